"""The slot cache: the layers of one kind in one array, a row of it per slot, written in place.

`positions` says what each place holds, so one mask rule serves rings too. The view of no cache at
all is `Fresh`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemlax import ops
from gemlax.config import CHUNK, Kind, LayerSpec, TextConfig
from gemlax.ops.storage import Storage, decode, empty, encode
from gemlax.sharding import ONE_DEVICE, Layout, constrain, without_layers

__all__ = [
    "Caches",
    "Fresh",
    "LayerView",
    "SlotCache",
    "new_caches",
    "record_positions",
    "resume",
    "rollback",
    "round_capacity",
]

# Keys read at a time by attention over a cache.
BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Keys and values of all layers of one kind.

    `k` and `v` are [n, B, S, K, H] in a form of `ops.storage`; `positions` [B, S] is shared by
    the n layers, since all of them hold the same tokens. A position lies at its own place; in a
    ring, which layers with a window have, at position mod S: a new token takes the place of one
    that no query of its chunk sees (`LayerSpec.cache_slots`).
    """

    k: Any
    v: Any
    positions: Any
    is_ring: bool = dataclasses.field(default=False, metadata={"static": True})
    # How a mesh cuts k and v; the blocks that are read are held to it. Left alone, XLA cuts heads
    # that are repeated as it cuts the queries, for each block, and gathers the cache after.
    sharding: Any = dataclasses.field(default=None, metadata={"static": True})

    def layer(
        self, layer: Any, positions: Array, spec: LayerSpec, metadata: Any, rows: Any = None
    ) -> "LayerView":
        """Return the view of a layer, by its place in the stack, for a step at `positions` [b, T].

        `rows` [b]: which rows of the cache those of this call are; None: all, in order.
        """
        if self.is_ring:
            size = self.positions.shape[-1]
            assert spec.window is not None
            limit = size - spec.window + 1
            if positions.shape[1] > limit:
                raise ValueError(
                    f"a ring of {size} slots for a window of {spec.window} takes {limit} tokens at "
                    f"a time, got {positions.shape[1]}: split them, or ask new_caches for a longer "
                    "chunk"
                )
        return LayerView(self, layer, positions, rows)


# A PagedPool may stand in the place of a stack.
Caches = dict[Kind, Any]


def round_capacity(tokens: int) -> int:
    """Return the capacity bucket that holds `tokens`: powers of two, so that programs are few."""
    return max(16, 1 << (tokens - 1).bit_length())


def new_caches(
    config: TextConfig,
    batch: int,
    capacity: int,
    dtype: Any,
    *,
    chunk: int = CHUNK,
    storage: Storage = None,
    layout: Layout = ONE_DEVICE,
) -> Caches:
    """Allocate empty caches for `batch` rows of up to `capacity` tokens (a bucket).

    Args:
        dtype: of keys and values.
        chunk: the most tokens of one step; drafts count.
        storage: "int8" holds 8-bit codes and a scale per head instead.
        layout: how keys and values are to lie (`SlotCache.sharding`).
    """
    if capacity != round_capacity(capacity):
        raise ValueError(f"capacity {capacity} is not a bucket; use {round_capacity(capacity)}")
    caches: Caches = {}
    for kind, spec in _owners(config).items():
        slots = spec.cache_slots(capacity, chunk)
        num_layers = config.plan.cache_rows(kind)
        shape = (num_layers, batch, slots, spec.num_key_value_heads, spec.head_dim)
        caches[kind] = SlotCache(
            k=empty(shape, dtype, storage),
            v=empty(shape, dtype, storage),
            positions=jnp.full((batch, slots), ops.EMPTY, jnp.int32),
            is_ring=slots < capacity,
            sharding=layout.cache(config, spec, batch),
        )
    return caches


def _owners(config: TextConfig) -> dict[Kind, LayerSpec]:
    return {spec.kind: spec for spec in config.layers if spec.owns_kv}


def resume(
    config: TextConfig, caches: Caches, kept: Int[Any, "B"], capacity: int, chunk: int = CHUNK
) -> Caches:
    """Keep the first `kept` positions of each row, in a bucket of at least the old capacity."""
    grown: Caches = {}
    for kind, spec in _owners(config).items():
        old = caches[kind]
        slots = spec.cache_slots(capacity, chunk)
        more = max(slots - old.positions.shape[1], 0)  # a ring as long as that has never wrapped

        def pad(x: Array, more: int = more) -> Array:
            widths = [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)
            return jnp.pad(x, widths) if more else x

        positions = jnp.pad(old.positions, ((0, 0), (0, more)), constant_values=ops.EMPTY)
        k, v = jax.tree.map(pad, (old.k, old.v))
        ring = slots < capacity
        grown[kind] = dataclasses.replace(old, k=k, v=v, positions=positions, is_ring=ring)
    return rollback(grown, kept)


def rollback(
    caches: Caches,
    kept: Int[Any, "b"],
    rows: Int[Array, "b"] | None = None,
    chosen: Bool[Array, "b"] | None = None,
) -> Caches:
    """Forget position `kept` and all after it: a rejected draft, another ending.

    Args:
        rows: which rows of the caches are meant; None: all, in order.
        chosen: the ones of those to change; None: all.
    """

    def forget(cache: SlotCache) -> SlotCache:
        size = len(cache.positions)
        where = jnp.arange(size, dtype=jnp.int32) if rows is None else rows
        positions = cache.positions[where]
        positions = jnp.where(positions < jnp.asarray(kept)[:, None], positions, ops.EMPTY)
        if chosen is not None:
            where = jnp.where(chosen, where, size)
        positions = cache.positions.at[where].set(positions, mode="drop")
        return dataclasses.replace(cache, positions=positions)

    return {kind: forget(cache) for kind, cache in caches.items()}


