"""The settings of training: each field is the one statement of its default, range and help.

The checks here, the options of `gemlax tune` and the table in docs/tune.md are made of the fields.
"""

import dataclasses
import math
from typing import Any

from gemlax.errors import RequestError

__all__ = ["TuneSettings"]


def _setting(default: Any, help: str, *, kind: type = int, **more: Any) -> Any:
    """Declare a field.

    Args:
        more: the range, as `low` or (exclusive) `above`; `unset`, what None means; `option` of the
            command line, if it is not the name, or None where there is none.
    """
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, **more})


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """What to train, and how. The help of each field says what it does."""

    rules: Any = dataclasses.field(default=None, metadata={
        "help": "what to adapt, as for `adapters.attach`", "kind": object, "option": None,
        "unset": "the adapter that the model has, or rank 8 for every projection",
    })  # fmt: skip
    full: bool = _setting(False, "train all weights, not an adapter", kind=bool)
    beta: float | None = _setting(
        None, "strength of preference learning (DPO)", kind=float, above=0, option=None,
        unset="cross-entropy",
    )  # fmt: skip
    steps: int | None = _setting(
        None,
        "number of steps, whatever the size of the data",
        low=1,
        unset="as many as epochs take",
    )
    epochs: int = _setting(1, "passes through the data", low=1)
    batch_size: int = _setting(4, "rows per step", low=1)
    accumulate: int = _setting(1, "split each batch into N micro-batches, to save memory", low=1)
    max_length: int = _setting(512, "tokens per row; a longer example is an error", low=2)
    truncate: bool = _setting(False, "cut an example that is too long", kind=bool)
    pack: bool = _setting(True, "put several examples into a row", kind=bool, option="--no-packing")
    parse_special: bool = _setting(
        True, "read markers such as <end_of_turn> in texts as control tokens", kind=bool
    )
    learning_rate: float | None = _setting(
        None, "peak learning rate", kind=float, above=0,
        unset="2e-4; 2e-5 for all weights; 5e-5 for preferences",
    )  # fmt: skip
    warmup: float = _setting(
        0.05, "part of the steps in which the learning rate rises", kind=float, low=0, option=None
    )
    floor: float = _setting(
        0.1, "part of its peak that the learning rate falls to", kind=float, low=0, option=None
    )
    weight_decay: float = _setting(0.0, "decoupled weight decay of AdamW", kind=float, low=0)
    clip: float | None = _setting(
        1.0, "scale the gradients of a step down to this norm", kind=float, above=0, unset="never"
    )
    remat: bool = _setting(
        True, "recompute layers in the backward pass; recomputing saves memory and takes time",
        kind=bool,
    )  # fmt: skip
    save_every: int | None = _setting(
        None, "steps between checkpoints, and between evaluations", low=1, unset="only at the end"
    )
    seed: int = _setting(0, "seed of the adapter, the order of examples and dropout", low=0)

    def __post_init__(self) -> None:
        given = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            _check(field.name, given[field.name], **field.metadata)
        if self.batch_size % self.accumulate:
            raise RequestError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}"
            )
        if self.full and (self.rules is not None or self.beta is not None):
            raise RequestError("full trains all weights: it takes neither rules nor preferences")

    @property
    def peak_rate(self) -> float:
        """The learning rate at its peak.

        By custom, not by measurement: all weights take a tenth of what an adapter does, and
        preferences, whose gradients are small at the start, a quarter.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.full else 2e-4 if self.beta is None else 5e-5


def _check(
    name: str, value: Any, *, kind: type, low: float = -math.inf, above: float = -math.inf,
    **more: Any,
) -> None:  # fmt: skip
    if kind is object or (value is None and "unset" in more):
        return
    if kind is bool:
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        fits = fits and value >= low and above < value < math.inf
        wanted = f"above {above}" if low == -math.inf else f"at least {low}"
    if not fits:
        raise RequestError(f"{name} must be {wanted}, got {value!r}")
