"""Products with a weight of any kind, and the two uses of the embedding table.

Weights are [out, in], rows contiguous over the reduction, as Hugging Face stores them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax.ops import cpu
from gemlax.qtensor import QTensor, Weight, dense, is_stored, shape_of, take

__all__ = ["embed", "linear", "product", "unembed"]

# Rows of a stored table decoded at a time by `unembed`, so that no decoded copy of it exists.
_ROWS = 8192


def linear(x: Float[Array, "... D"], weight: Weight) -> Float[Array, "... F"]:
    """Return x @ weight.T in the dtype of `x`, accumulated in float32.

    A stored weight is frozen: it gets no gradient, and `x` does in reverse mode only.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = _stored_product(flat, weight) if is_stored(weight) else product(flat, dense(weight))
    return out.astype(x.dtype).reshape(*x.shape[:-1], shape_of(weight)[0])


@jax.custom_vjp
def _stored_product(x: Array, weight: Weight) -> Array:
    """Multiply with a stored weight; no decoded copy of it is kept for the backward pass."""
    if cpu.live() is None or not cpu.serves(weight):
        return product(x, dense(weight))
    if x.shape[0] <= cpu.MAX_ROWS:
        return cpu.multiply(x, weight)
    return product(x, cpu.decode(weight))


def _stored_forward(x: Array, weight: Weight) -> tuple[Array, tuple[Array, Weight]]:
    # An empty slice: only the dtype of `x` is needed.
    return _stored_product(x, weight), (x[:0], weight)


def _stored_backward(kept: tuple[Array, Weight], slope: Array) -> tuple[Array, None]:
    x, weight = kept
    return (slope @ dense(weight).astype(slope.dtype)).astype(x.dtype), None


_stored_product.defvjp(_stored_forward, _stored_backward)


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
    if not isinstance(table, QTensor) or rows <= _ROWS or table.format == "float32":
        return _stored_product(x, table) if is_stored(table) else product(x, dense(table))
    if x.shape[0] <= cpu.MAX_ROWS and cpu.live() and cpu.serves(table):
        return _stored_product(x, table)
    whole = rows - rows % _ROWS
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, _ROWS, a.shape[1]), table)
    logits = jax.lax.map(lambda block: product(x, block.dense()), blocks)
    logits = jnp.moveaxis(logits, 0, 1).reshape(x.shape[0], whole)
    if whole == rows:
        return logits
    rest = product(x, jax.tree.map(lambda a: a[whole:], table).dense())
    return jnp.concatenate([logits, rest], axis=1)


def product(x: Float[Array, "R D"], weight: Float[Array, "F D"]) -> Float[Array, "R F"]:
    """Contract the last axes of [R, D] and [F, D] with a float32 result."""
    dtype = x.dtype if x.dtype == weight.dtype else jnp.float32
    return jax.lax.dot_general(
        x.astype(dtype),
        weight.astype(dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
