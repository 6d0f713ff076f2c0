"""Measures what a decode step, a prompt and a compilation cost on this machine.

A `Case` is a decoder with caches of one form; what is measured is always one of its two programs,
so forms compare on equal terms. Times are of the host's clock, around work that has ended.
"""

import functools
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

from gemlax import cost, linen, ops
from gemlax.cache import new_caches, new_list, new_pools, round_capacity
from gemlax.config import CHUNK, TextConfig
from gemlax.decoder import Decoder, Layers, Read
from gemlax.engine import bucket
from gemlax.errors import RequestError
from gemlax.weights import build_decoder

__all__ = [
    "CacheForm",
    "Case",
    "Program",
    "Times",
    "compilation",
    "decode",
    "machine",
    "prefill",
    "random_decoder",
    "streaming_read",
    "timed",
]

CacheForm = Literal["stacked", "list", "paged"]
Key = TypeVar("Key")
_BLOCK_SIZE = 16  # tokens in a page
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


class Program(NamedTuple):
    """A compiled program, and the seconds that tracing and compiling it took."""

    run: Any
    trace_s: float
    compile_s: float

    def memory(self) -> dict[str, int]:
        """Return the bytes of its arguments, of those that it writes in place, of temporaries."""
        found = self.run.memory_analysis()
        return {
            "argument_bytes": found.argument_size_in_bytes,
            "alias_bytes": found.alias_size_in_bytes,
            "temporary_bytes": found.temp_size_in_bytes,
        }


