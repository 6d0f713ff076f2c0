"""OpenAI's text completions: POST /v1/completions, with what lm-eval needs of it."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gemlax.serve.body import (
    LEAST_LOGPROB,
    JsonObject,
    endpoint,
    json_response,
    key_id,
    openai_error,
    random_id,
    read,
    refuse,
)
from gemlax.serve.openai_fields import (
    Shared,
    data_event,
    finish,
    shared_arguments,
    stream_events,
    usage_body,
)
from gemlax.serve.parts import failure
from gemlax.serve.sse import EventStream
from gemlax.serve.work import (
    Answers,
    CompletionRequest,
    Kitchen,
    TokenLogprob,
    Update,
    Usage,
)

__all__ = ["CompletionBody", "completion_request", "routes"]

# OpenAI's and vLLM's.
MAX_TOKENS = 16


class CompletionBody(Shared):
    """The body of a request."""

    prompt: str | list[str | int | list[int]] | None = None
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None


def routes(kitchen: Kitchen) -> list[Route]:
    """Return the route of the API."""

    async def complete(request: Request, body: bytes) -> Response:
        asked = read(body, CompletionBody)
        answers = await kitchen.complete(completion_request(asked, key_id(request)))
        writer = _Writer(answers, asked)
        if asked.stream:
            return EventStream(stream_events(answers, writer), answers)
        return json_response(await _whole(answers, writer))

    return [Route("/v1/completions", endpoint(complete, openai_error), methods=["POST"])]


def completion_request(asked: CompletionBody, key_id: str) -> CompletionRequest:
    """Return what is asked as the kitchen takes it; raise ServeError for what cannot be done."""
    if asked.suffix:
        refuse("suffix", "this model cannot fill in a middle")
    max_tokens = MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    if max_tokens == 0 and not asked.echo:
        refuse("max_tokens", "0 gives nothing unless echo is true")
    return CompletionRequest(
        prompts=_prompts(asked.prompt),
        echo=bool(asked.echo),
        max_tokens_zero=max_tokens == 0,
        logprobs=asked.logprobs,
        **shared_arguments(asked, None if max_tokens == -1 else max_tokens, key_id),
    )


def _prompts(prompt: str | Sequence[object] | None) -> list[str | list[int]]:
    """Return the prompts; a list of ids is one."""
    if prompt is None or len(prompt) == 0:
        refuse("prompt", "this field is required, and cannot be empty")
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(one, int) for one in prompt):
        return [list(prompt)]  # type: ignore[arg-type]
    if any(isinstance(one, int) for one in prompt):
        refuse("prompt", "a list holds ids, or else texts and lists of ids")
    if not all(one for one in prompt):
        refuse("prompt", "a prompt cannot be empty")
    return list(prompt)  # type: ignore[arg-type]


class _Writer:
    """Writes the answers, as chunks while they come or as one body."""

    def __init__(self, answers: Answers, asked: CompletionBody):
        options = asked.stream_options
        self.shows_usage = bool(options and options.include_usage)
        self._continuous = bool(options and options.continuous_usage_stats)
        self._logprobs = asked.logprobs is not None
        self._n = asked.n or 1
        self._head: JsonObject = {
            "id": random_id("cmpl-"), "object": "text_completion", "created": int(time.time()),
            "model": answers.model, "system_fingerprint": None,
        }  # fmt: skip
        self.usages = [
            Usage(prompt=len(answers.prompts[index // self._n]))
            for index in range(answers.num_answers)
        ]
        self._sizes = [0] * answers.num_answers  # characters that tokens gave

    def choice(self, update: Update) -> JsonObject:
        """Return an update as a choice."""
        text = "".join(delta.text for delta in update.deltas if delta.kind == "content")
        index = update.index
        self.usages[index] = update.usage
        shown = self._shown(index, update.logprobs) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": shown, **finish(update)}

    def _shown(self, index: int, logprobs: Sequence[TokenLogprob]) -> JsonObject:
        offsets = []
        for one in logprobs:
            offsets.append(self._sizes[index])
            self._sizes[index] += len(one.data.decode("utf-8", "replace"))
        return {
            "tokens": [one.text for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [_top(one) for one in logprobs],
            "text_offset": offsets,
        }

    def usage(self) -> JsonObject:
        """Return what the answers took."""
        return usage_body(self.usages, self._n)

    def opening(self) -> Iterator[bytes]:
        """Yield nothing: a choice begins with its first text."""
        yield from ()

    def take(self, update: Update) -> Iterator[bytes]:
        """Yield the chunk of an update, unless it says nothing."""
        choice = self.choice(update)
        if update.finish_reason == "error":
            return
        if choice["text"] or update.logprobs or update.finish_reason:
            body = {**self._head, "choices": [choice]}
            if self.shows_usage:
                body["usage"] = self.usage() if self._continuous else None
            yield data_event(body)

    def last(self) -> bytes:
        """Return the chunk with what the answers took."""
        return data_event({**self._head, "choices": [], "usage": self.usage()})

    def body(self, choices: list[JsonObject]) -> JsonObject:
        """Return the whole of the answers."""
        return {**self._head, "choices": choices, "usage": self.usage()}


def _finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON can write; None for the first token of a prompt."""
    if logprob is None or logprob != logprob:
        return None
    return max(logprob, LEAST_LOGPROB)


def _top(one: TokenLogprob) -> dict[str, float | None] | None:
    """Return the likeliest tokens by text, and the token itself."""
    if _finite(one.logprob) is None:
        return None
    top: dict[str, float | None] = {}
    for other in (*one.top, one):
        top.setdefault(other.text, _finite(other.logprob))
    return top


async def _whole(answers: Answers, writer: _Writer) -> JsonObject:
    updates: list[list[Update]] = [[] for _ in range(answers.num_answers)]
    try:
        async for update in answers:
            updates[update.index].append(update)
            if error := failure(update):
                raise error
    finally:
        await answers.cancel()
    return writer.body([writer.choice(_joined(one)) for one in updates])


def _joined(updates: list[Update]) -> Update:
    return dataclasses.replace(
        updates[-1],
        deltas=[delta for update in updates for delta in update.deltas],
        logprobs=[logprob for update in updates for logprob in update.logprobs],
    )
