"""Which weights are held as codes: as a file has them, or made from floats by rules."""

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import ml_dtypes
import numpy as np

from gemlax.calibration import Importance, measure, own_text, random_rows, rows_of
from gemlax.checkpoints import Checkpoint
from gemlax.config import GemmaConfig, TextConfig
from gemlax.errors import RequestError
from gemlax.formats import GROUP, MADE, Coded, Format, encode
from gemlax.names import text_weights
from gemlax.tokenizer import Tokenizer
from gemlax.weights import Codes, Fill

__all__ = [
    "Rules",
    "Texts",
    "check_rules",
    "codes_by_rules",
    "codes_of",
    "formats_by_rules",
    "importance_by_rules",
]

# A format for every matrix except routers, which int4 is not of the table that is also the head (it
# gets int8); or a format, or "dense", by pattern of canonical names (`fnmatch`; the first that fits
# counts, what none fits is dense): {"*.mlp.*": "int4"}.
Rules = Literal["stored", "dense", "int8", "int4", "nf4"] | Mapping[str, str]

# Texts like those that the model is for.
Texts = str | Sequence[str]

_log = logging.getLogger(__name__)
# A router's choice flips on a tie, and it is small.
_ROUTERS = "*.router.*"
# Every token passes it twice.
_TABLE = "embed_tokens.weight"


def check_rules(rules: Rules | None) -> None:
    """Check that rules name formats that can be made."""
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
    """Return the format that rules give a weight; None: dense."""
    if not isinstance(rules, Mapping):
        table = "int8" if rules == "int4" else rules
        rules = {_ROUTERS: "dense", _TABLE: table, "*": rules}
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


def formats_by_rules(rules: Rules, config: TextConfig) -> dict[str, Format]:
    """Return the format of every matrix that rules quantise, by canonical name."""
    check_rules(rules)
    if rules == "dense":
        return {}
    shapes = text_weights(config)
    found = {name: _format_of(rules, name, shape) for name, shape in shapes.items()}
    return {name: format for name, format in found.items() if format is not None}


def importance_by_rules(
    rules: Rules,
    config: GemmaConfig,
    read: Fill,
    tokenizer: Tokenizer | None = None,
    texts: Texts | None = None,
) -> Importance:
    """Measure what the inputs of matrices weigh, where rules make int4; empty: they do not.

    Args:
        read: writes a weight of a canonical name into a float32 array.
        texts: None: a page of ours; without a tokenizer, tokens by chance.

    Raises:
        RequestError: texts that nothing asks for, that hold no token, or without a tokenizer.
    """
    if "int4" not in formats_by_rules(rules, config.text).values():
        if texts is not None:
            raise RequestError("a calibration text is for int4, which these rules do not make")
        return {}
    if tokenizer is None:
        if texts is None:
            return measure(config.text, read, random_rows(config))
        raise RequestError("a calibration text needs a tokenizer, which the model does not have")
    texts = own_text() if texts is None else texts
    ids = [tokenizer.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
    rows = rows_of(ids, config)
    if not rows.size:
        raise RequestError("the calibration text is empty; some thousand tokens serve best")
    return measure(config.text, read, rows)


def codes_by_rules(
    config: TextConfig, read: Fill, rules: Rules, importance: Importance | None = None
) -> Codes | None:
    """Return what quantises matrices that `read` writes as float32; None: all are dense."""
    if rules == "dense":
        return None
    shapes = text_weights(config)

    def codes(name: str) -> Coded | None:
        format = _format_of(rules, name, shapes[name])
        if format is None:
            return None
        wide = np.empty(shapes[name], np.float32)
        read(name, wide)
        try:
            return Coded(format, *encode(wide, format, (importance or {}).get(name)))
        except ValueError as error:
            raise RequestError(f"{name} cannot be quantised: {error}") from error

    return codes


def codes_of(source: Checkpoint, rules: Rules, texts: Texts | None = None) -> Codes | None:
    """Return what gives the matrices of a checkpoint as codes; None: all are dense.

    What a file quantises in a type that no kernel reads is rounded to bfloat16; floats stay.

    Args:
        texts: for `importance_by_rules`.
    """
    if rules != "stored":
        config, read = source.config, source.read
        importance = importance_by_rules(rules, config, read, source.tokenizer(), texts)
        return codes_by_rules(config.text, read, rules, importance)
    if texts is not None:
        raise RequestError("a calibration text is for int4; 'stored' takes codes as they are")
    shapes = text_weights(source.config.text)
    coded = [name for name, shape in shapes.items() if len(shape) > 1 and not source.is_float(name)]
    stored = {name: source.stored(name) for name in coded}
    others = [name for name, held in stored.items() if held is None]
    if not stored:
        return None
    if others:
        _log.info("%s: %d matrices are held as bfloat16: %s", source.source, len(others),
                  "no kernel reads their type")  # fmt: skip

    def codes(name: str) -> Coded | None:
        held = stored.get(name)
        if held is not None or name not in stored:
            return held
        wide = np.empty(shapes[name], ml_dtypes.bfloat16)
        source.read(name, wide)
        return Coded("bfloat16", wide.view(np.uint16))

    return codes
