"""What decode steps, a prompt and a compilation cost on this machine.

The engine that users run is timed, by the host's clock, with requests of random tokens.
"""

import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemlax import cost
from gemlax.cache import new_caches, round_capacity
from gemlax.config import GemmaConfig, TextConfig
from gemlax.decoder import Decoder, Layers, Read
from gemlax.engine import MAX_STEPS, Engine, Request
from gemlax.errors import RequestError
from gemlax.model import Model
from gemlax.sampling import make_sampling
from gemlax.weights import build_decoder

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

Key = TypeVar("Key")
_READ_BYTES = 2**29  # larger than any cache of a processor
_READ_ROW = 1024


class Times(NamedTuple):
    """Seconds of one thing, over rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Times":
        """Sum up the rounds."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def report(self, name: str, unit: Literal["s", "ms"], parts: int = 1) -> dict[str, float]:
        """Return the time of one of `parts` equal parts, under names that end in the unit."""
        scale = {"s": 1, "ms": 1e3}[unit] / parts
        names = (f"{name}_{unit}", f"{name}_{unit}_min", f"{name}_{unit}_max")
        return {key: round(taken * scale, 4) for key, taken in zip(names, self, strict=True)}


def timed(works: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, Times]:
    """Time each of `works` until all that it returns is there, after one round of warm-up.

    They take turns, so that a change in the machine's speed meets all of them.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in works}
    for _ in range(rounds + 1):
        for key, work in works.items():
            begin = time.perf_counter()
            jax.block_until_ready(work())
            seconds[key].append(time.perf_counter() - begin)
    return {key: Times.of(taken[1:]) for key, taken in seconds.items()}


def memory(program: Any) -> dict[str, int]:
    """Return the bytes of a program's arguments, of those written in place, of temporaries."""
    analysis = program.memory_analysis()
    return {
        "argument_bytes": analysis.argument_size_in_bytes,
        "alias_bytes": analysis.alias_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
    }


