"""What may come next in one answer: a grammar, ids that are allowed, a budget of thought."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Constraint", "Matcher", "ThinkingBudget", "mask_width"]

WORD = 32
Matcher: TypeAlias = Any  # of llguidance, which is imported at first use
Mask = NDArray[np.uint32]


def mask_width(num_tokens: int) -> int:
    """Return how many words a mask of so many tokens has."""
    return -(-num_tokens // WORD)


class ThinkingBudget(NamedTuple):
    """The most tokens of a thought channel; then only the id that closes it may come."""

    most: int
    open_id: int
    close_id: int
    is_open: bool = False  # the prompt ends inside a channel


@dataclasses.dataclass
class _Thought:
    is_open: bool
    num_used: int = 0


class Constraint:
    """The state of one answer. Used by one thread at a time.

    A mask is a row of bits, one for each id from the lowest bit of the first word on.

    Attributes:
        error: why the answer cannot go on; None: it can.
        is_finished: it is complete: a stop id came, or nothing more may come.
    """

    def __init__(
        self,
        matcher: Matcher | None,
        *,
        num_tokens: int,
        eos_id: int,
        stop_ids: Collection[int],
        special_ids: Collection[int] = (),
        allowed_ids: Sequence[int] | None = None,
        budget: ThinkingBudget | None = None,
    ):
        """Begin an answer.

        Args:
            matcher: an `LLMatcher` of this answer alone; None: any text.
            num_tokens: of the vocabulary.
            eos_id: that stands in the matcher for the end.
            stop_ids: all that end the answer.
            special_ids: that are no text; of stop ids, these may come where the grammar may end.
            allowed_ids: the only ones that may come; None: all.
            budget: of thought.
        """
        self.error: str | None = None
        self.is_finished = False
        self._matcher, self._eos_id, self._budget = matcher, eos_id, budget
        self._stop_ids = frozenset(stop_ids)
        self._ends = np.asarray(sorted(self._stop_ids & set(special_ids)), np.int64)
        self._allowed = None if allowed_ids is None else _bits(allowed_ids, num_tokens)
        self._closing = None if budget is None else _bits([budget.close_id], num_tokens)
        self._full = np.full(mask_width(num_tokens), 0xFFFFFFFF, np.uint32)
        self._row = self._full.copy()
        self._thought = _Thought(budget is not None and budget.is_open)

    def copy(self) -> "Constraint":
        """Return one that goes on from here by itself."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._row, other._thought = self._full.copy(), dataclasses.replace(self._thought)
        if self._matcher is not None:
            other._matcher = self._matcher.deep_copy()
        return other

    def fill(self, rows: Mask, drafts: Sequence[int] = ()) -> None:
        """Write the masks of the next token, and after each of `drafts` of the one after it.

        Drafts must be valid (`check`). A grammar that fails sets `error`.
        """
        thought = dataclasses.replace(self._thought)
        for place in range(len(drafts) + 1):
            self._fill_one(rows[place])
            if place < len(drafts):
                self._note(drafts[place])
                if self._matcher is not None and not self._matcher.consume_token(drafts[place]):
                    break  # the error is noted below
        self._thought = thought
        if self._matcher is not None:
            if drafts and not self._matcher.rollback(len(drafts)):
                self._fail()
            if self._matcher.is_error():
                self._fail()

    def advance(self, tokens: Sequence[int]) -> int:
        """Take in tokens that came, up to an end or an error; return how many are the answer's."""
        for count, token in enumerate(tokens):
            if self.error is not None or self.is_finished:
                return count
            if token in self._stop_ids:
                self.is_finished = True
                continue
            self._note(token)
            if self._matcher is None:
                continue
            if not self._matcher.consume_token(token):
                self._fail()
                return count
            self.is_finished = self._matcher.is_stopped()
        return len(tokens)

    def forced(self) -> list[int]:
        """Return the ids that must come next, as far as they are known."""
        if self._matcher is None or self.is_finished or self.error is not None:
            return []
        return self._without_stops(self._matcher.compute_ff_tokens())

    def check(self, drafts: Sequence[int]) -> int:
        """Return how many drafts may come, one after another, before an end."""
        drafts = self._without_stops(drafts)
        if self._allowed is not None:
            drafts = drafts[: _first_false([_has(self._allowed, id) for id in drafts])]
        if self._budget is not None:
            drafts = drafts[: self._within_budget(drafts)]
        return len(drafts) if self._matcher is None else self._matcher.validate_tokens(drafts)

    def _without_stops(self, ids: Sequence[int]) -> list[int]:
        return list(ids[: _first_false([id not in self._stop_ids for id in ids])])

    def _fill_one(self, out: Mask) -> None:
        row = self._row
        if self._matcher is None:
            row[:] = self._full
        else:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            # The matcher knows one end; the answer may have others.
            may_end = _has(row, self._eos_id)
            _set(row, self._eos_id, False)
            if may_end:
                for id in self._ends:
                    _set(row, int(id), True)
        if self._allowed is not None:
            row &= self._allowed
        if self._is_used_up() and self._closing is not None:
            assert self._budget is not None
            if _has(row, self._budget.close_id):  # not inside a character
                row[:] = self._closing
        out[:] = row[: len(out)]

    def _note(self, token: int) -> None:
        """Count the tokens of a thought."""
        if self._budget is None:
            return
        if token == self._budget.close_id:
            self._thought = _Thought(False)
        elif token == self._budget.open_id:
            self._thought = _Thought(True)
        elif self._thought.is_open:
            self._thought.num_used += 1

    def _is_used_up(self) -> bool:
        thought = self._thought
        return (
            self._budget is not None and thought.is_open and thought.num_used >= self._budget.most
        )

    def _within_budget(self, drafts: Sequence[int]) -> int:
        thought = dataclasses.replace(self._thought)
        count = 0
        for draft in drafts:
            if self._is_used_up() and self._budget and draft != self._budget.close_id:
                break
            self._note(draft)
            count += 1
        self._thought = thought
        return count

    def _fail(self) -> None:
        assert self._matcher is not None
        said = self._matcher.get_error() or str(self._matcher.stop_reason())
        self.error = f"the grammar cannot go on from here: {' '.join(said.split())[:300]}"


def _bits(ids: Sequence[int], num_tokens: int) -> Mask:
    row = np.zeros(mask_width(num_tokens) * WORD, np.uint8)
    row[[id for id in ids if id < num_tokens]] = 1
    return np.packbits(row, bitorder="little").view("<u4").astype(np.uint32)


def _has(row: Mask, id: int) -> bool:
    return bool(int(row[id // WORD]) >> (id % WORD) & 1)


def _set(row: Mask, id: int, on: bool) -> None:
    bit = np.uint32(1 << id % WORD)
    row[id // WORD] = row[id // WORD] | bit if on else row[id // WORD] & ~bit


def _first_false(flags: Sequence[bool]) -> int:
    return next((index for index, flag in enumerate(flags) if not flag), len(flags))
