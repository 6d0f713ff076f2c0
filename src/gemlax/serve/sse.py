"""Answers that are sent as they come: server-sent events."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gemlax.serve.body import disconnected
from gemlax.serve.work import Answers

__all__ = ["EventStream", "named_event"]

# A silent stream says that it lives after this many seconds.
PING_SECONDS = 10.0


def named_event(event: dict[str, object]) -> bytes:
    """Return an event under the name of its type, without which clients drop it."""
    return b"event: %b\ndata: %b\n\n" % (str(event["type"]).encode(), msgspec.json.encode(event))


class EventStream(StreamingResponse):
    """Events of an answer, until it ends or the client is gone: then the answer is cancelled."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        answers: Answers,
        *,
        ping: bytes = b": ping\n\n",
        ping_seconds: float = PING_SECONDS,
    ):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._answers = events, answers
        self._ping, self._ping_seconds, self._last_sent = ping, ping_seconds, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events. Errors of a connection that broke are no errors."""
        gone = asyncio.ensure_future(disconnected(receive))
        sending = asyncio.ensure_future(self._send_all(send))
        try:
            await asyncio.wait({gone, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with suppress(OSError):
                    sending.result()
        finally:
            for task in (gone, sending):
                task.cancel()
            await asyncio.gather(gone, sending, return_exceptions=True)
            await self._events.aclose()
            await self._answers.cancel()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        pinging = asyncio.ensure_future(self._send_pings(send))
        try:
            async for part in self._events:
                self._last_sent = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": part, "more_body": True})
        finally:
            pinging.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pings(self, send: Send) -> None:
        """Send a ping, a whole event, whenever nothing was sent for a while."""
        clock = asyncio.get_running_loop().time
        self._last_sent = clock()
        while True:
            await asyncio.sleep(max(0.0, self._last_sent + self._ping_seconds - clock()))
            if clock() >= self._last_sent + self._ping_seconds:
                self._last_sent = clock()
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})
