"""Compiles the device programs of one decoder, once per bucket, and counts what is run."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gemlax import ops
from gemlax.cache import Caches, new_caches, resume
from gemlax.decoder import Decoder
from gemlax.engine import programs
from gemlax.engine.state import Changing, Joining, Settled, State, join, new_rows
from gemlax.ops.storage import Storage
from gemlax.sharding import Layout, put

__all__ = ["Counters", "Programs", "bucket", "prefill_width"]

# How many places, tokens and padding, a prefill of several rows has at most. A CPU's is measured
# (docs/log.md); no accelerator's is.
PREFILL_PLACES, MANY_PLACES = {"cpu": 128}, 4096

_Function = Callable[..., tuple[State, programs.Output | None]]


def bucket(size: int, smallest: int = 1) -> int:
    """Return the power of two, at least `smallest`, that holds `size`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def prefill_width(size: int) -> int:
    """Return how many places a chunk of `size` tokens gets: 2 or 3 times a power of two.

    A prompt takes the time of its places, so that powers of two alone would waste a quarter of it;
    of the first 64, few are worth a program more.
    """
    width = bucket(size, 16)
    return 3 * width // 4 if width > 64 and size <= 3 * width // 4 else width


@dataclasses.dataclass
class Counters:
    """What was done, for tests and reports: counts, and seconds by the wall clock.

    `compile_times` has the seconds of tracing and of compiling each program.
    """

    prefill_tokens: int = 0
    prefill_calls: int = 0
    decode_calls: int = 0
    decode_tokens: int = 0
    programs: int = 0
    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compile_times: dict[tuple[object, ...], tuple[float, float]] = dataclasses.field(
        default_factory=dict
    )


