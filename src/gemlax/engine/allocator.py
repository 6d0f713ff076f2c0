"""Which slots are free, and what their caches still hold. No jax.

A slot is one row of the stacked caches. When a request leaves, its keys and values stay until
another request takes the slot, so that one with the same beginning need not prefill it again.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Contents", "Reservation", "Ring", "SlotAllocator"]


class Ring(NamedTuple):
    """A sliding layer's cache: position p lies in place p mod `size`; a query sees `window`."""

    window: int
    size: int


class Reservation(NamedTuple):
    """A slot, and how many of the prompt's first tokens its caches already hold."""

    slot: int
    num_cached_tokens: int


# What keys and values depend on besides the tokens: the adapter and the salt of a request.
Origin = tuple[int, str]


@dataclasses.dataclass
class Contents:
    """What a slot's caches hold: `tokens`, of which rings have lost those before `oldest`."""

    tokens: tuple[int, ...] = ()
    origin: Origin = (0, "")
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

    def match_prefix(self, prompt: Sequence[int], origin: Origin) -> Reservation | None:
        """Return the free slot that holds most of a prompt, except its last token.

        Of slots that hold equally much, the one left first. None: no slot is free.
        """
        best: Reservation | None = None
        for slot in self._free:
            num_cached = self._num_usable(self._slots[slot], prompt, origin)
            if best is None or num_cached > best.num_cached_tokens:
                best = Reservation(slot, num_cached)
        return best

    def reserve(self, prompt: Sequence[int], origin: Origin) -> Reservation | None:
        """Take the slot that `match_prefix` returns; None: no slot is free."""
        reservation = self.match_prefix(prompt, origin)
        if reservation is not None:
            self._free.remove(reservation.slot)
        return reservation

    def contents(self, slot: int) -> Contents:
        """Return what the caches of a slot held when it was last free, or what was restored."""
        return self._slots[slot]

    def restored(self, slot: int, tokens: Sequence[int], origin: Origin) -> None:
        """Note that a reserved slot was given these tokens, and their last window, from outside."""
        oldest = tuple(max(0, len(tokens) - ring.window + 1) for ring in self.rings)
        self._slots[slot] = Contents(tuple(tokens), origin, oldest)

    def free(
        self, slot: int, tokens: Sequence[int], origin: Origin, *, num_cached: int, highest: int
    ) -> None:
        """Take a slot back.

        Args:
            slot: a reserved one.
            tokens: those whose keys and values its caches hold.
            origin: that they were made with.
            num_cached: how many of them the slot held when it was reserved.
            highest: one more than the highest position that was written, rejected drafts included.
        """
        if slot in self._free:
            raise ValueError(f"slot {slot} is free already")
        before = self._slots[slot].oldest if num_cached else (0,) * len(self.rings)
        oldest = tuple(
            max(first, highest - ring.size) for first, ring in zip(before, self.rings, strict=True)
        )
        self._slots[slot] = Contents(tuple(tokens), origin, oldest)
        self._free.append(slot)

    def forget(self, adapter: int) -> None:
        """Forget what was made with an adapter: it is another one now, or gone."""
        for slot, contents in enumerate(self._slots):
            if contents.origin[0] == adapter:
                self._slots[slot] = self._empty()

    def holds_window(self, contents: Contents) -> bool:
        """Whether the rings still hold all that a query after the last token sees."""
        length = len(contents.tokens)
        return all(
            max(length - ring.window + 1, 0) >= oldest
            for ring, oldest in zip(self.rings, contents.oldest, strict=True)
        )

    def _empty(self) -> Contents:
        return Contents(oldest=(0,) * len(self.rings))

    def _num_usable(self, held: Contents, prompt: Sequence[int], origin: Origin) -> int:
        """Return how many tokens of a prompt a slot's caches can go on from."""
        if held.origin != origin:
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
