"""Weights in every format, made of random bytes or by `formats.encode`."""

import jax.numpy as jnp
import numpy as np

from gemlax.formats import FORMATS, MADE, encode
from gemlax.qtensor import QTensor, pack_bfloat16

__all__ = ["FORMATS", "blocks", "stored"]

# Where the float16 numbers of a block lie; anything else may be any byte.
HALVES = {"q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q4_k": (0, 2), "q6_k": (208,)}


def blocks(format: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Return rows of random blocks of a GGUF type, uint8 [rows, bytes]."""
    rng = np.random.default_rng(seed)
    form = FORMATS[format]
    codes = rng.integers(0, 256, (rows, width // form.block, form.elements), np.uint8)
    for at in HALVES[format]:
        halves = rng.uniform(0.01, 0.1, codes.shape[:-1]).astype(np.float16)
        codes[..., at : at + 2] = halves[..., None].view(np.uint8)
    return codes.reshape(rows, -1)


def stored(format: str, layers: int, out: int, width: int) -> QTensor:
    """Return a weight [out, width], or a stack [layers, out, width]; 0 layers: no stack."""
    shape = (layers, out, width) if layers else (out, width)
    if format in HALVES:
        codes = blocks(format, int(np.prod(shape[:-1])), width)
        return QTensor(jnp.asarray(codes.reshape(*shape[:-1], -1)), format)
    weights = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    if format in MADE:
        codes, scales = encode(weights, format)
        return QTensor(jnp.asarray(codes), format, jnp.asarray(scales))
    if format == "bfloat16":
        return pack_bfloat16(jnp.asarray(weights, jnp.bfloat16))
    return QTensor(jnp.asarray(weights), "float32")
