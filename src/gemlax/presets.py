"""The published sizes as rows of data, and `tiny`, the same layer pattern at toy width.

A row holds what the published config.json says and the class defaults do not.
Source: the config.json files of google/gemma-3-*; see docs/sources.md.
"""

import dataclasses
from typing import Any

from gemlax.config import GemmaConfig, LayerSpec
from gemlax.errors import RequestError

__all__ = ["PRESETS", "preset", "tiny"]

_LINEAR_8 = {"rope_type": "linear", "factor": 8.0}
_SMALL: dict[str, Any] = {"vocab_size": 262_144, "num_attention_heads": 4, "num_key_value_heads": 1,
          "sliding_window": 512, "max_position_embeddings": 32_768}  # fmt: skip
_TINY_HIDDEN = 80  # hidden / heads = 20 equals no head_dim
_LARGE: dict[str, Any] = {"sliding_window": 1024, "rope_scaling": _LINEAR_8}

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
}  # fmt: skip


def preset(name: str) -> GemmaConfig:
    """Return the config of a published size, for example `preset("gemma-3-4b")`.

    Raises:
        RequestError: no such preset.
    """
    if name not in PRESETS:
        raise RequestError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return GemmaConfig.from_hf({"model_type": "gemma3_text"} | PRESETS[name])


def tiny(config: GemmaConfig, *, num_hidden_layers: int | None = None) -> GemmaConfig:
    """Return `config` at toy width: its layer pattern, head ratio, scale rule and rope are kept.

    Widths stay large enough for every part to matter: window 32, head_dim that is not
    hidden / heads, at least as many K/V heads as the ratio allows, 512 tokens.
    """
    text = config.text
    heads = min(text.num_attention_heads, 4)

    def shrink(spec: LayerSpec) -> LayerSpec:
        head_dim = max(spec.head_dim // 8, 16)
        ratio = text.num_attention_heads // spec.num_key_value_heads
        # Gemma 3 27B divides by hidden / heads, the others by head_dim.
        own = text.query_pre_attn_scalar == spec.head_dim
        return dataclasses.replace(
            spec,
            window=None if spec.window is None else 32,
            num_key_value_heads=max(heads // ratio, 1),
            head_dim=head_dim,
            attention_scale=(head_dim if own else _TINY_HIDDEN / heads) ** -0.5,
            intermediate_size=96,
        )

    layers = tuple(map(shrink, text.layers[:num_hidden_layers]))
    small = dataclasses.replace(
        text,
        vocab_size=512,
        hidden_size=_TINY_HIDDEN,
        num_attention_heads=heads,
        max_position_embeddings=min(text.max_position_embeddings, 65_536),
        query_pre_attn_scalar=round(layers[0].attention_scale ** -2),
        layers=layers,
    )
    return dataclasses.replace(config, text=small)
