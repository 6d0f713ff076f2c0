"""The log-likelihood of texts: windows over a long one, and its tokens' log-probabilities."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gemlax import ops
from gemlax.decoder import Decoder
from gemlax.qtensor import shape_of
from gemlax.sampling import top_logprobs
from gemlax.sharding import ONE_DEVICE, Layout

__all__ = ["Score", "label_logprobs", "top_label_logprobs", "windows"]


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


def label_logprobs(
    decoder: Decoder,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    wanted: Bool[Array, "B T"],
    *,
    frozen: bool = True,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
    """Return the log-probability of each label where `wanted`, elsewhere 0.

    Args:
        frozen: what makes the logits gets no gradient.
        layout: of the decoder's weights.
    """
    table = decoder.head.weight.get_value()
    shards, groups = layout.parts("vocab"), layout.parts("batch")
    shards = shards if shape_of(table)[0] % shards == 0 else 1
    groups = groups if len(labels) % groups == 0 else 1
    head = ops.Head(table, decoder.config.final_logit_softcapping, frozen, shards)
    return ops.chunked_logprobs(head, hidden, labels, wanted, groups=groups)


# Positions whose logits are there at once.
_BLOCK = 64


def top_label_logprobs(
    decoder: Decoder, hidden: Float[Array, "1 T D"], labels: Int[Array, "1 T"]
) -> tuple[Float[Array, "1 T"], Int[Array, "1 T n"], Float[Array, "1 T n"]]:
    """Return the log-probability of each label, and the most likely ids with theirs.

    A label that is the most likely id has exactly its number.
    """
    size = labels.shape[1]
    places = -(-size // _BLOCK) * _BLOCK
    hidden = jnp.pad(hidden[0], ((0, places - size), (0, 0))).reshape(-1, _BLOCK, hidden.shape[2])
    labels = jnp.pad(labels[0], (0, places - size)).reshape(-1, _BLOCK)

    def block(both: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        return top_logprobs(decoder.logits(both[0]), both[1])

    parts = jax.lax.map(block, (hidden, labels))
    logprobs, top_ids, top_values = (
        part.reshape(1, places, *part.shape[2:])[:, :size] for part in parts
    )
    return logprobs, top_ids, top_values
