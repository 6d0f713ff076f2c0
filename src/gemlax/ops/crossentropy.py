"""Log-probabilities of labels without the logits of all tokens.

The head of a small Gemma is most of its work and its logits most of its memory: 262,144 float32
for each token. Here a block of the table meets a block of tokens at a time, and what softmax needs
is kept as a running maximum and sum, as attention does it (arXiv 2205.14135); where the table is
frozen the slope of the hidden states is summed in the same pass. Tokens that are learnt come first,
and a block of which none is learnt is not computed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemlax.ops import cpu
from gemlax.ops.backend import choose
from gemlax.ops.basic import softcap
from gemlax.qtensor import QTensor, shape_of, take

__all__ = ["Head", "chunked_logprobs"]

# Tokens and rows of the table that meet at a time: fewer are slower, more are not faster and leave
# more tokens that are not learnt in the last block (docs/log.md).
_TOKENS = 256
_TABLE_ROWS = 2048


class Head(NamedTuple):
    """What makes logits of hidden states: a table, and the cap of Gemma's final softcap.

    Attributes:
        table: that of the embeddings, or the matrix of a head of its own.
        frozen: the table gets no gradient, and that of the hidden states is made in the forward
            pass.
        shards: parts into which a mesh cuts the rows of the table; each is summed on its own.
    """

    table: Any
    cap: float | None
    frozen: bool
    shards: int = 1


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
        groups: of rows that are taken at once, as many as a mesh cuts them into, so
            that each device works on its own.
    """
    batch, length = labels.shape
    shape = (groups, batch // groups * length)
    order = jnp.argsort(~wanted.reshape(shape), axis=1, stable=True)  # wanted ones first
    flat = hidden.reshape(*shape, hidden.shape[-1])
    flat = jnp.take_along_axis(flat, order[..., None], axis=1)
    targets = jnp.take_along_axis(labels.reshape(shape), order, axis=1)
    counts = wanted.reshape(shape).sum(axis=1, dtype=jnp.int32)
    blocks = -(-batch * length // _TOKENS)  # that are full if all tokens are learnt
    size = -(-shape[1] // max(1, blocks))
    pad = -shape[1] % size
    flat = jnp.pad(flat, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    plan = _Plan(head.cap, head.frozen, head.shards, size)
    out = _logprobs(plan, flat, head.table, targets, counts)[:, : shape[1]]
    back = jnp.argsort(order, axis=1)
    out = jnp.take_along_axis(out, back, axis=1).reshape(batch, length)
    return jnp.where(wanted, out, 0.0)


class _Plan(NamedTuple):
    """What is known when a program is compiled; `tokens` of each group are taken at a time."""

    cap: float | None
    frozen: bool
    shards: int
    tokens: int


class _Sums(NamedTuple):
    """Of exp(logit - maximum) over the rows of the table seen, except the label's: [G, shards, N].

    `weighted` is the sum of the rows themselves, by exp times the slope of the cap, [..., D].
    """

    maximum: Array
    total: Array
    weighted: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(plan: _Plan, x: Array, table: Any, labels: Array, counts: Array) -> Array:
    """Return log-probabilities [G, N] of the first `counts` labels of each group."""
    return _forward(plan._replace(frozen=False), x, table, labels, counts)[0]


def _forward(plan: _Plan, x: Array, table: Any, labels: Array, counts: Array) -> Any:
    rows = take(table, labels)
    label_logits = (x.astype(rows.dtype).astype(jnp.float32) * rows.astype(jnp.float32)).sum(
        axis=-1
    )
    label_logits, bend = _capped(label_logits, plan.cap)
    sums = _sum(plan, x, table, labels, counts, label_logits)
    maximum = sums.maximum.max(axis=1)
    part = jnp.exp(sums.maximum - maximum[:, None])
    others = (sums.total * part).sum(axis=1)
    total = others + jnp.exp(label_logits - maximum)
    log_total = maximum + jnp.log(total)
    out = label_logits - log_total
    if sums.weighted is None:
        return out, (x, log_total, table, labels, counts)
    # The label's own row is kept apart, so that little is left of it where it is nearly certain.
    others = (others / total * bend)[..., None] * rows.astype(jnp.float32)
    slope = others - (sums.weighted * part[..., None]).sum(axis=1) / total[..., None]
    return out, (slope.astype(x.dtype), None, table, labels, counts)


def _sum(
    plan: _Plan, x: Array, table: Any, labels: Array, counts: Array, label_logits: Array
) -> _Sums:
    groups, length, width = x.shape
    shape = (groups, plan.shards, length)
    maximum = jnp.broadcast_to(label_logits[:, None], shape)
    weighted = jnp.zeros((*shape, width), jnp.float32) if plan.frozen else None
    # A kernel reads stored rows; the sum of the rows themselves needs them as floats.
    as_stored = groups == plan.shards == 1 and not plan.frozen
    as_stored = as_stored and choose("multiply", table, plan.tokens) == "cpu"

    def by_rows(start: Array, rows: Array | QTensor, sums: _Sums) -> _Sums:
        def by_tokens(first: Array, sums: _Sums) -> _Sums:
            logits, bend = _capped(_logits(_cut(x, first, plan.tokens, 1), rows), plan.cap)
            old, total, weighted = (_cut(a, first, plan.tokens, 2) for a in sums)
            maximum = jnp.maximum(old, logits.max(axis=-1))
            kept, weights = jnp.exp(old - maximum), jnp.exp(logits - maximum[..., None])
            hot = _is_label(start, rows, table, _cut(labels, first, plan.tokens, 1))
            weights = jnp.where(hot, 0.0, weights)
            total = total * kept + weights.sum(axis=-1)
            if weighted is not None and not isinstance(rows, QTensor):
                weighted = weighted * kept[..., None] + _times_rows(weights * bend, rows)
            new = _Sums(maximum, total, weighted)
            return jax.tree.map(lambda a, part: _put(a, part, first, 2), sums, new)

        return _over_tokens(plan, counts, by_tokens, sums)

    sums = _Sums(maximum, jnp.zeros(shape, jnp.float32), weighted)
    return _over_table(plan, table, by_rows, sums, as_stored)


def _backward(plan: _Plan, kept: Any, given: Array) -> Any:
    x, log_total, table, labels, counts = kept
    if plan.frozen:  # `x` is the slope that the forward pass made
        return (given[..., None] * x).astype(x.dtype), None, None, None
    groups, length, width = x.shape

    def by_rows(start: Array, rows: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        def by_tokens(first: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
            part = _cut(x, first, plan.tokens, 1)
            logits, bend = _capped(_logits(part, rows), plan.cap)
            weights = jnp.exp(logits - _cut(log_total, first, plan.tokens, 1)[:, None, :, None])
            hot = _is_label(start, rows, table, _cut(labels, first, plan.tokens, 1))
            slope = bend * (hot.astype(jnp.float32) - weights)
            slope *= _cut(given, first, plan.tokens, 1)[:, None, :, None]
            added = jnp.einsum("gsnr,gnd->srd", slope, part.astype(jnp.float32))
            of_part = _cut(both[0], first, plan.tokens, 2) + _times_rows(slope, rows)
            return _put(both[0], of_part, first, 2), both[1] + added

        of_x, of_table = both
        none = jnp.zeros(rows.shape, jnp.float32)
        of_x, of_rows = _over_tokens(plan, counts, by_tokens, (of_x, none))
        return of_x, _put(of_table, of_rows.astype(of_table.dtype), start, 1)

    none = (
        jnp.zeros((groups, plan.shards, length, width), jnp.float32),
        jnp.zeros((plan.shards, table.shape[0] // plan.shards, width), table.dtype),
    )
    of_x, of_table = _over_table(plan, table, by_rows, none)
    return of_x.sum(axis=1).astype(x.dtype), of_table.reshape(table.shape), None, None


_logprobs.defvjp(_forward, _backward)


def _over_table(
    plan: _Plan, table: Any, body: Callable[..., Any], carry: Any, as_stored: bool = False
) -> Any:
    """Run `body(start, rows, carry)` over blocks of the table's rows, [shards, R, D].

    `start` counts within a shard. Unless `as_stored`, a stored table is decoded block by block.
    """
    cut = jax.tree.map(lambda a: a.reshape(plan.shards, -1, a.shape[-1]), table)
    length = shape_of(table)[0] // plan.shards
    size = min(length, _TABLE_ROWS)

    def block(start: Any, size: int, carry: Any) -> Any:
        rows = jax.tree.map(lambda a: _cut(a, start, size, 1), cut)
        return body(
            start, rows if as_stored or not isinstance(rows, QTensor) else rows.dense(), carry
        )

    whole = length // size
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: block(i * size, size, carry), carry)
    rest = length - whole * size
    return block(jnp.int32(whole * size), rest, carry) if rest else carry


def _over_tokens(plan: _Plan, counts: Array, body: Callable[..., Any], carry: Any) -> Any:
    """Run `body(at, carry)` on as many blocks as the fullest group has tokens that are learnt."""
    number = (counts.max() + plan.tokens - 1) // plan.tokens
    return jax.lax.fori_loop(0, number, lambda i, carry: body(i * plan.tokens, carry), carry)


def _cut(a: Any, start: Array, size: int, axis: int) -> Any:
    return None if a is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def _put(a: Array, part: Array, start: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, part, start, axis)


def _is_label(
    start: Array, rows: Array | QTensor, table: Any, labels: Array
) -> Bool[Array, "G S N R"]:
    """Return which logits are those of the labels [G, N]."""
    shards, size, _ = shape_of(rows)
    first = jnp.arange(shards, dtype=jnp.int32) * (shape_of(table)[0] // shards) + start
    ids = first[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
    return labels[:, None, :, None] == ids[None, :, None]


def _capped(logits: Array, cap: float | None) -> tuple[Array, Any]:
    """Return softcap of logits, and its slope there."""
    capped = softcap(logits, cap)
    return capped, 1.0 if cap is None else 1 - (capped / cap) ** 2  # of tanh


def _logits(x: Float[Array, "G N D"], rows: Array | QTensor) -> Float[Array, "G S N R"]:
    if isinstance(rows, QTensor):  # of one shard, for one group
        return cpu.multiply(x[0], jax.tree.map(lambda a: a[0], rows))[0][None, None]
    return jnp.einsum(
        "gnd,srd->gsnr", x.astype(rows.dtype), rows, preferred_element_type=jnp.float32
    )


def _times_rows(
    slope: Float[Array, "G S N R"], rows: Float[Array, "S R D"]
) -> Float[Array, "G S N D"]:
    return jnp.einsum(
        "gsnr,srd->gsnd", slope.astype(rows.dtype), rows, preferred_element_type=jnp.float32
    )
