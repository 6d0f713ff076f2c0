"""Prompt lookup: drafts are what followed the last tokens when they stood in the row before.

Pure functions of arrays, on the device. Nothing here decides which tokens come out: `generate`
lets the decoder judge every draft.
Source: A. Saxena, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = ["MOST", "Drafting", "Drafts", "account", "afford", "propose", "start", "worthwhile"]

# The attention kernel takes 16 tokens of a row at once (ops.cpu.MAX_ROWS): the last and 15 drafts.
MOST = 15
# How many of its last tokens a row looks for: three, or else two.
_NGRAMS = (3, 2)
# A step takes the time of its rows and of two more: measured with native kernels (docs/log.md).
_FIXED = 2.0
# Of a row's budget, in steps: what it begins with, what a step without drafts adds, and the most.
# A row whose drafts are all wrong loses 2% of its time; found by trial (docs/log.md).
_START, _INCOME, _MOST_SAVED = 1.0, 0.02, 2.0


class Drafts(NamedTuple):
    """Tokens to try, and how many of them count in each row."""

    tokens: Any  # [B, d]
    counts: Any  # [B]


class Drafting(NamedTuple):
    """What a row remembers of its drafts.

    `steps` counts what it has run. `budget` is how many steps' time drafts have saved, kept small:
    where it is used up, the row waits.
    """

    steps: Any  # [B]
    budget: Any  # [B]


def start(batch: int) -> Drafting:
    """Return what rows remember before their first step."""
    return Drafting(steps=np.zeros(batch, np.int32), budget=np.full(batch, _START, np.float32))


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
    """Tell whether a step with drafts would pay if all of them were right."""
    possible = jnp.sum(drafts.counts).astype(jnp.float32)
    running = jnp.sum(~done).astype(jnp.float32)
    return (possible > 0) & (possible >= running * _extra(drafts))


def afford(drafts: Drafts, drafting: Drafting) -> Drafts:
    """Take back the drafts of rows whose budget is used up."""
    return drafts._replace(counts=jnp.where(drafting.budget < 0, 0, drafts.counts))


def account(
    drafting: Drafting, drafts: Drafts, tried: Bool[Array, ""], added: Int[Array, " B"]
) -> Drafting:
    """Count a step that added so many tokens to each row; `tried` says whether it took drafts."""
    gain = (added - 1).astype(jnp.float32) - _extra(drafts)
    change = jnp.where(tried & (drafts.counts > 0), gain, _INCOME)
    budget = jnp.minimum(drafting.budget + change, _MOST_SAVED)
    return Drafting(drafting.steps + (added > 0).astype(jnp.int32), budget)


def _extra(drafts: Drafts) -> float:
    """Return how many ordinary steps' time a step with drafts takes beyond one."""
    batch, most = drafts.tokens.shape
    return batch * most / (batch + _FIXED)
