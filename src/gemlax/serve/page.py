"""The page of `gemlax serve`: files of the package, with the headers that keep it to itself.

The page asks no host but the one it came from, runs no script but its own files, and may not be
framed. It is open without a key: it holds nothing, and asks for the key that its requests need.
"""

import hashlib
import importlib.resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["HEADERS", "routes"]

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

HEADERS = {
    # A browser keeps the files, but asks each time whether they are still the same.
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def routes() -> list[Route]:
    """Return GET / and GET /page/NAME for each file; they are read once, here."""
    folder = importlib.resources.files("gemlax.serve") / "page"
    files = {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.rpartition(".")[2] in _TYPES
    }
    pages = [_route(f"/page/{name}", name, body) for name, body in files.items()]
    return [_route("/", "index.html", files["index.html"]), *pages]


def _route(path: str, name: str, body: bytes) -> Route:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    media_type = _TYPES[name.rpartition(".")[2]]
    headers = {**HEADERS, "etag": etag}

    async def answer(request: Request) -> Response:
        if _matches(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    return Route(path, answer, methods=["GET"], name=path)


def _matches(condition: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return etag in tags or tags == ["*"]
