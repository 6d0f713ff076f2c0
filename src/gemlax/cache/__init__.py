"""Key/value caches: what a layer attends to, and where it writes.

`slots` holds the layers of a kind in one array (dense or ring), `pool` holds them in pages,
`layer_list` takes the lists of outside engines. A layer knows none of these: it gets a view, hands
in its new keys and values, and attends through what comes back.
"""

from gemlax.cache.layer_list import (
    LayerCache,
    LayerListCache,
    new_list,
    stack_layers,
    unstack_layers,
)
from gemlax.cache.pool import PagedPool, metadata_by_kind, new_pools
from gemlax.cache.slots import (
    Caches,
    Fresh,
    SlotCache,
    new_caches,
    record_positions,
    resume,
    rollback,
    round_capacity,
)

__all__ = [
    "Caches",
    "Fresh",
    "LayerCache",
    "LayerListCache",
    "PagedPool",
    "SlotCache",
    "metadata_by_kind",
    "new_caches",
    "new_list",
    "new_pools",
    "record_positions",
    "resume",
    "rollback",
    "round_capacity",
    "stack_layers",
    "unstack_layers",
]
