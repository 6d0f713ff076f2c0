"""Pure functions on arrays: the maths of Gemma, written for reading.

These are the reference versions. They know JAX and `qtensor`, and no layer, cache or model.
"""

from gemlax.ops import cpu
from gemlax.ops.attention import attend, attend_blocks, causal_mask, fresh_attend
from gemlax.ops.backend import (
    Backend,
    check_compiles,
    choose,
    fault,
    implementation,
    kernels,
    kernels_in_use,
    platform,
)
from gemlax.ops.basic import EMPTY, geglu, rms_norm, rope, softcap
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
    "Backend",
    "Head",
    "LowRank",
    "add_low_rank",
    "attend",
    "attend_blocks",
    "causal_mask",
    "check_compiles",
    "choose",
    "chunked_logprobs",
    "cpu",
    "embed",
    "experts",
    "fault",
    "fresh_attend",
    "from_tpu_layout",
    "geglu",
    "implementation",
    "kernels",
    "kernels_in_use",
    "linear",
    "linears",
    "paged_attend",
    "platform",
    "rms_norm",
    "rope",
    "route",
    "softcap",
    "to_tpu_layout",
    "unembed",
    "watched",
    "write_pages",
]
