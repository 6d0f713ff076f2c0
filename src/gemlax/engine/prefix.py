"""Beginnings of prompts that were prefilled before, and what is left of it. No jax.

One radix tree of token ids for each `Root`. Tokens are compared, never hashed, so no prompt gets
what another one left. A node holds the keys and values of the full layers for the tokens between
its parent and itself, its span. Sliding layers keep only a window, so prefill can go on only where
a snapshot of the window was taken: a node may have one at its end.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

__all__ = [
    "WORTH_REUSING",
    "HostCopy",
    "Match",
    "PrefixCache",
    "Root",
    "Window",
    "free_memory",
]

Args = ParamSpec("Args")
Result = TypeVar("Result")

# Fewer tokens are prefilled as fast as they are restored (docs/log.md).
WORTH_REUSING = 16


class Root(NamedTuple):
    """What must agree besides the tokens. Each field has its place: none can stand for another."""

    weights: Hashable = None
    adapter: Hashable = None
    salt: str = ""


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """Keys and values of some tokens, in caches of some kinds: arrays [n, T, ...] of the host."""

    leaves: tuple[np.ndarray, ...]

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def split(self, count: int) -> "tuple[HostCopy, HostCopy]":
        """Return the first `count` tokens, and the rest; neither keeps the other's memory."""
        first = tuple(leaf[:, :count].copy() for leaf in self.leaves)
        return HostCopy(first), HostCopy(tuple(leaf[:, count:].copy() for leaf in self.leaves))


class Window(NamedTuple):
    """What sliding layers hold at a position: the tokens from `start` up to it."""

    start: int
    payload: HostCopy


@dataclasses.dataclass(eq=False)
class _Node:
    """Tokens from `end - len(tokens)` to `end`; a root has none and no span."""

    tokens: np.ndarray
    end: int
    span: HostCopy = HostCopy(())
    parent: "_Node | None" = None
    children: dict[int, "_Node"] = dataclasses.field(default_factory=dict)
    window: Window | None = None
    priority: float = 0.0

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)

    def ancestors(self) -> "Iterator[_Node]":
        """Yield the nodes between this one and the root."""
        node = self.parent
        while node is not None and node.parent is not None:
            yield node
            node = node.parent


class Match(NamedTuple):
    """What a prompt can go on from.

    Attributes:
        length: how many of its tokens need no prefill; 0: nothing is known.
        spans: from position 0 to `length` or beyond.
        window: at `length`, or a later one that reaches back far enough.
        known: how many of its first tokens other prompts had as well.
    """

    length: int = 0
    spans: Sequence[HostCopy] = ()
    window: Window | None = None
    known: int = 0
    node: _Node | None = None


def _locked(
    method: Callable[Concatenate["PrefixCache", Args], Result],
) -> Callable[Concatenate["PrefixCache", Args], Result]:
    """Let one thread at a time run a method."""

    @functools.wraps(method)
    def run(self: "PrefixCache", *args: Args.args, **options: Args.kwargs) -> Result:
        with self._lock:
            return method(self, *args, **options)

    return run


