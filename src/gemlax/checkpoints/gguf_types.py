"""The types of GGUF's tensors: which are read, how, and which stay as codes.

The arithmetic of the quantised types is `gguf.quants`'.
"""

import math
import mmap
from collections.abc import Callable

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemlax.checkpoints.base import BFLOAT16
from gemlax.checkpoints.gguf_header import Tensor
from gemlax.formats import Format

__all__ = ["FLOATS", "INTEGERS", "KEPT", "QUANTISED", "decoder", "has_finite_scales"]

T = GGMLQuantizationType
FLOATS = {
    T.F32: np.dtype(np.float32), T.F16: np.dtype(np.float16), T.BF16: BFLOAT16,
    T.F64: np.dtype(np.float64),
}  # fmt: skip
# All that gguf 0.19.0 decodes.
QUANTISED = {
    T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K,
    T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_NL, T.IQ4_XS,
    T.TQ1_0, T.TQ2_0, T.MXFP4, T.NVFP4,
}  # fmt: skip
# No weight of the decoder is one; others may lie beside them.
INTEGERS = {T.I8, T.I16, T.I32, T.I64}

# Types whose blocks `formats` decodes.
KEPT: dict[GGMLQuantizationType, Format] = {
    T.Q8_0: "q8_0", T.Q4_0: "q4_0", T.Q5_0: "q5_0", T.Q4_K: "q4_k", T.Q6_K: "q6_k",
}  # fmt: skip
# At which byte of their blocks each float16 scale begins. Source: ggml-common.h.
_SCALES_AT = {T.Q8_0: (0,), T.Q4_0: (0,), T.Q5_0: (0,), T.Q4_K: (0, 2), T.Q6_K: (208,)}


def has_finite_scales(data: np.ndarray, kind: GGMLQuantizationType) -> bool:
    """Tell whether the bytes of a type of `KEPT` mean finite numbers."""
    halves = data.view(np.uint16).reshape(-1, GGML_QUANT_SIZES[kind][1] // 2)
    return not any((halves[:, at // 2] & 0x7C00 == 0x7C00).any() for at in _SCALES_AT[kind])


def decoder(data: mmap.mmap, tensor: Tensor) -> Callable[[int, int], np.ndarray]:
    """Return a function that gives elements [a, b) of a tensor; a is a block's first.

    The tensor's type is one of `FLOATS` or `QUANTISED`.
    """
    if tensor.type in FLOATS:
        count = math.prod(tensor.shape)
        floats = np.frombuffer(data, FLOATS[tensor.type], count, tensor.start)
        return lambda a, b: floats[a:b]
    size, nbytes = GGML_QUANT_SIZES[tensor.type]
    stored = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.start)

    def decode(a: int, b: int) -> np.ndarray:
        # One row: `dequantize` loops in Python over groups of 16 rows.
        blocks = stored[a // size * nbytes : b // size * nbytes].reshape(1, -1)
        return dequantize(blocks, tensor.type).reshape(-1)

    return decode
