"""Who may ask, and from where: keys, the Host header, origins, and headers of what is sent."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemlax.errors import RequestError
from gemlax.serve.work import ServeError

__all__ = ["Gate", "LOOPBACK", "hostname_of", "is_loopback", "read_keys"]

# What anybody may ask: whether the server lives, and the page, which holds nothing.
OPEN = ("/", "/health", "/v1/health", "/ping", "/favicon.ico")
OPEN_FOLDER = "/page/"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
METHODS = "GET, POST, OPTIONS"
MAX_AGE = "600"


def read_keys(key: str | None, file: Path | None, environment: Mapping[str, str]) -> list[str]:
    """Return the API keys of an option, of the lines of a file, and of GEMLAX_API_KEY."""
    keys = [key] if key is not None else []
    if file is not None:
        lines = file.read_text("utf-8").splitlines()
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise RequestError(f"{file} has no API key")
    if not keys and environment.get("GEMLAX_API_KEY"):
        keys = [environment["GEMLAX_API_KEY"]]
    for one in keys:
        if not (one.isascii() and one.isprintable() and one.strip() == one and one):
            raise RequestError("an API key must be printable ASCII without spaces around it")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hostname_of(header: str) -> str:
    """Return the name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.rpartition(":")[0].lower() if header.count(":") == 1 else header.lower()


class Gate:
    """Checks the headers of a request."""

    def __init__(
        self,
        keys: Iterable[str] = (),
        *,
        origins: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
    ):
        """Take up who may ask.

        Args:
            keys: API keys; none: nobody needs one.
            origins: of foreign pages that may ask; "*": all.
            hosts: names by which the server may be called; None: any.
        """
        self._keys = {_digest(key.encode()): _digest(key.encode())[:8].hex() for key in keys}
        self._origins = frozenset(origins)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    def check(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> str:
        """Return what stands for the key of a request; raise ServeError if it may not be asked."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and hostname_of(host) not in self._hosts:
            text = "this server answers only to its own name (Host); start it with --host otherwise"
            raise ServeError(403, text, code="host_not_allowed")
        origin = headers.get(b"origin", b"").decode("latin-1")
        is_foreign = bool(origin) and not self.allows(origin) and not _is_own(origin, host)
        if is_foreign and method != "GET":
            text = "pages of this origin may not ask this server; see --cors-origin"
            raise ServeError(403, text, code="origin_not_allowed")
        if not self._keys or path in OPEN or path.startswith(OPEN_FOLDER):
            return ""
        return self._key(headers)

    def _key(self, headers: Mapping[bytes, bytes]) -> str:
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        candidates = [key.strip()] if scheme.lower() == b"bearer" else []
        candidates += [headers[b"x-api-key"]] if b"x-api-key" in headers else []
        known = ""
        for candidate in candidates:
            digest = _digest(candidate)
            for key_digest, name in self._keys.items():  # all, so that time tells nothing
                if hmac.compare_digest(digest, key_digest):
                    known = name
        if not known:
            what = "this is not a key of this server" if candidates else "an API key is needed"
            text = f"{what}: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            raise ServeError(401, text, code="invalid_api_key")
        return known

    def allows(self, origin: str) -> bool:
        """Whether pages of an origin may ask."""
        return origin in self._origins or "*" in self._origins

    def cors(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """Return the headers that let a page of an allowed origin read an answer."""
        origin = headers.get(b"origin")
        if origin is None or not self.allows(origin.decode("latin-1")):
            return []
        exposed = b"x-request-id, request-id, retry-after"
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", exposed),
            (b"vary", b"Origin"),
        ]

    def preflight(self, headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]] | None:
        """Return the headers that answer a browser which asks first; None: it does not ask."""
        if b"access-control-request-method" not in headers:
            return None
        cors = self.cors(headers)
        if not cors:
            return []
        wanted = headers.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            *cors,
            (b"access-control-allow-methods", METHODS.encode()),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", MAX_AGE.encode()),
        ]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_own(origin: str, host: str) -> bool:
    """Whether a page came from this server itself."""
    return bool(host) and origin.partition("://")[2].lower() == host.lower()
