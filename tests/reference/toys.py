"""The five toy models of Gemma 3 with what transformers computes for them, once per session."""

import functools
from typing import Any, NamedTuple

import numpy as np
from golden import make_gemma3
from golden.conditioned import conditioned_weights, ragged_prompts, valid_tokens, weight_shapes
from transformers import Gemma3ForCausalLM

from gemlax.config import GemmaConfig

SIZES = tuple(make_gemma3.SIZES)


class Toy(NamedTuple):
    """A toy, its prompts, and one run of transformers over them.

    `logits` [B, T, V] and `hidden` (L + 1 times [B, T, D]) count only where `valid` [B, T].
    """

    size: str
    hf_config: dict[str, Any]
    config: GemmaConfig
    weights: dict[str, np.ndarray]
    reference: Gemma3ForCausalLM
    tokens: np.ndarray
    lengths: np.ndarray
    valid: np.ndarray
    logits: np.ndarray
    hidden: list[np.ndarray]

    @property
    def std(self) -> float:
        """The standard deviation of the logits, the unit of every tolerance."""
        return float(self.logits[self.valid].std())

    def error(self, logits: np.ndarray) -> float:
        """Return the largest difference of these logits from transformers', times std."""
        return float(np.abs(logits - self.logits)[self.valid].max()) / self.std


@functools.cache
def toy(size: str) -> Toy:
    """Build transformers' model of a size and run its prompts."""
    hf_config = make_gemma3.SIZES[size]
    weights = conditioned_weights(size, weight_shapes(hf_config))
    model = make_gemma3.build(hf_config, weights)
    tokens, lengths = ragged_prompts(size, hf_config["vocab_size"])
    run = make_gemma3.run(model, tokens, lengths)
    return Toy(
        size,
        hf_config,
        GemmaConfig.from_hf(hf_config),
        weights,
        model,
        tokens,
        lengths,
        valid_tokens(lengths),
        run.logits,
        run.hidden,
    )
