"""The mask rule and attention: over whole arrays (the reference) and over blocks of keys.

Positions, not columns, decide what a query sees, so one rule serves every cache, both sides of
padding and any chunking. K and V have K heads; query head n reads K/V head n // (N / K).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemlax.ops.basic import EMPTY

__all__ = ["attend", "attend_blocks", "causal_mask", "fresh_attend"]

# Below every real logit yet finite, so that a row without any key stays free of NaN.
_MASKED = -1e30
# Queries taken at a time when a long sequence attends to itself.
_QUERIES = 256


def causal_mask(
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    window: int | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Bool[Array, "B T S"]:
    """Return True where a query may attend: key written, not later, and inside the window.

    A window of W covers W keys, the query's own included. `segments` are those of queries and
    keys, where a row holds several texts: a query sees its own.
    """
    q, k = queries[:, :, None], keys[:, None, :]
    seen = (k != EMPTY) & (k <= q)
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    return seen if window is None else seen & (k > q - window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attend over all keys at once: the reference. A query that may see no key gets zeros."""
    logits = _logits(q, k, mask, scale)  # [B, K, G, T, S]
    weights = jnp.where(mask[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
    out = jnp.einsum(
        "bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out.reshape(q.shape).astype(q.dtype)


def fresh_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Let a sequence attend to itself; a long one by blocks of queries: memory linear in T.

    `segments` numbers the texts of a row that is packed with several; positions begin anew in each.
    """
    length = q.shape[1]

    def mask(at: Array, own: Array | None) -> Array:
        both = None if segments is None or own is None else (own, segments)
        return causal_mask(at, positions, window, both)

    if length <= _QUERIES:
        return attend(q, k, v, mask(positions, segments), scale=scale)
    pad = -length % _QUERIES
    blocks = (length + pad) // _QUERIES

    def split(x: Array, fill: int) -> Array:
        widths = [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, _QUERIES, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(block: tuple[Array, Array, Array | None]) -> Array:
        queries, at, own = block
        return attend(queries, k, v, mask(at, own), scale=scale)

    own = None if segments is None else split(segments, EMPTY)
    out = jax.lax.map(one, (split(q, 0), split(positions, EMPTY), own))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], length + pad, *q.shape[2:])[:, :length]


def attend_blocks(
    q: Float[Array, "B T N H"],
    read: Callable[[Array], tuple[Array, Array, Array]],
    bounds: tuple[Array, Array],
    positions: Int[Array, "B T"],
    *,
    num_kv_heads: int,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Attend over blocks first .. last - 1 of keys with an online softmax.

    `read(i)` returns block i as (k [B, S, K, H], v, positions [B, S]). The number of blocks is
    dynamic, so this cannot be differentiated in reverse. Source: arXiv 1805.02867.
    """
    batch, length, heads, size = q.shape
    groups = (batch, num_kv_heads, heads // num_kv_heads, length)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        k, v, at = read(index)
        mask = causal_mask(positions, at, window)
        logits = _logits(q, k, mask, scale)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        weights = jnp.where(mask[:, None, None], jnp.exp(logits - new_peak[..., None]), 0.0)
        shrink = jnp.exp(peak - new_peak)
        added = jnp.einsum(
            "bkgts,bskh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return new_peak, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + added

    start = (
        jnp.full(groups, _MASKED, jnp.float32),
        jnp.zeros(groups, jnp.float32),
        jnp.zeros((*groups, size), jnp.float32),
    )
    _, total, out = jax.lax.fori_loop(*bounds, step, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(q.shape).astype(q.dtype)


def _logits(q: Array, k: Array, mask: Array, scale: float) -> Array:
    """Return masked float32 logits [B, K, G, T, S]."""
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], logits * jnp.float32(scale), _MASKED)
