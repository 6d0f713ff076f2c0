"""OpenAI's chat completions: POST /v1/chat/completions."""

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gemlax.serve.body import (
    EFFORTS,
    JsonObject,
    endpoint,
    json_response,
    key_id,
    logprob_entry,
    openai_error,
    random_id,
    read,
    refuse,
)
from gemlax.serve.openai_fields import (
    Shared,
    check_name,
    data_event,
    finish,
    shared_arguments,
    stream_events,
    usage_body,
)
from gemlax.serve.parts import Parts, failure
from gemlax.serve.sse import EventStream
from gemlax.serve.work import Answers, ChatRequest, Kitchen, TokenLogprob, Update, Usage

__all__ = ["ChatBody", "chat_request", "routes"]

MAX_TOOLS = 512


class WireMessage(msgspec.Struct):
    """A message; what else it has is ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[JsonObject] | None = None
    name: str | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None
    function_call: JsonObject | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def as_dict(self) -> JsonObject:
        """Return the fields that say something; nobody but an assistant may say nothing."""
        given = msgspec.structs.asdict(self)
        message = {name: value for name, value in given.items() if value not in (None, [])}
        message.setdefault("content", "")
        return message


class ChatBody(Shared):
    """The body of a request."""

    messages: Annotated[list[WireMessage], Meta(min_length=1)] = []  # noqa: RUF012 - of msgspec
    max_completion_tokens: Annotated[int, Meta(ge=-1)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[JsonObject], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    functions: object = None
    function_call: object = None
    reasoning_effort: str | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None
    reasoning_budget_tokens: Annotated[int, Meta(ge=-1)] | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = None
    audio: object = None


def routes(kitchen: Kitchen) -> list[Route]:
    """Return the route of the API."""

    async def complete(request: Request, body: bytes) -> Response:
        asked = read(body, ChatBody)
        chat = chat_request(asked, key_id(request))
        answers = await kitchen.chat(chat)
        writer = _Writer(answers, asked)
        if asked.stream:
            return EventStream(stream_events(answers, writer), answers)
        return json_response(await _whole(answers, writer))

    path = "/v1/chat/completions"
    return [Route(path, endpoint(complete, openai_error), methods=["POST"])]


def chat_request(asked: ChatBody, key_id: str) -> ChatRequest:
    """Return what is asked as the kitchen takes it; raise ServeError for what cannot be done."""
    if not asked.messages:
        refuse("messages", "this field is required")
    for name, value in (("functions", asked.functions), ("function_call", asked.function_call)):
        if value is not None:
            refuse(name, "use tools and tool_choice")
    if asked.audio is not None or set(asked.modalities or ()) - {"text"}:
        refuse("modalities", "this model answers in text")
    field = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = asked.max_tokens if field == "max_tokens" else asked.max_completion_tokens
    if max_tokens == 0:
        refuse(field, "at least 1")
    tools, choice = _tools(asked)
    thinking, budget, args = _thinking(asked)
    return ChatRequest(
        messages=[message.as_dict() for message in asked.messages],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        thinking=thinking,
        thinking_budget=budget,
        continue_final_message=_continues(asked),
        template_args=args,
        logprobs=_logprobs(asked),
        **shared_arguments(asked, None if max_tokens == -1 else max_tokens, key_id),
    )


def _continues(asked: ChatBody) -> bool | None:
    if asked.continue_final_message and asked.add_generation_prompt:
        refuse("continue_final_message", "add_generation_prompt says the opposite; leave one")
    if asked.add_generation_prompt is False and not asked.continue_final_message:
        refuse("add_generation_prompt", "the answer must begin; use continue_final_message")
    return False if asked.add_generation_prompt else asked.continue_final_message


def _logprobs(asked: ChatBody) -> int | None:
    if asked.logprobs:
        return asked.top_logprobs or 0
    if asked.top_logprobs:
        refuse("top_logprobs", "it needs logprobs")
    return None


def _thinking(asked: ChatBody) -> tuple[bool | None, int | None, JsonObject]:
    """Return whether to think, how many tokens at most, and what else the template is told."""
    args = dict(asked.chat_template_kwargs or {})
    thinking = args.pop("enable_thinking", None)
    if thinking is not None and not isinstance(thinking, bool):
        refuse("chat_template_kwargs.enable_thinking", "it must be true or false")
    budget = None
    effort = asked.reasoning_effort
    if effort is not None:
        if effort not in EFFORTS:
            refuse("reasoning_effort", f"one of {', '.join(EFFORTS)}")
        thinking = effort != "none"
        budget = EFFORTS[effort] if thinking else None
    tokens = asked.thinking_token_budget
    tokens = asked.reasoning_budget_tokens if tokens is None else tokens
    if tokens is not None and tokens >= 0:
        budget, thinking = (None, False) if tokens == 0 else (tokens, thinking)
    return thinking, budget, args


def _tools(
    asked: ChatBody,
) -> tuple[list[JsonObject], Literal["none", "auto", "required"] | dict[str, str]]:
    tools, names = asked.tools or [], set()
    for i, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            refuse(f"tools[{i}].type", "only functions are supported")
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            refuse(f"tools[{i}].function", "it must be an object")
        name = check_name(function.get("name"), f"tools[{i}].function.name")
        if name in names:
            refuse(f"tools[{i}].function.name", f"two tools are called {name[:64]!r}")
        names.add(name)
    choice = asked.tool_choice
    if choice is None or choice == "auto":
        return tools, "auto"
    if choice == "none":
        return tools, "none"
    if not tools:
        refuse("tool_choice", "there are no tools to call")
    if choice == "required":
        return tools, "required"
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or function.get("name") not in names:
        refuse("tool_choice", "none, auto, required, or a function with the name of a tool")
    return tools, {"name": function["name"]}


class _Writer:
    """Writes the answers, as chunks while they come or as one body."""

    def __init__(self, answers: Answers, asked: ChatBody):
        options = asked.stream_options
        self.shows_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._logprobs = bool(asked.logprobs)
        self._n = answers.num_answers
        self._head: JsonObject = {
            "id": random_id("chatcmpl-"), "object": "chat.completion.chunk",
            "created": int(time.time()), "model": answers.model, "system_fingerprint": None,
        }  # fmt: skip
        self.usages = [Usage(prompt=len(answers.prompts[0]))] * self._n
        self._calls = [0] * self._n

    def opening(self) -> Iterator[bytes]:
        """Yield the first chunk of each choice, in order: clients append choices as they come."""
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def take(self, update: Update) -> Iterator[bytes]:
        """Yield the chunks of an update."""
        index = update.index
        self.usages[index] = update.usage
        deltas = [self._delta(index, kind, text) for kind, text in update.deltas]
        logprobs = update.logprobs if self._logprobs else ()
        if logprobs and not deltas:
            deltas = [{}]
        for delta in deltas:
            yield self._chunk(index, delta, logprobs)
            logprobs = ()
        if update.finish_reason not in (None, "error"):
            yield self._chunk(index, {}, (), **finish(update))

    def last(self) -> bytes:
        """Return the chunk with what the answers took."""
        return data_event({**self._head, "choices": [], "usage": self._usage()})

    def _usage(self) -> JsonObject:
        return usage_body(self.usages, self._n)

    def _delta(self, index: int, kind: str, text: str) -> JsonObject:
        if kind == "content":
            return {"content": text}
        if kind == "reasoning":
            return {"reasoning": text, "reasoning_content": text}
        if kind == "call":
            self._calls[index] += 1
            head = {"id": random_id("call_"), "type": "function"}
            function = {"name": text, "arguments": ""}
            return {"tool_calls": [{"index": self._calls[index] - 1, **head, "function": function}]}
        function = {"arguments": text}
        return {"tool_calls": [{"index": self._calls[index] - 1, "function": function}]}

    def _chunk(
        self,
        index: int,
        delta: JsonObject,
        logprobs: Iterator[TokenLogprob] | tuple[()] | object = (),
        **ending: object,
    ) -> bytes:
        choice: JsonObject = {"index": index, "delta": delta, "logprobs": None}
        if logprobs:
            choice["logprobs"] = _logprobs_body(logprobs)
        choice |= {"finish_reason": None, **ending}
        body = {**self._head, "choices": [choice]}
        if self.shows_usage:
            body["usage"] = self._usage() if self._continuous else None
        return data_event(body)

    def body(self, parts: list[Parts], logprobs: list[list[TokenLogprob]]) -> JsonObject:
        """Return the whole of the answers."""
        self.usages = [one.usage for one in parts]
        choices = []
        for index, one in enumerate(parts):
            assert one.last is not None
            shown = _logprobs_body(logprobs[index]) if self._logprobs else None
            message = _message(one)
            choices.append(
                {"index": index, "message": message, "logprobs": shown, **finish(one.last)}
            )
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self._usage()}


def _logprobs_body(logprobs: object) -> JsonObject:
    assert isinstance(logprobs, list | tuple)
    return {"content": [logprob_entry(one) for one in logprobs], "refusal": None}


def _message(answer: Parts) -> JsonObject:
    """Return the message of a whole answer. `tool_calls` is there only where there are some."""
    texts = {
        kind: "".join(part.text for part in answer.parts if part.kind == kind)
        for kind in ("content", "reasoning")
    }
    calls = [
        {
            "id": f"call_{part.key}",
            "type": "function",
            "function": {"name": part.name, "arguments": part.text},
        }
        for part in answer.parts
        if part.kind == "call"
    ]
    content = texts["content"] or (None if calls else "")
    message: JsonObject = {"role": "assistant", "content": content, "refusal": None}
    if texts["reasoning"]:
        message |= {"reasoning": texts["reasoning"], "reasoning_content": texts["reasoning"]}
    return message | ({"tool_calls": calls} if calls else {})


async def _whole(answers: Answers, writer: _Writer) -> JsonObject:
    parts = [Parts() for _ in range(answers.num_answers)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in parts]
    try:
        async for update in answers:
            logprobs[update.index] += update.logprobs
            for _ in parts[update.index].take(update):
                pass
            if error := failure(update):
                raise error
    finally:
        await answers.cancel()
    return writer.body(parts, logprobs)
