"""What `gemlax bench` and benchmarks/ measure.

`engine` times the engine in this process, `server` a server over HTTP, through `client`.
"""

from gemlax.bench.engine import (
    Times,
    compilation,
    decode,
    machine,
    memory,
    num_bytes,
    prefill,
    random_decoder,
    random_model,
    streaming_read,
    timed,
)

__all__ = [
    "Times",
    "compilation",
    "decode",
    "machine",
    "memory",
    "num_bytes",
    "prefill",
    "random_decoder",
    "random_model",
    "streaming_read",
    "timed",
]
