"""How int4 is made: 4-bit codes, and a scale and a zero point for each group of 32 weights.

weight = scale * (code - zero). An entry of 16 bits holds both: its lower 9 bits are bits 5 to 13 of
a float16, its upper 7 the zero point in eighths.
Source of the search: github.com/ggml-org/ggml, ggml-quants.c, make_qkx2_quants.
"""

from typing import Any

import numpy as np

__all__ = ["LARGEST", "SMALLEST", "codes_of", "scales_of", "zeros_of", "fit"]

_MOST = 15  # the largest code
_SCALE_BITS, _SCALE_SHIFT = 9, 5
_LARGEST_SCALE = 1.96875
# The largest weight of a matrix lies between these. No larger one has an entry; where all are
# smaller, scales are too coarse: they are multiples of 2^-19.
SMALLEST, LARGEST = 2.0**-12, _MOST * _LARGEST_SCALE
# Where the search begins: the shares of a group's span that are cut off below and above.
_CUTS = ((0.0, 0.0), (0.05, 0.05), (0.1, 0.1), (0.0, 0.1), (0.1, 0.0))
_PASSES = 3
# Added to each, as a share of the group's mean: other texts differ from the one that was measured.
_LEAST_IMPORTANCE = 0.1


def scales_of(entries: Any) -> Any:
    """Return the scales, as float32; of NumPy or of JAX, as the entries are."""
    bits = (entries & (2**_SCALE_BITS - 1)) << _SCALE_SHIFT
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def zeros_of(entries: Any) -> Any:
    """Return the zero points, as float32."""
    return (entries >> _SCALE_BITS).astype(np.float32) * np.float32(0.125)


def fit(x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Return the entries [n] that make groups [32, n] with the least squared error found.

    Each start is improved by weighted least squares over scale and minimum, then rounded.

    Args:
        importance: of the error of each weight of a group, [32, n] or [32, 1].
    """
    weights = np.ones((len(x), 1), np.float32)
    if importance is not None:
        weights = importance / np.maximum(importance.mean(axis=0), np.float32(1e-30))
        weights = weights + np.float32(_LEAST_IMPORTANCE)
    low = np.minimum(x.min(axis=0), 0)
    span = np.maximum(np.maximum(x.max(axis=0), 0) - low, np.float32(1e-30))
    best = np.full(x.shape[1], np.inf, np.float32)
    entries = np.zeros(x.shape[1], np.uint16)
    for below, above in _CUTS:
        scale, least = (
            span * np.float32((1 - below - above) / _MOST),
            low + np.float32(below) * span,
        )
        for _ in range(_PASSES):
            scale, least = _improve(x, weights, scale, least)
        candidates = _pack(x, weights, scale, least)
        scale, zero = scales_of(candidates), zeros_of(candidates)
        error = (codes_of(x, scale, zero) - zero) * scale
        error -= x
        error *= error
        error *= weights
        own = error.sum(axis=0)
        better = own < best
        best = np.where(better, own, best)
        entries = np.where(better, candidates, entries)
    return entries


def codes_of(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Return the nearest codes, as float32."""
    codes = x * (1 / np.where(scale > 0, scale, np.float32(1)))
    codes += zero
    np.rint(codes, out=codes)
    return np.clip(codes, 0, _MOST, out=codes)


def _improve(
    x: np.ndarray, weights: np.ndarray, scale: np.ndarray, least: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and minimum that suit best the codes which the given ones make."""
    codes = codes_of(x, scale, -least / scale)
    weighted = codes * weights
    total, sum_x = weights.sum(axis=0), (x * weights).sum(axis=0)
    sum_q = weighted.sum(axis=0)
    sum_qx, sum_qq = (weighted * x).sum(axis=0), (weighted * codes).sum(axis=0)
    spread = total * sum_qq - sum_q * sum_q
    sound = spread > 0
    spread = np.where(sound, spread, np.float32(1))
    new = (total * sum_qx - sum_q * sum_x) / spread
    sound &= new > 0
    found = (sum_qq * sum_x - sum_q * sum_qx) / spread
    return np.where(sound, new, scale), np.where(sound, found, least)


def _pack(x: np.ndarray, weights: np.ndarray, scale: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Return entries: the zero point rounded, then the scale that suits it best."""
    zero = np.clip(np.rint(least / scale * np.float32(-8)), 0, 127)
    units = codes_of(x, scale, zero * np.float32(0.125)) - zero * np.float32(0.125)
    weighted = units * weights
    square = (weighted * units).sum(axis=0)
    better = (weighted * x).sum(axis=0) / np.where(square > 0, square, np.float32(1))
    scale = np.clip(np.where(better > 0, better, scale), 0, np.float32(_LARGEST_SCALE))
    bits = scale.astype(np.float16).view(np.uint16).astype(np.uint32)
    bits = np.minimum((bits + 2 ** (_SCALE_SHIFT - 1)) >> _SCALE_SHIFT, 2**_SCALE_BITS - 1)
    return (bits | zero.astype(np.uint32) << _SCALE_BITS).astype(np.uint16)
