"""Which requests run, and what the next step does. No jax, no clock: the same calls, the same plan.

A request waits, is admitted to a slot, has its prompt prefilled in chunks, and decodes until it
ends. All tokens of a prompt except the last are prefilled; the last one is the first decode step's.
"""

import dataclasses
from collections import deque
from typing import NamedTuple

import numpy as np

from gemlax.engine.allocator import SlotAllocator
from gemlax.engine.drafts import Proposer
from gemlax.engine.request import Request, Usage
from gemlax.grammar import Constraint

__all__ = ["Chunk", "Row", "Scheduler"]


@dataclasses.dataclass(eq=False)
class Row:
    """A request in a slot.

    `tokens` are prompt and answer; the caches hold the first `num_filled` of them. `highest` is
    one more than the highest position written. `num_passed` counts the steps in a row that
    prefilled others instead. `is_waiting`: it is not prefilled for now, because another row
    prefills the same beginning. `snapshots`: see `Reuse`. `masks`: of the next step, where there
    is a constraint.
    """

    request_id: int
    request: Request
    slot: int
    num_cached: int
    tokens: list[int]
    num_filled: int
    highest: int
    proposer: Proposer | None = None
    constraint: Constraint | None = None
    masks: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint32))
    num_steps: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_passed: int = 0
    is_waiting: bool = False
    snapshots: list[int] | None = None

    @property
    def usage(self) -> Usage:
        """What the request has taken so far."""
        num_prompt = len(self.request.prompt)
        return Usage(
            num_prompt, self.num_cached, len(self.tokens) - num_prompt, self.num_steps,
            self.prefill_s, self.decode_s,
        )  # fmt: skip

    @property
    def num_to_fill(self) -> int:
        """How many tokens of the prompt are still to be prefilled."""
        return len(self.request.prompt) - 1 - self.num_filled


class Chunk(NamedTuple):
    """Tokens [start, stop) of a row's prompt, to be prefilled in one call."""

    row: Row
    start: int
    stop: int


# Steps after which a row that others were prefilled before goes first.
_PATIENCE = 8


class Scheduler:
    """Keeps each request in one place: waiting, or in a slot.

    Attributes:
        interleaved: the most tokens that are prefilled in a step while others decode, so that their
            tokens keep flowing; None: prompts first. It may be set between steps.
    """

    def __init__(self, allocator: SlotAllocator, *, chunk: int, interleaved: int | None = None):
        """Start with no requests.

        Args:
            allocator: of the slots.
            chunk: the most tokens of a row that are prefilled in one call.
            interleaved: see the attribute.
        """
        self._allocator, self._chunk, self.interleaved = allocator, chunk, interleaved
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rows: dict[int, Row] = {}

    @property
    def num_waiting(self) -> int:
        """How many requests have no slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests have a slot."""
        return len(self._rows)

    def submit(self, request_id: int, request: Request) -> None:
        """Let a request wait for a slot."""
        self._waiting.append((request_id, request))

    def admit(self) -> list[Row]:
        """Give free slots to those who wait, first come first served; return the new rows."""
        admitted = []
        while self._waiting:
            request_id, request = self._waiting[0]
            reservation = self._allocator.reserve(request.prompt, request.origin)
            if reservation is None:
                break
            self._waiting.popleft()
            slot, num_cached = reservation
            row = Row(
                request_id, request, slot, num_cached, list(request.prompt), num_cached, num_cached
            )
            if request.num_drafts:
                row.proposer = Proposer(request.prompt)
            if request.constraint is not None:
                row.constraint = request.constraint.copy()
            self._rows[request_id] = row
            admitted.append(row)
        return admitted

    def chunks(self) -> list[Chunk]:
        """Return what to prefill next: the same number of tokens at most for each row.

        Prompts first: a chunk of every row that has some left. Interleaved: of the row that has
        least left, or has been passed over long enough, and the whole rest of others that the same
        bound has room for. While nobody decodes the bound is a chunk.
        """
        filling = [row for row in self.filling() if not row.is_waiting]
        if not filling:
            return []
        size = self._chunk
        if self.interleaved is not None:
            size = min(size, self.interleaved) if self.decoding() else size
            filling = self._within(filling, size)
        return [
            Chunk(row, row.num_filled, row.num_filled + min(row.num_to_fill, size))
            for row in filling
        ]

    def _within(self, filling: list[Row], bound: int) -> list[Row]:
        """Return the rows that one step prefills, `bound` tokens in all."""
        filling = sorted(filling, key=lambda r: (r.num_passed < _PATIENCE, r.num_to_fill))
        chosen, room = filling[:1], bound - filling[0].num_to_fill
        for row in filling[1:]:
            if row.num_to_fill <= room:
                chosen.append(row)
                room -= row.num_to_fill
        for row in filling:
            row.num_passed = 0 if row in chosen else row.num_passed + 1
        return chosen

    def filling(self) -> list[Row]:
        """Return the rows whose prompt is not all in the caches, in the order of admission."""
        return [row for row in self._rows.values() if row.num_to_fill > 0]

    def filled(self, chunk: Chunk) -> None:
        """Note that a chunk is in the caches."""
        chunk.row.num_filled = chunk.stop
        chunk.row.highest = max(chunk.row.highest, chunk.stop)

    def decoding(self) -> list[Row]:
        """Return the rows that take the next decode step, by slot.

        Prompts first: nobody decodes while a prompt is being prefilled.
        """
        rows = [row for row in self._rows.values() if row.num_to_fill <= 0]
        if self.interleaved is None and len(rows) < len(self._rows):
            return []
        return sorted(rows, key=lambda row: row.slot)

    def find(self, request_id: int) -> Row | None:
        """Return the row of a request; None: it waits, or has ended."""
        return self._rows.get(request_id)

    def leave(self, row: Row) -> None:
        """Free the slot of a row; what its caches hold can be used again."""
        del self._rows[row.request_id]
        self._allocator.free(
            row.slot,
            row.tokens[: row.num_filled],
            row.request.origin,
            num_cached=row.num_cached,
            highest=row.highest,
        )

    def withdraw(self, request_id: int) -> bool:
        """Drop a request that waits; False: it does not wait."""
        for entry in self._waiting:
            if entry[0] == request_id:
                self._waiting.remove(entry)
                return True
        return False

    def rows(self) -> list[Row]:
        """Return all rows."""
        return list(self._rows.values())

    def waiting_ids(self) -> list[int]:
        """Return the requests that have no slot yet."""
        return [request_id for request_id, _ in self._waiting]
