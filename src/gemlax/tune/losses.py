"""Log-probabilities of tokens without the logits of all of them, and the losses made of them.

The head of a small Gemma is most of its work and its logits most of its memory: 262,144 float32
for each token. Here tokens that are learnt come first and are taken a block at a time; a block
of which none is learnt is not computed. `token_logprobs` is the reference.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax import ops
from gemlax.decoder import Decoder
from gemlax.qtensor import QTensor, dense, is_stored, shape_of

__all__ = ["Head", "chunked_logprobs", "preference_loss", "token_logprobs"]

# A block of logits is at most this part of all, so that the two arrays of its size that XLA keeps,
# three with a cap, stay below an eighth of all (tests/test_tune_losses.py) ...
_PARTS, _PARTS_WITH_CAP = 20, 32
# ... and has at most this many rows: more are not faster (docs/log.md).
_MOST_ROWS = 128
# Rows of a stored table decoded at a time.
_TABLE_ROWS = 8192


class Head(NamedTuple):
    """What makes logits of hidden states: the table, and the cap of Gemma's final softcap.

    `frozen`: the table gets no gradient, and that of the hidden states is made in the forward pass.
    """

    table: Any
    cap: float | None
    frozen: bool

    @classmethod
    def of(cls, decoder: Decoder, *, frozen: bool) -> "Head":
        """Return the head of a decoder."""
        table = decoder.embed_tokens.weight.get_value()
        return cls(table, decoder.config.final_logit_softcapping, frozen)


def token_logprobs(
    decoder: Decoder, hidden: Float[Array, "B T D"], labels: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return the log-probability of each label, from all logits at once: the reference."""
    logits = decoder.logits(hidden)
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def chunked_logprobs(
    head: Head,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    wanted: Any,
    *,
    groups: int = 1,
) -> Float[Array, "B T"]:
    """Return the log-probability of each label where `wanted`, elsewhere 0.

    Args:
        wanted: bool [B, T]; time is spent on these alone.
        groups: rows are taken in so many groups at once, as many as a mesh cuts them into, so
            that each device works on its own.
    """
    batch, length = labels.shape
    shape = (groups, batch // groups * length)
    order = jnp.argsort(~wanted.reshape(shape), axis=1, stable=True)  # wanted ones first
    flat = hidden.reshape(*shape, hidden.shape[-1])
    flat = jnp.take_along_axis(flat, order[..., None], axis=1)
    own = jnp.take_along_axis(labels.reshape(shape), order, axis=1)
    counts = wanted.reshape(shape).sum(axis=1, dtype=jnp.int32)
    parts = _PARTS if head.cap is None else _PARTS_WITH_CAP
    size = max(1, min(_MOST_ROWS, batch * length // parts) // groups)
    pad = -shape[1] % size
    flat = jnp.pad(flat, ((0, 0), (0, pad), (0, 0)))
    own = jnp.pad(own, ((0, 0), (0, pad)))
    out = _logprobs(head.cap, head.frozen, size, flat, head.table, own, counts)[:, : shape[1]]
    back = jnp.argsort(order, axis=1)
    out = jnp.take_along_axis(out, back, axis=1).reshape(batch, length)
    return jnp.where(wanted, out, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _logprobs(
    cap: float | None, frozen: bool, size: int, x: Array, table: Any, labels: Array, counts: Array
) -> Array:
    """Return log-probabilities [G, N] of the first `counts` labels of each group."""

    def block(start: Array, out: Array) -> Array:
        logits = _logits(cap, _cut(x, start, size), table)
        return _put(out, _own(logits, _cut(labels, start, size)), start)

    return _blocks(size, x, counts, block, jnp.zeros(labels.shape, jnp.float32))


def _forward(
    cap: float | None, frozen: bool, size: int, x: Array, table: Any, labels: Array, counts: Array
) -> Any:
    if not frozen:
        # The slope of the table needs what each token weighs, which only the backward pass knows.
        out = _logprobs(cap, frozen, size, x, table, labels, counts)
        return out, (x, None, table, labels, counts)

    def block(start: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = _logits(cap, _cut(x, start, size), table)
        own = _cut(labels, start, size)
        slope = _times_table(_slope(cap, logits, own), table).astype(x.dtype)
        return _put(both[0], _own(logits, own), start), _put(both[1], slope, start)

    none = (jnp.zeros(labels.shape, jnp.float32), jnp.zeros_like(x))
    out, slopes = _blocks(size, x, counts, block, none)
    return out, (x[:, :0], slopes, table, labels, counts)


def _backward(cap: float | None, frozen: bool, size: int, kept: Any, given: Array) -> Any:
    x, slopes, table, labels, counts = kept
    if frozen:
        return (given[..., None] * slopes).astype(x.dtype), None, None, None

    def block(start: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        rows = _cut(x, start, size)
        logits = _logits(cap, rows, table)
        own = _cut(labels, start, size)
        slope = _slope(cap, logits, own) * _cut(given, start, size)[..., None]
        flat, rows = slope.reshape(-1, slope.shape[-1]), rows.reshape(-1, rows.shape[-1])
        added = both[1] + jnp.einsum("rv,rd->vd", flat, rows.astype(jnp.float32))
        return _put(both[0], _times_table(slope, table).astype(x.dtype), start), added

    none = (jnp.zeros_like(x), jnp.zeros(table.shape, jnp.float32))
    slope, of_table = _blocks(size, x, counts, block, none)
    return slope, of_table.astype(table.dtype), None, None


_logprobs.defvjp(_forward, _backward)


def _blocks(size: int, x: Array, counts: Array, block: Any, start: Any) -> Any:
    """Run `block` on as many blocks of `size` tokens as the fullest group has wanted ones."""
    number = (counts.max() + size - 1) // size
    return jax.lax.fori_loop(0, number, lambda i, out: block(i * size, out), start)


def _cut(a: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)


def _put(a: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part, start, axis=1)


def _own(logits: Array, labels: Array) -> Array:
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1)


def _slope(cap: float | None, logits: Array, labels: Array) -> Array:
    """Return the slope of the label's log-probability by the logits before the cap."""
    hot = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
    slope = hot.astype(jnp.float32) - jax.nn.softmax(logits, axis=-1)
    return slope if cap is None else slope * (1 - (logits / cap) ** 2)  # of tanh


def _logits(cap: float | None, x: Array, table: Any) -> Array:
    """Return float32 logits of [G, R, D]; no decoded copy of a whole stored table exists."""
    flat = x.reshape(-1, x.shape[-1])
    if _is_decoded(table, flat.shape[0]):
        whole, rest = _table_blocks(table)
        logits = jax.lax.map(lambda part: _product(flat, part.dense()), whole)
        logits = jnp.moveaxis(logits, 0, 1).reshape(flat.shape[0], -1)
        if rest is not None:
            logits = jnp.concatenate([logits, _product(flat, rest.dense())], axis=1)
    else:
        logits = ops.unembed(flat, table)
    return ops.softcap(logits, cap).reshape(*x.shape[:-1], -1)


def _times_table(slope: Array, table: Any) -> Array:
    """Return float32 [G, R, V] @ table."""
    flat = slope.reshape(-1, slope.shape[-1])
    if not is_stored(table):
        return _product(flat, dense(table), axis=0).reshape(*slope.shape[:-1], -1)
    whole, rest = _table_blocks(table)
    parts, size = jax.tree.leaves(whole)[0].shape[:2]

    def add(i: Array, total: Array) -> Array:
        block = jax.tree.map(lambda a: a[i], whole).dense()
        own = jax.lax.dynamic_slice_in_dim(flat, i * size, size, axis=1)
        return total + _product(own, block, axis=0)

    out = jnp.zeros((flat.shape[0], shape_of(table)[1]), jnp.float32)
    out = jax.lax.fori_loop(0, parts, add, out)
    if rest is not None:
        out += _product(flat[:, parts * size :], rest.dense(), axis=0)
    return out.reshape(*slope.shape[:-1], -1)


def _is_decoded(table: Any, rows: int) -> bool:
    """Return whether a table is stored and no native kernel multiplies so many rows with it."""
    native = ops.cpu.live() is not None and is_stored(table) and ops.cpu.prefers(table, rows)
    return isinstance(table, QTensor) and not native


def _table_blocks(table: QTensor) -> tuple[Any, Any]:
    """Split a stored table into equal blocks of rows, and what is left or None."""
    rows = table.shape[0]
    size = min(rows, _TABLE_ROWS)
    whole = rows - rows % size
    blocks = jax.tree.map(lambda a: a[:whole].reshape(-1, size, a.shape[1]), table)
    rest = jax.tree.map(lambda a: a[whole:], table) if whole < rows else None
    return blocks, rest


def _product(x: Array, weight: Array, axis: int = 1) -> Array:
    """Contract rows of x with an axis of a table, in the table's dtype, summed in float32."""
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def preference_loss(
    policy: Float[Array, "R"], reference: Float[Array, "R"], *, beta: float
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """Return the DPO loss of each pair, and by how much the policy prefers the chosen answer.

    Rows 2i and 2i + 1 are the log-probabilities of chosen and rejected answers.
    Source: arXiv 2305.18290, equation 7.
    """
    gained = beta * (policy - reference)
    margin = gained[0::2] - gained[1::2]
    return -jax.nn.log_sigmoid(margin), margin
