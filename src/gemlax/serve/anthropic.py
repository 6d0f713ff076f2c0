"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens."""

import logging
import secrets
from collections.abc import AsyncGenerator, Iterator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gemlax.serve.anthropic_wire import CountRequest, MessagesRequest, Signer, chat_request
from gemlax.serve.body import (
    JsonObject,
    endpoint,
    json_response,
    key_id,
    random_id,
    read,
    request_id,
    retry_headers,
)
from gemlax.serve.parts import Part, Parts, Step, failure, gather
from gemlax.serve.sse import EventStream, named_event
from gemlax.serve.work import Answers, Kitchen, ServeError, Update, Usage

__all__ = ["error_response", "routes"]

logger = logging.getLogger(__name__)

OVERLOADED = 529
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
PING = named_event({"type": "ping"})


def routes(kitchen: Kitchen, signing_key: bytes | None = None) -> list[Route]:
    """Return the routes of the API; the key signs what the model thought, None: one made now."""
    signer = Signer(signing_key or secrets.token_bytes(32))

    async def messages(request: Request, body: bytes) -> Response:
        asked = read(body, MessagesRequest)
        answers = await kitchen.chat(chat_request(asked, signer, key_id(request)))
        shows = asked.thinking is None or asked.thinking.display != "omitted"
        answer = _Answer(answers, signer, shows)
        headers = {"request-id": request_id(request)}
        if asked.stream:
            stream = EventStream(
                _events(answers, answer, headers["request-id"]), answers, ping=PING
            )
            stream.headers.update(headers)
            return stream
        return json_response(answer.body(await gather(answers)), headers=headers)

    async def count(request: Request, body: bytes) -> Response:
        asked = chat_request(read(body, CountRequest), signer, key_id(request))
        tokens = await kitchen.count(asked)
        return json_response({"input_tokens": tokens}, headers={"request-id": request_id(request)})

    paths = {"/v1/messages": messages, "/v1/messages/count_tokens": count}
    return [
        Route(path, endpoint(handle, error_response), methods=["POST"])
        for path, handle in paths.items()
    ]


def error_response(request: Request, error: ServeError) -> Response:
    """Return an error as the response of this API."""
    id = request_id(request)
    headers = {"request-id": id, **retry_headers(error)}
    return json_response(_error_body(error, id), _status(error), headers)


def _status(error: ServeError) -> int:
    """Return the status: a server that is full, loads or drains is overloaded to these clients."""
    is_load = error.status == 429 and error.code != "rate_limit_exceeded"
    return OVERLOADED if is_load or error.status == 503 else error.status


def _error_body(error: ServeError, id: str) -> JsonObject:
    status = _status(error)
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    fields = {**error.extra, "type": kind, "message": error.message}
    return {"type": "error", "error": fields, "request_id": id}


class _Answer:
    """Writes one answer, as events while it comes or as a whole."""

    def __init__(self, answers: Answers, signer: Signer, shows_thinking: bool):
        self._signer, self._shows_thinking = signer, shows_thinking
        usage = Usage(prompt=len(answers.prompts[0]))
        self._message: JsonObject = {
            "id": random_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": answers.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def start(self) -> JsonObject:
        """Return the first event."""
        return {"type": "message_start", "message": self._message}

    def step(self, step: Step) -> Iterator[JsonObject]:
        """Yield the events of a step of a part."""
        index, part = step.part.index, step.part
        if step.kind == "open":
            block = self._block(Part(index, part.kind, part.name, key=part.key))
            yield {"type": "content_block_start", "index": index, "content_block": block}
        elif step.kind == "grow":
            if delta := self._delta(part, step.text):
                yield {"type": "content_block_delta", "index": index, "delta": delta}
        else:
            if part.kind == "reasoning":
                signed = {"type": "signature_delta", "signature": self._block(part)["signature"]}
                yield {"type": "content_block_delta", "index": index, "delta": signed}
            yield {"type": "content_block_stop", "index": index}

    def end(self, update: Update) -> Iterator[JsonObject]:
        """Yield the last events."""
        usage = _usage(update.usage)
        yield {"type": "message_delta", "delta": _ending(update), "usage": usage}
        yield {"type": "message_stop"}

    def body(self, parts: Parts) -> JsonObject:
        """Return the whole answer."""
        ending = _ending(parts.last) if parts.last else {}
        blocks = [self._block(part) for part in parts.parts]
        return {**self._message, "content": blocks, **ending, "usage": _usage(parts.usage)}

    def _block(self, part: Part) -> JsonObject:
        if part.kind == "content":
            return {"type": "text", "text": part.text}
        if part.kind == "call":
            called = {"id": f"toolu_{part.key}", "name": part.name}
            return {"type": "tool_use", **called, "input": _arguments(part.text)}
        shown = part.text if self._shows_thinking else ""
        signature = self._signer.sign(shown) if part.text else ""
        return {"type": "thinking", "thinking": shown, "signature": signature}

    def _delta(self, part: Part, text: str) -> JsonObject | None:
        if part.kind == "content":
            return {"type": "text_delta", "text": text}
        if part.kind == "call":
            return {"type": "input_json_delta", "partial_json": text}
        return {"type": "thinking_delta", "thinking": text} if self._shows_thinking else None


async def _events(answers: Answers, answer: _Answer, id: str) -> AsyncGenerator[bytes, None]:
    parts = Parts()
    yield named_event(answer.start())
    try:
        async for update in answers:
            events = [event for step in parts.take(update) for event in answer.step(step)]
            error = failure(update)
            if update.finish_reason is not None and not error:
                events += answer.end(update)
            if events:
                yield b"".join(map(named_event, events))
            if error:
                raise error
        if parts.last is None:
            raise ServeError(500, "the answer has no end")
    except ServeError as error:
        yield named_event(_error_body(error, id))
    except Exception:
        logger.exception("request %s failed", id)
        yield named_event(_error_body(ServeError(500, "the server failed at this answer"), id))


def _arguments(text: str) -> object:
    """Return the arguments of a call; those of one that was cut off are empty."""
    try:
        return msgspec.json.decode(text, type=dict)
    except msgspec.MsgspecError:
        return {}


def _ending(update: Update) -> JsonObject:
    reason, sequence = "end_turn", None
    if update.finish_reason == "length":
        reason = "max_tokens"
    elif update.finish_reason == "tool_calls":
        reason = "tool_use"
    elif isinstance(update.stop, str):
        reason, sequence = "stop_sequence", update.stop
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Usage) -> JsonObject:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }
