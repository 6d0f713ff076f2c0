"""Rows of fixed width from examples of any length, in an order that a seed gives.

Nothing here is kept between batches: batch b of a run is a function of the examples, the seed and
b, so a run goes on where it stopped by its number of steps alone.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gemlax.tune.data import Example, Pair

__all__ = ["Batches", "Rows", "pack", "pair_rows"]

EMPTY = -1  # the position of padding, as in `ops`
OPEN = 64  # rows that are looked at for room; so packing takes time linear in the examples


class Rows(NamedTuple):
    """Rows of tokens; each array is [..., T] int32, `weights` float32.

    `labels` is the token that follows in the same text, and `weights` 1 where that is learnt.
    """

    tokens: Any  # of NumPy, or of JAX once they are on devices
    positions: Any
    segments: Any
    labels: Any
    weights: Any


def pack(examples: Sequence[Example], width: int, *, several: bool = True) -> Rows:
    """Put examples into rows, in order; each into the first row that has room.

    Args:
        several: put several examples into one row; they do not see one another.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.ids)
        open_rows = range(max(0, len(rows) - OPEN), len(rows)) if several else ()
        row = next((i for i in open_rows if room[i] >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(example)
        room[row] -= size
    return _rows(rows, width)


def pair_rows(pairs: Sequence[Pair], width: int) -> Rows:
    """Put each answer into a row of its own: row 2i is chosen, row 2i + 1 rejected."""
    return _rows([[one] for pair in pairs for one in pair], width)


def _rows(rows: Sequence[Sequence[Example]], width: int) -> Rows:
    shape = (len(rows), width)
    out = Rows(
        np.zeros(shape, np.int32), np.full(shape, EMPTY, np.int32), np.full(shape, EMPTY, np.int32),
        np.zeros(shape, np.int32), np.zeros(shape, np.float32),
    )  # fmt: skip
    for i, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            size = len(example.ids)
            columns = slice(start, start + size)
            out.tokens[i, columns] = example.ids
            out.positions[i, columns] = np.arange(size)
            out.segments[i, columns] = number
            labelled = slice(start, start + size - 1)
            out.labels[i, labelled] = example.ids[1:]
            out.weights[i, labelled] = example.learnt[1:]
            start += size
    return out


class Batches:
    """The batches of a run: rows are made once and come in a new order in each epoch.

    What does not fill the last batch of an epoch is filled with rows that weigh nothing.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[Pair],
        width: int,
        rows: int,
        *,
        seed: int = 0,
        packed: bool = True,
    ):
        """`rows`: of a batch, a pair counts as one; pairs are not packed."""
        order = np.random.default_rng(seed).permutation(len(examples))
        shuffled: list[Any] = [examples[i] for i in order]
        self._size, self._seed = rows, seed
        self._pairs = isinstance(shuffled[0], Pair)
        made = pair_rows(shuffled, width) if self._pairs else pack(shuffled, width, several=packed)
        self.num_rows = len(made.tokens) // (2 if self._pairs else 1)
        empty = _rows([[]] * ((2 if self._pairs else 1) * (-self.num_rows % rows)), width)
        self._rows = Rows(*(np.concatenate(parts) for parts in zip(made, empty, strict=True)))
        self.per_epoch = -(-self.num_rows // rows)

    def __getitem__(self, step: int) -> Rows:
        """Return batch `step` of the run, counted over all epochs."""
        epoch, batch = divmod(step, self.per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self.num_rows)
        order = np.concatenate([order, np.arange(self.num_rows, self.per_epoch * self._size)])
        chosen = order[batch * self._size : (batch + 1) * self._size]
        if self._pairs:
            chosen = np.stack([2 * chosen, 2 * chosen + 1], axis=1).reshape(-1)
        return Rows(*(a[chosen] for a in self._rows))