class PrefixCache:
    """Keeps what prompts left behind, as much as fits a budget of bytes.

    What goes first is what was not used for longest, weighed by the tokens that a byte saves
    (GreedyDual). A window goes first; spans go when no window needs them any more.
    """

    def __init__(self, budget: int):
        """Keep nothing yet; `budget`: bytes."""
        self.budget = budget
        self.num_bytes = 0
        self._roots: dict[Root, _Node] = {}
        self._windows: dict[_Node, None] = {}  # the one that was used last comes last
        self._age = 0.0
        self._lock = threading.RLock()  # engines of several threads may share it

    @_locked
    def match(self, root: Root, tokens: Sequence[int], reach: int) -> Match:
        """Return the longest beginning of a prompt that can be gone on from.

        Args:
            root: what must agree besides.
            tokens: of the prompt.
            reach: how many tokens a query of a sliding layer sees, its own included.
        """
        path, known = self._walk(root, np.asarray(tokens, np.int32))
        for last in reversed(path):
            length = min(last.end, known)
            # A snapshot of a longer prompt serves this place too if its window reaches back so far.
            node = self._reaching(last, length, reach)
            if node is not None:
                spans = [one.span for one in path if one.start < length]
                return Match(length, spans, node.window, known, node)
        return Match(known=known)

    @_locked
    def use(self, match: Match) -> None:
        """Note that a match was used: it is kept for longer."""
        if match.node is not None and match.node in self._windows:
            self._refresh(match.node)

    @_locked
    def covered(self, root: Root, tokens: Sequence[int]) -> tuple[int, int]:
        """Return how many tokens have spans, and up to which of those the last window reaches."""
        path, known = self._walk(root, np.asarray(tokens, np.int32))
        ends = [node.end for node in path if node.window is not None and node.end <= known]
        return known, max(ends, default=0)

    @_locked
    def insert(
        self, root: Root, tokens: Sequence[int], start: int, span: HostCopy, window: Window
    ) -> None:
        """Add a snapshot.

        Args:
            root: what must agree besides.
            tokens: all, from position 0 on.
            start: how many have spans already (`covered`).
            span: of the rest; empty where there is no rest.
            window: at their end.
        """
        array = np.asarray(tokens, np.int32)
        added = window.payload.num_bytes + span.num_bytes
        path, known = self._walk(root, array)
        if known != start or not len(array) or added > self.budget:
            return
        if path:
            node = self._split(path[-1], known)
        else:
            node = self._roots.setdefault(root, _Node(array[:0], 0))
        if known < len(array):
            child = _Node(array[known:].copy(), len(array), span, node)
            node.children[int(array[known])] = child
            self.num_bytes += span.num_bytes + child.tokens.nbytes
            node = child
        if node.window is not None:
            self.num_bytes -= node.window.payload.num_bytes
        node.window = window
        self.num_bytes += window.payload.num_bytes
        self._refresh(node)
        while self.num_bytes > self.budget:
            victim = min(self._windows, key=lambda one: one.priority)
            self._age = victim.priority
            self._drop(victim)

    @_locked
    def forget(self, weights: Hashable, adapter: Hashable) -> None:
        """Forget what was made with an adapter: it is another one now, or gone."""
        for root in [root for root in self._roots if root[:2] == (weights, adapter)]:
            for node in [node for node in self._windows if _root_of(node) is self._roots[root]]:
                self._drop(node)

    @_locked
    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._windows.clear()
        self.num_bytes = 0

    def __bool__(self) -> bool:
        """Whether there may be anything in it."""
        return self.budget > 0

    def __len__(self) -> int:
        """Return how many snapshots there are."""
        return len(self._windows)

    def _walk(self, root: Root, tokens: np.ndarray) -> tuple[list[_Node], int]:
        """Return the nodes that begin as the tokens go on, and how many tokens agree."""
        node, path, known = self._roots.get(root), [], 0
        while node is not None and known == node.end and known < len(tokens):
            node = node.children.get(int(tokens[known]))
            if node is not None:
                known += _common(node.tokens, tokens[known:])
                path.append(node)
        return path, known

    def _reaching(self, node: _Node, known: int, reach: int) -> _Node | None:
        """Return a node at `known` tokens or below whose window has what a query there sees."""
        start, stack = max(0, known - reach + 1), [node]
        while stack:
            one = stack.pop()
            if one.window is not None and one.end >= known and one.window.start <= start:
                return one
            if one.end <= max(known, reach):  # windows farther down begin later
                stack += one.children.values()
        return None

    def _split(self, node: _Node, known: int) -> _Node:
        """Return the node that ends after `known` tokens: this one, or its upper part."""
        if known == node.end:
            return node
        count, parent = known - node.start, node.parent
        assert parent is not None
        first, rest = node.span.split(count)
        upper = _Node(node.tokens[:count].copy(), known, first, parent)
        parent.children[int(upper.tokens[0])] = upper
        self.num_bytes += first.num_bytes + rest.num_bytes - node.span.num_bytes
        node.tokens, node.span, node.parent = node.tokens[count:].copy(), rest, upper
        upper.children[int(node.tokens[0])] = node
        return upper

    def _refresh(self, node: _Node) -> None:
        """Note that a window was used: its priority is the tokens that each of its bytes saves."""
        assert node.window is not None
        nearest = next((one.end for one in node.ancestors() if one.window is not None), 0)
        size = node.window.payload.num_bytes
        if not node.children:
            size += node.span.num_bytes
        node.priority = self._age + (node.end - nearest) / max(size, 1)
        self._windows.pop(node, None)
        self._windows[node] = None

    def _drop(self, node: _Node) -> None:
        """Drop a window, and the spans that no window needs any more."""
        assert node.window is not None
        self.num_bytes -= node.window.payload.num_bytes
        node.window = None
        del self._windows[node]
        while node.parent is not None and node.window is None and not node.children:
            self.num_bytes -= node.span.num_bytes + node.tokens.nbytes
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {root: one for root, one in self._roots.items() if one is not node}


def free_memory() -> int:
    """Return how many bytes of memory no process needs; where nobody says, a tenth of all."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":", 1) for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10
    except (AttributeError, OSError, ValueError):
        return 2**30


def _root_of(node: _Node) -> _Node:
    while node.parent is not None:
        node = node.parent
    return node


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many first tokens are the same."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size
