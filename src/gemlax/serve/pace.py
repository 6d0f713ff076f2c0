"""How many tokens of a prompt are read between two steps of those who decode. No jax."""

import dataclasses

__all__ = ["Pace"]

# Sizes that a chunk may have beside decoding rows: larger ones are no faster per token on a CPU,
# smaller ones slower (docs/log.md).
_SIZES = (256, 128, 64, 32)
_WEIGHT = 0.2  # of the newest measurement


@dataclasses.dataclass
class Pace:
    """Moving averages of what steps and prompt tokens take, in seconds.

    Attributes:
        target: what a step and a chunk together may take.
    """

    target: float
    _token_s: float | None = None
    _step_s: dict[int, float] = dataclasses.field(default_factory=dict)

    def chunk(self, num_decoding: int) -> int:
        """Return the most tokens to prefill beside so many rows that decode."""
        step = self._step_s.get(num_decoding, max(self._step_s.values(), default=0.0))
        if self._token_s is None:
            return _SIZES[-1]
        left = self.target - step
        return next((n for n in _SIZES if n * self._token_s <= left), _SIZES[-1])

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Take in what prompt tokens took."""
        if tokens >= _SIZES[-1] // 2:  # of fewer, most places are padding
            self._token_s = _averaged(self._token_s, seconds / tokens)

    def note_step(self, num_decoding: int, seconds: float) -> None:
        """Take in what a step of so many rows took."""
        old = self._step_s.get(num_decoding)
        self._step_s[num_decoding] = _averaged(old, seconds)


def _averaged(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
