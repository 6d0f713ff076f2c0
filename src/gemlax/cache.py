"""Key/value caches: what a layer attends to, and where it writes.

A cache stacks all layers of one kind; `positions` says what each slot holds. A layer gets a
view: it hands in its new keys and values, and attends through what comes back. The view of no
cache at all is `Fresh`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemlax import ops
from gemlax.config import Kind, TextConfig

__all__ = ["Caches", "DenseCache", "Fresh", "LayerView", "new_caches", "resume", "round_capacity"]

# Keys read at a time by attention over a cache.
BLOCK = 256


class DenseCache(NamedTuple):
    """Keys and values of all layers of one kind, slot = position.

    `k` and `v` are [n, B, S, K, H]; `positions` [B, S] is shared by the n layers, since all of
    them hold the same tokens. On CPU 16-bit values are kept as their bits (uint16): XLA:CPU
    converts a bfloat16 buffer as a whole for a one-row write.
    """

    k: Any
    v: Any
    positions: Any


Caches = dict[Kind, DenseCache]


def round_capacity(tokens: int) -> int:
    """Return the capacity bucket that holds `tokens`: powers of two, so that programs are few."""
    return max(16, 1 << (tokens - 1).bit_length())


def new_caches(config: TextConfig, batch: int, capacity: int, dtype: Any) -> Caches:
    """Allocate empty caches for `batch` rows of up to `capacity` tokens (a bucket).

    Raises:
        ValueError: `capacity` is not a bucket of `round_capacity`.
    """
    if capacity != round_capacity(capacity):
        raise ValueError(f"capacity {capacity} is no bucket; use {round_capacity(capacity)}")
    stored = _stored_dtype(jnp.dtype(dtype))
    caches: Caches = {}
    for kind, spec in {spec.kind: spec for spec in config.layers if spec.owns_kv}.items():
        rows = config.plan.cache_rows(kind)
        shape = (rows, batch, capacity, spec.num_key_value_heads, spec.head_dim)
        caches[kind] = DenseCache(
            k=jnp.zeros(shape, stored),
            v=jnp.zeros(shape, stored),
            positions=jnp.full((batch, capacity), ops.EMPTY, jnp.int32),
        )
    return caches


def resume(caches: Caches, kept: Int[Any, "B"], capacity: int) -> Caches:
    """Keep the first `kept` positions of each row, in a bucket of at least the old capacity."""

    def one(cache: DenseCache) -> DenseCache:
        more = capacity - cache.positions.shape[1]
        wide = ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))
        k, v = (jnp.pad(x, wide) if more else x for x in (cache.k, cache.v))
        filled = ((0, 0), (0, more))
        positions = jnp.pad(cache.positions, filled, constant_values=ops.EMPTY)
        known = positions < jnp.asarray(kept)[:, None]
        return DenseCache(k, v, jnp.where(known, positions, ops.EMPTY))

    return {kind: one(cache) for kind, cache in caches.items()}


def _stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    narrow = dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    return jnp.dtype(jnp.uint16) if narrow else dtype


def mark(caches: Caches, positions: Int[Array, "B T"]) -> Caches:
    """Note in every cache which positions are about to be written. EMPTY ones are not."""
    return {
        kind: cache._replace(positions=_scatter(cache.positions, (), positions, positions))
        for kind, cache in caches.items()
    }


def _scatter(buffer: Array, lead: tuple, positions: Array, values: Array) -> Array:
    """Write values [B, T, ...] at (lead, row, position); padding falls out of range: dropped."""
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
    slots = jnp.where(positions == ops.EMPTY, buffer.shape[len(lead) + 1], positions)
    return buffer.at[(*lead, rows, slots)].set(values, mode="drop")


class LayerView(NamedTuple):
    """Row `row` of a stacked cache, and the positions of the tokens of this step."""

    cache: DenseCache
    row: Any  # int32 scalar
    positions: Any  # [B, T]

    def update(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "LayerView":
        """Write this step's rows, and nothing else, into the stack."""
        lead = (self.row,)
        cache = self.cache
        cache = cache._replace(
            k=_scatter(cache.k, lead, self.positions, _to_stored(k, cache.k.dtype)),
            v=_scatter(cache.v, lead, self.positions, _to_stored(v, cache.v.dtype)),
        )
        return self._replace(cache=cache)

    def attend(
        self, q: Float[Array, "B T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "B T N H"]:
        """Attend to the row, block by block, without slicing the row out of the stack."""
        cache = self.cache
        _, batch, capacity, heads, size = cache.k.shape
        # Two blocks at least: XLA takes a block that is the whole row for loop-invariant, reads it
        # before the write, and then copies the stack (docs/log.md, 2026-11-24).
        block = min(BLOCK, capacity // 2)

        def read(index: Array) -> tuple[Array, Array, Array]:
            start = index * block
            at = (self.row, 0, start, 0, 0)
            shape = (1, batch, block, heads, size)
            k, v = (jax.lax.dynamic_slice(x, at, shape)[0] for x in (cache.k, cache.v))
            kept = jax.lax.dynamic_slice(cache.positions, (0, start), (batch, block))
            return _from_stored(k, q.dtype), _from_stored(v, q.dtype), kept

        return ops.attend_blocks(
            q,
            read,
            self._bounds(block, window),
            self.positions,
            num_kv_heads=heads,
            window=window,
            scale=scale,
        )

    def _bounds(self, block: int, window: int | None) -> tuple[Array, Array]:
        """Return the blocks that any query of this step may see: slot = position."""
        last = self.positions.max() // block + 1
        if window is None:
            return jnp.zeros_like(last), last
        real = jnp.where(self.positions == ops.EMPTY, jnp.iinfo(jnp.int32).max, self.positions)
        return jnp.minimum(jnp.maximum(real.min() - window + 1, 0) // block, last), last


class Fresh(NamedTuple):
    """No cache: a layer attends to the keys and values of this call alone."""

    positions: Any
    k: Any = None
    v: Any = None

    def update(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "Fresh":
        """Hold this call's keys and values."""
        return self._replace(k=k, v=v)

    def attend(
        self, q: Float[Array, "B T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "B T N H"]:
        """Attend to what `update` was given."""
        return ops.fresh_attend(q, self.k, self.v, self.positions, window=window, scale=scale)


def _to_stored(x: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.uint16 else x.astype(dtype)


def _from_stored(x: Array, dtype: jnp.dtype) -> Array:
    return (
        jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x.astype(dtype)
    )
