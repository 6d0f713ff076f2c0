"""Pure functions on arrays: the maths of Gemma, written for reading.

These are the reference versions. They know JAX and `qtensor`, and no layer, cache or model.
"""

from gemlax.ops import cpu
from gemlax.ops.attention import attend, attend_blocks, causal_mask, fresh_attend
from gemlax.ops.backend import backend, check_compiles
from gemlax.ops.basic import EMPTY, geglu, rms_norm, rope, softcap
from gemlax.ops.cpu import Implementation, implementation
from gemlax.ops.crossentropy import Head, chunked_logprobs
from gemlax.ops.matmul import LowRank, add_low_rank, embed, linear, linears, unembed, watched
from gemlax.ops.moe import experts, route
from gemlax.ops.paged import (
    AttentionMetadata,
    from_tpu_layout,
    paged_attend,
    to_tpu_layout,
    write_pages,
)

__all__ = [
    "EMPTY",
    "AttentionMetadata",
    "Head",
    "Implementation",
    "LowRank",
    "add_low_rank",
    "attend",
    "attend_blocks",
    "backend",
    "causal_mask",
    "check_compiles",
    "chunked_logprobs",
    "cpu",
    "embed",
    "experts",
    "fresh_attend",
    "from_tpu_layout",
    "geglu",
    "implementation",
    "linear",
    "linears",
    "paged_attend",
    "rms_norm",
    "rope",
    "route",
    "softcap",
    "to_tpu_layout",
    "unembed",
    "watched",
    "write_pages",
]
