"""A client of OpenAI's API as small as can be, so that it costs little beside the server.

HTTP/1.1 over asyncio's sockets, one connection for each request. What goes wrong is a
`RequestError` in one line: it names the address, and what the server said.
"""

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import NamedTuple

from gemlax.errors import RequestError

__all__ = ["Connection", "StatusError", "Target", "request_json", "stream_events"]

_MAX_LINE = 2**16
_MAX_ERROR = 2**20
_MAX_MESSAGE = 200


class StatusError(RequestError):
    """The server answered with a status that is not 200."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Target(NamedTuple):
    """Where a server is.

    Attributes:
        prefix: of every path, as "/v1" of an address that ends so; mostly empty.
    """

    host: str
    port: int
    prefix: str = ""
    secure: bool = False
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Target":
        """Read an address such as http://localhost:8000; a "/v1" at its end is not needed."""
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise RequestError(f"--server takes an address as http://localhost:8000, got {url!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise RequestError("the API key has characters that a header cannot hold")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), prefix, secure, api_key)

    def __str__(self) -> str:
        """Return the address without the key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}"


class Connection:
    """One request and its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.status, self.headers = 0, dict[str, str]()

    async def send(self, target: Target, method: str, path: str, body: object) -> None:
        """Send a request, its body as JSON unless it is None, and read the answer's head."""
        data = b"" if body is None else json.dumps(body).encode()
        host = str(target).split("//")[1].partition("/")[0]
        lines = [f"{method} {target.prefix}{path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        if target.api_key:
            lines.append(f"Authorization: Bearer {target.api_key}")
        if data:
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        # A server that refuses a long body answers before it has read it.
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()
        first = (await self.reader.readline()).decode("latin-1").split(maxsplit=2)
        if len(first) < 2 or not first[0].startswith("HTTP/1.") or not first[1].isdigit():
            raise RequestError("it closed the connection without an answer of HTTP")
        self.status = int(first[1])
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; raise where it ends too early."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readuntil(b"\n")).partition(b";")[0], 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while piece := await self.reader.read(_MAX_LINE):
                yield piece

    async def check(self, target: Target) -> None:
        """Raise `StatusError` with the server's message unless the status is 200."""
        if self.status == 200:
            return
        body = b""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            async for piece in self.pieces():
                body += piece
                if len(body) > _MAX_ERROR:
                    break
        message = _message(body)
        if self.status in (401, 403):
            message += "; give the key with --api-key or in GEMLAX_API_KEY"
        raise StatusError(self.status, f"{target} answered {self.status}: {message}")


def _message(body: bytes) -> str:
    """Return what an error's body says, in one line."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        while isinstance(value, dict):
            value = value.get("error", value.get("message", value.get("detail", str(value))))
        text = str(value)
    return " ".join(text.split())[:_MAX_MESSAGE] or "no message"


@contextlib.asynccontextmanager
async def _connect(
    target: Target, method: str, path: str, body: object, timeout: float
) -> AsyncIterator[Connection]:
    """Send a request; errors of sockets and of the protocol become `RequestError`."""
    writer = None
    try:
        async with asyncio.timeout(timeout):
            context = ssl.create_default_context() if target.secure else None
            reader, writer = await asyncio.open_connection(
                target.host, target.port, ssl=context, limit=_MAX_LINE
            )
            connection = Connection(reader, writer)
            await connection.send(target, method, path, body)
            await connection.check(target)
            yield connection
    except TimeoutError:
        raise RequestError(f"{target} did not end its answer within {timeout:g} s") from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        if isinstance(error, ConnectionRefusedError):
            reason = "nothing listens there"
        raise RequestError(f"{target}{path}: {reason}") from error
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise RequestError(f"{target}{path}: the answer broke off") from error
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{target}{path}: the answer is malformed") from error
    finally:
        if writer is not None:
            writer.close()


async def request_json(
    target: Target, method: str, path: str, body: object = None, timeout: float = 60
) -> object:
    """Return the JSON that the server answers with."""
    async with _connect(target, method, path, body, timeout) as connection:
        return json.loads(b"".join([piece async for piece in connection.pieces()]))


async def stream_events(
    target: Target, path: str, body: Mapping[str, object], timeout: float
) -> AsyncGenerator[bytes, None]:
    """Yield the data of each server-sent event as it comes, "[DONE]" included."""
    async with _connect(target, "POST", path, body, timeout) as connection:
        line = b""
        async for piece in connection.pieces():
            *lines, line = (line + piece).split(b"\n")
            for whole in lines:
                if whole.startswith(b"data:"):
                    yield whole[5:].strip()
