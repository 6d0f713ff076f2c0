"""One request: a prompt of ids with its own settings, and what a step adds to its answer."""

import dataclasses
from typing import Any, Literal, NamedTuple

from gemlax.grammar import Constraint

__all__ = ["STOP_PLACES", "Event", "FinishReason", "Request", "Usage"]

FinishReason = Literal["stop", "length", "error"]
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
        salt: its beginning is shared only with requests of the same salt.
        snapshot_at: how many tokens of the prompt others are likely to begin with: the end of the
            system text and tools, of the last user turn. Only hints, for the prefix cache.
        constraint: what may come, from the first token on; the engine works on a copy.
    """

    prompt: tuple[int, ...]
    max_length: int
    settings: Any
    stop_ids: tuple[int, ...] = ()
    adapter: int = 0
    num_drafts: int = 0
    logprobs: bool = False
    salt: str = ""
    snapshot_at: tuple[int, ...] = ()
    constraint: Constraint | None = None

    @property
    def origin(self) -> tuple[int, str]:
        """What must agree besides the tokens, so that another's keys and values can be used."""
        return self.adapter, self.salt


class Usage(NamedTuple):
    """What a request has taken so far.

    `num_cached_tokens` of the prompt were in the cache already; `num_steps` decoded `num_tokens`.
    The seconds are those of the calls that it took part in, without compilation.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def num_prefilled_tokens(self) -> int:
        """How many tokens were prefilled: the first decode step takes the last one."""
        return max(self.num_prompt_tokens - 1 - self.num_cached_tokens, 0)


class Event(NamedTuple):
    """What one step did for one request.

    `tokens` are new, the stop token included; `usage` includes this step. `logprobs`, where asked
    for, are (own [n], ids [n, 20], values [n, 20]). `finish_reason` is None while it goes on;
    with "error", `error` says why the constraint lets nothing more come.
    """

    request_id: int
    tokens: list[int]
    usage: Usage
    logprobs: tuple[Any, Any, Any] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