def random_decoder(
    config: TextConfig,
    *,
    dtype: Any = "float32",
    layers: Layers | None = None,
    read: Read = "index",
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Build a decoder of random weights: the rows of a matrix repeat, for their time does not."""
    random = np.random.default_rng(0)

    def fill(name: str, out: np.ndarray) -> None:
        noise = random.standard_normal(out.shape[-1], np.float32) * np.float32(0.03)
        out[...] = noise.astype(out.dtype)

    return build_decoder(config, fill, dtype=dtype, layers=layers, read=read, progress=progress)


def random_model(config: GemmaConfig, *, dtype: Any = "float32", layers: Layers | None) -> Model:
    """Build a model of random weights."""
    return Model(config, random_decoder(config.text, dtype=dtype, layers=layers))


class _Bench:
    """A model, and an engine with `batch` slots for requests of random tokens."""

    def __init__(self, build: Callable[[], Model], batch: int, tokens: int, capacity: int | None):
        """Check what was asked for, and only then build the model.

        `tokens` are those of a prompt and its answer; a `capacity` of None is what they need.
        """
        _check(1, batch=batch)
        if capacity is not None and capacity < tokens:
            raise RequestError(f"capacity must be at least {tokens} tokens, got {capacity}")
        self.anonymous_bytes = _anonymous_bytes()
        self.model = build()
        self.programs, self.config = self.model.programs, self.model.config.text
        longest = self.config.max_position_embeddings
        if tokens > longest:
            raise RequestError(f"{tokens} tokens are more than the context of {longest}")
        self.batch, self.capacity = batch, round_capacity(capacity or tokens)
        self.engine = Engine(self.programs, batch, self.capacity)
        self._random = np.random.default_rng(0)
        self._settings = make_sampling(self.programs.num_tokens, [0], temperature=0.0).row(0)

    def draw(self, length: int) -> np.ndarray:
        """Return prompts [batch, length]."""
        return self._random.integers(0, self.programs.num_tokens, (self.batch, length))

    def submit(self, prompts: np.ndarray, new_tokens: int) -> None:
        """Let each prompt get `new_tokens`."""
        for prompt in prompts.tolist():
            self.engine.submit(Request(tuple(prompt), len(prompt) + new_tokens, self._settings))

    def drain(self) -> None:
        """Run every request to its end."""
        while self.engine.num_running or self.engine.num_waiting:
            self.engine.step(MAX_STEPS)

    def program(self, name: str) -> tuple[Any, tuple[float, float]]:
        """Return the newest program of a name, and the seconds of tracing and compiling it."""
        key = [key for key in self.programs.compiled if key[0] == name][-1]
        return self.programs.compiled[key], self.programs.counters.compile_times[key]

    def report(self, name: str, **settings: int) -> dict[str, Any]:
        """Return what was measured, and the memory that a program and all else takes."""
        program, seconds = self.program(name)
        at_start, now = self.anonymous_bytes, _anonymous_bytes()
        return {
            **self.settings(**settings),
            "compile_s": round(sum(seconds), 3),
            **self.sizes(),
            **memory(program),
            "memory_increase_bytes": None if at_start is None or now is None else now - at_start,
        }

    def settings(self, **more: int) -> dict[str, Any]:
        """Return what the figures hold for."""
        decoder = self.model.decoder
        return {
            "dtype": self.model.dtype.name, "layers": decoder.layout, "batch": self.batch,
            "capacity": self.capacity, **more,
        }  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """Return the bytes of weights and caches."""
        slots, dtype = self.programs.num_slots(self.batch), self.model.dtype
        caches = jax.eval_shape(lambda: new_caches(
            self.config, slots, self.capacity, dtype, storage=self.programs.storage
        ))  # fmt: skip
        weights = nnx.state(self.model.decoder)
        return {"weight_bytes": num_bytes(weights), "cache_bytes": num_bytes(caches)}


def decode(
    build: Callable[[], Model], *, depth: int, steps: int, rounds: int, batch: int = 1,
    capacity: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure `steps` decode steps of `batch` requests that have `depth` tokens."""
    _check(1, depth=depth, steps=steps, rounds=rounds)
    bench = _Bench(build, batch, depth + 1 + steps, capacity)
    prompts, seconds = bench.draw(depth), []
    for _ in range(rounds + 1):
        bench.submit(prompts, 1 + steps)  # after the first round the caches have the prompts
        while not bench.engine.step(1):
            pass
        begin = time.perf_counter()
        bench.drain()
        seconds.append(time.perf_counter() - begin)
    times = Times.of(seconds[1:])
    report = bench.report("decode", depth=depth, steps=steps, rounds=rounds)
    machine_gb_s, step_s = streaming_read(rounds), times.median / steps
    read_bytes = cost.decode_bytes(
        bench.config, depth + (steps + 1) // 2, batch,
        report["weight_bytes"] / cost.parameters(bench.config), bench.model.dtype.itemsize,
    )  # fmt: skip
    return report | {
        **times.report("step", "ms", steps),
        "tok_s": round(batch / step_s, 2),
        "read_bytes": read_bytes,
        "gb_s": round(read_bytes / step_s / 1e9, 3),
        "machine_gb_s": round(machine_gb_s, 3),
        "bandwidth_share": round(read_bytes / step_s / 1e9 / machine_gb_s, 4),
    }


def prefill(
    build: Callable[[], Model], *, prompt_length: int, depth: int, rounds: int, batch: int = 1,
    capacity: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the prefill of `prompt_length` tokens after `depth` others."""
    _check(0, depth=depth)
    _check(1, prompt_length=prompt_length, rounds=rounds)
    bench = _Bench(build, batch, depth + prompt_length + 2, capacity)
    counters, seconds = bench.programs.counters, []
    for _ in range(rounds + 1):
        prompts = bench.draw(depth + prompt_length + 1)  # the last token is not prefilled
        if depth:
            bench.submit(prompts[:, :depth], 1)
            bench.drain()
        earlier_s = counters.prefill_s
        bench.submit(prompts, 1)
        bench.drain()
        seconds.append(counters.prefill_s - earlier_s)
    times = Times.of(seconds[1:])
    report = bench.report("prefill", depth=depth, prompt_length=prompt_length, rounds=rounds)
    return report | {
        **times.report("prompt", "ms"),
        "tok_s": round(batch * prompt_length / times.median, 2),
    }


def compilation(
    build: Callable[[], Model], *, prompt_length: int, rounds: int, batch: int = 1,
    capacity: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure tracing and compiling the two programs, each round with jax's caches emptied."""
    _check(1, prompt_length=prompt_length, rounds=rounds)
    bench = _Bench(build, batch, prompt_length + 2, capacity)
    seconds: dict[str, list[tuple[float, float]]] = {"decode": [], "prefill": []}
    for _ in range(rounds + 1):
        jax.clear_caches()
        bench.programs.compiled.clear()
        bench.submit(bench.draw(prompt_length + 1), 1)
        bench.drain()
        for name, taken in seconds.items():
            taken.append(bench.program(name)[1])
    report = bench.settings(prompt_length=prompt_length, rounds=rounds)
    for name, taken in seconds.items():
        for part, times in zip(("trace", "compile"), zip(*taken[1:], strict=True), strict=True):
            report |= Times.of(list(times)).report(f"{name}_{part}", "s")
        program = memory(bench.program(name)[0])
        report |= {f"{name}_{key}": size for key, size in program.items()}
    return report | bench.sizes()


def _check(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise RequestError(f"{name} must be at least {least}, got {value}")


def streaming_read(rounds: int = 5) -> float:
    """Return GB/s of reading 512 MB once: a float32 matrix-vector product by XLA, median."""
    x = jnp.ones((_READ_BYTES // 4 // _READ_ROW, _READ_ROW), jnp.float32)
    product = jax.jit(jnp.dot)
    vector = jnp.ones((_READ_ROW,), jnp.float32)
    gb_s = x.nbytes / timed({"read": lambda: product(x, vector)}, rounds)["read"].median / 1e9
    x.delete()
    return gb_s


def machine() -> dict[str, Any]:
    """Name the device and the versions that a measurement holds for."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("gemlax", "jax", "flax")}
    return {
        "device": f"{device.device_kind} ({device.platform})",
        "processor": _processor(),
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    """Return the number of cores and their name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()


def _anonymous_bytes() -> int | None:
    """Return the process's resident memory that no file backs; None where it is unknown."""
    gc.collect()
    path = Path("/proc/self/status")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    sizes = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return next((1024 * int(size) for size in sizes), None)


def num_bytes(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