def record_positions(
    caches: dict[Any, Any], positions: Int[Array, "b T"], rows: Int[Array, "b"] | None = None
) -> dict[Any, Any]:
    """Note in every slot cache which positions are about to be written. EMPTY ones are not.

    `rows`: which rows of the caches those of `positions` are; None: all, in order.
    """

    def record(cache: Any) -> Any:
        if not isinstance(cache, SlotCache):
            return cache
        recorded = _scatter(cache, (), cache.positions, positions, positions, rows)
        return dataclasses.replace(cache, positions=recorded)

    return {key: record(cache) for key, cache in caches.items()}


def _scatter(
    cache: SlotCache,
    lead: tuple[object, ...],
    buffer: Any,
    positions: Array,
    values: Any,
    rows: Array | None,
) -> Any:
    """Write values [b, T, ...] at (lead, row, slot); padding falls out of range: dropped."""
    size = cache.positions.shape[-1]
    if rows is None:
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)
    slots = positions % size if cache.is_ring else positions
    index = (*lead, rows[:, None], jnp.where(positions == ops.EMPTY, size, slots))
    return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), buffer, values)


class LayerView(NamedTuple):
    """A layer of a slot cache, and the positions of the tokens of this step."""

    cache: SlotCache
    layer: Any  # int32 scalar
    positions: Any  # [b, T]
    rows: Any = None  # [b]: the rows of the cache that this step's are; None: all, in order

    def update(self, k: Float[Array, "b T K H"], v: Float[Array, "b T K H"]) -> "LayerView":
        """Write this step's tokens, and nothing else, into the stack."""
        cache, lead = self.cache, (self.layer,)
        k, v = encode(k, cache.k), encode(v, cache.v)
        cache = dataclasses.replace(
            cache,
            k=_scatter(cache, lead, cache.k, self.positions, k, self.rows),
            v=_scatter(cache, lead, cache.v, self.positions, v, self.rows),
        )
        return self._replace(cache=cache)

    def attend(
        self, q: Float[Array, "b T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "b T N H"]:
        """Attend to the layer, block by block, without slicing it out of the stack."""
        cache = self.cache
        if ops.choose("attend", q, cache.k) == "cpu":
            return ops.cpu.attend(
                q, cache.k, cache.v, cache.positions, self.layer, self.positions, self.rows,
                ring=cache.is_ring, window=window, scale=scale,
            )  # fmt: skip
        size = cache.positions.shape[1]
        # Two blocks at least: XLA takes a block that is the whole row for loop-invariant, reads it
        # before the write, and then copies the stack (docs/log.md, 2026-11-24).
        block = max(min(BLOCK, size // 2), 1)
        count = -(-size // block)

        def read(index: Array) -> tuple[Array, Array, Array]:
            begin = index % count * block
            start = jnp.minimum(begin, size - block)
            key_positions = self._block(cache.positions, (), start, block)
            if size % block:  # the last block begins inside the one before
                slots = start + jnp.arange(block, dtype=jnp.int32)
                key_positions = jnp.where((slots >= begin)[None], key_positions, ops.EMPTY)
            k, v = jax.tree.map(
                lambda x: self._block(x, (self.layer,), start, block), (cache.k, cache.v)
            )
            k, v = constrain((k, v), without_layers(cache.sharding))
            return decode(k, q.dtype), decode(v, q.dtype), key_positions

        return ops.attend_blocks(
            q,
            read,
            self._bounds(block, count, window),
            self.positions,
            num_kv_heads=jax.tree.leaves(cache.k)[0].shape[3],
            window=window,
            scale=scale,
        )

    def _block(self, x: Array, lead: tuple[object, ...], start: Array, block: int) -> Array:
        """Return [b, block, ...] of a buffer [*lead, B, S, ...], from slot `start` on."""
        inner = x.shape[len(lead) + 2 :]
        rest, ones = (0,) * len(inner), (1,) * len(lead)

        def slice_rows(first: Any, count: int) -> Array:
            begin, shape = (*lead, first, start, *rest), (*ones, count, block, *inner)
            return jax.lax.dynamic_slice(x, begin, shape).reshape(shape[len(lead) :])

        if self.rows is None:
            return slice_rows(0, x.shape[len(lead)])
        return jax.vmap(lambda row: slice_rows(row, 1)[0])(self.rows)

    def _bounds(self, block: int, count: int, window: int | None) -> tuple[Array, Array]:
        """Return the blocks, by position, that any query of this step may see.

        In a ring, block i lies in the place of block i mod `count`.
        """
        if self.cache.is_ring and self.cache.positions.shape[1] % block:
            return jnp.int32(0), jnp.int32(count)
        last = self.positions.max() // block + 1
        if not self.cache.is_ring:
            last = jnp.minimum(last, count)
        first = jnp.zeros_like(last)
        if window is not None:
            real = jnp.where(self.positions == ops.EMPTY, jnp.iinfo(jnp.int32).max, self.positions)
            first = jnp.minimum(jnp.maximum(real.min() - window + 1, 0) // block, last)
        return jnp.maximum(first, last - count), last


class Fresh(NamedTuple):
    """No cache: a layer attends to the keys and values of this call alone."""

    positions: Any
    k: Any = None
    v: Any = None
    segments: Any = None  # [B, T]: the text of its row that each token belongs to; None: one

    def update(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "Fresh":
        """Hold this call's keys and values."""
        return self._replace(k=k, v=v)

    def attend(
        self, q: Float[Array, "B T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "B T N H"]:
        """Attend to what `update` was given."""
        return ops.fresh_attend(
            q, self.k, self.v, self.positions, window=window, scale=scale, segments=self.segments
        )
