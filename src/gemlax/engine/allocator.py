"""Which slots are free, and what their caches still hold. No jax.

A slot is one row of the stacked caches. When a request leaves, its keys and values stay until
another request takes the slot, so that one with the same beginning need not prefill it again.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Reservation", "Ring", "SlotAllocator"]


class Ring(NamedTuple):
    """A sliding layer's cache: position p lies in place p mod `size`; a query sees `window`."""

    window: int
    size: int


class Reservation(NamedTuple):
    """A slot, and how many of the prompt's first tokens its caches already hold."""

    slot: int
    num_cached_tokens: int


@dataclasses.dataclass
class _Slot:
    """What a slot's caches hold: `tokens`, of which rings have lost those before `oldest`."""

    tokens: tuple[int, ...] = ()
    adapter: int = 0
    oldest: tuple[int, ...] = ()


class SlotAllocator:
    """Hands out slots and takes them back. A slot is free or reserved, never both.

    Attributes:
        rings: of each kind of sliding layers; as many as they were, they may become longer.
    """

    def __init__(self, num_slots: int, rings: Sequence[Ring] = ()):
        self.rings = tuple(rings)
        self._slots = [self._empty() for _ in range(num_slots)]
        self._free = list(range(num_slots))  # the one that was left first comes first

    @property
    def num_free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def match_prefix(self, prompt: Sequence[int], adapter: int) -> Reservation | None:
        """Return the free slot that holds most of a prompt, except its last token.

        Of slots that hold equally much, the one left first. None: no slot is free.
        """
        best: Reservation | None = None
        for slot in self._free:
            num_cached = self._num_usable(self._slots[slot], prompt, adapter)
            if best is None or num_cached > best.num_cached_tokens:
                best = Reservation(slot, num_cached)
        return best

    def reserve(self, prompt: Sequence[int], adapter: int) -> Reservation | None:
        """Take the slot that `match_prefix` returns; None: no slot is free."""
        reservation = self.match_prefix(prompt, adapter)
        if reservation is not None:
            self._free.remove(reservation.slot)
        return reservation

    def free(
        self, slot: int, tokens: Sequence[int], adapter: int, *, num_cached: int, highest: int
    ) -> None:
        """Take a slot back.

        Args:
            slot: a reserved one.
            tokens: those whose keys and values its caches hold.
            adapter: that they were made with.
            num_cached: how many of them the slot held when it was reserved.
            highest: one more than the highest position that was written, rejected drafts included.
        """
        if slot in self._free:
            raise ValueError(f"slot {slot} is free already")
        before = self._slots[slot].oldest if num_cached else (0,) * len(self.rings)
        oldest = tuple(
            max(first, highest - ring.size) for first, ring in zip(before, self.rings, strict=True)
        )
        self._slots[slot] = _Slot(tuple(tokens), adapter, oldest)
        self._free.append(slot)

    def forget(self) -> None:
        """Forget what all free slots hold: their caches were lost."""
        for slot in self._free:
            self._slots[slot] = self._empty()

    def _empty(self) -> _Slot:
        return _Slot(oldest=(0,) * len(self.rings))

    def _num_usable(self, held: _Slot, prompt: Sequence[int], adapter: int) -> int:
        """Return how many tokens of a prompt a slot's caches can go on from."""
        if held.adapter != adapter:
            return 0
        shorter = min(len(held.tokens), len(prompt) - 1)
        same = next(
            (i for i in range(shorter) if held.tokens[i] != prompt[i]),
            shorter,
        )
        for ring, oldest in zip(self.rings, held.oldest, strict=True):
            if max(same - ring.window + 1, 0) < oldest:
                return 0
        return same
