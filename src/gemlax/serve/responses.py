"""OpenAI's Responses API: POST /v1/responses. Nothing is stored."""

import logging
import time
from collections.abc import AsyncGenerator, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gemlax.serve.body import (
    JsonObject,
    endpoint,
    json_response,
    key_id,
    logprob_entry,
    openai_error,
    random_id,
    read,
    request_id,
)
from gemlax.serve.parts import Part, Parts, Step, failure, gather
from gemlax.serve.responses_wire import ResponsesRequest, chat_request
from gemlax.serve.sse import EventStream, named_event
from gemlax.serve.work import Answers, Kitchen, ServeError, Usage

__all__ = ["error_response", "routes"]

logger = logging.getLogger(__name__)

error_response = openai_error
ID_PREFIXES = {"content": "msg_", "reasoning": "rs_", "call": "fc_"}


def routes(kitchen: Kitchen) -> list[Route]:
    """Return the routes of the API."""

    async def responses(request: Request, body: bytes) -> Response:
        asked = read(body, ResponsesRequest)
        answers = await kitchen.chat(chat_request(asked, key_id(request)))
        answer = _Answer(asked, answers.model)
        if asked.stream:
            return EventStream(_events(answers, answer, request_id(request)), answers)
        parts = await gather(answers)
        return json_response(answer.response(parts))

    return [Route("/v1/responses", endpoint(responses, error_response), methods=["POST"])]


class _Answer:
    """Writes one answer, as events while it comes or as a whole."""

    def __init__(self, asked: ResponsesRequest, model: str):
        self._in_summary = bool(asked.reasoning and asked.reasoning.summary)
        self._created = int(time.time())
        reasoning = asked.reasoning
        self._echo: JsonObject = {
            "id": random_id("resp_"),
            "object": "response",
            "created_at": self._created,
            "background": False,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": model,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "service_tier": "default",
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": asked.format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
        }

    def response(self, parts: Parts | None = None, error: ServeError | None = None) -> JsonObject:
        """Return the response as it stands: of `parts`, or failed by an error."""
        status, details, usage = "in_progress", None, None
        if error is not None:
            status = "failed"
        elif parts and parts.last:
            cut = parts.last.finish_reason == "length"
            status = "incomplete" if cut else "completed"
            details = {"reason": "max_output_tokens"} if cut else None
        if parts and (parts.last or error):
            usage = _usage(parts.usage)
        ended = {"completed_at": int(time.time())} if status == "completed" else {}
        return {
            **self._echo,
            **ended,
            "status": status,
            "error": error and {"code": _error_code(error), "message": error.message},
            "incomplete_details": details,
            "output": [self.item(part) for part in parts.parts] if parts else [],
            "usage": usage,
        }

    def item(self, part: Part, *, is_open: bool = False) -> JsonObject:
        """Return a part as an item of the output; an open one has not yet any text."""
        status = "completed" if part.complete else "incomplete"
        item: JsonObject = {
            "id": ID_PREFIXES[part.kind] + part.key,
            "type": "message",
            "status": "in_progress" if is_open else status,
        }
        pieces = [] if is_open else [self.piece(part)]
        if part.kind == "content":
            return {**item, "role": "assistant", "content": pieces}
        if part.kind == "call":
            text = "" if is_open else part.text
            called = {"call_id": f"call_{part.key}", "name": part.name, "arguments": text}
            return {**item, "type": "function_call", **called}
        shown, hidden = ("summary", "content") if self._in_summary else ("content", "summary")
        return {**item, "type": "reasoning", shown: pieces, hidden: [], "encrypted_content": None}

    def piece(self, part: Part, *, is_open: bool = False) -> JsonObject:
        """Return the one piece of content of an item."""
        text = "" if is_open else part.text
        if part.kind == "reasoning":
            kind = "summary_text" if self._in_summary else "reasoning_text"
            return {"type": kind, "text": text}
        logprobs = [] if is_open else [logprob_entry(token) for token in part.logprobs]
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def step(self, step: Step) -> Iterator[JsonObject]:
        """Yield the events of a step of a part."""
        part = step.part
        if step.kind == "open":
            item = self.item(part, is_open=True)
            yield {"type": "response.output_item.added", "output_index": part.index, "item": item}
        name, piece, place = self._names(part)
        if step.kind == "open" and piece:
            opened = self.piece(part, is_open=True)
            yield {"type": f"response.{piece}.added", **place, "part": opened}
        elif step.kind == "grow":
            delta: JsonObject = {"type": f"response.{name}.delta", **place, "delta": step.text}
            if part.kind == "content":
                delta["logprobs"] = [logprob_entry(token) for token in step.logprobs]
            yield delta
        elif step.kind == "close":
            yield from self._close(part, name, piece, place)

    def _close(self, part: Part, name: str, piece: str, place: JsonObject) -> Iterator[JsonObject]:
        item = self.item(part)
        done: JsonObject = {"type": f"response.{name}.done", **place}
        if part.kind == "call":
            yield {**done, "name": part.name, "arguments": part.text}
        elif part.kind == "content":
            yield {**done, "text": part.text, "logprobs": self.piece(part)["logprobs"]}
        else:
            yield {**done, "text": part.text}
        if piece:
            yield {"type": f"response.{piece}.done", **place, "part": self.piece(part)}
        yield {"type": "response.output_item.done", "output_index": part.index, "item": item}

    def _names(self, part: Part) -> tuple[str, str, JsonObject]:
        """Return what a part's deltas and its piece are called, and where they belong."""
        place = {"item_id": ID_PREFIXES[part.kind] + part.key, "output_index": part.index}
        if part.kind == "call":
            return "function_call_arguments", "", place
        if part.kind == "content":
            return "output_text", "content_part", {**place, "content_index": 0}
        if self._in_summary:
            place["summary_index"] = 0
            return "reasoning_summary_text", "reasoning_summary_part", place
        return "reasoning_text", "content_part", {**place, "content_index": 0}


async def _events(answers: Answers, answer: _Answer, id: str) -> AsyncGenerator[bytes, None]:
    parts, number = Parts(), 0

    def written(events: list[JsonObject]) -> bytes:
        nonlocal number
        lines = []
        for event in events:
            lines.append(named_event({**event, "sequence_number": number}))
            number += 1
        return b"".join(lines)

    begun = answer.response()
    kinds = ("response.created", "response.in_progress")
    yield written([{"type": kind, "response": begun} for kind in kinds])
    try:
        async for update in answers:
            events = [event for step in parts.take(update) for event in answer.step(step)]
            error = failure(update)
            if update.finish_reason is not None and not error:
                response = answer.response(parts)
                events.append({"type": f"response.{response['status']}", "response": response})
            if events:
                yield written(events)
            if error:
                raise error
        if parts.last is None:
            raise ServeError(500, "the answer has no end")
    except Exception as error:
        if not isinstance(error, ServeError):
            logger.exception("request %s failed", id)
            error = ServeError(500, "the server failed at this answer")
        response = answer.response(parts, error)
        yield written([{"type": "response.failed", "response": response}])


def _error_code(error: ServeError) -> str:
    codes = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
    return codes.get(error.status, "server_error")


def _usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
