"""Weights and prompts of the toy models: the same arrays from the same names, on any machine.

numpy only, so that the scripts that make golden files (torch) and the tests that read them (jax)
share it. The weights are conditioned: in a plain random net as deep as Gemma's, one rounding error
of the weights can move the logits by five standard deviations, and nothing can be compared.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# Standard deviation of a hidden state before the first layer. Much larger, and a toy repeats its
# last token for ever, because the table is also the head.
EMBEDDING_STD = 0.1
# Where the gains of the norms lie: 1 + w for Gemma 3, w for Gemma 4.
NORM_CENTRES = {
    # With the scale head_dim ** -0.5 this makes attention logits of standard deviation 1.
    "q_norm": 1.0,
    "k_norm": 1.0,
    # Small updates keep a rounding error from growing with depth.
    "post_attention_layernorm": 0.3,
    "post_feedforward_layernorm": 0.3,
    "input_layernorm": 1.0,
    "pre_feedforward_layernorm": 1.0,
    "norm": 1.0,
}
# Gemma 4 has the attention scale 1, so its q_norm and k_norm lie about head_dim ** -0.25.
NORM_CENTRES_4 = NORM_CENTRES | {
    "post_per_layer_input_norm": 0.3,
    "per_layer_projection_norm": 1.0,
    "post_feedforward_layernorm_1": 0.7,
    "post_feedforward_layernorm_2": 0.7,
    "pre_feedforward_layernorm_2": 1.0,
    # Logits of standard deviation 2, at which the softcap of 30 is felt.
    "norm": 20.0,
}
NORM_SPREAD = 0.2
# Vectors that are no norm: uniform between these.
UNIFORM = {"layer_scalar": (0.9, 1.1), "scale": (0.5, 1.5), "per_expert_scale": (0.5, 1.5)}
# Of the router's weights, and so of its logits, since it divides by sqrt(hidden) itself. At 2
# the probabilities of the eighth and ninth of 128 experts lie furthest apart.
ROUTER_STD = 2.0
# Tokens of each prompt; the window is 32.
LENGTHS = (100, 71, 33)
# Ids below are special: padding, end, start.
FIRST_PLAIN_ID = 3


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a Gemma 3 or 4 text decoder, by canonical name.

    Args:
        config: its `config.json`; for Gemma 4 with `layer_types`.
    """
    gemma4 = config["model_type"] != "gemma3_text"
    hidden = config["hidden_size"]
    layers = {
        f"layers.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in (_layer4(config, i) if gemma4 else _layer3(config)).items()
    }
    table = {"embed_tokens.weight": (config["vocab_size"], hidden)}
    width = config.get("hidden_size_per_layer_input", 0)
    if width:
        every = config["num_hidden_layers"] * width
        table |= {
            "embed_tokens_per_layer.weight": (config["vocab_size_per_layer_input"], every),
            "per_layer_model_projection.weight": (every, hidden),
            "per_layer_projection_norm.weight": (width,),
        }
    return table | layers | {"norm.weight": (hidden,)}


