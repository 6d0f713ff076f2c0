"""Products with a weight of any kind, and the two uses of the embedding table.

Weights are [out, in], rows contiguous over the reduction, as Hugging Face stores them.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from gemlax.errors import UnsupportedError
from gemlax.ops import cpu
from gemlax.ops.backend import choose
from gemlax.qtensor import At, QTensor, Weight, dense, is_stored, shape_of, take

__all__ = [
    "LowRank", "add_low_rank", "embed", "linear", "linears", "product", "unembed", "watched",
]  # fmt: skip

# Rows of a stored table decoded at a time by `unembed`, so that no decoded copy of it exists.
_ROWS = 8192

Watch = Callable[[Array, tuple[Weight, ...]], None]
_watch: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("watch", default=None)


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Tell `watch` the rows and the weights of every projection that is traced or run inside."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def linear(x: Float[Array, "... D"], weight: Weight) -> Float[Array, "... F"]:
    """Return x @ weight.T in the dtype of `x`, accumulated in float32.

    A weight that is stored as codes, or handed in as `At`, is frozen: `x` alone has a gradient, in
    reverse mode only, and nothing of the weight is kept for it.
    """
    return linears(x, weight)[0]


def linears(x: Float[Array, "... D"], *weights: Weight) -> tuple[Float[Array, "... _"], ...]:
    """Return `linear` of each weight; a native kernel takes them all at once."""
    flat = x.reshape(-1, x.shape[-1])
    if (watch := _watch.get()) is not None:
        watch(flat, weights)
    if all(_is_frozen(weight) for weight in weights):
        outs = _frozen_products(flat, weights)
    else:
        outs = tuple(
            _frozen_products(flat, (w,))[0] if _is_frozen(w) else product(flat, dense(w))
            for w in weights
        )
    return tuple(out.astype(x.dtype).reshape(*x.shape[:-1], -1) for out in outs)


def _is_frozen(weight: Weight) -> bool:
    return isinstance(weight, At) or is_stored(weight)


@jax.custom_vjp
def _frozen_products(x: Array, weights: tuple[Weight, ...]) -> tuple[Array, ...]:
    """Multiply with frozen weights; no copy of them is kept for the backward pass."""
    weights = tuple(_as_stored(weight, x.shape[0]) for weight in weights)
    if all(choose("multiply", weight, x.shape[0]) == "cpu" for weight in weights):
        return cpu.multiply(x, *weights)
    return tuple(_frozen_product(x, weight) for weight in weights)


def _as_stored(weight: Weight, rows: int) -> Weight:
    """Return a layer of a float32 stack as a kernel takes it: XLA would slice it out first."""
    if not isinstance(weight, At) or not isinstance(weight.stack, jax.Array):
        return weight
    if weight.stack.ndim != 3 or weight.stack.dtype != jnp.float32:
        return weight
    stored = At(QTensor(weight.stack, "float32"), weight.index)
    return stored if choose("multiply", stored, rows) == "cpu" else weight


def _frozen_product(x: Array, weight: Weight) -> Array:
    if choose("multiply", weight, x.shape[0]) == "cpu":
        return cpu.multiply(x, weight)[0]
    return product(x, cpu.decode(weight) if choose("decode", weight) == "cpu" else dense(weight))


def _frozen_forward(x: Any, weights: Any) -> Any:
    """Keep the weights as they are held, such as a whole stack and an index into it."""
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    for leaf in jax.tree.leaves(weights, is_leaf=is_primal):
        if leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.floating):
            raise UnsupportedError(
                "a base that is read by index is frozen and has no gradient; to train it, build "
                "the decoder with read='slice' and floats"
            )
    x, weights = jax.tree.map(lambda leaf: leaf.value, (x, weights), is_leaf=is_primal)
    # An empty slice: only the dtype of `x` is needed.
    return _frozen_products(x, weights), (x[:0], weights)


def _frozen_backward(kept: Any, slopes: tuple[Any, ...]) -> tuple[Array, None]:
    x, weights = kept
    rows, dtype = slopes[0].shape[0], jnp.float32
    total = jnp.zeros((rows, x.shape[1]), dtype)
    for slope, weight in zip(slopes, weights, strict=True):
        if not isinstance(slope, SymbolicZero):
            total += slope.astype(dtype) @ dense(weight).astype(dtype)
    return total.astype(x.dtype), None


_frozen_products.defvjp(_frozen_forward, _frozen_backward, symbolic_zeros=True)


class LowRank(NamedTuple):
    """A table of E updates of low rank to a weight [out, in]: scale * b @ a."""

    a: Float[Array, "E r in"]
    b: Float[Array, "E out r"]
    scale: Float[Array, "E"]


def add_low_rank(
    x: Float[Array, "B T D"],
    out: Float[Array, "B T F"],
    table: LowRank,
    rows: Int[Array, "B"] | None = None,
    dropout: tuple[Array, Float[Array, "E"]] | None = None,
) -> Float[Array, "B T F"]:
    """Return out + scale * (x @ a.T) @ b.T, added in float32, in the dtype of `out`.

    Source: arXiv 2106.09685, section 4.1.

    Args:
        rows: the entry of the table that each row of the batch takes; None: entry 0.
        dropout: a key, and the rate of each entry for the input of `a`.
    """
    if dropout is not None:
        key, rates = dropout
        rate = rates[0] if rows is None else rates[rows][:, None, None]
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        wide = x.astype(jnp.float32)
        x = jnp.where(kept, wide / (1 - rate), jnp.zeros_like(wide))
    if rows is None:
        inner = product(x.reshape(-1, x.shape[-1]), table.a[0])
        update = product(inner, table.b[0]).reshape(out.shape) * table.scale[0]
    else:
        a, b, scale = (part[rows].astype(jnp.float32) for part in table)
        inner = jnp.einsum("btd,brd->btr", x.astype(jnp.float32), a)
        update = jnp.einsum("btr,bfr->btf", inner, b) * scale[:, None, None]
    return (out.astype(jnp.float32) + update).astype(out.dtype)


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
    native = choose("multiply", table, x.shape[0]) == "cpu"
    if native or not isinstance(table, QTensor) or rows <= _ROWS or table.format == "float32":
        return _frozen_products(x, (table,))[0]
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
