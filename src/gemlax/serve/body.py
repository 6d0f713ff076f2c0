"""What every protocol reads and answers alike: bodies, errors, ids, who asks and who has left."""

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gemlax.errors import RequestError
from gemlax.grammar import Grammar, JsonSchema
from gemlax.serve.work import ServeError, TokenLogprob

__all__ = [
    "EFFORTS",
    "Handler",
    "JsonObject",
    "convert",
    "disconnected",
    "endpoint",
    "json_response",
    "json_schema_grammar",
    "key_id",
    "logprob_entry",
    "openai_error",
    "openai_error_body",
    "random_id",
    "read",
    "refuse",
    "request_id",
    "retry_headers",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
JsonObject = dict[str, Any]
Handler = Callable[[Request, bytes], Coroutine[object, None, Response]]

# How many tokens of reasoning an effort allows; None: no bound.
EFFORTS: dict[str, int | None] = {
    "none": 0,
    "minimal": 512,
    "low": 1024,
    "medium": 4096,
    "high": 16384,
    "xhigh": None,
    "max": None,
}

# The most characters of an error that quotes what was sent.
MAX_MESSAGE = 300
# JSON has no infinity: what a token that cannot come is reported with. vLLM's number.
LEAST_LOGPROB = -9999.0
# What the client is called when it is gone before the answer; nothing is sent. nginx's number.
CLIENT_GONE = 499

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
PLACE = re.compile(r" - at `\$?\.?(.*)`$")
MISSING = re.compile(r"Object missing required field `(.*?)`")
UNKNOWN = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)


def refuse(param: str, message: str) -> NoReturn:
    """Raise the error of a field that is wrong or cannot be honoured."""
    raise ServeError(400, f"{param}: {message}"[:MAX_MESSAGE], param=param)


def read(body: bytes, form: type[T]) -> T:
    """Return a body of JSON as a Struct; raise ServeError with the path of what is wrong."""
    try:
        return msgspec.json.decode(body, type=form)
    except msgspec.ValidationError as error:
        raise _as_wrong_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        message = f"the body is not JSON: {reason}"[:MAX_MESSAGE]
        raise ServeError(400, message, code="invalid_json") from None


def convert(value: object, form: type[T]) -> T:
    """Return what JSON was read into as a Struct; raise ServeError likewise."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise _as_wrong_field(str(error)) from None


def _as_wrong_field(text: str) -> ServeError:
    place = PLACE.search(text)
    path, reason = (place[1], text[: place.start()]) if place else ("", text)
    if missing := MISSING.fullmatch(reason):
        path, reason = f"{path}.{missing[1]}".lstrip("."), "this field is required"
    elif unknown := UNKNOWN.fullmatch(reason):
        reason = f"{unknown[1][:100]} is not supported"
    message = f"{path or 'the body'}: {reason}"[:MAX_MESSAGE]
    return ServeError(400, message, param=path[:MAX_MESSAGE] or None)


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a response of JSON."""
    content = msgspec.json.encode(body)
    return Response(content, status, headers, media_type="application/json")


def openai_error_body(error: ServeError) -> JsonObject:
    """Return an error as OpenAI's APIs write it."""
    kind = ERROR_TYPES.get(error.status)
    kind = kind or ("invalid_request_error" if error.status < 500 else "server_error")
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": {**error.extra, **fields}}


def openai_error(request: Request, error: ServeError) -> Response:
    """Return an error as the response of one of OpenAI's APIs."""
    return json_response(openai_error_body(error), error.status, retry_headers(error))


def retry_headers(error: ServeError) -> dict[str, str]:
    """Return the headers that tell a client when to come again."""
    if error.retry_after is None:
        return {}
    return {"retry-after": str(max(1, round(error.retry_after)))}


def random_id(prefix: str = "") -> str:
    """Return a prefix and 24 characters that no other answer has."""
    return prefix + secrets.token_hex(12)


def request_id(request: Request) -> str:
    """Return the id of a request: the client's, if it can be shown as it is."""
    state = request.scope.setdefault("state", {})
    if "request_id" not in state:
        given = request.headers.get("x-request-id", "")
        usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        state["request_id"] = given if usable else random_id("req_")
    return str(state["request_id"])


def key_id(request: Request) -> str:
    """Return what stands for the API key; the check of keys puts it there."""
    return str(request.scope.get("state", {}).get("key_id", ""))


def json_schema_grammar(schema: JsonObject, strict: bool) -> Grammar:
    """Return the grammar of the JSON that a schema allows; `strict`: refuse unknown keywords."""
    return JsonSchema(schema, strict=strict)


def logprob_entry(token: TokenLogprob) -> JsonObject:
    """Return a token with its log-probability as OpenAI's chat APIs write it."""
    top = [_logprob(one) for one in token.top]
    return {**_logprob(token), "top_logprobs": top}


def _logprob(token: TokenLogprob) -> JsonObject:
    value = LEAST_LOGPROB if token.logprob is None else max(token.logprob, LEAST_LOGPROB)
    return {"token": token.text, "logprob": value, "bytes": list(token.data)}


def endpoint(
    handle: Handler, as_response: Callable[[Request, ServeError], Response]
) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that reads the body and stops working for a client that is gone.

    `as_response` writes errors in the shape of the API.
    """

    async def run(request: Request) -> Response:
        try:
            body = await request.body()
            return await _unless_gone(request, handle(request, body))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except ServeError as error:
            return as_response(request, error)
        except RequestError as error:
            return as_response(request, ServeError(400, str(error)))
        except Exception:
            logger.exception("request %s failed", request_id(request))
            return as_response(request, ServeError(500, "the server failed at this request"))

    return run


async def disconnected(receive: Callable[[], Awaitable[Mapping[str, object]]]) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(request: Request, work: Coroutine[object, None, Response]) -> Response:
    """Return what the work returns, or cancel it when the client is gone first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