def _layer3(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * size
    keys = config["num_key_value_heads"] * size
    return {
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
    }


def _layer4(config: Mapping[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    """Return what layer `i` has: less than Gemma 3 if it shares K/V, or makes both from one."""
    hidden = config["hidden_size"]
    own = {key: config[key] for key in ("head_dim", "num_key_value_heads", "intermediate_size")}
    full = config["layer_types"][i] == "full_attention"
    if full:
        own["head_dim"] = config["global_head_dim"]
        own["num_key_value_heads"] = (
            config["num_global_key_value_heads"] or config["num_key_value_heads"]
        )
    shared = i >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
    if shared and config["use_double_wide_mlp"]:
        own["intermediate_size"] *= 2
    layer = _layer3({**config, **own})
    if shared:
        for name in ("k_proj", "v_proj", "k_norm"):
            del layer[f"self_attn.{name}.weight"]
    elif full and config["attention_k_eq_v"]:
        del layer["self_attn.v_proj.weight"]
    width = config.get("hidden_size_per_layer_input", 0)
    if width:
        layer |= {
            "per_layer_input_gate.weight": (width, hidden),
            "per_layer_projection.weight": (hidden, width),
            "post_per_layer_input_norm.weight": (hidden,),
        }
    if config.get("enable_moe_block"):
        experts, inner = config["num_experts"], config["moe_intermediate_size"]
        layer |= {
            "router.proj.weight": (experts, hidden),
            "router.scale": (hidden,),
            "router.per_expert_scale": (experts,),
            "experts.gate_up_proj": (experts, 2 * inner, hidden),
            "experts.down_proj": (experts, hidden, inner),
            "post_feedforward_layernorm_1.weight": (hidden,),
            "pre_feedforward_layernorm_2.weight": (hidden,),
            "post_feedforward_layernorm_2.weight": (hidden,),
        }
    return layer | {"layer_scalar": (1,)}


def conditioned_weights(
    name_of_size: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return float32 weights; each tensor has its own stream, seeded by its size and name.

    Only Gemma 4 has layer scalars; its norms multiply by w, not by 1 + w.
    """
    gemma4 = "layers.0.layer_scalar" in shapes
    width = shapes.get("per_layer_projection_norm.weight", (1,))[0]
    draw = _draw4 if gemma4 else _draw3
    return {name: draw(name_of_size, name, shape, width) for name, shape in shapes.items()}


def _draw3(size: str, name: str, shape: tuple[int, ...], _: int) -> np.ndarray:
    normal = _stream(size, name).standard_normal(shape)
    module = name.split(".")[-2]
    if module in NORM_CENTRES:
        return (NORM_CENTRES[module] * np.exp(NORM_SPREAD * normal) - 1).astype(np.float32)
    return _matrix(normal, EMBEDDING_STD if module == "embed_tokens" else 1.0)


def _draw4(size: str, name: str, shape: tuple[int, ...], width: int) -> np.ndarray:
    stream = _stream(size, name)
    last = name.split(".")[-1]
    if last in UNIFORM:
        return stream.uniform(*UNIFORM[last], shape).astype(np.float32)
    normal = stream.standard_normal(shape)
    module = name.split(".")[-2]
    if module in NORM_CENTRES_4:
        centre = shape[0] ** -0.25 if module in ("q_norm", "k_norm") else NORM_CENTRES_4[module]
        return (centre * np.exp(NORM_SPREAD * normal)).astype(np.float32)
    if module == "embed_tokens_per_layer":
        return (normal * width**-0.5).astype(np.float32)  # the rows of all layers lie side by side
    if name.endswith("router.proj.weight"):
        return _matrix(normal, ROUTER_STD * shape[-1] ** 0.5)
    return _matrix(normal, EMBEDDING_STD if module == "embed_tokens" else 1.0)


def _stream(size: str, name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{size}/{name}".encode()))


def _matrix(normal: np.ndarray, scale: float) -> np.ndarray:
    return (normal * scale * normal.shape[-1] ** -0.5).astype(np.float32)  # [out, in] or [V, D]


def ragged_prompts(name_of_size: str, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random tokens [3, 100], padded on the right with 0, and their lengths [3]."""
    rng = np.random.default_rng(zlib.crc32(f"{name_of_size}/prompts".encode()))
    lengths = np.array(LENGTHS, np.int32)
    shape = (len(LENGTHS), max(LENGTHS))
    tokens = rng.integers(FIRST_PLAIN_ID, vocab_size, shape, dtype=np.int32)
    return tokens * valid_tokens(lengths), lengths


def valid_tokens(lengths: np.ndarray) -> np.ndarray:
    """Return a mask [B, T], True where a token is no padding."""
    return np.arange(lengths.max()) < lengths[:, None]
