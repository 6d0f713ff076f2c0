"""What a server is told: bounds, times and who may ask. No jax, no HTTP."""

import dataclasses

__all__ = ["ServeOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of one server; times are in seconds.

    Attributes:
        name: under which the base model answers.
        slots: answers that are generated at once.
        context: the most tokens of a prompt and its answer.
        max_queue: answers that may wait for a slot.
        max_queue_tokens: the most prompt tokens of those that wait; one may always wait alone.
        cache_mb: MB of memory for beginnings of prompts; None: a tenth of what was free.
        itl_target: how far apart two tokens of an answer may be while prompts are read.
        queue_timeout: how long an answer may wait for a slot.
        request_timeout: how long a request may take in all.
        drain: how long running answers may go on after SIGTERM.
        max_body: bytes of a request's body.
        header_timeout: for a request's headers.
        body_timeout: for a request's body.
        write_timeout: for a client to take in what was sent.
        max_connections: open connections.
        ping: an idle stream gets a comment after so long.
    """

    name: str = "gemlax"
    slots: int = 8
    context: int = 8192
    max_queue: int = 64
    max_queue_tokens: int = 262_144
    cache_mb: int | None = None
    itl_target: float = 0.1
    queue_timeout: float = 300.0
    request_timeout: float = 3600.0
    drain: float = 30.0
    max_body: int = 32 * 2**20
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    max_connections: int = 1024
    ping: float = 15.0
