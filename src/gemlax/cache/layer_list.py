"""The list contract: caches that an outside engine owns, one entry per layer.

Entries are in the order of the layers that own keys and values; a layer that shares its donor's
has none. A scan needs them stacked, and XLA copies the entries of unrolled layers too: the list
costs about one copy of the caches per call (docs/performance.md).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemlax import ops
from gemlax.cache.pool import PagedPool
from gemlax.cache.slots import SlotCache
from gemlax.config import CHUNK, Kind, LayerSpec, TextConfig
from gemlax.ops.storage import Int8, decode, to_storage

__all__ = ["LayerListCache", "LayerCache", "new_list", "stack_layers", "unstack_layers"]


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, S, K, H], and what position each slot holds, [B, S].

    `ops.EMPTY` marks an empty slot. The layers of a kind hold the same tokens: where they are
    stacked, the first one's positions count. A window layer's entry that is shorter than those of
    full attention is a ring, slot = position mod S; any other has slot = position.
    """

    k: Any
    v: Any
    positions: Any


Entry = Any  # LayerCache | jax.Array


def new_list(
    config: TextConfig, batch: int, capacity: int, dtype: Any, *, chunk: int = CHUNK
) -> list[LayerCache]:
    """Allocate an empty entry for each layer that owns K/V; arguments as for `new_caches`."""
    entries = []
    for spec in config.layers:
        if spec.owns_kv:
            slots = (batch, spec.cache_slots(capacity, chunk))
            shape = (*slots, spec.num_key_value_heads, spec.head_dim)
            positions = jnp.full(slots, ops.EMPTY, jnp.int32)
            entries.append(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions))
    return entries


def stack_layers(entries: Any, count: int) -> Any:
    """Stack a list of `count` equal pytrees along a new first axis; None stays None."""
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise TypeError(f"layers are stacked from a list, got {type(entries).__name__}")
    if len(entries) != count:
        raise ValueError(f"expected {count} entries to stack, got {len(entries)}")
    forms: list[Any] = [jax.tree.structure(entry) for entry in entries]
    for i, form in enumerate(forms):
        if form != forms[0]:
            raise TypeError(f"entry {i} is {form}, entry 0 is {forms[0]}")
    for leaves in zip(*map(jax.tree.leaves, entries), strict=True):
        kinds = {(leaf.shape, leaf.dtype.name) for leaf in leaves}
        if len(kinds) > 1:
            raise ValueError(f"entries of one stack differ in shape or dtype: {sorted(kinds)}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *entries)


def unstack_layers(stacked: Any, count: int) -> list[Any] | None:
    """Take a stacked pytree apart into a list of `count`; None stays None."""
    if stacked is None:
        return None
    for leaf in jax.tree.leaves(stacked):
        if leaf.shape[:1] != (count,):
            raise ValueError(f"expected {count} layers first, got a leaf of {list(leaf.shape)}")
    return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]


