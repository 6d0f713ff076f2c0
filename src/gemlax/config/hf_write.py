"""A `GemmaConfig` written as a config.json that transformers reads: the inverse of `hf`.

Gemma 3 is written with the keys of transformers 4 where they can say it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from gemlax.config import hf
from gemlax.config.keys import show_value
from gemlax.config.rope import write_rope
from gemlax.config.spec import KINDS, GemmaConfig, LayerSpec, TextConfig
from gemlax.errors import UnsupportedError

__all__ = ["write"]

SLIDING, FULL = KINDS
_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
}


def write(config: GemmaConfig) -> dict[str, Any]:
    """Write a text-only config.json; see `GemmaConfig.to_hf`."""
    text, eos = config.text, config.eos_token_id
    own: Callable[[TextConfig], dict[str, Any]] = (
        _write_gemma3 if text.model_type == "gemma3_text" else _write_gemma4
    )
    written = {
        "architectures": [_ARCHITECTURES[text.model_type]],
        "model_type": text.model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "layer_types": [layer.kind for layer in text.layers],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": text.final_logit_softcapping,
        "tie_word_embeddings": text.tie_word_embeddings,
        **own(text),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) != 1 else eos[0],
        "pad_token_id": config.pad_token_id,
    }
    _check_equal(config, hf.resolve(written))
    return written


def _check_equal(config: GemmaConfig, again: GemmaConfig) -> None:
    """Raise UnsupportedError with every fact that reading what was written does not give back."""
    # Which ids stand for features goes by the family and the size of the table.
    config = dataclasses.replace(config, placeholder_ids=again.placeholder_ids)
    if again == config:
        return
    differ = _differences(config, again, "") + _differences(config.text, again.text, "")
    pairs = zip(config.text.layers, again.text.layers, strict=True)
    for i, (layer, other) in enumerate(pairs):
        differ += _differences(layer, other, f"layers[{i}].")
    listed = "; ".join(differ[:4]) + (f"; and {len(differ) - 4} more" if differ[4:] else "")
    raise UnsupportedError(f"a config.json cannot hold this config: {listed}")


def _differences(
    own: GemmaConfig | TextConfig | LayerSpec,
    again: GemmaConfig | TextConfig | LayerSpec,
    prefix: str,
) -> list[str]:
    pairs = [(f.name, vars(own)[f.name], vars(again)[f.name]) for f in dataclasses.fields(own)]
    return [
        f"{prefix}{name} {show_value(value)} would be read as {show_value(other)}"
        for name, value, other in pairs
        if value != other and name not in ("text", "layers")
    ]


def _write_gemma3(text: TextConfig) -> dict[str, Any]:
    sliding, full = text.first(SLIDING), text.first(FULL)
    spec = text.layers[0]
    written: dict[str, Any] = {
        "intermediate_size": spec.intermediate_size,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "query_pre_attn_scalar": text.query_pre_attn_scalar,
        "sliding_window": sliding.window if sliding else hf.GEMMA3_DEFAULTS["sliding_window"],
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }
    local = write_rope(sliding.rope) if sliding else {}
    whole = write_rope(full.rope) if full else {}
    if (
        local.get("rope_type", "default") != "default"
        or whole.get("rope_type", "default") == "proportional"
    ):
        by_kind = {SLIDING: local, FULL: whole}
        return written | {"rope_parameters": {kind: own for kind, own in by_kind.items() if own}}
    default = hf.GEMMA3_DEFAULTS
    scaling = {"rope_type": "linear", "factor": whole["factor"]} if "factor" in whole else None
    return written | {
        "rope_theta": whole.get("rope_theta", default["rope_theta"]),
        "rope_local_base_freq": local.get("rope_theta", default["rope_local_base_freq"]),
        "rope_scaling": scaling,
    }


def _write_gemma4(text: TextConfig) -> dict[str, Any]:
    sliding, full = text.first(SLIDING), text.first(FULL)
    plain, whole, first = sliding or full, full or sliding, text.layers[0]
    assert plain is not None
    assert whole is not None
    k_eq_v = any(spec.k_eq_v for spec in text.layers)
    other_heads = whole.num_key_value_heads != plain.num_key_value_heads
    written: dict[str, Any] = {
        "intermediate_size": first.intermediate_size,
        "num_key_value_heads": plain.num_key_value_heads,
        "head_dim": plain.head_dim,
        "sliding_window": sliding.window if sliding else hf.GEMMA4_DEFAULTS["sliding_window"],
        "global_head_dim": whole.head_dim,
        "num_global_key_value_heads": whole.num_key_value_heads if other_heads else None,
        "attention_k_eq_v": k_eq_v,
        "num_kv_shared_layers": sum(not spec.owns_kv for spec in text.layers),
        "use_double_wide_mlp": text.layers[-1].intermediate_size != first.intermediate_size,
        "use_bidirectional_attention": text.use_bidirectional_attention,
        "rope_parameters": {
            spec.kind: write_rope(spec.rope) for spec in (sliding, full) if spec is not None
        },
    }
    if other_heads and not k_eq_v:  # the flat field counts with k_eq_v only
        sizes = {"head_dim": whole.head_dim, "num_key_value_heads": whole.num_key_value_heads}
        kinds = enumerate(spec.kind for spec in text.layers)
        written["per_layer_config"] = {str(i): sizes for i, kind in kinds if kind == FULL}
    if text.model_type == "gemma4_text":
        written |= {
            "hidden_size_per_layer_input": text.hidden_size_per_layer_input,
            "vocab_size_per_layer_input": text.vocab_size_per_layer_input or text.vocab_size,
            "enable_moe_block": first.num_experts > 0,
            "num_experts": first.num_experts or None,
            "top_k_experts": text.top_k_experts or None,
            "moe_intermediate_size": text.moe_intermediate_size or None,
        }
    return written
