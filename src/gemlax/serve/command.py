"""`gemlax serve`: options to a server, and its life from loading to the last answer."""

import asyncio
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from gemlax.errors import Error, RequestError
from gemlax.model import Model
from gemlax.serve.app import make_app
from gemlax.serve.http import guarded_protocol
from gemlax.serve.kitchen import ModelKitchen
from gemlax.serve.options import ServeOptions
from gemlax.serve.security import LOOPBACK, Gate, is_loopback, read_keys

__all__ = ["Server", "find_adapters", "run", "served_name"]

_log = logging.getLogger(__name__)
# What a client that reads slowly gets to go on when the server ends.
_LAST_WORDS = 5
_CONTEXT = 8192


def served_name(path: str) -> str:
    """Return the name of a model for clients: the last part of its path, without `.gguf`."""
    return Path(path).name.removesuffix(".gguf") or "gemlax"


def find_adapters(folder: Path | None) -> dict[str, Path]:
    """Return the adapters in a folder: its folders that have an adapter_config.json, by name."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise Error(f"--adapter-dir: {folder} is not a folder")
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}


def make_gate(
    host: str, keys: Sequence[str], origins: Sequence[str], *, no_auth: bool = False
) -> Gate:
    """Return the gate of a server; raise Error where anybody on the network could ask."""
    if not is_loopback(host) and not keys and not no_auth:
        raise Error(
            f"--host {host} can be reached from other machines: give --api-key, --api-key-file or "
            "GEMLAX_API_KEY, or --no-auth if anybody may ask"
        )
    for origin in origins:
        if origin != "*" and (origin.count("/") != 2 or "://" not in origin):
            raise Error(f"--cors-origin {origin} must be as in https://example.org, or *")
    return Gate(keys, origins=origins, hosts=(*LOOPBACK, host) if is_loopback(host) else None)


class Server(uvicorn.Server):
    """uvicorn's server around a kitchen: drains at the first signal, ends now at the second.

    Attributes:
        address: where it answers.
    """

    def __init__(
        self,
        kitchen: ModelKitchen,
        gate: Gate,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        on_ready: Callable[[str], None] | None = None,
        on_progress: Callable[[str], None] | None = None,
    ):
        config = uvicorn.Config(
            make_app(kitchen, gate), host=host, port=port, http=guarded_protocol(kitchen.options),
            ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS, backlog=2048,
        )  # fmt: skip
        super().__init__(config)
        self._kitchen, self._host = kitchen, host
        self._on_ready, self._on_progress = on_ready, on_progress
        self._signals, self._told, self._dumped = 0, (-1, 0), False

    @property
    def address(self) -> str:
        """Where the server answers, once it has started."""
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: object) -> None:
        """Drain, or end; called for SIGINT and SIGTERM."""
        self._signals += 1
        if self._signals == 1:
            self._kitchen.worker.drain(self._kitchen.options.drain)
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look after the engine, ten times a second; return whether to end."""
        worker = self._kitchen.worker
        if worker.progress != self._told and worker.admission.state == "loading":
            self._told = worker.progress
            if self._on_progress is not None:
                self._on_progress(f"compiling: {self._told[0]} of {self._told[1]}")
        if worker.admission.state == "ready" and self._on_ready is not None:
            self._on_ready(self.address)
            self._on_ready = None
        if worker.stuck_for and not self._dumped:
            self._dumped = True
            _log.error("the engine hangs in a step; what its threads do follows")
            faulthandler.dump_traceback(file=sys.stderr)
        return worker.has_ended or await super().on_tick(counter)

    def serve_until_told(self) -> int:
        """Serve; return the exit status."""
        self._kitchen.start()
        asyncio.run(self.serve())
        worker = self._kitchen.worker
        if not self.started:
            return 1
        if self._signals < 2:
            worker.join(self._kitchen.options.drain + _LAST_WORDS)
        self._kitchen.close()
        if worker.failure:
            _log.error("%s", worker.failure)
            return 1
        return 0 if self._signals < 2 else 130


def run(
    args: Any,
    load: Callable[[dict[str, Path] | None], Model],
    model_name: str,
    write: Callable[[str], None],
    show_progress: Callable[[str], None] | None = None,
) -> int:
    """Serve as the options of the command line say; return the exit status.

    Args:
        args: those options.
        load: returns the model with these adapters; None: as it says itself.
        model_name: what --model says.
        write: prints on stdout.
        show_progress: shows how far compilation is.
    """
    keys = read_keys(args.api_key, args.api_key_file, os.environ)
    origins = args.cors_origin or []
    gate = make_gate(args.host, keys, origins, no_auth=args.no_auth)
    adapters = find_adapters(args.adapter_dir)
    begin = time.monotonic()
    model = load(adapters or None)
    limit = model.config.text.max_position_embeddings
    options = ServeOptions(
        name=args.served_model_name or served_name(model_name), slots=args.slots,
        context=min(limit, _CONTEXT) if args.context is None else args.context,
        max_queue=args.max_queue, max_queue_tokens=args.max_queue_tokens,
        cache_mb=args.cache_mb, itl_target=args.itl_target, queue_timeout=args.queue_timeout,
        request_timeout=args.request_timeout, drain=args.drain,
    )  # fmt: skip
    check_options(options)

    def ready(address: str) -> None:
        seconds = time.monotonic() - begin
        key = " -H 'Authorization: Bearer KEY'" if keys else ""
        write(
            f"gemlax serves {options.name} at {address} after {seconds:.1f} s ({options.slots} "
            f"slots of {options.context} tokens); try: curl {address}/v1/chat/completions{key} "
            """-H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": """
            """"Hello"}]}'"""
        )

    server = Server(
        ModelKitchen(model, options), gate, host=args.host, port=args.port, on_ready=ready,
        on_progress=show_progress,
    )  # fmt: skip
    try:
        return server.serve_until_told()
    except OSError as error:
        raise Error(f"cannot listen on {args.host}:{args.port}: {error.strerror}") from error


def check_options(options: ServeOptions) -> None:
    """Raise RequestError for an option out of its range."""
    ranges = {
        "--slots": (options.slots, 1, 1024), "--max-queue": (options.max_queue, 0, 10**6),
        "--max-queue-tokens": (options.max_queue_tokens, 1, 2**40),
        "--itl-target": (options.itl_target, 0.001, 3600),
        "--cache-mb": (options.cache_mb or 0, 0, 2**30),
        "--queue-timeout": (options.queue_timeout, 0.001, 10**6),
        "--request-timeout": (options.request_timeout, 0.001, 10**6),
        "--drain": (options.drain, 0, 10**6),
    }  # fmt: skip
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise RequestError(f"{name} must be in [{low}, {high}], got {value}")
