"""The token loop: requests join and leave one running batch.

`Engine` is what callers drive: submit, step, cancel. Below it, without jax, are the scheduler
(which requests run), the allocator (which slots are free) and the drafts; on the device the state
(one row per slot) and its programs.
"""

from gemlax.engine.compiled import Counters, Programs, bucket
from gemlax.engine.drafts import MAX_DRAFTS
from gemlax.engine.engine import Engine
from gemlax.engine.prefix import PrefixCache, free_memory
from gemlax.engine.programs import MAX_STEPS
from gemlax.engine.request import STOP_PLACES, Event, FinishReason, Request, Usage

__all__ = [
    "MAX_DRAFTS",
    "MAX_STEPS",
    "STOP_PLACES",
    "Counters",
    "Engine",
    "Event",
    "FinishReason",
    "PrefixCache",
    "Programs",
    "Request",
    "Usage",
    "bucket",
    "free_memory",
]
