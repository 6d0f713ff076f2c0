"""Trees of weights in the layouts of google-deepmind/gemma, and orbax to write them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from disk import CONFIG

from gemlax.config import GemmaConfig, LayerSpec, TextConfig

TEXT = CONFIG.text
D, N, K = TEXT.hidden_size, TEXT.num_attention_heads, TEXT.layers[0].num_key_value_heads
H = TEXT.layers[0].head_dim


def flat_tree(weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the published layout: one dict of paths, each with one or two arrays."""
    tree = {
        "transformer/embedder": {"input_embedding": weights["embed_tokens.weight"]},
        "transformer/final_norm": {"scale": weights["norm.weight"]},
    }
    for i in range(TEXT.num_hidden_layers):

        def get(name: str, i: int = i) -> np.ndarray:
            return weights[f"layers.{i}.{name}.weight"]

        def heads(name: str, count: int, get=get) -> np.ndarray:
            return get(name).reshape(count, H, D).transpose(0, 2, 1)

        layer = {
            "attn/q_einsum": {"w": heads("self_attn.q_proj", N)},
            "attn/kv_einsum": {
                "w": np.stack([heads("self_attn.k_proj", K), heads("self_attn.v_proj", K)])
            },
            "attn/attn_vec_einsum": {"w": get("self_attn.o_proj").T.reshape(N, H, D)},
            "attn/_query_norm": {"scale": get("self_attn.q_norm")},
            "attn/_key_norm": {"scale": get("self_attn.k_norm")},
            "mlp/gating_einsum": {"w": np.stack([get("mlp.gate_proj"), get("mlp.up_proj")])},
            "mlp/linear": {"w": get("mlp.down_proj").T},
            "pre_attention_norm": {"scale": get("input_layernorm")},
            "post_attention_norm": {"scale": get("post_attention_layernorm")},
            "pre_ffw_norm": {"scale": get("pre_feedforward_layernorm")},
            "post_ffw_norm": {"scale": get("post_feedforward_layernorm")},
        }
        tree |= {f"transformer/layer_{i}/{path}": leaf for path, leaf in layer.items()}
    return tree


def nested_tree(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the layout of a Flax model: nested, and no `w` in the MLP."""
    tree: dict[str, Any] = {}
    for path, leaf in flat_tree(weights).items():
        *above, last = path.split("/")[1:]
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf["w"] if "mlp" in above else leaf
    return tree


def flat_tree_of_gemma4(
    weights: Mapping[str, np.ndarray], config: GemmaConfig, stored_kv: bool = False
) -> dict[str, dict[str, np.ndarray]]:
    """Return the layout of google-deepmind/gemma, gm/nn/gemma4/_modules.py and _moe.py.

    Args:
        stored_kv: also the K/V of layers that share it, as published files have them.
    """
    text = config.text
    width, count = text.hidden_size_per_layer_input, text.num_hidden_layers
    tree: dict[str, dict[str, np.ndarray]] = {
        "transformer/embedder": {"input_embedding": weights["embed_tokens.weight"]},
        "transformer/final_norm": {"scale": weights["norm.weight"]},
    }
    if width:
        table = weights["embed_tokens_per_layer.weight"].reshape(-1, count, width)
        projection = weights["per_layer_model_projection.weight"].T.reshape(-1, count, width)
        norm = weights["per_layer_projection_norm.weight"]
        tree["transformer/embedder"]["per_layer_embeddings"] = table
        tree["transformer/embedder/per_layer_model_projection"] = {"w": projection}
        tree["transformer/embedder/per_layer_projection_norm"] = {"scale": norm}
    for i, spec in enumerate(text.layers):
        start = f"layers.{i}."
        own = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        layer: dict[str, dict[str, np.ndarray]] = {"": {"skip_scale": own["layer_scalar"]}}
        layer |= attention_of_gemma4(own, text, spec, stored_kv) | mlps_of_gemma4(own, spec)
        if width:
            layer |= {
                "per_layer_input_gate": {"w": own["per_layer_input_gate.weight"].T},
                "per_layer_projection": {"w": own["per_layer_projection.weight"].T},
                "post_per_layer_input_norm": {"scale": own["post_per_layer_input_norm.weight"]},
            }
        tree |= {f"transformer/layer_{i}/{path}".rstrip("/"): leaf for path, leaf in layer.items()}
    return tree


def attention_of_gemma4(
    own: Mapping[str, np.ndarray], text: TextConfig, spec: LayerSpec, stored_kv: bool
) -> dict[str, dict[str, np.ndarray]]:
    hidden, size, kv_heads = text.hidden_size, spec.head_dim, spec.num_key_value_heads
    heads = text.num_attention_heads

    def split(name: str, count: int) -> np.ndarray:
        return own[f"self_attn.{name}_proj.weight"].reshape(count, size, hidden).swapaxes(1, 2)

    layer: dict[str, dict[str, np.ndarray]] = {
        "attn/q_einsum": {"w": split("q", heads)},
        "attn/attn_vec_einsum": {
            "w": own["self_attn.o_proj.weight"].T.reshape(heads, size, hidden)
        },
        "attn/query_norm": {"scale": own["self_attn.q_norm.weight"]},
        "pre_attention_norm": {"scale": own["input_layernorm.weight"]},
        "post_attention_norm": {"scale": own["post_attention_layernorm.weight"]},
    }
    if spec.owns_kv:
        layer["attn/key_norm"] = {"scale": own["self_attn.k_norm.weight"]}
        if spec.k_eq_v:
            layer["attn/k_einsum"] = {"w": split("k", kv_heads)}
        else:
            pair = np.stack([split("k", kv_heads), split("v", kv_heads)])
            layer["attn/kv_einsum"] = {"w": pair}
    elif stored_kv:
        layer["attn/key_norm"] = {"scale": np.zeros(size)}
        layer["attn/kv_einsum"] = {"w": np.zeros((2, kv_heads, hidden, size))}
    return layer


def mlps_of_gemma4(
    own: Mapping[str, np.ndarray], spec: LayerSpec
) -> dict[str, dict[str, np.ndarray]]:
    dense = {
        "gating_einsum": {"w": np.stack([own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]])},
        "linear": {"w": own["mlp.down_proj.weight"].T},
    }
    before = {"scale": own["pre_feedforward_layernorm.weight"]}
    after = {"scale": own["post_feedforward_layernorm.weight"]}
    if not spec.num_experts:
        named = {f"mlp/{name}": leaf for name, leaf in dense.items()}
        return named | {"pre_ffw_norm": before, "post_ffw_norm": after}
    up = own["experts.gate_up_proj"]
    return {f"mlp2/{name}": leaf for name, leaf in dense.items()} | {
        "pre_ffw2_norm": before,
        "post_ffw2_norm": {"scale": own["post_feedforward_layernorm_1.weight"]},
        "mlp": {
            "router_scale": own["router.scale"],
            "per_expert_scale": own["router.per_expert_scale"],
        },
        "mlp/router_logits": {"w": own["router.proj.weight"].T},
        "mlp/gating_einsum": {"w": up.reshape(spec.num_experts, 2, -1, up.shape[-1])},
        "mlp/linear": {"w": own["experts.down_proj"].swapaxes(1, 2)},
        "pre_ffw_norm": {"scale": own["pre_feedforward_layernorm_2.weight"]},
        "post_ffw1_norm": {"scale": own["post_feedforward_layernorm_2.weight"]},
        "post_ffw_norm": after,
    }


def write(folder: Path, tree: Mapping[str, Any]) -> Path:
    """Write a tree with orbax."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder
