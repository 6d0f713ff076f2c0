"""The log-likelihood of texts: windows over a long one, and its tokens' log-probabilities."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemlax.decoder import Decoder

__all__ = ["Score", "token_logprobs", "windows"]

# Tokens whose logits exist at a time.
_ROWS = 128


class Score(NamedTuple):
    """The log-likelihood (natural) of `num_tokens` tokens, each given those before it."""

    log_likelihood: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; NaN of no tokens."""
        if not self.num_tokens:
            return float("nan")
        return float(np.exp(-self.log_likelihood / self.num_tokens))


def windows(
    ids: Int[np.ndarray, " n"], window: int, bos_id: int
) -> Iterator[tuple[Int[np.ndarray, " m"], int]]:
    """Yield pieces of at most `window` ids, and how many of a piece's last ids are scored in it.

    Pieces overlap by half a window, and each begins with the text's BOS.
    """
    bos = ids[:1] if ids[0] == bos_id else ids[:0]
    room, scored = window - len(bos), 1
    while scored < len(ids):
        # Of a tiny window BOS takes half; one id at least must be new.
        start = max(len(bos), scored - min(window // 2, room - 1))
        end = min(start + room, len(ids))
        yield np.concatenate([bos, ids[start:end]]), end - scored
        scored = end


def token_logprobs(
    decoder: Decoder, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T-1"]:
    """Return the log-probabilities of tokens[:, 1:]; logits exist for a block at a time."""
    hidden = hidden[:, :-1]
    targets = tokens[:, 1:]
    pad = -hidden.shape[1] % _ROWS if hidden.shape[1] > _ROWS else 0
    rows = min(_ROWS, hidden.shape[1])
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    flat = jnp.pad(targets, ((0, 0), (0, pad))).reshape(-1, rows)

    def block(args: tuple[Array, Array]) -> Array:
        logits = decoder.logits(args[0])
        own = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(block, (hidden, flat)).reshape(tokens.shape[0], -1)
    return out[:, : targets.shape[1]]
