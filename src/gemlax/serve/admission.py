"""Who may come in, and who of those that wait is next. No jax, no HTTP, no clock of its own.

Places are taken on the event loop and given back by the engine's thread, so they are counted under
a lock.
"""

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Generic, Literal, Protocol, TypeVar

from gemlax.serve.options import ServeOptions
from gemlax.serve.work import ServeError

__all__ = ["Admission", "Place", "State", "Waiting"]

State = Literal["loading", "ready", "draining", "failed"]
# Seconds of waiting that are worth one step of priority.
_AGEING = 10.0
# What one answer is thought to take, for Retry-After, before any has ended.
_FIRST_GUESS = 1.0


class Place:
    """The places of one request: one for each answer until it ends, and its waiting tokens."""

    def __init__(self, admission: "Admission", key: str, answers: int):
        """`Admission.enter` makes it."""
        self._admission, self._key = admission, key
        self._answers, self._tokens = answers, 0

    def wait_with(self, tokens: int) -> None:
        """Let the prompts wait; raise ServeError 429 where too many tokens wait already."""
        self._tokens = self._admission.queue_tokens(tokens)

    def started(self, tokens: int) -> None:
        """A prompt does not wait any more."""
        tokens = min(tokens, self._tokens)
        self._tokens -= tokens
        self._admission.unqueue_tokens(tokens)

    def leave(self, answers: int | None = None, seconds: float | None = None) -> None:
        """Give back places of some answers, or of all that are left; `seconds` is what one took."""
        answers = self._answers if answers is None else min(answers, self._answers)
        self._answers -= answers
        if not self._answers:
            self.started(self._tokens)
        self._admission.release(self._key, answers, seconds)


class Admission:
    """Counts places: as many as slots and queue have together.

    Attributes:
        state: whether anybody may come in; set by the engine's thread and by whoever drains.
    """

    def __init__(
        self, options: ServeOptions, on_rejected: Callable[[str], None] = lambda reason: None
    ):
        """`on_rejected` is told why a request gets no place."""
        self.state: State = "loading"
        self._on_rejected = on_rejected
        self._options = options
        self._total = options.slots + options.max_queue
        self._lock = threading.Lock()
        self._places: Counter[str] = Counter()
        self._tokens = 0
        self._seconds = _FIRST_GUESS

    @property
    def num_places(self) -> int:
        """How many places are taken."""
        return self._places.total()

    def check_open(self) -> None:
        """Raise ServeError 503 unless the server is ready."""
        if self.state == "ready":
            return
        self._on_rejected(self.state)
        said = {
            "loading": "the model is still loading",
            "draining": "the server is shutting down",
            "failed": "the engine has failed",
        }[self.state]
        raise ServeError(503, f"{said}; try again later", code=self.state, retry_after=2.0)

    def enter(self, key: str, answers: int) -> Place:
        """Take places for the answers of a request; raise ServeError 429 where none are left.

        One key gets at most half of all places while others have some.
        """
        self.check_open()
        with self._lock:
            taken, total = self._places.total(), self._total
            others = taken - self._places[key]
            if taken + answers > total:
                self._refuse("queue_full", f"{taken} of {total} places are taken")
            if others and self._places[key] + answers > max(total // 2, 1):
                self._refuse("key_limit", f"this key has {self._places[key]} of {total} places")
            self._places[key] += answers
        return Place(self, key, answers)

    def _refuse(self, reason: str, what: str) -> None:
        self._on_rejected(reason)
        wait = max(1.0, self._seconds * self._places.total() / self._options.slots / 2)
        raise ServeError(
            429, f"the server is busy: {what}; try again later", code=reason,
            retry_after=min(round(wait), 60),
        )  # fmt: skip

    def queue_tokens(self, tokens: int) -> int:
        """Count prompt tokens that wait; see `Place.wait_with`."""
        limit = self._options.max_queue_tokens
        with self._lock:
            if self._tokens and self._tokens + tokens > limit:
                self._refuse("queue_tokens", f"prompts of {self._tokens} of {limit} tokens wait")
            self._tokens += tokens
        return tokens

    def unqueue_tokens(self, tokens: int) -> None:
        """Undo `queue_tokens`."""
        with self._lock:
            self._tokens -= tokens

    def release(self, key: str, answers: int, seconds: float | None) -> None:
        """Give places back; see `Place.leave`."""
        with self._lock:
            self._places[key] -= answers
            if self._places[key] <= 0:
                del self._places[key]
            if seconds is not None:
                self._seconds += 0.2 * (seconds - self._seconds)


class Waiter(Protocol):
    """What may wait."""

    key: str
    priority: int
    arrival: float


W = TypeVar("W", bound=Waiter)


@dataclasses.dataclass
class Waiting(Generic[W]):
    """Those that have no slot yet."""

    entries: list[W] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: W) -> None:
        """Let somebody wait."""
        self.entries.append(entry)

    def remove(self, entry: W) -> bool:
        """Forget somebody; False: they do not wait."""
        if entry not in self.entries:
            return False
        self.entries.remove(entry)
        return True

    def take(self, now: float, running: Mapping[str, int], slots: int) -> W:
        """Return who is next: by priority, which waiting improves, then by arrival.

        A key that has half of the slots lets others go first. `running` counts slots by key.
        """

        def rank(entry: W) -> tuple[bool, float, float]:
            is_full = running.get(entry.key, 0) >= max(slots // 2, 1)
            aged = entry.priority - int((now - entry.arrival) / _AGEING)
            return is_full, aged, entry.arrival

        entry = min(self.entries, key=rank)
        self.entries.remove(entry)
        return entry
