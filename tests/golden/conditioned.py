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
# Where the effective weights 1 + w of the norms lie.
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
NORM_SPREAD = 0.2
# Tokens of each prompt; the window is 32.
LENGTHS = (100, 71, 33)
# Ids below are special: padding, end, start.
FIRST_PLAIN_ID = 3


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a Gemma 3 text decoder, by canonical name.

    Args:
        config: its `config.json`.
    """
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries = config["num_attention_heads"] * size
    keys = config["num_key_value_heads"] * size
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (size,),
        "self_attn.k_norm": (size,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
    }
    layers = {
        f"layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    table = {"embed_tokens.weight": (config["vocab_size"], hidden)}
    return table | layers | {"norm.weight": (hidden,)}


def conditioned_weights(
    name_of_size: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Return float32 weights; each tensor has its own stream, seeded by its size and name."""
    return {name: _draw(name_of_size, name, shape) for name, shape in shapes.items()}


def _draw(size: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(f"{size}/{name}".encode())
    normal = np.random.default_rng(seed).standard_normal(shape)
    module = name.split(".")[-2]
    if module in NORM_CENTRES:
        return (NORM_CENTRES[module] * np.exp(NORM_SPREAD * normal) - 1).astype(np.float32)
    scale = EMBEDDING_STD if module == "embed_tokens" else 1.0
    return (normal * scale * shape[1] ** -0.5).astype(np.float32)  # [out, in] or [V, D]


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