class Case:
    """One way to run a decoder: its weights, a form of cache, a batch and a capacity.

    Attributes:
        weights: what the programs take first.
        caches: what the last run left. What they hold changes no work, so a run may start at any
            position.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        batch: int = 1,
        capacity: int = 512,
        cache: CacheForm = "stacked",
        linen: bool = False,
    ):
        self.config: TextConfig = decoder.config
        self.dtype = decoder.dtype
        self.layers: Layers = decoder.layout
        self.batch, self.capacity, self.cache, self.linen = batch, capacity, cache, linen
        self._bind, self.weights = (_bind_linen if linen else _bind_nnx)(decoder)

    @functools.cached_property
    def caches(self) -> Any:
        """Empty caches, at first."""
        return self._new_caches()

    @functools.cached_property
    def decode_program(self) -> Program:
        """What `decode` runs."""
        return self.compile_decode()

    def compile_decode(self) -> Program:
        """Compile a loop of greedy steps: (weights, token [B, 1], caches, start, steps)."""

        def loop(weights: Any, token: Any, caches: Any, start: Any, steps: Any) -> Any:
            def step(carry: Any) -> Any:
                i, token, caches = carry
                model = self._bind(weights)
                hidden, caches = self._forward(model, token, caches, i, jnp.int32(1))
                best = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
                return i + 1, best, caches

            return jax.lax.while_loop(lambda c: c[0] < start + steps, step, (start, token, caches))

        return self._compile(loop, 1)

    def compile_prefill(self, width: int) -> Program:
        """Compile a chunk of a prompt: (weights, tokens [B, T], caches, start, count)."""

        def chunk(weights: Any, tokens: Any, caches: Any, start: Any, count: Any) -> Any:
            return self._forward(self._bind(weights), tokens, caches, start, count)[1]

        return self._compile(chunk, width)

    def decode(self, start: int, steps: int) -> Any:
        """Run `steps` steps from position `start` on; return what must be there at the end."""
        token = jnp.zeros((self.batch, 1), jnp.int32)
        at = (jnp.int32(start), jnp.int32(steps))
        self.caches = self.decode_program.run(self.weights, token, self.caches, *at)[2]
        return self.caches

    def prefill(self, program: Program, width: int, start: int, length: int) -> Any:
        """Run `length` tokens from position `start` on, in chunks of `width`."""
        tokens = jnp.zeros((self.batch, width), jnp.int32)
        for done in range(0, length, width):
            at = (jnp.int32(start + done), jnp.int32(min(width, length - done)))
            self.caches = program.run(self.weights, tokens, self.caches, *at)
        return self.caches

    def sizes(self) -> dict[str, int]:
        """Return the bytes of what is held."""
        return {
            "weight_bytes": _num_bytes(self.weights),
            "cache_bytes": _num_bytes(jax.eval_shape(self._new_caches)),
        }

    def _forward(self, model: Any, tokens: Any, caches: Any, start: Any, count: Any) -> Any:
        """Run the first `count` of the tokens [B, T] at positions from `start` on.

        In pages the tokens of all rows are adjacent; what is left over follows them.
        """
        batch, width = tokens.shape
        if self.cache != "paged":
            columns = jnp.arange(width, dtype=jnp.int32)
            at = jnp.where(columns < count, start + columns, ops.EMPTY)
            return model(tokens, jnp.broadcast_to(at, tokens.shape), caches)
        token = jnp.arange(batch * width, dtype=jnp.int32)
        blocks = jnp.arange(batch * self.capacity // _BLOCK_SIZE, dtype=jnp.int32)
        metadata = ops.AttentionMetadata(
            input_positions=jnp.where(token < batch * count, start + token % count, ops.EMPTY),
            block_tables=blocks.reshape(batch, -1),
            seq_lens=jnp.full((batch,), start + count),
            query_start_loc=jnp.arange(batch + 1, dtype=jnp.int32) * count,
            request_distribution=jnp.array([batch if width == 1 else 0, batch, batch], jnp.int32),
        )
        hidden, caches = model(tokens.reshape(-1), None, caches, metadata)
        return hidden.reshape(batch, width, -1), caches

    def _new_caches(self) -> Any:
        if self.cache == "stacked":
            return new_caches(self.config, self.batch, self.capacity, self.dtype)
        if self.cache == "paged":
            blocks = self.batch * self.capacity // _BLOCK_SIZE
            return new_pools(self.config, blocks, _BLOCK_SIZE, self.dtype)
        return new_list(self.config, self.batch, self.capacity, self.dtype)

    def _compile(self, function: Any, width: int) -> Program:
        """Compile a function from the shapes of what it takes; the caches are donated."""
        tokens = jax.ShapeDtypeStruct((self.batch, width), jnp.int32)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        args = (self.weights, tokens, jax.eval_shape(self._new_caches), number, number)
        ops.check_compiles("a benchmark")
        begin = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=2).lower(*args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        return Program(compiled, traced - begin, time.perf_counter() - traced)


def _bind_nnx(decoder: Decoder) -> tuple[Callable[[Any], Any], Any]:
    graphdef, state = nnx.split(decoder)
    return lambda weights: nnx.merge(graphdef, weights), state


def _bind_linen(decoder: Decoder) -> tuple[Callable[[Any], Any], Any]:
    """Hold the same arrays as the variables of the Linen decoder."""
    module = linen.Decoder(
        decoder.config,
        layers=decoder.layout,
        read=decoder.read,
        dtype=decoder.dtype,
    )
    return module.bind, linen.to_linen(decoder)


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


# --- the three benchmarks ----------------------------------------------------------------------


def decode(
    build: Callable[[], Decoder],
    *,
    depth: int,
    steps: int,
    rounds: int,
    capacity: int | None = None,
    **form: Any,
) -> dict[str, Any]:
    """Measure decode steps at positions from `depth` on.

    Args:
        build: makes the decoder; the memory that this and all else takes is counted.
        capacity: of the cache, in tokens; None: what is needed.
        form: see `Case`.
    """
    _check(1, steps=steps, rounds=rounds)
    before = _anonymous_bytes()
    case = _case(build, depth, steps, capacity, form)
    program = case.decode_program
    times = timed({"step": lambda: case.decode(depth, steps)}, rounds)["step"]
    taken = None if before is None else (_anonymous_bytes() or 0) - before
    machine_gb_s = streaming_read(rounds)
    step_s = times.median / steps
    sizes = case.sizes()
    read_bytes = cost.decode_bytes(
        case.config,
        depth + (steps + 1) // 2,
        case.batch,
        sizes["weight_bytes"] / cost.parameters(case.config),
        case.dtype.itemsize,
    )
    return {
        **_setting(case, depth=depth, steps=steps, rounds=rounds),
        **times.report("step", "ms", steps),
        "tok_s": round(case.batch / step_s, 2),
        "read_bytes": read_bytes,
        "gb_s": round(read_bytes / step_s / 1e9, 3),
        "machine_gb_s": round(machine_gb_s, 3),
        "bandwidth_share": round(read_bytes / step_s / 1e9 / machine_gb_s, 4),
        "compile_s": round(program.trace_s + program.compile_s, 3),
        **sizes,
        **program.memory(),
        "memory_increase_bytes": taken,
    }


def prefill(
    build: Callable[[], Decoder],
    *,
    prompt_length: int,
    depth: int,
    rounds: int,
    capacity: int | None = None,
    **form: Any,
) -> dict[str, Any]:
    """Measure a prompt of `prompt_length` tokens after `depth` others, in chunks as it is used."""
    _check(1, prompt_length=prompt_length, rounds=rounds)
    before = _anonymous_bytes()
    case = _case(build, depth, prompt_length, capacity, form)
    width = _width(prompt_length)
    program = case.compile_prefill(width)
    work = functools.partial(case.prefill, program, width, depth, prompt_length)
    times = timed({"prompt": work}, rounds)["prompt"]
    taken = None if before is None else (_anonymous_bytes() or 0) - before
    return {
        **_setting(case, depth=depth, prompt_length=prompt_length, chunk=width, rounds=rounds),
        **times.report("prompt", "ms"),
        "tok_s": round(case.batch * prompt_length / times.median, 2),
        "compile_s": round(program.trace_s + program.compile_s, 3),
        **case.sizes(),
        **program.memory(),
        "memory_increase_bytes": taken,
    }


def compilation(
    build: Callable[[], Decoder],
    *,
    prompt_length: int,
    rounds: int,
    capacity: int | None = None,
    **form: Any,
) -> dict[str, Any]:
    """Measure tracing and compiling the two programs, each round with jax's caches emptied."""
    _check(1, prompt_length=prompt_length, rounds=rounds)
    case = _case(build, 0, prompt_length, capacity, form)
    width = _width(prompt_length)
    found = _setting(case, chunk=width, rounds=rounds)
    makers = {"decode": case.compile_decode, "prefill": lambda: case.compile_prefill(width)}
    for name, make in makers.items():
        programs = []
        for _ in range(rounds + 1):
            jax.clear_caches()
            programs.append(make())
        warm = programs[1:]
        found |= Times.of([p.trace_s for p in warm]).report(f"{name}_trace", "s")
        found |= Times.of([p.compile_s for p in warm]).report(f"{name}_compile", "s")
        found |= {f"{name}_{key}": size for key, size in warm[-1].memory().items()}
    return found | case.sizes()


