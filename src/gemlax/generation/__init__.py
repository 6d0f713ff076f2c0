"""What a caller asks for, and what it gets: settings, completions, streams, conversations.

A call becomes one `engine.Request` for each prompt; their answers are put together from the events
of the engine.
"""

from gemlax.generation.answers import Completion, Stream, TokenLogprob
from gemlax.generation.prompts import Prompt, as_ids, check_ids, read_prompts, spelled_marker
from gemlax.generation.requests import RequestBatch
from gemlax.generation.session import Reply, Session
from gemlax.generation.settings import SamplingSettings, read_settings

__all__ = [
    "Completion",
    "Prompt",
    "Reply",
    "RequestBatch",
    "SamplingSettings",
    "Session",
    "Stream",
    "TokenLogprob",
    "as_ids",
    "check_ids",
    "read_prompts",
    "read_settings",
    "spelled_marker",
]
