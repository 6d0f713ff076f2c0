"""What uvicorn does not do: deadlines, sizes and caps, and whatever holds for every response."""

import asyncio
import logging
from typing import cast

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from gemlax.serve import anthropic
from gemlax.serve.body import openai_error, openai_error_body, request_id
from gemlax.serve.jobs import JOBS, Job
from gemlax.serve.options import ServeOptions
from gemlax.serve.security import Gate
from gemlax.serve.work import ServeError

__all__ = ["Front", "guarded_protocol", "respond"]

_log = logging.getLogger(__name__)
MAX_HEADERS = 65_536
ANTHROPIC = "/v1/messages"
TOO_MANY = openai_error_body(
    ServeError(503, "too many connections; try again later", code="connections")
)


def respond(request: Request, error: ServeError) -> Response:
    """Return an error in the shape of the API whose path was asked for."""
    if request.url.path.startswith(ANTHROPIC):
        return anthropic.error_response(request, error)
    return openai_error(request, error)


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class Front:
    """Stands before the routes: checks, reads the body, and answers for what fails.

    Whatever becomes of a request, the jobs that it started end with it.
    """

    def __init__(self, app: ASGIApp, gate: Gate, options: ServeOptions):
        self._app, self._gate, self._options = app, gate, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        scope.setdefault("app", self)  # routes then raise what they do not have
        sender = _Sender(send, self._options.write_timeout)
        request = Request(scope, receive)
        jobs: list[Job] = []
        token = JOBS.set(jobs)
        try:
            sender.extra = [
                (b"x-request-id", request_id(request).encode()),
                (b"x-content-type-options", b"nosniff"),
                *self._gate.cors(headers),
            ]
            await self._answer(scope, receive, sender, headers)
        except (ClientGone, OSError):
            _log.debug("a client has left")
        except Exception as error:
            await self._fail(request, sender, error)
        finally:
            for job in jobs:
                job.cancel_now()
            JOBS.reset(token)

    async def _answer(
        self, scope: Scope, receive: Receive, sender: "_Sender", headers: dict[bytes, bytes]
    ) -> None:
        if scope["method"] == "OPTIONS" and (more := self._gate.preflight(headers)) is not None:
            sender.extra += [header for header in more if header not in sender.extra]
            await Response(status_code=204 if more else 403)(scope, receive, sender)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            raise ServeError(431, f"the headers have more than {MAX_HEADERS} bytes")
        key = self._gate.check(scope["method"], scope["path"], headers)
        scope.setdefault("state", {})["key_id"] = key
        body = await self._body(receive, headers)
        await self._app(scope, _replayed(body, receive), sender)

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """Return the whole body, in time and not too large."""
        max_bytes, length = self._options.max_body, headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in headers:
            return b""
        too_large = ServeError(
            413, f"the body has more than {max_bytes} bytes", code="body_too_large"
        )
        if length is not None and length.isdigit() and int(length) > max_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._options.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > max_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self._options.body_timeout
            raise ServeError(408, f"the body did not come within {seconds:g} s") from None

    async def _fail(self, request: Request, sender: "_Sender", error: Exception) -> None:
        """Answer with an error, unless an answer has begun."""
        if isinstance(error, HTTPException):
            texts = {404: "there is no such path", 405: "this path has another method"}
            error = ServeError(error.status_code, texts.get(error.status_code, error.detail))
        if not isinstance(error, ServeError):
            _log.error("request %s failed", request_id(request), exc_info=error)
            error = ServeError(500, "the server failed at this request")
        if sender.has_begun:
            return
        if error.status in (408, 413, 431):  # what else was sent is not read
            sender.extra.append((b"connection", b"close"))
        try:
            await respond(request, error)(request.scope, request.receive, sender)
        except OSError:
            _log.debug("a client has left")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read already, and then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class _Sender:
    """Sends, with headers of every response and a bound on how long a client takes.

    Attributes:
        extra: headers to be added.
        has_begun: a status was sent.
    """

    def __init__(self, send: Send, timeout: float):
        self._send, self._timeout = send, timeout
        self.extra: list[tuple[bytes, bytes]] = []
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            names = {name for name, _ in message.get("headers", ())}
            added = [header for header in self.extra if header[0] not in names]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except TimeoutError:
            raise ClientGone from None


def guarded_protocol(options: ServeOptions) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a deadline for headers and a cap on connections."""

    class Guarded(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """One connection."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            """Take a connection, unless there are too many."""
            super().connection_made(transport)
            if len(self.connections) > options.max_connections:
                body = msgspec.json.encode(TOO_MANY)
                head = (
                    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
                    b"retry-after: 1\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
                )
                cast(asyncio.WriteTransport, transport).write(head % len(body) + body)
                transport.close()
                return
            self._expect()

        def data_received(self, data: bytes) -> None:
            """Read, and wait for the rest of the headers only so long."""
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._expect_no_more()
            elif self.timer is None:
                self._expect()

        def connection_lost(self, exc: Exception | None) -> None:
            """Forget the connection."""
            self._expect_no_more()
            super().connection_lost(exc)

        def _expect(self) -> None:
            self.timer = self.loop.call_later(options.header_timeout, self._too_late)

        def _expect_no_more(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _too_late(self) -> None:
            self.timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Guarded
