"""Prompt lookup: drafts are what followed the last tokens when they stood in the row before.

Pure functions of arrays, on the device. Nothing here decides which tokens come out: `generate`
lets the decoder judge every draft.
Source: A. Saxena, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = ["MOST", "Drafting", "Drafts", "propose", "start", "worthwhile"]

# The attention kernel takes 16 tokens of a row at once (ops.cpu.MAX_ROWS): the last and 15 drafts.
MOST = 15
# How many of its last tokens a row looks for: three, or else two.
_NGRAMS = (3, 2)


class Drafts(NamedTuple):
    """Tokens to try, and how many of them count in each row."""

    tokens: Any  # [B, d]
    counts: Any  # [B]


class Drafting(NamedTuple):
    """What a row remembers of its drafts: `steps` it has run, one token each without drafts."""

    steps: Any  # [B]


def start(batch: int) -> Drafting:
    """Return what rows remember before their first step."""
    return Drafting(steps=np.zeros(batch, np.int32))


def propose(
    tokens: Int[Array, "B S"], lengths: Int[Array, " B"], room: Int[Array, " B"], most: int
) -> Drafts:
    """Draft up to `most` tokens, and no more than `room`, for each row.

    They are those that followed the last earlier occurrence of the row's last tokens; where that
    reaches the end of the row, it goes on as it would if the row repeated itself.
    """
    last = lengths - 1
    end = jnp.full_like(lengths, -1)
    for n in _NGRAMS:
        end = jnp.where(end < 0, _last_match(tokens, last, n), end)
    order = jnp.arange(most, dtype=jnp.int32)[None]
    period = jnp.where(end < 0, 1, last - end)[:, None]
    at = jnp.maximum(end, 0)[:, None] + 1 + order % period
    drafts = jnp.take_along_axis(tokens, jnp.minimum(at, last[:, None]), axis=1)
    return Drafts(drafts, jnp.where(end < 0, 0, jnp.clip(room, 0, most)))


def _last_match(tokens: Array, last: Array, n: int) -> Array:
    """Return where the last earlier occurrence of each row's last n tokens ends, or -1."""
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    same = (columns >= n - 1) & (columns < last[:, None])
    for back in range(n):
        own = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0)[:, None], axis=1)
        same &= jnp.roll(tokens, back, axis=1) == own
    return jnp.where(same, columns, -1).max(axis=1)


def worthwhile(drafts: Drafts, done: Bool[Array, " B"]) -> Bool[Array, ""]:
    """Tell whether enough rows have drafts for all of them to take the long step."""
    drafting = jnp.sum(drafts.counts > 0)
    return (drafting > 0) & (2 * drafting >= jnp.sum(~done))
