"""Which projections an adapter changes: rules by pattern of canonical names.

A rule gives rank, alpha and dropout. What rules come to for one config is an `Adapter`, the record
that a decoder carries and that is written beside the weights of an adapter.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Iterator, Mapping

from gemlax.config import TextConfig
from gemlax.errors import RequestError, UnsupportedError
from gemlax.names import adaptable, text_weights

__all__ = ["Adapter", "Base", "Module", "Rule", "Rules", "adaptable_modules", "resolve"]

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rule:
    """What an adapter is like where a pattern fits.

    Attributes:
        rank: of the update to a matrix.
        alpha: the update is times alpha / rank; None: alpha is the rank.
        dropout: the part of the inputs that is left out in training, see `dropout`.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RequestError(f"the rank of an adapter must be at least 1, got {self.rank!r}")
        if self.alpha is not None and not 0 < float(self.alpha) < float("inf"):
            raise RequestError(f"alpha must be a positive number or None, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise RequestError(f"dropout must be in [0, 1), got {self.dropout!r}")


# A rule or a rank for every projection of attention and MLP; or one by pattern of canonical names
# (`fnmatch`; ".weight" may be left out; the first that fits counts): {"*.q_proj": Rule(rank=4)}.
Rules = Rule | int | Mapping[str, Rule | int]


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint that a decoder was loaded from, as adapters of it name it.

    Attributes:
        name: a path or a hub name; None: it is not known.
        multimodal: it has encoders, too, so that the decoder's modules lie one level deeper.
    """

    name: str | None = None
    multimodal: bool = False


@dataclasses.dataclass(frozen=True)
class Module:
    """One projection that an adapter changes; `name` is canonical, without ".weight"."""

    name: str
    rank: int
    alpha: float
    dropout: float
    shape: tuple[int, int]  # of the weight, [out, in]

    @property
    def parameters(self) -> int:
        """How many numbers the update has."""
        return self.rank * sum(self.shape)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter changes: every module, in layer order.

    `rslora` divides alpha by the root of the rank (arXiv 2312.03732).
    """

    modules: tuple[Module, ...]
    rslora: bool = False

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    @property
    def parameters(self) -> int:
        """How many numbers can be trained."""
        return sum(module.parameters for module in self.modules)

    def scale(self, module: Module) -> float:
        """Return what the product of B and A is multiplied with."""
        return module.alpha / (module.rank**0.5 if self.rslora else module.rank)

    def __str__(self) -> str:
        lines = [
            f"{module.name} {list(module.shape)} rank {module.rank} {module.parameters:,}"
            for module in self.modules
        ]
        return "\n".join([*lines, f"{len(lines)} modules, {self.parameters:,} parameters"])


def resolve(rules: Rules, config: TextConfig, *, rslora: bool = False) -> Adapter:
    """Return what `rules` come to for a config."""
    shapes = text_weights(config)
    if isinstance(rules, Mapping):
        by_name = _match({pattern: _rule(rule) for pattern, rule in rules.items()}, config)
    else:
        usual = [name for name, is_usual in adaptable(config).items() if is_usual]
        by_name = dict.fromkeys(usual, _rule(rules))
    modules = []
    for name, shape in shapes.items():
        if rule := by_name.get(name):
            alpha = float(rule.rank if rule.alpha is None else rule.alpha)
            size = (shape[0], shape[1])
            module = name.removesuffix(".weight")
            modules.append(Module(module, rule.rank, alpha, float(rule.dropout), size))
    return Adapter(tuple(modules), rslora)


@functools.cache
def adaptable_modules(config: TextConfig) -> tuple[str, ...]:
    """Return the modules that may have an adapter, in layer order."""
    return tuple(name.removesuffix(".weight") for name in adaptable(config))


def _rule(rule: object) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, int):
        return Rule(rule)
    raise RequestError(f"a rule must be a rank or a Rule, got {rule!r}")


def _match(by_pattern: dict[str, Rule], config: TextConfig) -> dict[str, Rule]:
    """Return the rule of each name that one fits; the first counts."""
    if not by_pattern:
        raise RequestError("no rules: give a rank, a Rule, or one by pattern of names")
    able = list(adaptable(config))
    by_name: dict[str, Rule] = {}
    for pattern, rule in by_pattern.items():
        fits = [name for name in able if _fits(name, pattern)]
        new = [name for name in fits if name not in by_name]
        if not new:
            _refuse(pattern, fits, [n for n in text_weights(config) if _fits(n, pattern)])
        by_name |= dict.fromkeys(new, rule)
    return by_name


def _fits(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.removesuffix(".weight")))


def _refuse(pattern: str, able: list[str], others: list[str]) -> None:
    if able:
        raise RequestError(
            f"the rule {pattern!r} has no effect: rules before it fit all that it fits, such as "
            f"{able[0]}; put it before them, or leave it out"
        )
    if not others:
        raise RequestError(
            f"the rule {pattern!r} fits no weight; names are such as "
            "layers.0.self_attn.q_proj.weight, and a layer has only what it owns"
        )
    shown = ", ".join(others[:_SHOWN])
    what = "experts" if any(".experts." in name for name in others) else "such weights"
    raise UnsupportedError(
        f"the rule {pattern!r} fits only {shown}: adapters of {what} are not supported, those of "
        "the projections of attention and MLP are"
    )
