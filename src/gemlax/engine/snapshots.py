"""Copies of what a slot's caches hold, taken to the host and written back in place.

Full layers are copied in pieces of `PIECE` tokens, rings as whole rows that the host unrolls: so
there are four programs for a state, whatever is copied. Layers that share keys and values have none
to copy. Copies are in the form of the caches, so they come back bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax import Array
from jax.stages import Compiled

from gemlax import ops
from gemlax.cache import Caches
from gemlax.config import Kind
from gemlax.engine.compiled import Programs
from gemlax.engine.prefix import HostCopy, Match, Window
from gemlax.engine.state import State
from gemlax.errors import UnsupportedError

__all__ = ["PIECE", "Snapshots", "read", "write"]

PIECE = 512  # tokens


def read(
    kinds: Sequence[Kind], width: int, caches: Caches, slot: Array, start: Array
) -> list[Array]:
    """Return `width` places of a slot from `start` on: [n, width, ...] for each buffer."""

    def one(leaf: Array) -> Array:
        rest = leaf.shape[3:]
        begin: list[Array | int] = [0, slot, start, *[0] * len(rest)]
        size = (leaf.shape[0], 1, width, *rest)
        return jax.lax.dynamic_slice(leaf, begin, size).reshape(size[0], width, *rest)

    return [one(leaf) for leaf in _leaves(caches, kinds)]


def write(
    kinds: Sequence[Kind],
    caches: Caches,
    slot: Array,
    start: Array,
    pieces: Sequence[Array],
    positions: dict[Kind, Array],
) -> Caches:
    """Write what `read` returned to places from `start` on; set the slot's `positions` [S]."""
    left = iter(pieces)

    def one(leaf: Array) -> Array:
        begin: list[Array | int] = [0, slot, start, *[0] * (leaf.ndim - 3)]
        return jax.lax.dynamic_update_slice(leaf, next(left)[:, None], begin)

    written = dict(caches)
    for kind in kinds:
        k, v = jax.tree.map(one, (caches[kind].k, caches[kind].v))
        written[kind] = dataclasses.replace(caches[kind], k=k, v=v)
    for kind, row in positions.items():
        table = written[kind].positions.at[slot].set(row)
        written[kind] = dataclasses.replace(written[kind], positions=table)
    return written


def _leaves(caches: Caches, kinds: Sequence[Kind]) -> list[Array]:
    return [leaf for kind in kinds for leaf in jax.tree.leaves((caches[kind].k, caches[kind].v))]


