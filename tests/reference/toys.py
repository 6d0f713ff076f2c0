"""The toy models of all sizes with what transformers computes for them, once per session."""

import functools
from typing import Any, NamedTuple

import adapters
import numpy as np
import pytest
from golden import hf, make_gemma3, make_gemma4
from golden.conditioned import conditioned_weights, ragged_prompts, valid_tokens, weight_shapes
from transformers import PreTrainedModel

from gemlax import ops
from gemlax.config import GemmaConfig, from_hf
from gemlax.decoder import Decoder

GEMMA_3 = tuple(make_gemma3.SIZES)
GEMMA_4 = tuple(make_gemma4.SIZES)


class Toy(NamedTuple):
    """A toy, its prompts, and one run of transformers over them.

    `run` counts only where `valid` [B, T].
    """

    size: str
    hf_config: dict[str, Any]
    config: GemmaConfig
    weights: dict[str, np.ndarray]
    reference: PreTrainedModel
    tokens: np.ndarray
    lengths: np.ndarray
    valid: np.ndarray
    run: hf.Run

    @property
    def logits(self) -> np.ndarray:
        """transformers' logits [B, T, V]."""
        return self.run.logits

    @property
    def hidden(self) -> list[np.ndarray]:
        """transformers' hidden states [B, T, D] at the L + 1 layer borders."""
        return self.run.hidden

    @property
    def std(self) -> float:
        """The standard deviation of the logits, the unit of every tolerance."""
        return float(self.logits[self.valid].std())

    @property
    def clear(self) -> np.ndarray:
        """Where [B, T] every router chose clearly; all tokens, if there are no experts."""
        return self.valid & clear_choices(self.run)

    def error(self, logits: np.ndarray) -> float:
        """Return the largest difference of these logits from transformers', times std."""
        return float(np.abs(logits - self.logits)[self.clear].max()) / self.std


def stacks(sizes: tuple[str, ...], each_way: tuple[str, ...]) -> list[Any]:
    """Return pairs of a size and how its layers are held: read by index, as they are by default.

    The other ways are quick for `each_way` and slow for the rest, whose layers are like theirs.
    """
    ways: tuple[adapters.Stack, ...] = ("index", "scan", "unroll")
    return [
        pytest.param(
            size, way, marks=() if way == "index" or size in each_way else pytest.mark.slow
        )
        for size in sizes
        for way in ways
    ]


def clear_choices(run: hf.Run) -> np.ndarray:
    """Return where [B, T] no rounding can make a router choose another expert."""
    if not run.router_gap.size:
        return np.ones(run.logits.shape[:2], bool)
    return run.router_gap.min(axis=0) >= adapters.ROUTER_GAP


@functools.cache
def toy(size: str) -> Toy:
    """Build transformers' model of a size and run its prompts."""
    hf_config = (make_gemma3.SIZES | make_gemma4.SIZES)[size]
    weights = conditioned_weights(size, weight_shapes(hf_config))
    model = hf.build(hf_config, weights)
    tokens, lengths = ragged_prompts(size, hf_config["vocab_size"])
    return Toy(
        size,
        hf_config,
        from_hf(hf_config),
        weights,
        model,
        tokens,
        lengths,
        valid_tokens(lengths),
        hf.run(model, tokens, lengths),
    )


def positions_of(case: Toy) -> np.ndarray:
    """Return the position of each token, EMPTY where there is none."""
    return np.where(case.valid, np.arange(case.valid.shape[1]), ops.EMPTY).astype(np.int32)


def layer_errors(case: Toy, decoder: Decoder) -> list[float]:
    """Return how far each layer is from transformers' on its own inputs, times std.

    Its own inputs are the hidden states, the per-layer input, and the keys and values of the
    donor.
    """
    positions, run, errors = positions_of(case), case.run, []
    for i, spec in enumerate(case.config.text.layers):
        own = run.per_layer_inputs[i] if run.per_layer_inputs else None
        shared = None if spec.owns_kv else run.shared[spec.kind]
        found = adapters.layer_output(decoder, i, run.hidden[i], positions, own, shared)
        expected = run.hidden[i + 1]
        difference = np.abs(found - expected)[case.clear].max()
        errors.append(float(difference / expected[case.valid].std()))
    return errors


# Torch rounds otherwise on a CPU without AVX-512: up to 2.6e-5 times std after 30 layers, and
# 3.6e-4 of the gaps between routers' choices. A wrong constant is off by more than 1e-3.
OTHER_CPU = {"router_gap": 1e-3}


def check_golden_file(case: Toy, new: dict[str, np.ndarray]) -> None:
    """Check that a size's golden file is what was computed just now."""
    with np.load(hf.path_of(case.size)) as old:
        assert set(new) == set(old)
        for name, value in new.items():
            if value.dtype == np.float32:
                scale = case.std if name.startswith("logits") else value.std()
                assert (
                    np.abs(old[name] - value).max() <= OTHER_CPU.get(name, adapters.LOGITS) * scale
                ), name
            else:
                np.testing.assert_array_equal(old[name], value, err_msg=name)
