"""The published sizes as rows of data, and `tiny`, the same layer pattern at toy width.

A row holds what the published config.json says and the class defaults do not.
Source: the config.json files of google/gemma-3-* and google/gemma-4-*.
"""

from collections.abc import Mapping
from typing import Any

from gemlax.config import GemmaConfig, TextConfig, from_hf
from gemlax.errors import RequestError

__all__ = ["PRESETS", "preset", "tiny"]

_LINEAR_8 = {"rope_type": "linear", "factor": 8.0}
_SMALL: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "num_attention_heads": 4,
    "num_key_value_heads": 1, "sliding_window": 512, "max_position_embeddings": 32_768,
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": _LINEAR_8,
}  # fmt: skip
# Gemma 4: the edge models with per-layer embeddings and shared K/V, and those without.
_EDGE: dict[str, Any] = {
    "model_type": "gemma4_text", "num_attention_heads": 8, "sliding_window": 512,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_SERVER: dict[str, Any] = {
    "model_type": "gemma4_text", "num_attention_heads": 16, "sliding_window": 1024,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
    "max_position_embeddings": 262_144, "use_bidirectional_attention": "vision",
}  # fmt: skip
_PERIOD_5 = ["sliding_attention"] * 4 + ["full_attention"]

PRESETS: dict[str, dict[str, Any]] = {
    "gemma-3-270m": _SMALL
    | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "gemma-3-1b": _SMALL
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    "gemma-3-4b": _LARGE
    | {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34,
       "num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma-3-12b": _LARGE
    | {"hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48,
       "num_attention_heads": 16, "num_key_value_heads": 8},
    "gemma-3-27b": _LARGE
    | {"hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62,
       "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
       "query_pre_attn_scalar": 168},
    "gemma-4-e2b": _EDGE
    | {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
       "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
       "layer_types": _PERIOD_5 * 7},
    "gemma-4-e4b": _EDGE
    | {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 42,
       "num_key_value_heads": 2, "num_kv_shared_layers": 18},
    "gemma-4-12b": {key: value for key, value in _SERVER.items()
                    if key != "hidden_size_per_layer_input"}
    | {"model_type": "gemma4_unified_text", "hidden_size": 3840, "intermediate_size": 15_360,
       "num_hidden_layers": 48, "num_key_value_heads": 8, "num_global_key_value_heads": 1},
    "gemma-4-26b-a4b": _SERVER
    | {"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30,
       "num_key_value_heads": 8, "num_global_key_value_heads": 2, "enable_moe_block": True,
       "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "gemma-4-31b": _SERVER
    | {"hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 60,
       "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4},
}  # fmt: skip

_HEADS = ("head_dim", "global_head_dim", "num_key_value_heads", "num_global_key_value_heads")
_TINY_HIDDEN = 80  # hidden / heads = 20 equals no head_dim
_TINY_WINDOW = 32
_TINY_VOCAB = 512


def preset(name: str) -> GemmaConfig:
    """Return the config of a published size, for example `preset("gemma-3-4b")`.

    Raises:
        RequestError: no such preset.
    """
    if name not in PRESETS:
        raise RequestError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return from_hf(PRESETS[name])


def tiny(config: GemmaConfig, *, num_hidden_layers: int | None = None) -> GemmaConfig:
    """Return `config` at toy width: its layer pattern, head ratio, scale rule and rope are kept.

    Widths stay large enough for every part to matter: window 32, head_dim that is not
    hidden / heads and differs between kinds where it did, K/V heads by the ratio, 512 tokens;
    the number of experts and how many are active stay.
    """
    text, keys = config.text, config.to_hf()
    layers, heads = text.layers[:num_hidden_layers], _tiny_heads(text)

    def shrink(sizes: Mapping[str, Any]) -> dict[str, int]:
        return {
            key: max(size // 8, 16) if "dim" in key else max(heads * size // old_heads, 1)
            for key, size in sizes.items()
        }

    old_heads = text.num_attention_heads
    changes = shrink({key: keys[key] for key in _HEADS if keys.get(key)}) | {
        "vocab_size": _TINY_VOCAB,
        "hidden_size": _TINY_HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "layer_types": keys["layer_types"][: len(layers)],
        "max_position_embeddings": min(text.max_position_embeddings, 65_536),
        "sliding_window": _TINY_WINDOW,
        "num_kv_shared_layers": sum(not spec.owns_kv for spec in layers),
        "hidden_size_per_layer_input": min(text.hidden_size_per_layer_input, 16),
        "vocab_size_per_layer_input": _TINY_VOCAB,
        "moe_intermediate_size": min(text.moe_intermediate_size, 24) or None,
    }
    if "per_layer_config" in keys:
        by_layer = keys["per_layer_config"].items()
        changes["per_layer_config"] = {i: shrink(x) for i, x in by_layer if int(i) < len(layers)}
    # Gemma 3 27B divides by hidden / heads, the others by head_dim.
    own_scale = keys.get("query_pre_attn_scalar") == keys["head_dim"]
    changes["query_pre_attn_scalar"] = changes["head_dim"] if own_scale else _TINY_HIDDEN / heads
    return from_hf(keys | {key: value for key, value in changes.items() if key in keys})


def _tiny_heads(text: TextConfig) -> int:
    """Return 4 query heads, or more where a kind would be left with one K/V head of several."""
    several = (spec for spec in text.layers if spec.num_key_value_heads > 1)
    widest = max((text.num_attention_heads // s.num_key_value_heads for s in several), default=1)
    return min(text.num_attention_heads, max(4, 2 * widest))
