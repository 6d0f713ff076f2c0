"""What protocols and the engine's thread say to each other. No jax, no HTTP.

A protocol makes a `ChatRequest` or a `CompletionRequest` of what a client sent, and its own events
and bodies of the `Update`s that come back. It never sees an engine.
"""

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from gemlax.errors import Error
from gemlax.grammar import Grammar

__all__ = [
    "Answers",
    "ChatRequest",
    "CompletionRequest",
    "Delta",
    "FinishReason",
    "Kitchen",
    "ServeError",
    "TokenLogprob",
    "Update",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class ServeError(Error):
    """A request that gets an error instead of an answer. Each protocol has its own shape for it.

    Attributes:
        status: of HTTP.
        message: what was got, what was expected, what to do.
        param: the field of the request, as `messages[0].role`; None: no single one.
        code: OpenAI's code where it has one, as "context_length_exceeded".
        retry_after: seconds after which it may succeed; None: never, or nobody knows.
        extra: further fields of the error's body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        extra: Mapping[str, object] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.extra = retry_after, dict(extra or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shared:
    """What chats and completions have in common.

    Attributes:
        model: the name that the client gave; None: the base model.
        settings: keyword arguments of `SamplingSettings`, without `adapter` and `logprobs`.
        n: answers to one prompt.
        logprobs: how many of the likeliest tokens are reported with each token; None: nothing.
        ignore_eos: the checkpoint's own stop ids do not end an answer.
        include_stop: the stop string that ended an answer is part of it.
        grammar: what the answer must match: a spec of `gemlax.grammar`; None: anything.
        cache_salt: prompts share their cache only with prompts of the same salt.
        priority: requests of a lower number go first.
        key_id: stands for the API key, for fairness; never the key itself.
    """

    model: str | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    ignore_eos: bool = False
    include_stop: bool = False
    grammar: Grammar | None = None
    cache_salt: str = ""
    priority: int = 0
    key_id: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest(_Shared):
    """A conversation to be answered.

    Attributes:
        messages: as `Model.chat` takes them.
        tools: declarations as `Model.chat` takes them; empty: none.
        tool_choice: "none", "auto", "required", or {"name": the only one to be called}.
        parallel_tool_calls: whether an answer may call more than one.
        thinking: let the model reason first; None: the template's default.
        thinking_budget: the most tokens of reasoning; None: no bound.
        continue_final_message: as `Model.chat` takes it.
        template_args: further variables of the chat template.
    """

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] = ()
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    thinking: bool | None = None
    thinking_budget: int | None = None
    continue_final_message: bool | None = None
    template_args: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest(_Shared):
    """Prompts to be continued as they are.

    Attributes:
        prompts: texts or token ids.
        echo: the prompt is part of the answer, and its log-probabilities are reported as well.
        max_tokens_zero: nothing is generated, which `echo` alone allows.
    """

    prompts: Sequence[str | Sequence[int]]
    echo: bool = False
    max_tokens_zero: bool = False


class Delta(NamedTuple):
    """What was added to an answer.

    "content" and "reasoning" are text; "call" begins a tool call and is its name; "arguments" is a
    piece of the JSON text of the last call's arguments.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str


class TokenLogprob(NamedTuple):
    """A token with its log-probability and the likeliest ones, `top` in falling order.

    `text` shows what the token adds, with U+FFFD where it is part of a character; `data` has its
    bytes. `logprob` is None for the first token of an echoed prompt.
    """

    token: int
    text: str
    data: bytes
    logprob: float | None
    top: tuple["TokenLogprob", ...] = ()


class Usage(NamedTuple):
    """What one answer took, in tokens; `cached` of the prompt were not prefilled again."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """What a step did for one answer. The last one has a `finish_reason`.

    Attributes:
        index: of the answer: prompt * n + choice.
        stop: the stop string, or the id of the caller's `stop_ids`, that ended the answer.
        error: why the answer ends with "error".
    """

    index: int
    deltas: Sequence[Delta] = ()
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    usage: Usage = dataclasses.field(default=Usage())
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    error: ServeError | None = None


class Answers(Protocol):
    """The answers to one request on their way: one iterator over all of them.

    They were admitted: errors before that were raised by the call that returned this.

    Attributes:
        num_answers: prompts * n.
        prompts: the ids of each prompt.
        model: the name under which the model answers.
    """

    num_answers: int
    prompts: Sequence[Sequence[int]]
    model: str

    def __aiter__(self) -> AsyncIterator[Update]:
        """Yield updates until every answer has ended."""
        ...

    async def cancel(self) -> None:
        """End what still runs. Safe to call at any time, more than once."""
        ...


class Kitchen(Protocol):
    """Where requests are made into answers."""

    async def chat(self, request: ChatRequest) -> Answers:
        """Render, encode, check and admit; raise ServeError where that fails."""
        ...

    async def complete(self, request: CompletionRequest) -> Answers:
        """Likewise for prompts."""
        ...

    async def count(self, request: ChatRequest) -> int:
        """Return how many tokens the prompt of a chat has."""
        ...
