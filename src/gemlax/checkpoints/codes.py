"""Matrices as codes in a safetensors folder: what config.json says of them, and their tensors.

`quantization_config` holds the method, its version, and the format of each such matrix by
canonical name. The codes of a matrix lie as `<name>.codes` and, where its format has scales, those
as `<name>.scales`, in bfloat16 or as the 16 bits of int4; a matrix that is held as bfloat16 lies
plainly. Nothing else reads this layout.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gemlax.checkpoints.base import BFLOAT16, Piece, show
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import FORMATS, Coded, Format

__all__ = [
    "CODES",
    "KEY",
    "SCALES",
    "Formats",
    "check_formats",
    "count_bytes",
    "flatten",
    "pieces",
    "read_formats",
    "write_formats",
]

# Format by canonical name of those matrices that are codes.
Formats = Mapping[str, Format]

KEY = "quantization_config"
# Another layout, or another meaning of a format's codes, is another version.
METHOD, VERSION = "gemlax", 2
CODES, SCALES = ".codes", ".scales"
_DTYPES = {
    np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.uint16): "U16", BFLOAT16: "BF16",
}  # fmt: skip
_KNOWN = [format for format in FORMATS if format != "float32"]
_SHOWN = 5
# Where mlx-lm says its own, beside a copy under `KEY`.
_MLX = "quantization"


def read_formats(config: Mapping[str, Any], source: Path) -> dict[str, Format]:
    """Return what a config.json says of codes; empty: all weights are floats."""
    said = config.get(KEY) or config.get(_MLX)
    if not said:  # null or empty: nothing is quantised
        return {}
    if not isinstance(said, Mapping) or said.get("quant_method") != METHOD:
        method = said.get("quant_method") if isinstance(said, Mapping) else said
        method = "mlx" if not method and said.keys() >= {"group_size", "bits"} else method
        raise UnsupportedError(
            f"{source}: the weights are quantised by {show(repr(method))}, which gemlax does not "
            "read; it reads what `gemlax quantize` wrote, GGUF files, and folders of floats"
        )
    if said.get("version") != VERSION:
        raise UnsupportedError(
            f"{source}: {KEY} has version {show(repr(said.get('version')))}; this gemlax reads "
            f"version {VERSION}"
        )
    formats = said.get("formats")
    if said.keys() != {"quant_method", "version", "formats"} or not isinstance(formats, Mapping):
        raise CheckpointError(
            f"{source}: {KEY} must have quant_method, version and formats (an object), got "
            f"{show(', '.join(map(str, said)))}"
        )
    unknown = [f"{show(n)} ({show(repr(f))})" for n, f in formats.items() if not _is_format(f)]
    if unknown or not formats:
        raise UnsupportedError(
            f"{source}: {KEY} names formats that are not known: "
            f"{', '.join(unknown[:_SHOWN]) or 'none at all'}; expected {', '.join(_KNOWN)}"
        )
    return cast(dict[str, Format], dict(formats))


def _is_format(value: object) -> bool:
    return isinstance(value, str) and value in _KNOWN


def write_formats(own: Formats) -> dict[str, Any]:
    """Return what `read_formats` reads, as part of a config.json; nothing where all is floats."""
    if not own:
        return {}
    return {KEY: {"quant_method": METHOD, "version": VERSION, "formats": dict(own)}}


def check_formats(own: Formats, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Check that formats are those of matrices whose rows are whole blocks."""
    for name, format in own.items():
        shape, block = shapes.get(name, ()), FORMATS[format].block
        if len(shape) < 2 or shape[-1] % block:
            what = f"its shape is {list(shape)}" if shape else "there is no such weight"
            raise CheckpointError(
                f"{source}: {KEY} says that {show(name)} is {format}, which is for matrices with "
                f"rows of whole blocks of {block}; {what}"
            )


def pieces(name: str, shape: tuple[int, ...], format: Format | None) -> list[Piece]:
    """Return the tensors that a weight lies in."""
    if format is None or format == "bfloat16":
        return [Piece(name, shape, None if format is None else "BF16")]
    form = FORMATS[format]
    blocks = shape[-1] // form.block
    codes = (*shape[:-1], blocks * form.elements)
    parts = [Piece(name + CODES, codes, _DTYPES[np.dtype(form.dtype)])]
    if form.scales is not None:
        scales = _DTYPES[np.dtype(form.scales)]
        parts.append(Piece(name + SCALES, (*shape[:-1], blocks), scales))
    return parts


def count_bytes(shape: tuple[int, ...], format: Format) -> int:
    """Return the bytes that a matrix takes as codes."""
    sizes = {"I8": 1, "U8": 1, "U16": 2, "BF16": 2}
    return sum(math.prod(p.shape) * sizes[str(p.type)] for p in pieces("", shape, format))


def flatten(
    weights: Iterable[tuple[str, np.ndarray | Coded]], own: Formats
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of each weight; what is yielded is not kept."""
    for name, weight in weights:
        if not isinstance(weight, Coded):
            yield name, weight
        elif weight.format != own.get(name):
            raise CheckpointError(
                f"cannot save {name!r}: it comes as {weight.format}, expected {own.get(name)}"
            )
        elif weight.format == "bfloat16":
            yield name, weight.codes.view(BFLOAT16)
        else:
            yield name + CODES, weight.codes
            if weight.scales is not None:
                yield name + SCALES, weight.scales.view(FORMATS[weight.format].scales)
        del weight  # before the next one is made
