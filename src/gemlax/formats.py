"""The forms in which a weight is held as codes: how they decode, and how our own are made.

int8, int4 and nf4 hold 16 bits per group of 32 weights along a row: int8 and nf4, which are
symmetric, a scale in bfloat16, int4 a scale and a zero point (int4.py).
The types of GGUF are held byte for byte as in the file: `q4_k` and so on. NumPy arrays are decoded
by NumPy and JAX arrays by JAX, from one definition.
Sources: github.com/ggml-org/ggml, ggml-quants.c; arXiv 2305.14314, appendix E (nf4).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemlax import int4

__all__ = [
    "FORMATS",
    "GROUP",
    "MADE",
    "Coded",
    "Form",
    "Format",
    "check",
    "decode",
    "encode",
]

Format = Literal[
    "float32", "bfloat16", "int8", "int4", "nf4", "q8_0", "q4_0", "q5_0", "q4_k", "q6_k"
]
# Weights per scale in the formats that are made here.
GROUP = 32
# The formats that `encode` makes.
MADE: tuple[Format, ...] = ("int8", "int4", "nf4")
# Groups that `encode` works on at a time: half a megabyte of weights, so that its scratch arrays
# stay in cache (docs/log.md).
_STEP = 2**12

# The 16 levels of nf4: quantiles of the normal distribution, scaled to [-1, 1].
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


class Form(NamedTuple):
    """One format: weights and code elements per block, the dtype of codes, and of scales."""

    block: int
    elements: int
    dtype: Any
    scales: Any = None


class Coded(NamedTuple):
    """One weight as codes [..., out, elements], with scales where the format has them.

    Scales [..., out, blocks] are uint16: bits of bfloat16, or the entries of int4.
    """

    format: Format
    codes: np.ndarray
    scales: np.ndarray | None = None


FORMATS: dict[Format, Form] = {
    "float32": Form(1, 1, np.float32),
    "bfloat16": Form(1, 1, np.uint16),
    "int8": Form(GROUP, GROUP, np.int8, ml_dtypes.bfloat16),
    "int4": Form(GROUP, GROUP // 2, np.uint8, np.uint16),
    "nf4": Form(GROUP, GROUP // 2, np.uint8, ml_dtypes.bfloat16),
    "q8_0": Form(32, 34, np.uint8),
    "q4_0": Form(32, 18, np.uint8),
    "q5_0": Form(32, 22, np.uint8),
    "q4_k": Form(256, 144, np.uint8),
    "q6_k": Form(256, 210, np.uint8),
}


def check(format: Format, codes: tuple[int, ...], scales: tuple[int, ...] | None) -> int:
    """Return the width of a row of weights, given the shapes of codes and scales.

    Raises:
        ValueError: they do not fit the format or one another.
    """
    form = FORMATS[format]
    if codes[-1] % form.elements:
        raise ValueError(
            f"{format} rows are blocks of {form.elements} codes, got codes {list(codes)}"
        )
    blocks = codes[-1] // form.elements
    expected = None if form.scales is None else (*codes[:-1], blocks)
    if scales != expected:
        raise ValueError(
            f"{format} codes {list(codes)} need scales "
            f"{'of ' + str(list(expected)) if expected else 'None'}, "
            f"got {scales if scales is None else list(scales)}"
        )
    return blocks * form.block


def decode(codes: Any, scales: Any, format: Format) -> Any:
    """Return the weights [..., width]: float32, and bfloat16 where that is the format."""
    if format == "float32":
        return codes
    if format == "bfloat16":
        return codes.view(ml_dtypes.bfloat16)
    blocks = codes.reshape(*codes.shape[:-1], -1, FORMATS[format].elements)
    if format == "int4":
        weights = _int4(blocks, scales[..., None])
        return weights.reshape(*codes.shape[:-1], -1)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = _DECODERS[format](blocks)
    if scales is not None:
        weights = weights * scales.view(ml_dtypes.bfloat16).astype(np.float32)[..., None]
    return weights.reshape(*codes.shape[:-1], -1)


def _of(block: Any) -> Any:
    """Return the module whose functions take this array."""
    return jnp if isinstance(block, jax.Array) else np


def _halves(codes: Any) -> Any:
    """Return the low halves of bytes [..., n], then the high ones: [..., 2 n] in [0, 15]."""
    return _of(codes).concatenate([codes & 15, codes >> 4], axis=-1)


def _float16(block: Any, at: int) -> Any:
    """Return the float16 at byte `at` of each block, [..., 1] as float32."""
    return block[..., at : at + 2].view(np.float16).astype(np.float32)


def _int4(block: Any, entries: Any) -> Any:
    codes = _halves(block).astype(np.float32)
    return (codes - int4.zeros_of(entries)) * int4.scales_of(entries)


def _nf4(block: Any) -> Any:
    return _of(block).asarray(NF4)[_halves(block)]


def _q8_0(block: Any) -> Any:
    codes = block[..., 2:].view(np.int8)
    return _float16(block, 0) * codes.astype(np.float32)


def _q4_0(block: Any) -> Any:
    return _float16(block, 0) * (_halves(block[..., 2:]).astype(np.float32) - 8)


def _q5_0(block: Any) -> Any:
    bits = _of(block).stack([block[..., 2:6] >> i & 1 for i in range(8)], axis=-1)
    fifth = bits.reshape(*block.shape[:-1], 32)
    codes = _halves(block[..., 6:]) | (fifth << 4)
    return _float16(block, 0) * (codes.astype(np.float32) - 16)


def _q4_k(block: Any) -> Any:
    a, b, c = block[..., 4:8], block[..., 8:12], block[..., 12:16]
    scales = _of(block).concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)  # [..., 8]
    minima = _of(block).concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    pairs = block[..., 16:].reshape(*block.shape[:-1], 4, 32)
    codes = _of(block).stack([pairs & 15, pairs >> 4], axis=-2).reshape(*block.shape[:-1], 8, 32)
    steps = (_float16(block, 0) * scales.astype(np.float32))[..., None]
    lowest = (_float16(block, 2) * minima.astype(np.float32))[..., None]
    return (steps * codes.astype(np.float32) - lowest).reshape(*block.shape[:-1], 256)


def _q6_k(block: Any) -> Any:
    low = block[..., :128].reshape(*block.shape[:-1], 2, 1, 64)
    low = _halves(low).reshape(*block.shape[:-1], 2, 4, 32)
    high = block[..., 128:192].reshape(*block.shape[:-1], 2, 32)
    high = _of(block).stack([high >> i & 3 for i in (0, 2, 4, 6)], axis=-2)
    codes = (low | (high << 4)).astype(np.float32).reshape(*block.shape[:-1], 16, 16) - 32
    scales = block[..., 192:208].view(np.int8).astype(np.float32)
    steps = (_float16(block, 208) * scales)[..., None]
    return (steps * codes).reshape(*block.shape[:-1], 256)


_DECODERS: dict[Format, Callable[[Any], Any]] = {
    "int8": lambda block: block.astype(np.float32),
    "nf4": _nf4,
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q5_0": _q5_0,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}


def encode(
    weights: np.ndarray, format: Format, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows of float32 weights [..., width] to (codes, scales).

    Args:
        importance: of an error in each column, [width]; int4 alone asks for it.

    Raises:
        ValueError: `format` is not one of `MADE`, the width no multiple of 32, or a value is not
            finite or too large for the format.
    """
    if format not in MADE:
        raise ValueError(f"format must be one of {', '.join(MADE)}, got {format!r}")
    width = weights.shape[-1]
    if width % GROUP:
        raise ValueError(f"rows of {width} weights are no groups of {GROUP}")
    form, each = FORMATS[format], width // GROUP
    groups = np.ascontiguousarray(weights, np.float32).reshape(-1, GROUP)
    if format == "int4":
        _check_range(groups)
    codes = np.empty((len(groups), form.elements), form.dtype)
    scales = np.empty(len(groups), np.uint16)
    step = max(1, _STEP // each) * each  # whole rows

    def work(start: int) -> None:
        part = slice(start, start + step)
        if not np.isfinite(groups[part]).all():
            raise ValueError("weights to be quantised must be finite")
        if format == "int4":
            codes[part], scales[part] = _to_int4(groups[part], importance)
        else:
            codes[part], own = _ENCODERS[format](groups[part])
            scales[part] = own.view(np.uint16)

    # NumPy lets other threads run while it computes.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(work, range(0, len(groups), step)))
    lead = weights.shape[:-1]
    return codes.reshape(*lead, -1), scales.reshape(*lead, -1)


def _check_range(groups: np.ndarray) -> None:
    largest = max(groups.max(initial=0), -groups.min(initial=0))
    if largest != 0 and not int4.SMALLEST <= largest <= int4.LARGEST and np.isfinite(largest):
        raise ValueError(
            f"int4 is for matrices whose largest weight is {int4.SMALLEST:.5f} to {int4.LARGEST} "
            f"in magnitude, got {largest:.3g}: hold it in int8"
        )


def _scale(groups: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bfloat16 scales [n] for `most` steps, and the groups in units of them."""
    scales = most.astype(ml_dtypes.bfloat16)
    held = scales.astype(np.float32)
    return scales, groups / np.where(held == 0, np.float32(1), held)[:, None]


def _to_int8(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, units = _scale(groups, np.abs(groups).max(axis=1) / 127)
    return np.clip(np.rint(units), -127, 127).astype(np.int8), scales


def _to_int4(groups: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    columns = np.ascontiguousarray(groups.T)
    if importance is not None:
        own = np.asarray(importance, np.float32).reshape(-1, GROUP).T
        importance = np.tile(own, len(groups) // own.shape[1])
    entries = int4.fit(columns, importance)
    codes = int4.codes_of(columns, int4.scales_of(entries), int4.zeros_of(entries))
    return _pack(np.ascontiguousarray(codes.astype(np.uint8).T)), entries


def _to_nf4(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, units = _scale(groups, np.abs(groups).max(axis=1))
    borders = (NF4[1:] + NF4[:-1]) / 2
    return _pack(np.searchsorted(borders, units).astype(np.uint8)), scales


def _pack(halves: np.ndarray) -> np.ndarray:
    """Put weight i + 16 of a group above weight i in one byte: [n, 32] to [n, 16]."""
    return halves[:, : GROUP // 2] | (halves[:, GROUP // 2 :] << 4)


_ENCODERS = {"int8": _to_int8, "nf4": _to_nf4}