def _case(
    build: Callable[[], Decoder], depth: int, new: int, capacity: int | None, form: dict[str, Any]
) -> Case:
    """Check what was asked for, and only then build the decoder."""
    _check(0, depth=depth)
    _check(1, batch=form.get("batch", 1))
    needed = round_capacity(depth + new)
    capacity = needed if capacity is None else capacity
    if capacity < needed or capacity != round_capacity(capacity):
        raise RequestError(
            f"capacity must be a power of two, at least {needed} for {depth} + {new} tokens, "
            f"got {capacity}"
        )
    case = Case(build(), capacity=capacity, **form)
    most = case.config.max_position_embeddings
    if depth + new > most:
        raise RequestError(f"{depth} + {new} tokens are more than the context of {most}")
    return case


def _check(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise RequestError(f"{name} must be at least {least}, got {value}")


def _width(length: int) -> int:
    """Return the width of the chunks that `Engine` would take."""
    return bucket(min(length, CHUNK), 16)


def _setting(case: Case, **numbers: int) -> dict[str, Any]:
    return {
        "dtype": case.dtype.name,
        "layers": case.layers,
        "cache": case.cache,
        "linen": case.linen,
        "batch": case.batch,
        "capacity": case.capacity,
        **numbers,
    }


# --- the machine -------------------------------------------------------------------------------


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
    """Return the process's resident memory that no file backs; None where it is not told."""
    gc.collect()
    path = Path("/proc/self/status")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return next((1024 * int(size) for size in found), None)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