class Programs:
    """The programs of one decoder, whose weights must not change. Engines share them.

    Attributes:
        num_tokens: ids from here on are never sampled (rows of the table without a token).
        adapters: names of those in the decoder's tables, in order.
        compiled: programs by key: name, shape of the state, bucket.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_tokens: int,
        dtype: jnp.dtype,
        mesh: Mesh | None = None,
        storage: Storage = None,
        implementation: ops.Backend | None = None,
        adapters: Sequence[str] = (),
    ):
        """Split the decoder; nothing is compiled yet.

        On a `mesh`, that of the weights, caches are cut by rows and heads, all else is replicated.
        `storage` is that of the caches (`new_caches`), `implementation` that of stored weights and
        attention (`ops.implementation`).
        """
        self.config, self.dtype = decoder.config, dtype
        self.layout = Layout(mesh, implementation)
        self.storage: Storage = storage
        self.adapters = tuple(adapters)
        self.num_tokens = num_tokens
        self.counters = Counters()
        self._graphdef, self._weights = nnx.split(decoder)
        # A call takes the arrays as a list: walking the tree of modules takes as long as the call.
        self._arrays, self._structure = jax.tree.flatten(self._weights)
        self.compiled: dict[tuple[object, ...], Any] = {}

    def put(self, tree: Any) -> Any:
        """Bring arrays of the host, which every process has alike, to all devices."""
        return put(tree, self.layout.replicated)

    def _arguments(self, tree: Any) -> Any:
        """Return a call's arrays of the host as its program takes them: one device, as they are."""
        return tree if self.layout.mesh is None else self.put(tree)

    def divide(self, sizes: Sequence[int]) -> list[list[int]]:
        """Divide chunks of these sizes into calls; return their indices.

        Chunks share a call, as wide as the longest, while it has few places: a CPU is no faster
        with more. On a mesh all slots run.
        """
        if not sizes:
            return []
        if self.layout.mesh is not None:
            return [list(range(len(sizes)))]
        places = PREFILL_PLACES.get(ops.platform(), MANY_PLACES)
        calls: list[list[int]] = []
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            if calls and bucket(len(calls[-1]) + 1) * prefill_width(sizes[index]) <= places:
                calls[-1].append(index)
            else:
                calls.append([index])
        return calls

    def num_slots(self, requests: int) -> int:
        """Return how many slots the bucket of so many requests has: what cuts them divides it."""
        cuts = self.layout.parts("batch")
        return -(-bucket(requests) // cuts) * cuts

    def new_state(self, num_slots: int, capacity: int, places: Sequence[int]) -> State:
        """Allocate a state in which every slot is free; `places`: see `new_rows`."""
        caches = self._make_caches(
            lambda: new_caches(
                self.config, num_slots, capacity, self.dtype,
                storage=self.storage, layout=self.layout,
            )
        )  # fmt: skip
        rows = new_rows(num_slots, capacity, self.num_tokens, places)
        adapters = np.zeros(num_slots, np.int32) if self.adapters else None
        return State(caches, **self.put(rows), adapters=self.put(adapters))

    def grow(self, state: State, capacity: int, places: tuple[int, ...]) -> State:
        """Return a state for `capacity` tokens and more places of settings; `state` is used up."""
        kept = self.put(np.full(len(state.lengths), capacity, np.int32))
        caches = self._make_caches(
            lambda old, kept: resume(self.config, old, kept, capacity), state.caches, kept
        )
        more = capacity - state.tokens.shape[1]
        tokens = np.pad(
            np.asarray(state.tokens), ((0, 0), (0, more)), constant_values=self.num_tokens
        )
        settings = state.settings.widened(places, self.num_tokens)
        return state._replace(caches=caches, tokens=self.put(tokens), settings=self.put(settings))

    def _make_caches(self, make: Any, *args: Any) -> Caches:
        return self.layout.make(make, self._cache_shardings, *args)

    def _cache_shardings(self, caches: Caches) -> Caches:
        def shardings(cache: Any) -> Any:
            rows = self.layout.rows(len(cache.positions))
            return dataclasses.replace(cache, k=cache.sharding, v=cache.sharding, positions=rows)

        return {kind: shardings(cache) for kind, cache in caches.items()}

    def join(self, state: State, new: Joining) -> State:
        """Write a request into its slot."""
        args = (state, self._arguments(new))
        key = ("join", _shape_of(state))
        return self._program(key, join, args, lambda: _shardings(state), donated=0)(*args)

    def prefill(
        self, state: State, tokens: np.ndarray, positions: np.ndarray, rows: np.ndarray | None
    ) -> State:
        """Write tokens [b, T] of some slots into the caches."""
        num_tokens = int((positions != ops.EMPTY).sum())
        if (by_rows := self.layout.rows(len(tokens))) is not None:
            tokens, positions = put((tokens, positions), by_rows)

        def prefill(weights: object, state: State, *rest: jax.Array) -> tuple[State, None]:
            return programs.prefill(self._graphdef, weights, state, *rest), None

        rest = (tokens, positions, self._arguments(rows))
        run, args = self._call(("prefill", _shape_of(state), *tokens.shape), prefill, state, rest)
        begin = time.perf_counter()
        changed, _ = run(*args)
        jax.block_until_ready(changed)
        self.counters.prefill_s += time.perf_counter() - begin
        self.counters.prefill_calls += 1
        self.counters.prefill_tokens += num_tokens
        return state.changed(changed)

    def decode(
        self,
        state: State,
        rows: np.ndarray | None,
        running: np.ndarray,
        *,
        steps: int,
        eager: bool,
        logprobs: bool,
    ) -> tuple[State, programs.Output]:
        """Run up to `steps` decode steps of some slots; see `programs.decode`."""
        rest = self._arguments((rows, running, np.int32(steps), np.bool_(eager)))
        shape = (len(running), logprobs)
        return self._decode("decode", shape, programs.decode, state, rest)

    def verify(
        self,
        state: State,
        rows: np.ndarray | None,
        running: np.ndarray,
        drafts: np.ndarray,
        counts: np.ndarray,
        *,
        logprobs: bool,
    ) -> tuple[State, programs.Output]:
        """Run one step of some slots with drafts; see `programs.verify`."""
        rest = self._arguments((rows, running, drafts, counts))
        shape = (*drafts.shape, logprobs)
        return self._decode("verify", shape, programs.verify, state, rest)

    def _decode(
        self,
        name: str,
        shape: tuple[int, ...],
        function: _Function,
        state: State,
        rest: tuple[object, ...],
    ) -> tuple[State, programs.Output]:
        fixed = (self._graphdef, self.num_tokens, self.layout, bool(shape[-1]))
        key = (name, _shape_of(state), *shape)
        run, args = self._call(key, functools.partial(function, *fixed), state, rest)
        begin = time.perf_counter()
        changed, (tokens, counts, logprobs) = run(*args)
        if logprobs is not None:
            logprobs = tuple(map(np.asarray, logprobs))
        output = programs.Output(np.asarray(tokens), np.asarray(counts), logprobs)
        self.counters.decode_s += time.perf_counter() - begin
        self.counters.decode_calls += 1
        self.counters.decode_tokens += sum(output.counts.tolist())
        return state.changed(changed), output

    def _call(
        self,
        key: tuple[object, ...],
        function: _Function,
        state: State,
        rest: tuple[object, ...],
    ) -> tuple[Any, tuple[object, ...]]:
        """Return the program of a function (weights, state, *rest), and its arguments.

        What the decoder changes of the state is used up and returned; the rest is only read.
        """
        args = (self._arrays, *state.parts(), *rest)

        def run(
            arrays: list[jax.Array], changing: Changing, settled: Settled, *rest: object
        ) -> object:
            weights = jax.tree.unflatten(self._structure, arrays)
            state, output = function(weights, State(*changing, *settled), *rest)
            return state.parts()[0], output

        def shardings() -> object:
            # The state stays where it lies; every device gets the output.
            return _shardings(args[1]), self.layout.replicated

        return self._program(key, run, args, shardings, donated=1), args

    def smallest(
        self, name: str, state: State, rows: int, rest: tuple[object, ...], slack: int
    ) -> int:
        """Return the bucket of so many rows.

        It is the smallest one that is compiled and at most `slack` times as large as needed, else
        the next power of two; on a mesh, all slots. `rest` is what else tells programs of this
        name apart.
        """
        if self.layout.mesh is not None:
            return len(state.lengths)
        needed = min(bucket(rows), len(state.lengths))
        shape = _shape_of(state)
        sizes: list[Any] = [
            key[2] for key in self.compiled if key[:2] == (name, shape) and key[3:] == rest
        ]
        return min((size for size in sizes if rows <= size <= slack * needed), default=needed)

    def _program(
        self,
        key: tuple[object, ...],
        function: Callable[..., object],
        args: tuple[object, ...],
        shardings: Callable[[], object],
        *,
        donated: int,
    ) -> Any:
        """Return the compiled program of a bucket; compile it at first use."""
        ops.check_compiles("generating")
        if key not in self.compiled:
            begin = time.perf_counter()
            lowered = self.layout.jit(function, shardings(), donate_argnums=donated).lower(*args)
            traced = time.perf_counter()
            self.compiled[key] = lowered.compile()
            end = time.perf_counter()
            self.counters.compile_times[key] = traced - begin, end - traced
            self.counters.compile_s += end - begin
            self.counters.programs += 1
        return self.compiled[key]


def _shape_of(state: State) -> tuple[int, ...]:
    """Return what of a state's shape differs between programs: slots, capacity, places."""
    return (*state.tokens.shape, *state.settings.places())


def _shardings(tree: object) -> object:
    return jax.tree.map(lambda x: x.sharding, tree)
