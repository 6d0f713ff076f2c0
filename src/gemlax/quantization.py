"""Which weights are held as codes: as a file has them, or made from floats by rules."""

import fnmatch
import logging
from collections.abc import Callable, Mapping
from typing import Literal, cast

import ml_dtypes
import numpy as np

from gemlax.checkpoints import Checkpoint, text_weights
from gemlax.errors import RequestError
from gemlax.formats import GROUP, MADE, Format, encode
from gemlax.weights import Coded, Codes

__all__ = ["Rules", "check_rules", "codes_of"]

# A format for every matrix but routers; or a format, or "dense", by pattern of canonical names
# (`fnmatch`; the first that fits counts, what none fits is dense): {"*.mlp.*": "int4"}.
Rules = Literal["stored", "dense", "int8", "int4", "nf4"] | Mapping[str, str]

_log = logging.getLogger(__name__)
# A router's choice flips on a tie, and it is small.
_ROUTERS = "*.router.*"


def check_rules(rules: Rules | None) -> None:
    """Check that rules name formats that can be made.

    Raises:
        RequestError: they do not.
    """
    if rules is None or rules in ("stored", "dense"):
        return
    formats = list(rules.values()) if isinstance(rules, Mapping) else [rules]
    for format in formats:
        if format not in MADE and (format != "dense" or not isinstance(rules, Mapping)):
            raise RequestError(
                f"a weight can be quantised to {', '.join(MADE)}, got {format!r}; quantize takes "
                "one of them, 'stored', 'dense', or rules by pattern of names"
            )


def _format_of(rules: Rules, name: str, shape: tuple[int, ...]) -> Format | None:
    """Return the format that rules give a weight; None: dense.

    Raises:
        RequestError: rows of such a width are no groups.
    """
    if not isinstance(rules, Mapping):
        rules = {_ROUTERS: "dense", "*": rules}
    matching = (format for pattern, format in rules.items() if fnmatch.fnmatch(name, pattern))
    format = next(matching, "dense")
    if format == "dense" or len(shape) < 2:
        return None
    if shape[-1] % GROUP:
        raise RequestError(
            f"{name} has rows of {shape[-1]} weights, no multiple of {GROUP}: leave it dense, with "
            f"rules such as {{{name!r}: 'dense', '*': {format!r}}}"
        )
    return cast(Format, format)


def _quantised(
    rules: Rules, name: str, shape: tuple[int, ...], read: Callable[[np.ndarray], None]
) -> Coded | None:
    """Quantise a weight that `read` writes, as rules say; None: it stays dense."""
    format = _format_of(rules, name, shape)
    if format is None:
        return None
    wide = np.empty(shape, np.float32)
    read(wide)
    try:
        return Coded(format, *encode(wide, format))
    except ValueError as error:
        raise RequestError(f"{name} cannot be quantised: {error}") from error


def codes_of(source: Checkpoint, rules: Rules) -> Codes | None:
    """Return what gives the matrices of a checkpoint as codes; None: all are dense."""
    if rules == "dense":
        return None
    shapes = text_weights(source.config.text)
    if rules != "stored":
        return lambda name: _quantised(
            rules, name, shapes[name], lambda out: source.read(name, out)
        )
    stored = {name: source.stored(name) for name, shape in shapes.items() if len(shape) > 1}
    others = [name for name, held in stored.items() if held is None]
    if len(others) == len(stored):
        return None
    if others:
        _log.info("%s: %d matrices are held as bfloat16: %s", source.source, len(others),
                  "no kernel reads their type")  # fmt: skip

    def codes(name: str) -> Coded:
        held = stored[name]
        if held is not None:
            return Coded(*held)
        wide = np.empty(shapes[name], ml_dtypes.bfloat16)
        source.read(name, wide)
        return Coded("bfloat16", wide.view(np.uint16))

    return codes
