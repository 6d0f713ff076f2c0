"""A server of OpenAI's API without a model: answers come as a test says, and when it says."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence


class FakeServer:
    """Streams a piece of text after each of `delays`; keeps what it was asked, and when it sent.

    Attributes:
        failures: how the first answers fail: "break" (the connection ends within the stream),
            "error" (an event), "garbage", or a status.
        key: the only API key that is let in; None: any.
    """

    def __init__(
        self,
        delays: Sequence[float] = (0.0, 0.0),
        *,
        failures: Sequence[str | int] = (),
        key: str | None = None,
        chunked: bool = True,
    ):
        self.delays, self.failures, self.key, self.chunked = delays, list(failures), key, chunked
        self.paths: list[str] = []
        self.bodies: list[dict] = []
        self.arrivals: list[float] = []
        self.sent: list[list[float]] = []
        self.running = self.most_running = 0
        self.server: asyncio.Server | None = None
        self.url = ""

    async def start(self) -> None:
        self.server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._route(reader, writer)
        finally:
            self.running -= 1
            writer.close()

    async def _route(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split()[1]
        headers = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in head[1:]}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.paths.append(path)
        if path == "/health":
            self._json(writer, 200, {"status": "ok"})
        elif self.key and headers.get("authorization") != f"Bearer {self.key}":
            self._json(writer, 401, {"error": {"message": "wrong key"}})
        elif path == "/v1/models":
            self._json(writer, 200, {"data": [{"id": "fake"}]})
        elif path.endswith("completions"):
            self.bodies.append(json.loads(body))
            self.arrivals.append(time.perf_counter())
            await self._complete(writer, self.bodies[-1], chat="chat" in path)
        else:
            self._json(writer, 404, {"error": {"message": f"no {path}"}})

    def _json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        kind = "Content-Type: application/json"
        head = f"HTTP/1.1 {status} X\r\n{kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    async def _complete(self, writer: asyncio.StreamWriter, body: dict, chat: bool) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if isinstance(failure, int):
            self._json(writer, failure, {"error": {"message": "as it was told"}})
            return
        if not body.get("stream"):
            text = "a" * len(self.delays)
            content = (
                {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            )
            self._json(writer, 200, {"choices": [{"index": 0, "finish_reason": "stop", **content}]})
            return
        coding = "Transfer-Encoding: chunked\r\n" if self.chunked else ""
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{coding}\r\n"
        writer.write(head.encode())
        self.sent.append([])
        if chat:
            self._event(writer, _choice(chat, {"role": "assistant", "content": ""}))
        for index, delay in enumerate(self.delays):
            await asyncio.sleep(delay)
            if failure == "break" and index == 1:
                return
            if failure == "error":
                self._event(writer, {"error": {"message": "out of luck"}})
                return
            self.sent[-1].append(time.perf_counter())
            self._event(writer, "{" if failure == "garbage" else _choice(chat, {"content": "a"}))
            await writer.drain()
        self._event(writer, _choice(chat, {}, "length"))
        usage = {"prompt_tokens": 10, "completion_tokens": len(self.delays),
                 "prompt_tokens_details": {"cached_tokens": 4}}  # fmt: skip
        self._event(writer, {"choices": [], "usage": usage})
        self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n" if self.chunked else b"")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        data = f": a comment\n\ndata: {text}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)


def _choice(chat: bool, delta: dict, finish_reason: str | None = None) -> dict:
    content = {"delta": delta} if chat else {"text": delta.get("content", "")}
    return {"choices": [{"index": 0, **content, "finish_reason": finish_reason}]}


@contextlib.contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """Run a server in a thread of its own."""
    loop, started = asyncio.new_event_loop(), threading.Event()

    def work() -> None:
        loop.run_until_complete(server.start())
        started.set()
        loop.run_forever()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _stop(server: FakeServer) -> None:
    server.server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _run() -> None:
    fake = FakeServer((0.02,) * 20, key="secret")
    await fake.start()
    print(fake.url, flush=True)
    await fake.server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_run())
