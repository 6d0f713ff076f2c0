"""The paged pool: one array of pages per kind, whose layers share the block tables.

Tokens are flat: prefill and decode tokens of many requests lie in one row, [1, T], and
`ops.AttentionMetadata` says whose each is.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from gemlax import ops
from gemlax.config import KINDS, Kind, LayerSpec, TextConfig
from gemlax.ops.storage import empty

__all__ = ["PageView", "PagedPool", "metadata_by_kind", "new_pools"]


class PagedPool(NamedTuple):
    """Pages of all layers of one kind, [n, num_blocks, block_size, 2K, H], in a stored dtype.

    Keys and values of a head alternate: k0, v0, k1, v1. Block b of layer l is page
    l * num_blocks + b of the whole, so no layer is ever sliced out. The last two axes may be
    wider than a layer needs.
    """

    pages: Any

    def layer(
        self, layer: Any, positions: Array, spec: LayerSpec, metadata: Any, rows: Any = None
    ) -> "PageView":
        """Return the view of one layer."""
        if rows is not None:
            raise ValueError("cache_rows are for stacked caches; pages have block tables")
        if metadata is None:
            raise TypeError("a cache of pages needs attention_metadata, got None")
        if positions.shape[0] != 1:
            raise ValueError(
                f"a cache of pages takes flat tokens [T] or [1, T], got {positions.shape[0]} rows"
            )
        return PageView(self, layer, positions, metadata, spec.num_key_value_heads)


def new_pools(
    config: TextConfig, num_blocks: int, block_size: int, dtype: Any
) -> dict[Any, PagedPool]:
    """Allocate empty pools of `num_blocks` blocks for each layer that owns keys and values."""
    pools = {}
    for spec in config.layers:
        if spec.owns_kv and spec.kind not in pools:
            shape = (num_blocks, block_size, 2 * spec.num_key_value_heads, spec.head_dim)
            pages = empty((config.plan.cache_rows(spec.kind), *shape), dtype)
            pools[spec.kind] = PagedPool(pages)
    return pools


def metadata_by_kind(config: TextConfig, metadata: Any) -> dict[Kind, Any]:
    """Return the attention metadata of each kind of layer.

    Args:
        config: says which layers are of which kind.
        metadata: one for all layers; a dict by kind; or, as tpu-inference groups them, a dict by
            layer, "layer.0" and so on, in which all layers of a kind have the same object. Layers
            that share keys and values may be left out of the last.
    """
    if not isinstance(metadata, dict):
        return dict.fromkeys(KINDS, metadata)
    if metadata.keys() == set(KINDS):
        return metadata
    names = {f"layer.{i}": spec for i, spec in enumerate(config.layers)}
    owners = {name for name, spec in names.items() if spec.owns_kv}
    if not owners <= metadata.keys() <= names.keys():
        raise TypeError(
            f"attention_metadata in a dict needs the keys {', '.join(KINDS)}, or layer.0 to "
            f"layer.{len(names) - 1}; got {', '.join(map(str, metadata)) or 'none'}"
        )
    by_kind: dict[Kind, Any] = dict.fromkeys(KINDS)
    for name, entry in metadata.items():
        kind = names[name].kind
        if by_kind[kind] is None:
            by_kind[kind] = entry
        elif by_kind[kind] is not entry:
            raise ValueError(
                f"attention_metadata[{name!r}] is another object than that of the {kind} layers "
                "before it: all layers of a kind must share one"
            )
    return by_kind


class PageView(NamedTuple):
    """A layer of a pool, for the tokens of one step."""

    cache: PagedPool
    layer: Any  # int32 scalar
    positions: Any  # [1, T]
    metadata: Any  # ops.AttentionMetadata
    num_kv_heads: int

    def update(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> "PageView":
        """Write this step's tokens into their pages, and nothing else."""
        flat = ops.write_pages(self._flat(), k[0], v[0], self.metadata, self._first_block())
        return self._replace(cache=PagedPool(flat.reshape(self.cache.pages.shape)))

    def attend(
        self, q: Float[Array, "B T N H"], *, window: int | None, scale: float
    ) -> Float[Array, "B T N H"]:
        """Attend to the pages of each token's own request."""
        out = ops.paged_attend(
            q[0],
            self._flat(),
            self.metadata,
            self._first_block(),
            num_kv_heads=self.num_kv_heads,
            window=window,
            scale=scale,
        )
        return out[None]

    def _flat(self) -> Array:
        """Return the pages of all layers in a row: a reshape, no copy."""
        return self.cache.pages.reshape(-1, *self.cache.pages.shape[2:])

    def _first_block(self) -> Array:
        return jnp.asarray(self.layer * self.cache.pages.shape[1], jnp.int32)
