"""transformers as the arbiter: build a toy, run it, and keep what the golden files hold.

Needs torch and transformers (the `reference` extra), and no gemlax.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from golden.conditioned import conditioned_weights, ragged_prompts, valid_tokens, weight_shapes
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
    PreTrainedModel,
)

CLASSES: dict[str, tuple[type, type]] = {
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig),
    "gemma4_text": (Gemma4ForCausalLM, Gemma4TextConfig),
    "gemma4_unified_text": (Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig),
}
# Stored whole for one row of the batch: what goes into some layers, and what comes out.
ROW = 0
OUTPUTS = 16  # positions at which a layer's output is stored
FULL = 6  # positions at which all logits are stored


class Run(NamedTuple):
    """One forward pass: logits [B, T, V] and the hidden states at the L + 1 layer borders.

    `shared` holds, by kind, the keys and values [B, T, K, H] that later layers share, and
    `router_gap` [L, B, T] how far apart the probabilities of the last chosen expert and of the
    next one are. Both, and the `per_layer_inputs` [L, B, T, P], are empty where there are none.
    """

    logits: np.ndarray
    hidden: list[np.ndarray]
    per_layer_inputs: list[np.ndarray]
    shared: dict[str, tuple[np.ndarray, np.ndarray]]
    router_gap: np.ndarray


def build(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> PreTrainedModel:
    """Build transformers' model with these weights, given by canonical name."""
    make_model, make_config = CLASSES[config["model_type"]]
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = make_model(make_config(**config, **eager))
    state = {f"model.{name}": torch.from_numpy(value) for name, value in weights.items()}
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or found.missing_keys not in ([], ["lm_head.weight"]):
        raise ValueError(f"the weights do not fit: {found}")
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def run(
    model: PreTrainedModel, tokens: np.ndarray, lengths: np.ndarray, use_cache: bool = False
) -> Run:
    """Run a batch padded on the right."""
    out = Run(np.empty(0), [], [], {}, np.empty(0))
    gaps: list[np.ndarray] = []

    def before_layer(layer: Any, args: tuple) -> None:
        out.hidden.append(_copy(args[0]))
        if len(args) > 1 and args[1] is not None:
            out.per_layer_inputs.append(_copy(args[1]))

    def after_attention(layer: Any, args: tuple, kwargs: Mapping[str, Any], _: Any) -> None:
        if kwargs["shared_kv_states"]:
            both = kwargs["shared_kv_states"].get(layer.layer_type)
            if both is not None:
                out.shared[layer.layer_type] = tuple(_copy(x.transpose(1, 2)) for x in both)

    def after_router(router: Any, args: tuple, found: tuple) -> None:
        top = found[0].topk(router.config.top_k_experts + 1).values
        gaps.append(_copy(top[:, -2] - top[:, -1]).reshape(tokens.shape))

    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(before_layer) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda *a: out.hidden.append(_copy(a[2]))))
    for layer in layers:
        if model.config.model_type != "gemma3_text" and model.config.num_kv_shared_layers:
            hook = layer.self_attn.register_forward_hook(after_attention, with_kwargs=True)
            hooks.append(hook)
        if hasattr(layer, "router"):
            hooks.append(layer.router.register_forward_hook(after_router))
    mask = torch.from_numpy(valid_tokens(lengths).astype(np.int64))
    ids = torch.from_numpy(tokens).long()
    logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
    for hook in hooks:
        hook.remove()
    return out._replace(logits=logits.numpy(), router_gap=np.array(gaps))


def _copy(x: torch.Tensor) -> np.ndarray:
    return x.numpy().copy()


def golden(
    size: str, config: Mapping[str, Any], layers: tuple[int, ...], num_ids: int
) -> dict[str, np.ndarray]:
    """Compute what the file of a size holds.

    Args:
        layers: those whose input and output are stored.
        num_ids: token ids whose logits are stored at each position.
    """
    weights = conditioned_weights(size, weight_shapes(config))
    tokens, lengths = ragged_prompts(size, config["vocab_size"])
    logits, hidden, _, _, router_gap = run(build(config, weights), tokens, lengths)
    valid = valid_tokens(lengths)
    rng = np.random.default_rng(0)
    at = np.sort(rng.choice(lengths[ROW], OUTPUTS, replace=False))
    vocab_ids = np.sort(rng.choice(config["vocab_size"], num_ids, replace=False))
    full_at = np.sort(rng.choice(np.flatnonzero(valid), FULL, replace=False))
    found = {
        "config": np.array(json.dumps(config)),
        # Tells other random numbers from another result.
        "weights_l1": np.array([float(np.abs(weights[n]).sum(dtype="f8")) for n in weights]),
        "tokens": tokens,
        "lengths": lengths,
        "vocab_ids": vocab_ids,
        "logits_slice": logits[valid][:, vocab_ids],  # [valid tokens, num_ids]
        "full_at": full_at,  # into the flattened [B * T]
        "logits_full": logits.reshape(-1, logits.shape[-1])[full_at],
        "logits_std": logits[valid].std(),
        "row": np.array(ROW),
        "layers": np.array(layers),
        "layer_inputs": np.stack([hidden[i][ROW, : lengths[ROW]] for i in layers]),
        "output_at": at,
        "layer_outputs": np.stack([hidden[i + 1][ROW, at] for i in layers]),
    }
    return found | ({"router_gap": router_gap} if router_gap.size else {})


def path_of(size: str) -> Path:
    """Return where the file of a size lies."""
    return Path(__file__).with_name(f"{size}.npz")
