"""The settings of a request: one field for each, with its default, its range and its help.

Checks, the options of the command line and the documentation of `Model.generate` are made from
these fields.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gemlax.adapters import DEFAULT
from gemlax.engine import MAX_DRAFTS
from gemlax.errors import RequestError, check_int
from gemlax.grammar import ChatGrammar, Choice, Grammar, JsonObject, JsonSchema, Lark, Regex
from gemlax.sampling import TOP_LOGPROBS, check_number, check_seed

__all__ = ["SamplingSettings", "describe", "read_settings", "seeds"]

_Check = Callable[[str, Any], Any]
_GRAMMARS = (JsonSchema, JsonObject, Regex, Choice, Lark, ChatGrammar)


def _number(low: float, high: float, *, open_low: bool = False) -> _Check:
    return lambda name, value: check_number(name, value, low, high, open_low=open_low)


def _integer(low: int, meaning: str = "") -> _Check:
    return lambda name, value: check_int(name, value, low, meaning)


def _up_to(high: int, what: str) -> _Check:
    def check(name: str, value: Any) -> int:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 0 <= value <= high:
            raise RequestError(f"{name} must be None or in [0, {high}]{what}, got {value!r}")
        return int(value)

    return check


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if any(not isinstance(text, str) or not text for text in texts):
        raise RequestError(f"{name} must be non-empty strings, got {list(texts)!r}")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not np.iterable(value):
        raise RequestError(f"{name} must be a list of token ids, got {value!r}")
    return tuple(check_int(f"an id in {name}", id, 0) for id in value)


def _grammar(name: str, value: Any) -> Any:
    """Check a grammar, or a list with one or None for each prompt."""
    several = isinstance(value, (list, tuple))
    for one in value if several else [value]:
        if not isinstance(one, _GRAMMARS) and not (several and one is None):
            raise RequestError(
                f"{name} must be a JsonSchema, JsonObject, Regex, Choice or Lark of "
                f"gemlax.grammar, or a list of them, got {one!r}"
            )
    return value


def _seed(name: str, value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [check_seed(one) for one in value]
    return check_seed(value)


def _setting(
    default: Any, text: str, check: _Check | None = None, *, unset: str = "", metavar: str = ""
) -> Any:
    """Declare a field; `unset` says what None means, `metavar` stands for the option's value."""
    more = {"help": text, "check": check, "unset": unset, "metavar": metavar}
    return dataclasses.field(default=default, metadata=more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a prompt is continued. None: as the checkpoint's generation_config says.

    Without a generation_config the most likely token is taken (temperature 0), and all else is
    off. A value outside its range raises RequestError, which names it.
    """

    max_new_tokens: int | None = _setting(
        None, "generate at most N tokens", _integer(0), unset="the checkpoint's, else 256"
    )
    min_new_tokens: int | None = _setting(
        None, "generate no stop id before N tokens", _integer(0), unset="the checkpoint's, else 0"
    )
    context: int | None = _setting(
        None, "allow N tokens of prompt and answer together", _integer(1), unset="the model's limit"
    )
    temperature: float | None = _setting(
        None, "divide the logits by T; 0 takes the most likely token", _number(0, math.inf),
        unset="the checkpoint's, else 0", metavar="T",
    )  # fmt: skip
    top_k: int | None = _setting(
        None, "sample from the K most likely tokens; 0 turns it off",
        _integer(-1, "0 or -1 turns it off"), unset="the checkpoint's, else 0", metavar="K",
    )  # fmt: skip
    top_p: float | None = _setting(
        None, "sample from the most likely tokens whose probabilities reach P; 1 turns it off",
        _number(0, 1), unset="the checkpoint's, else 1", metavar="P",
    )  # fmt: skip
    min_p: float | None = _setting(
        None, "drop tokens less likely than P times the most likely one; 0 turns it off",
        _number(0, 1), unset="the checkpoint's, else 0", metavar="P",
    )  # fmt: skip
    repetition_penalty: float | None = _setting(
        None, "divide the logits of tokens of prompt and answer by X; 1 turns it off",
        _number(0, math.inf, open_low=True), unset="the checkpoint's, else 1",
    )  # fmt: skip
    presence_penalty: float = _setting(
        0.0, "subtract X from the logits of tokens of the answer", _number(-math.inf, math.inf)
    )
    frequency_penalty: float = _setting(
        0.0, "subtract X from a token's logit for each time that the answer has it",
        _number(-math.inf, math.inf),
    )  # fmt: skip
    no_repeat_ngram_size: int | None = _setting(
        None, "let no N tokens in a row occur twice, prompt included; 0 turns it off",
        _integer(0, "0 turns it off"), unset="the checkpoint's, else 0",
    )  # fmt: skip
    bad_words: Sequence[str | Sequence[int]] | None = _setting(
        None, "never generate these words, or lists of ids", unset="the checkpoint's"
    )
    logit_bias: Mapping[int, float] | None = _setting(
        None, "add to the logits of these ids; -inf forbids one", unset="nothing"
    )
    seed: int | Sequence[int] = _setting(
        0, "seed of the draws (of prompt r: N + r, or entry r of a list)", _seed
    )
    stop: str | Sequence[str] = _setting(
        (), "end the answer before this text; a control token ends it too", _texts, unset="none"
    )
    stop_ids: Sequence[int] = _setting(
        (), "end the answer at these ids, besides the checkpoint's", unset="none"
    )
    logprobs: int | None = _setting(
        None, "return each token's log-probability, and those of the N most likely tokens",
        _up_to(TOP_LOGPROBS, ""), unset="none are returned",
    )  # fmt: skip
    speculate: int | None = _setting(
        None, "draft up to N tokens from the text so far: the same answer, sooner if it repeats",
        _up_to(MAX_DRAFTS, " drafts"), unset="no drafts, with a grammar 3",
    )  # fmt: skip
    grammar: Grammar | Sequence[Grammar | None] | None = _setting(  # noqa: RUF009
        None, "what the answer must match, of gemlax.grammar, or a list with one for each prompt",
        _grammar, unset="anything",
    )  # fmt: skip
    allowed_ids: Sequence[int] | None = _setting(
        None, "generate these ids alone; one that ends the answer must be among them", _ids,
        unset="all",
    )  # fmt: skip
    thinking_budget: int | None = _setting(
        None, "end a thought after N tokens (Gemma 4)", _integer(0), unset="no bound"
    )
    parse_special: bool = _setting(
        False, "read markers in the text, such as <start_of_turn>, as control tokens"
    )
    adapter: str | Sequence[str | None] | None = _setting(
        DEFAULT, "name of a loaded adapter, or a list with one for each prompt; None: the base"
    )

    def __post_init__(self) -> None:
        given = dict(self.__dict__)  # `asdict` would take a grammar apart
        for field in dataclasses.fields(self):
            value, check = given[field.name], field.metadata["check"]
            if value is None and field.name != "adapter":
                value = field.default
            elif check is not None:
                value = check(field.name, value)
            object.__setattr__(self, field.name, value)


_NAMES = tuple(field.name for field in dataclasses.fields(SamplingSettings))


def read_settings(
    settings: SamplingSettings | None, changes: Mapping[str, Any]
) -> SamplingSettings:
    """Return settings with changes by name, checked.

    Raises:
        TypeError: a name that is not a setting.
        RequestError: a value outside its range.
    """
    unknown = sorted(changes.keys() - set(_NAMES))
    if unknown:
        raise TypeError(f"unknown settings {unknown}; expected some of {sorted(_NAMES)}")
    return dataclasses.replace(settings or SamplingSettings(), **changes)


def describe() -> str:
    """Return a line of documentation for each setting."""
    return "\n".join(
        f"    {field.name}: {field.metadata['help']} "
        f"(default: {field.metadata['unset'] or field.default})."
        for field in dataclasses.fields(SamplingSettings)
    )


def seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """Return the seed of each of `count` prompts; after the largest one comes 0."""
    if not isinstance(seed, Sequence):
        return [(seed + row) % 2**32 for row in range(count)]
    if len(seed) != count:
        raise RequestError(f"seed must be an integer or a list of {count}, got {seed!r}")
    return list(seed)
