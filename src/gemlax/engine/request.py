"""One request: a prompt of ids with its own settings, and what a step adds to its answer."""

import dataclasses
from typing import Any, Literal, NamedTuple

__all__ = ["STOP_PLACES", "Event", "FinishReason", "Request"]

FinishReason = Literal["stop", "length", "cancelled"]
# The most stop ids of a request: they lie in an array of this width.
STOP_PLACES = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how it is continued. Its answer depends on no other request.

    Attributes:
        prompt: token ids, at least one.
        max_length: tokens of prompt and answer at which it ends with "length".
        settings: a `sampling.Sampling` of one row.
        stop_ids: ids that end it with "stop", at most STOP_PLACES.
        adapter: its entry of the decoder's tables of adapters; 0 is none.
        num_drafts: the most tokens drafted in one step; 0 turns drafts off.
        logprobs: report log-probabilities.
    """

    prompt: tuple[int, ...]
    max_length: int
    settings: Any
    stop_ids: tuple[int, ...] = ()
    adapter: int = 0
    num_drafts: int = 0
    logprobs: bool = False


class Event(NamedTuple):
    """What one step did for one request.

    `tokens` are new, the stop token included. `logprobs`, where asked for, are (own [n],
    ids [n, 20], values [n, 20]). `finish_reason` is None while the request goes on.
    """

    request_id: int
    tokens: list[int]
    logprobs: tuple[Any, Any, Any] | None = None
    finish_reason: FinishReason | None = None