class Snapshots:
    """Saves slots of a state and restores them.

    Attributes:
        reach: how many tokens a query of a sliding layer sees, its own included.
    """

    def __init__(self, programs: Programs):
        """Refuse a mesh, where a slot's caches are cut over devices and processes."""
        if programs.layout.mesh is not None:
            raise UnsupportedError(
                "prefixes are not reused on a mesh: leave the prefix cache out, or load the model "
                "on one device"
            )
        self._programs = programs
        windows = {spec.kind: spec.window for spec in programs.config.layers if spec.owns_kv}
        self._full = [kind for kind, window in windows.items() if window is None]
        self._sliding = [kind for kind, window in windows.items() if window is not None]
        self.reach = max((window for window in windows.values() if window is not None), default=1)

    def save(self, state: State, slot: int, start: int, stop: int) -> tuple[HostCopy, Window]:
        """Return what full layers hold of positions from `start` to `stop`, and the window there.

        The ring must still hold the window: nothing far after `stop` was written.
        """
        first = max(0, stop - self.reach + 1)
        rows = self._read(state, self._sliding, slot, 0) if self._sliding else []
        taken = [np.take(row, np.arange(first, stop) % row.shape[1], axis=1) for row in rows]
        window = Window(first, HostCopy(tuple(taken)))
        if start == stop:
            return HostCopy(()), window
        size = min(PIECE, state.tokens.shape[1])
        parts = []
        for begin in range(start // size * size, stop, size):
            piece = self._read(state, self._full, slot, begin)
            parts.append([leaf[:, max(start - begin, 0) : stop - begin] for leaf in piece])
        joined = [np.concatenate(leaves, axis=1) for leaves in zip(*parts, strict=True)]
        return HostCopy(tuple(joined)), window

    def restore(self, state: State, slot: int, match: Match) -> State:
        """Return a state whose slot holds the tokens of a match, and no other; `state` is used up.

        Only the caches change.
        """
        assert match.window is not None
        stop, size = match.length, min(PIECE, state.tokens.shape[1])
        caches = state.caches
        for begin in range(0, stop, size):
            shapes = [(leaf.shape, leaf.dtype) for leaf in _leaves(caches, self._full)]
            piece = [np.zeros((s[0], size, *s[3:]), dtype) for s, dtype in shapes]
            for place, leaves in _overlaps(match.spans, begin, min(begin + size, stop)):
                for whole, part in zip(piece, leaves, strict=True):
                    whole[:, place : place + part.shape[1]] = part
            caches = self._write(caches, self._full, slot, begin, piece, {})
        first, rows = max(0, stop - self.reach + 1), []
        for leaf, part in zip(
            _leaves(caches, self._sliding), match.window.payload.leaves, strict=True
        ):
            row = np.zeros((leaf.shape[0], *leaf.shape[2:]), leaf.dtype)
            start = match.window.start
            row[:, np.arange(first, stop) % row.shape[1]] = part[:, first - start : stop - start]
            rows.append(row)
        positions = {}
        for kind, cache in caches.items():
            table = np.full(cache.positions.shape[1], ops.EMPTY, np.int32)
            here = np.arange(first if kind in self._sliding else 0, stop, dtype=np.int32)
            table[here % len(table)] = here
            positions[kind] = table
        caches = self._write(caches, self._sliding, slot, 0, rows, positions)
        return state._replace(caches=caches)

    def _read(self, state: State, kinds: Sequence[Kind], slot: int, start: int) -> list[np.ndarray]:
        width = state.caches[kinds[0]].positions.shape[1]
        if kinds == self._full:
            width = min(PIECE, width)
        args = (state.caches, np.int32(slot), np.int32(start))
        run = self._program("save", kinds, functools.partial(read, kinds, width), args, ())
        return [np.asarray(leaf) for leaf in run(*args)]

    def _write(
        self,
        caches: Caches,
        kinds: Sequence[Kind],
        slot: int,
        start: int,
        pieces: Sequence[np.ndarray],
        positions: dict[Kind, np.ndarray],
    ) -> Caches:
        args = (caches, np.int32(slot), np.int32(start), pieces, positions)
        run = self._program("restore", kinds, functools.partial(write, kinds), args, 0)
        return run(*args)

    def _program(
        self,
        name: str,
        kinds: Sequence[Kind],
        function: Callable[..., object],
        args: tuple[object, ...],
        donated: int | tuple[int, ...],
    ) -> Compiled:
        caches: Caches = args[0]  # type: ignore[assignment]  # the first of any of them
        key = (name, *kinds, *(cache.positions.shape for cache in caches.values()))
        programs = self._programs
        if key not in programs.compiled:
            begin = time.perf_counter()
            jitted = programs.layout.jit(function, donate_argnums=donated)
            programs.compiled[key] = jitted.lower(*args).compile()
            programs.counters.compile_s += time.perf_counter() - begin
            programs.counters.programs += 1
        return programs.compiled[key]


def _overlaps(
    spans: Sequence[HostCopy], begin: int, stop: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield what spans, which begin at 0, have of [begin, stop), and where in it that lies."""
    start = 0
    for span in spans:
        end = start + span.leaves[0].shape[1]
        first, last = max(start, begin), min(end, stop)
        if first < last:
            yield first - begin, [leaf[:, first - start : last - start] for leaf in span.leaves]
        start = end
