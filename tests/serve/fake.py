"""A kitchen that answers by script, and how its protocols are called without a socket."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import httpx2
from starlette.applications import Starlette

from gemlax.serve import anthropic, responses
from gemlax.serve.work import (
    ChatRequest,
    CompletionRequest,
    Delta,
    FinishReason,
    ServeError,
    Update,
    Usage,
)

T = TypeVar("T")
# What a script is made of: updates, errors that are raised, and events that are waited for.
Script = Iterable[Update | Exception | asyncio.Event]

SIGNING_KEY = b"a key of tests"
SECONDS = 10  # the most that a test waits


def content(*pieces: str, index: int = 0) -> list[Update]:
    """Text in as many updates."""
    return [Update(index, [Delta("content", piece)], tokens=[1]) for piece in pieces]


def reasoning(*pieces: str, index: int = 0) -> list[Update]:
    """Reasoning in as many updates."""
    return [Update(index, [Delta("reasoning", piece)], tokens=[1]) for piece in pieces]


def call(name: str, *pieces: str, index: int = 0) -> list[Update]:
    """A tool call, its name first, then the JSON of its arguments piece by piece."""
    deltas = [Delta("call", name), *(Delta("arguments", piece) for piece in pieces)]
    return [Update(index, [delta], tokens=[1]) for delta in deltas]


def end(
    reason: FinishReason = "stop",
    *,
    index: int = 0,
    stop: str | int | None = None,
    usage: Usage | None = None,
    error: ServeError | None = None,
) -> Update:
    """The last update of an answer."""
    usage = usage or Usage(prompt=5, cached=2, completion=3)
    return Update(index, usage=usage, finish_reason=reason, stop=stop, error=error)


class FakeAnswers:
    """Answers by script.

    Attributes:
        cancels: how often they were cancelled.
        taken: updates that were handed out.
    """

    def __init__(self, script: Script, prompts: Sequence[Sequence[int]], n: int, model: str):
        self._script, self._cancelled = script, asyncio.Event()
        self.prompts, self.num_answers, self.model = prompts, len(prompts) * n, model
        self.cancels, self.taken = 0, 0

    async def __aiter__(self) -> AsyncIterator[Update]:
        for item in self._script:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, asyncio.Event):
                await either(item.wait(), self._cancelled.wait())
            if self._cancelled.is_set():
                return
            if isinstance(item, Update):
                self.taken += 1
                yield item
                await asyncio.sleep(0)

    async def cancel(self) -> None:
        self.cancels += 1
        self._cancelled.set()


class FakeKitchen:
    """Answers every request by the same script.

    Attributes:
        requests: what was asked, in order.
        answers: what was admitted, in order.
        error: is raised instead of admitting.
        gate: is waited for before admitting; the waits that were cancelled are counted.
    """

    def __init__(
        self,
        script: Script = (),
        *,
        error: Exception | None = None,
        gate: asyncio.Event | None = None,
        prompts: Sequence[Sequence[int]] = ((2, 3, 5, 7, 11),),
        model: str = "gemma",
    ):
        self._script = list(script) or [*content("Hello", " there"), end()]
        self._prompts, self._model = prompts, model
        self.error, self.gate, self.cancelled_waits = error, gate, 0
        self.requests: list[ChatRequest | CompletionRequest] = []
        self.answers: list[FakeAnswers] = []

    async def chat(self, request: ChatRequest) -> FakeAnswers:
        return await self._admit(request, self._prompts)

    async def complete(self, request: CompletionRequest) -> FakeAnswers:
        return await self._admit(request, self._prompts)

    async def count(self, request: ChatRequest) -> int:
        self.requests.append(request)
        if self.error:
            raise self.error
        return sum(map(len, self._prompts))

    async def _admit(
        self, request: ChatRequest | CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> FakeAnswers:
        self.requests.append(request)
        if self.gate:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled_waits += 1
                raise
        if self.error:
            raise self.error
        self.answers.append(FakeAnswers(self._script, prompts, request.n, self._model))
        return self.answers[-1]

    @property
    def asked(self) -> Any:
        """The only request."""
        (request,) = self.requests
        return request


def app_of(kitchen: Any) -> Starlette:
    """The protocols before a kitchen, without what stands before them in a server."""
    routes = anthropic.routes(kitchen, SIGNING_KEY) + responses.routes(kitchen)
    return Starlette(routes=routes)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, which must not take long."""
    return asyncio.run(asyncio.wait_for(work, SECONDS))


async def either(*works: Awaitable[Any]) -> None:
    """Wait for the first to end and cancel the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def post(kitchen: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
    """POST a body, of JSON unless it is bytes, and return the response."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app_of(kitchen), raise_app_exceptions=True)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(path, content=content, headers=headers)

    return run(ask())


def events_of(response: Any) -> list[dict[str, Any]]:
    """The events of a stream. Each has its type also as its name."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if lines:
            events.append(json.loads(lines["data"]))
            assert events[-1]["type"] == lines["event"]
    return events


class Caller:
    """A client of one request that can leave at any moment; `sent` is what it was sent so far."""

    def __init__(self, kitchen: Any, path: str, body: Any):
        self.sent = b""
        self._body, self._gone = json.dumps(body).encode(), asyncio.Event()
        self._has_sent_body, self._changed = False, asyncio.Event()
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "http_version": "1.1", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [], "scheme": "http", "root_path": "", "client": None, "server": None,
        }  # fmt: skip
        self.done = asyncio.ensure_future(app_of(kitchen)(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._has_sent_body:
            self._has_sent_body = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent += message.get("body", b"")
        self._changed.set()

    async def leave(self) -> None:
        """Disconnect, and wait until the server is done with it."""
        self._gone.set()
        await self.done

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds, looking whenever bytes come and every few milliseconds."""
        while not condition():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.005)