class LayerListCache:
    """A checked list of caches, and the way from it to what the layers write and back."""

    def __init__(self, config: TextConfig, entries: list[Entry], batch: int):
        self.entries = entries
        self.owners = [spec for spec in config.layers if spec.owns_kv]
        if len(entries) != len(self.owners):
            raise ValueError(
                f"kv_caches needs one entry per layer that owns keys and values: "
                f"{len(self.owners)} of {config.num_hidden_layers} layers, got {len(entries)}"
            )
        for i, (entry, spec) in enumerate(zip(entries, self.owners, strict=True)):
            _check(i, entry, spec, batch)
        if len({isinstance(entry, LayerCache) for entry in entries}) > 1:
            raise TypeError("kv_caches mixes LayerCache entries and arrays of pages")
        full = [
            entry.positions.shape[1]
            for entry, spec in zip(entries, self.owners, strict=True)
            if isinstance(entry, LayerCache) and spec.window is None
        ]
        self.capacity = min(full) if full else None

    def by_layer(self) -> dict[Any, Any]:
        """Return each entry as a stack of one, by its index."""
        return {i: _lift(self._native(i)) for i in range(len(self.entries))}

    def by_kind(self) -> dict[Any, Any]:
        """Return the entries stacked by kind: the copy that the list costs."""
        stacks: dict[Any, Any] = {}
        for kind in {spec.kind: None for spec in self.owners}:
            layers = [self._native(i) for i in self._indices(kind)]
            stack = stack_layers(layers, len(layers))
            if not isinstance(stack, PagedPool):
                stack = dataclasses.replace(stack, positions=layers[0].positions)
            stacks[kind] = stack
        return stacks

    def write_back(self, caches: dict[Any, Any]) -> list[Entry]:
        """Replace each entry, in its own form, by what `caches` has; return the list."""
        for key, cache in caches.items():
            indices = [key] if isinstance(key, int) else self._indices(key)
            if not isinstance(cache, PagedPool):
                shape = (len(indices), *cache.positions.shape)
                positions = jnp.broadcast_to(cache.positions[None], shape)
                cache = dataclasses.replace(cache, positions=positions)
            layers = unstack_layers(cache, len(indices)) or []
            for index, layer in zip(indices, layers, strict=True):
                self._put(index, layer)
        return self.entries

    def _indices(self, kind: Kind) -> list[int]:
        return [i for i, spec in enumerate(self.owners) if spec.kind == kind]

    def _native(self, index: int) -> Any:
        """Return an entry as a cache of one layer, without the leading axis."""
        entry, spec = self.entries[index], self.owners[index]
        if not isinstance(entry, LayerCache):
            return PagedPool(to_storage(ops.from_tpu_layout(entry)))
        short = self.capacity is None or entry.positions.shape[1] < self.capacity
        k, v = (x if isinstance(x, Int8) else to_storage(x) for x in (entry.k, entry.v))
        return SlotCache(k, v, entry.positions, is_ring=spec.window is not None and short)

    def _put(self, index: int, cache: Any) -> None:
        entry = self.entries[index]
        if isinstance(entry, LayerCache):
            k, v = (_from_storage(x, old) for x, old in ((cache.k, entry.k), (cache.v, entry.v)))
            self.entries[index] = LayerCache(k, v, cache.positions)
        else:
            self.entries[index] = _from_storage(
                ops.to_tpu_layout(cache.pages, entry.shape[3]), entry
            )


def _lift(cache: Any) -> Any:
    stack = jax.tree.map(lambda x: x[None], cache)
    if isinstance(cache, PagedPool):
        return stack
    return dataclasses.replace(stack, positions=cache.positions)


def _check(index: int, entry: Any, spec: LayerSpec, batch: int) -> None:
    heads, size = spec.num_key_value_heads, spec.head_dim
    if isinstance(entry, LayerCache):
        k, v = (x.codes if isinstance(x, Int8) else x for x in (entry.k, entry.v))
        slots = entry.positions.shape[-1]
        if not k.shape == v.shape == (batch, slots, heads, size):
            raise ValueError(
                f"kv_caches[{index}]: expected k and v of [{batch}, {slots}, {heads}, {size}] for "
                f"positions {list(entry.positions.shape)}, got {list(k.shape)} and {list(v.shape)}"
            )
        return
    if not isinstance(entry, jax.Array):
        raise TypeError(
            f"kv_caches[{index}] must be a LayerCache(k, v, positions) or one array of pages, "
            f"got {type(entry).__name__}"
        )
    # tpu-inference: [blocks, block_size, 2K / packing, packing, head_dim padded to 128].
    wide = entry.ndim == 5 and entry.shape[2] * entry.shape[3] >= 2 * heads
    if not wide or entry.shape[4] < size:
        raise ValueError(
            f"kv_caches[{index}]: expected pages [blocks, block_size, 2K / packing, packing, H] "
            f"with 2K >= {2 * heads} and H >= {size}, got {list(entry.shape)}"
        )


def _from_storage(stored: Any, like: Any) -> Array | Int8:
    """Undo `to_storage`: give the values back in the caller's own dtype."""
    return stored if isinstance(like, Int8) else decode(stored, like.dtype)
