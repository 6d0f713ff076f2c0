"""Pure functions on arrays: the maths of Gemma, written for reading.

These are the reference versions. They know JAX and `qtensor`, and no layer, cache or model.
"""

from gemlax.ops.attention import attend, attend_blocks, causal_mask, fresh_attend
from gemlax.ops.basic import EMPTY, geglu, rms_norm, rope, softcap
from gemlax.ops.matmul import embed, linear, unembed
from gemlax.ops.moe import experts, route

__all__ = [
    "EMPTY",
    "attend",
    "attend_blocks",
    "causal_mask",
    "embed",
    "experts",
    "fresh_attend",
    "geglu",
    "linear",
    "rms_norm",
    "rope",
    "route",
    "softcap",
    "unembed",
]
