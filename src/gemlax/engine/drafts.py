"""Prompt lookup: drafts are what followed the last tokens where they stood in the row before.

Runs on the host. Nothing here decides which tokens come out: the decoder judges every draft.
Source: A. Saxena, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Iterable, Sequence

__all__ = ["MAX_DRAFTS", "Proposer", "extra_steps", "is_worthwhile"]

# The attention kernel takes 16 tokens of a row at once (ops.cpu.MAX_ROWS): the last and 15 drafts.
MAX_DRAFTS = 15
# How many of its last tokens a row looks for: three, or else two.
_NGRAMS = (3, 2)
# A step takes the time of its rows and of two more: measured with native kernels (docs/log.md).
_FIXED = 2.0
# Of a row's budget, in steps: what it begins with, what a step without drafts adds, and the most.
# A row whose drafts are all wrong loses 2% of its time; found by trial (docs/log.md).
_START, _INCOME, _MOST_SAVED = 1.0, 0.02, 2.0


def extra_steps(num_rows: int, num_drafts: int) -> float:
    """Return how many ordinary steps' time a step with drafts takes beyond one."""
    return num_rows * num_drafts / (num_rows + _FIXED)


def is_worthwhile(counts: Sequence[int], num_drafts: int) -> bool:
    """Return whether a step with drafts would pay if all of them were right.

    `counts` are the drafts of each row, `num_drafts` how many places the step has for them.
    """
    return sum(counts) > 0 and sum(counts) >= len(counts) * extra_steps(len(counts), num_drafts)


class Proposer:
    """Drafts for one row from its own tokens.

    Attributes:
        budget: how many steps' time drafts have saved, kept small. Below zero the row waits.
    """

    def __init__(self, tokens: Iterable[int]):
        self.budget = _START
        self._tokens: list[int] = []
        # Where the last occurrence of an n-gram ends, except that at the end of the row.
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens of the row."""
        known = self._tokens
        for token in tokens:
            last = len(known) - 1
            for size in _NGRAMS:
                if len(known) >= size:
                    self._ends[tuple(known[-size:])] = last
            known.append(token)

    def propose(self, most: int) -> list[int]:
        """Return up to `most` drafts; none where the budget is used up or nothing matches.

        Where what followed reaches the end of the row, it goes on as if the row repeated itself.
        """
        known = self._tokens
        if most <= 0 or self.budget < 0:
            return []
        last = len(known) - 1
        for size in _NGRAMS:
            end = self._ends.get(tuple(known[-size:])) if len(known) >= size else None
            if end is not None:
                period = last - end
                return [known[end + 1 + order % period] for order in range(most)]
        return []

    def account(self, num_added: int, extra: float | None) -> None:
        """Count a step; `extra` is the time that its drafts took, None: it had none."""
        gain = _INCOME if extra is None else num_added - 1 - extra
        self.budget = min(self.budget + gain, _MOST_SAVED)
