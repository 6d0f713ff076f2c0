"""What was said and not yet read: filled by the engine's thread, emptied on the event loop.

A slow reader finds the updates of each answer joined, so that its outbox holds text and no history
of steps.
"""

import dataclasses
import threading
from collections.abc import Iterable

from gemlax.serve.work import Delta, Update

__all__ = ["Outbox", "joined"]

# Updates that wait before they are joined.
_MANY = 32


class Outbox:
    """The updates of one request, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._updates: list[Update] = []
        self._joined = 0

    def put(self, update: Update) -> None:
        """Add one; called by the engine's thread."""
        with self._lock:
            self._updates.append(update)
            if len(self._updates) > self._joined + _MANY:
                self._updates = joined(self._updates)
                self._joined = len(self._updates)

    def take(self) -> list[Update]:
        """Return all, those of one answer joined; called on the event loop."""
        with self._lock:
            updates, self._updates, self._joined = self._updates, [], 0
        return updates if len(updates) < 2 else joined(updates)


def joined(updates: Iterable[Update]) -> list[Update]:
    """Return one update for each answer."""
    by_index: dict[int, list[Update]] = {}
    for update in updates:
        by_index.setdefault(update.index, []).append(update)
    return [one[0] if len(one) == 1 else _join(one) for one in by_index.values()]


def _join(updates: list[Update]) -> Update:
    last = updates[-1]
    return dataclasses.replace(
        last,
        deltas=_join_deltas(delta for update in updates for delta in update.deltas),
        tokens=[token for update in updates for token in update.tokens],
        logprobs=[one for update in updates for one in update.logprobs],
    )


def _join_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """Put neighbours of one kind together; a call begins with its name."""
    texts: list[tuple[str, list[str]]] = []
    for kind, text in deltas:
        if texts and texts[-1][0] == kind != "call":
            texts[-1][1].append(text)
        else:
            texts.append((kind, [text]))
    return [Delta(kind, "".join(parts)) for kind, parts in texts]  # type: ignore[arg-type]
