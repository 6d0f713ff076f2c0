"""Writes tests/golden/<size>.npz: what transformers computes for five toy Gemma 3 models.

Run in an environment with torch and transformers (the `reference` extra); it needs no gemlax:

    cd tests && python -m golden.make_gemma3

A toy has its size's real layer pattern, head ratio, rope and query scale at small width. Weights
are not stored: `conditioned.py` makes them again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from golden.conditioned import conditioned_weights, ragged_prompts, valid_tokens, weight_shapes
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

COMMON = {
    "model_type": "gemma3_text",
    "vocab_size": 512,
    "hidden_size": 80,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "sliding_window": 32,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
SMALL = {"num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32,
         "max_position_embeddings": 32_768}  # fmt: skip
LARGE = {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
         "max_position_embeddings": 65_536,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": COMMON | SMALL | {"num_hidden_layers": 18},
    "gemma-3-1b": COMMON | SMALL | {"num_hidden_layers": 26},
    "gemma-3-4b": COMMON | LARGE | {"num_hidden_layers": 34},
    "gemma-3-12b": COMMON | LARGE | {"num_hidden_layers": 48},
    # The scale is (hidden / heads) ** -0.5 here, not head_dim ** -0.5.
    "gemma-3-27b": COMMON
    | LARGE
    | {"num_hidden_layers": 62, "head_dim": 16, "query_pre_attn_scalar": 20},
}
# Stored whole for one row of the batch: what goes into these layers, and what comes out.
ROW = 0
OUTPUTS = 16  # positions at which a layer's output is stored
SLICE = 64  # token ids whose logits are stored at each position
FULL = 6  # positions at which all logits are stored


class Run(NamedTuple):
    """One forward pass: logits [B, T, V] and the hidden states at the L + 1 layer borders."""

    logits: np.ndarray
    hidden: list[np.ndarray]


def build(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Gemma3ForCausalLM:
    """Build transformers' model with these weights, given by canonical name."""
    model = Gemma3ForCausalLM(Gemma3TextConfig(**config, attn_implementation="eager"))
    state = {f"model.{name}": torch.from_numpy(value) for name, value in weights.items()}
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or found.missing_keys not in ([], ["lm_head.weight"]):
        raise ValueError(f"the weights do not fit: {found}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def run(model: Gemma3ForCausalLM, tokens: np.ndarray, lengths: np.ndarray) -> Run:
    """Run a batch padded on the right."""
    hidden: list[np.ndarray] = []
    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0].numpy().copy()))
        for layer in layers
    ]
    hooks.append(layers[-1].register_forward_hook(lambda *a: hidden.append(a[2].numpy().copy())))
    mask = torch.from_numpy(valid_tokens(lengths).astype(np.int64))
    logits = model(torch.from_numpy(tokens).long(), attention_mask=mask, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return Run(logits.numpy(), hidden)


def golden(size: str) -> dict[str, np.ndarray]:
    """Compute what the file of a size holds."""
    config = SIZES[size]
    weights = conditioned_weights(size, weight_shapes(config))
    tokens, lengths = ragged_prompts(size, config["vocab_size"])
    logits, hidden = run(build(config, weights), tokens, lengths)
    valid = valid_tokens(lengths)
    rng = np.random.default_rng(0)
    last = config["num_hidden_layers"] - 1
    layers = np.array([0, 1, 5, 6, last - 1, last])
    at = np.sort(rng.choice(lengths[ROW], OUTPUTS, replace=False))
    vocab_ids = np.sort(rng.choice(config["vocab_size"], SLICE, replace=False))
    full_at = np.sort(rng.choice(np.flatnonzero(valid), FULL, replace=False))
    return {
        "config": np.array(json.dumps(config)),
        # Tells other random numbers from another result.
        "weights_l1": np.array([float(np.abs(weights[n]).sum(dtype="f8")) for n in weights]),
        "tokens": tokens,
        "lengths": lengths,
        "vocab_ids": vocab_ids,
        "logits_slice": logits[valid][:, vocab_ids],  # [valid tokens, SLICE]
        "full_at": full_at,  # into the flattened [B * T]
        "logits_full": logits.reshape(-1, logits.shape[-1])[full_at],
        "logits_std": logits[valid].std(),
        "row": np.array(ROW),
        "layers": layers,
        "layer_inputs": np.stack([hidden[i][ROW, : lengths[ROW]] for i in layers]),
        "output_at": at,
        "layer_outputs": np.stack([hidden[i + 1][ROW, at] for i in layers]),
    }


def path_of(size: str) -> Path:
    """Return where the file of a size lies."""
    return Path(__file__).with_name(f"{size}.npz")


def main() -> None:
    """Write one file per size beside this script."""
    torch.set_num_threads(2)
    for size in SIZES:
        np.savez_compressed(path_of(size), **golden(size))


if __name__ == "__main__":
    main()
