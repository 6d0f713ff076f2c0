"""Dense and ring caches: the layers of one kind in one array, written in place.

`positions` says what each slot holds, so one mask rule serves both. The view of no cache at all
is `Fresh`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gemlax import ops
from gemlax.config import CHUNK, Kind, LayerSpec, TextConfig
from gemlax.ops.storage import Storage, decode, empty, encode

__all__ = [
    "Caches",
    "DenseCache",
    "Fresh",
    "LayerView",
    "RingCache",
    "holds",
    "mark",
    "new_caches",
    "resume",
    "rollback",
    "rollback_rows",
    "round_capacity",
    "snapshot",
]

# Keys read at a time by attention over a cache.
BLOCK = 256


class DenseCache(NamedTuple):
    """Keys and values of all layers of one kind, slot = position.

    `k` and `v` are [n, B, S, K, H] in a form of `ops.storage`; `positions` [B, S] is shared by
    the n layers, since all of them hold the same tokens.
    """

    k: Any
    v: Any
    positions: Any

    def layer(
        self, row: Any, positions: Array, spec: LayerSpec, metadata: Any, rows: Any = None
    ) -> "LayerView":
        """Return the view of layer `row` for a step at `positions` [b, T].

        `rows` [b]: which rows of the cache those of this call are; None: all, in order.
        """
        return LayerView(self, row, positions, rows)


class RingCache(NamedTuple):
    """The same for layers with a window, slot = position mod S.

    A new token takes the place of one that no query of its chunk sees (`LayerSpec.cache_slots`).
    """

    k: Any
    v: Any
    positions: Any

    def layer(
        self, row: Any, positions: Array, spec: LayerSpec, metadata: Any, rows: Any = None
    ) -> "LayerView":
        """Return the view of layer `row`, as `DenseCache.layer` does.

        Raises:
            ValueError: the step is longer than the ring can take at once.
        """
        size = self.positions.shape[-1]
        assert spec.window is not None
        most = size - spec.window + 1
        if positions.shape[1] > most:
            raise ValueError(
                f"a ring of {size} slots for a window of {spec.window} takes {most} tokens at a "
                f"time, got {positions.shape[1]}: split them, or ask new_caches for a longer chunk"
            )
        return LayerView(self, row, positions, rows)


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
) -> Caches:
    """Allocate empty caches for `batch` rows of up to `capacity` tokens (a bucket).

    Args:
        dtype: of keys and values.
        chunk: the most tokens of one step; drafts count.
        storage: "int8" holds 8-bit codes and a scale per head instead.

    Raises:
        ValueError: `capacity` is not a bucket of `round_capacity`.
    """
    if capacity != round_capacity(capacity):
        raise ValueError(f"capacity {capacity} is no bucket; use {round_capacity(capacity)}")
    caches: Caches = {}
    for kind, spec in _owners(config).items():
        slots = spec.cache_slots(capacity, chunk)
        rows = config.plan.cache_rows(kind)
        shape = (rows, batch, slots, spec.num_key_value_heads, spec.head_dim)
        form = RingCache if slots < capacity else DenseCache
        caches[kind] = form(
            k=empty(shape, dtype, storage),
            v=empty(shape, dtype, storage),
            positions=jnp.full((batch, slots), ops.EMPTY, jnp.int32),
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
        form = RingCache if slots < capacity else DenseCache

        def pad(x: Array, more: int = more) -> Array:
            widths = [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)
            return jnp.pad(x, widths) if more else x

        positions = jnp.pad(old.positions, ((0, 0), (0, more)), constant_values=ops.EMPTY)
        grown[kind] = form(jax.tree.map(pad, old.k), jax.tree.map(pad, old.v), positions)
    return rollback(grown, kept)


def rollback(caches: Caches, kept: Int[Any, "B"]) -> Caches:
    """Forget position `kept` and all after it, in each row: a rejected draft, another ending."""

    def one(cache: Any) -> Any:
        known = cache.positions < jnp.asarray(kept)[:, None]
        return cache._replace(positions=jnp.where(known, cache.positions, ops.EMPTY))

    return {kind: one(cache) for kind, cache in caches.items()}


def rollback_rows(
    caches: Caches,
    kept: Int[Array, "b"],
    rows: Int[Array, "b"] | None,
    chosen: Bool[Array, "b"],
) -> Caches:
    """Forget position `kept` and all after it in the chosen ones of some rows.

    `rows`: of the caches; None: all, in order.
    """

    def one(cache: Any) -> Any:
        size = len(cache.positions)
        where = jnp.arange(size, dtype=jnp.int32) if rows is None else rows
        positions = cache.positions[where]
        positions = jnp.where(positions < kept[:, None], positions, ops.EMPTY)
        where = jnp.where(chosen, where, size)
        return cache._replace(positions=cache.positions.at[where].set(positions, mode="drop"))

    return {kind: one(cache) for kind, cache in caches.items()}


def holds(config: TextConfig, caches: Caches, kept: Int[Any, "B"]) -> Bool[Array, "B"]:
    """Return for which rows all that a query at position `kept` sees is held.

    A ring may have overwritten it, when more was decoded than is kept.
    """
    kept = jnp.asarray(kept)
    fine = jnp.ones(kept.shape, bool)
    for kind, spec in _owners(config).items():
        first = jnp.zeros_like(kept)
        if spec.window is not None:
            first = jnp.maximum(kept - spec.window + 1, 0)
        at = caches[kind].positions
        seen = (at >= first[:, None]) & (at < kept[:, None])
        fine &= seen.sum(axis=1) == kept - first
    return fine


def snapshot(caches: Caches) -> Caches:
    """Copy the caches: the original is donated to the next step, the copy can be gone back to."""
    return jax.tree.map(jnp.copy, caches)


def mark(
    caches: dict[Any, Any], positions: Int[Array, "b T"], rows: Int[Array, "b"] | None = None
) -> dict[Any, Any]:
    """Note in every cache which positions are about to be written. EMPTY ones are not.

    `rows`: which rows of the caches those of `positions` are; None: all, in order.
    """

    def one(cache: Any) -> Any:
        if not isinstance(cache, (DenseCache, RingCache)):
            return cache
        return cache._replace(
            positions=_scatter(cache, (), cache.positions, positions, positions, rows)
        )

    return {key: one(cache) for key, cache in caches.items()}


def _scatter(
    cache: Any,
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
    slots = positions % size if isinstance(cache, RingCache) else positions
    at = (*lead, rows[:, None], jnp.where(positions == ops.EMPTY, size, slots))
    return jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), buffer, values)


def _as_it_is(block: Any) -> Any:
    return block


class LayerView(NamedTuple):
    """Layer `row` of a stacked cache, and the positions of the tokens of this step.

    What is read, blocks [b, S, K, ...] as they are stored, goes through `hold`.
    """

    cache: Any  # DenseCache | RingCache
    row: Any  # int32 scalar
    positions: Any  # [b, T]
    rows: Any = None  # [b]: the rows of the cache that this step's are; None: all, in order
    hold: Callable[[Any], Any] = _as_it_is

    def update(self, k: Float[Array, "b T K H"], v: Float[Array, "b T K H"]) -> "LayerView":
        """Write this step's tokens, and nothing else, into the stack."""
        cache, lead = self.cache, (self.row,)
        k, v = encode(k, cache.k), encode(v, cache.v)
        cache = cache._replace(
            k=_scatter(cache, lead, cache.k, self.positions, k, self.rows),
            v=_scatter(cache, lead, cache.v, self.positions, v, self.rows),
        )
        return self._replace(cache=cache)

    def attend(
        self, q: Float[Array, "b T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "b T N H"]:
        """Attend to the layer, block by block, without slicing it out of the stack."""
        cache = self.cache
        # A view with a `hold` is on a mesh, where a kernel would see a part of the cache as all.
        if self.hold is _as_it_is and ops.cpu.live() and ops.cpu.attends(q, cache.k):
            return ops.cpu.attend(
                q, cache.k, cache.v, cache.positions, self.row, self.positions, self.rows,
                ring=isinstance(cache, RingCache), window=window, scale=scale,
            )  # fmt: skip
        size = cache.positions.shape[1]
        # Two blocks at least: XLA takes a block that is the whole row for loop-invariant, reads it
        # before the write, and then copies the stack (docs/log.md, 2026-11-24).
        block = max(min(BLOCK, size // 2), 1)
        count = -(-size // block)

        def read(index: Array) -> tuple[Array, Array, Array]:
            begin = index % count * block
            start = jnp.minimum(begin, size - block)
            at = self._block(cache.positions, (), start, block)
            if size % block:  # the last block begins inside the one before
                slots = start + jnp.arange(block, dtype=jnp.int32)
                at = jnp.where((slots >= begin)[None], at, ops.EMPTY)
            k, v = self.hold(
                jax.tree.map(
                    lambda x: self._block(x, (self.row,), start, block), (cache.k, cache.v)
                )
            )
            return decode(k, q.dtype), decode(v, q.dtype), at

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
            at, shape = (*lead, first, start, *rest), (*ones, count, block, *inner)
            return jax.lax.dynamic_slice(x, at, shape).reshape(shape[len(lead) :])

        if self.rows is None:
            return slice_rows(0, x.shape[len(lead)])
        return jax.vmap(lambda row: slice_rows(row, 1)[0])(self.rows)

    def _bounds(self, block: int, count: int, window: int | None) -> tuple[Array, Array]:
        """Return the blocks, by position, that any query of this step may see.

        In a ring, block i lies in the place of block i mod `count`.
        """
        wraps = isinstance(self.cache, RingCache)
        if wraps and self.cache.positions.shape[1] % block:
            return jnp.int32(0), jnp.int32(count)
        last = self.positions.max() // block + 1
        if not wraps:
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
