"""Products with a weight of any kind, and the two uses of the embedding table.

Weights are [out, in], rows contiguous over the reduction, as Hugging Face stores them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax.qtensor import QTensor, Weight, dense, shape_of, take

__all__ = ["embed", "linear", "product", "unembed"]

# Rows of a stored table decoded at a time by `unembed`, so that no decoded copy of it exists.
_ROWS = 8192


def linear(x: Float[Array, "... D"], weight: Weight) -> Float[Array, "... F"]:
    """Return x @ weight.T in the dtype of `x`, accumulated in float32."""
    out = product(x.reshape(-1, x.shape[-1]), dense(weight))
    return out.astype(x.dtype).reshape(*x.shape[:-1], shape_of(weight)[0])


def embed(tokens: Int[Array, "B T"], table: Weight, *, scale: float) -> Float[Array, "B T D"]:
    """Gather the rows of `tokens` and multiply by `scale` rounded to the dtype of the table.

    A bfloat16 table rounds sqrt(640) = 25.298 to 25.25, as the model was trained; a float32 one
    does not. Source: transformers modeling_gemma3.py, Gemma3TextScaledWordEmbedding.
    """
    rows = take(table, tokens)
    return rows * jnp.asarray(scale, rows.dtype)


def unembed(x: Float[Array, "R D"], table: Weight) -> Float[Array, "R V"]:
    """Return float32 logits x @ table.T; a stored table is decoded in blocks of rows."""
    rows = shape_of(table)[0]
    if not isinstance(table, QTensor) or rows <= _ROWS:
        return product(x, dense(table))
    whole = rows - rows % _ROWS
    blocks = table.codes[:whole].reshape(-1, _ROWS, table.shape[1])
    logits = jax.lax.map(lambda codes: product(x, QTensor(codes, table.format).dense()), blocks)
    logits = jnp.moveaxis(logits, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return logits
    rest = product(x, QTensor(table.codes[whole:], table.format).dense())
    return jnp.concatenate([logits, rest], axis=1)


def product(x: Float[Array, "R D"], weight: Float[Array, "F D"]) -> Float[Array, "R F"]:
    """Contract the last axes of [R, D] and [F, D] with a float32 result."""
    dtype = jnp.promote_types(x.dtype, weight.dtype)
    return jax.lax.dot_general(
        x.astype(dtype),
        weight.astype(dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
