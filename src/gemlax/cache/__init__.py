"""Key/value caches: what a layer attends to, and where it writes.

`stacked` holds the layers of a kind in one array (dense or ring), `pool` holds them in pages,
`listing` takes the lists of outside engines. A layer knows none of these: it gets a view, hands
in its new keys and values, and attends through what comes back.
"""

from gemlax.cache.listing import KVList, LayerCache, new_list, stack_layers, unstack_layers
from gemlax.cache.pool import PagedPool, metadata_by_kind, new_pools
from gemlax.cache.stacked import (
    Caches,
    DenseCache,
    Fresh,
    RingCache,
    holds,
    mark,
    new_caches,
    resume,
    rollback,
    rollback_rows,
    round_capacity,
    snapshot,
)

__all__ = [
    "Caches",
    "DenseCache",
    "Fresh",
    "KVList",
    "LayerCache",
    "PagedPool",
    "RingCache",
    "holds",
    "mark",
    "metadata_by_kind",
    "new_caches",
    "new_list",
    "new_pools",
    "resume",
    "rollback",
    "rollback_rows",
    "round_capacity",
    "snapshot",
    "stack_layers",
    "unstack_layers",
]
