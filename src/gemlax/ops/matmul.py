"""Products with a weight of any kind, and the two uses of the embedding table.

Weights are [out, in], rows contiguous over the reduction, as Hugging Face stores them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax.ops import cpu
from gemlax.qtensor import QTensor, Weight, dense, is_stored, shape_of, take

__all__ = ["embed", "linear", "linears", "product", "unembed"]

# Rows of a stored table decoded at a time by `unembed`, so that no decoded copy of it exists.
_ROWS = 8192


def linear(x: Float[Array, "... D"], weight: Weight) -> Float[Array, "... F"]:
    """Return x @ weight.T in the dtype of `x`, accumulated in float32.

    A stored weight is frozen: it gets no gradient, and `x` does in reverse mode only.
    """
    return linears(x, weight)[0]


def linears(x: Float[Array, "... D"], *weights: Weight) -> tuple[Float[Array, "... _"], ...]:
    """Return `linear` of each weight; a native kernel takes them all at once."""
    flat = x.reshape(-1, x.shape[-1])
    if all(is_stored(weight) for weight in weights):
        outs = _stored_products(flat, weights)
    else:
        outs = tuple(product(flat, dense(weight)) for weight in weights)
    return tuple(out.astype(x.dtype).reshape(*x.shape[:-1], -1) for out in outs)


@jax.custom_vjp
def _stored_products(x: Array, weights: tuple[Weight, ...]) -> tuple[Array, ...]:
    """Multiply with stored weights; no decoded copy of them is kept for the backward pass."""
    if cpu.live() is None:
        return tuple(product(x, dense(weight)) for weight in weights)
    if all(cpu.prefers(weight, x.shape[0]) for weight in weights):
        return cpu.multiply(x, *weights)
    return tuple(_stored_product(x, weight) for weight in weights)


def _stored_product(x: Array, weight: Weight) -> Array:
    if cpu.prefers(weight, x.shape[0]):
        return cpu.multiply(x, weight)[0]
    return product(x, cpu.decode(weight) if cpu.serves(weight) else dense(weight))


def _stored_forward(x: Array, weights: tuple[Weight, ...]) -> Any:
    # An empty slice: only the dtype of `x` is needed.
    return _stored_products(x, weights), (x[:0], weights)


def _stored_backward(kept: Any, slopes: tuple[Array, ...]) -> tuple[Array, None]:
    x, weights = kept
    total = jnp.zeros((slopes[0].shape[0], x.shape[1]), slopes[0].dtype)
    for slope, weight in zip(slopes, weights, strict=True):
        total += slope @ dense(weight).astype(slope.dtype)
    return total.astype(x.dtype), None


_stored_products.defvjp(_stored_forward, _stored_backward)


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
    if not is_stored(table):
        return product(x, dense(table))
    native = cpu.live() is not None and cpu.prefers(table, x.shape[0])
    if native or not isinstance(table, QTensor) or rows <= _ROWS or table.format == "float32":
        return _stored_products(x, (table,))[0]
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
