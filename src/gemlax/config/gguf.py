"""GGUF metadata into a `GemmaConfig`, by way of the keys of config.json.

Source: llama.cpp, conversion/gemma.py, src/models/gemma3.cpp and gemma4.cpp.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemlax.config import hf
from gemlax.config.spec import KINDS, GemmaConfig
from gemlax.errors import UnsupportedError

__all__ = ["read"]

_REQUIRED = {
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.sliding_window", "attention.layer_norm_rms_epsilon",
}  # fmt: skip
_COMMON = _REQUIRED | {
    "attention.value_length", "attention.sliding_window_pattern", "rope.freq_base",
    "rope.freq_base_swa", "rope.dimension_count", "vocab_size",
}  # fmt: skip
_KEYS = {
    "gemma3": _COMMON | {
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    },
    "gemma4": _COMMON | {
        "attention.key_length_swa", "attention.value_length_swa", "attention.shared_kv_layers",
        "rope.dimension_count_swa", "final_logit_softcapping", "embedding_length_per_layer_input",
        "expert_count", "expert_used_count", "expert_feed_forward_length",
    },
}  # fmt: skip

# Sizes of a head that must be those of its keys.
_SAME_SIZES = {
    "attention.value_length_swa": "sliding_attention",
    "rope.dimension_count_swa": "sliding_attention",
    "rope.dimension_count": "full_attention",
}


def read(metadata: Mapping[str, Any]) -> GemmaConfig:
    """Resolve the metadata; see `GemmaConfig.from_gguf`."""
    architecture = metadata.get("general.architecture")
    if architecture not in _KEYS:
        raise UnsupportedError(
            f"GGUF architecture {architecture!r} is not supported; expected one of {list(_KEYS)}"
        )
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    unknown = [
        f"{prefix}{k} = {own[k]!r} (not known)" for k in sorted(own.keys() - _KEYS[architecture])
    ]
    if unknown:
        raise UnsupportedError(f"GGUF metadata: {'; '.join(unknown)}")
    missing = sorted(_REQUIRED - own.keys())
    if missing:
        raise UnsupportedError(f"GGUF metadata lacks {prefix}{f', {prefix}'.join(missing)}")
    vocab = own.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] = (
        _gemma3 if architecture == "gemma3" else _gemma4
    )
    found = _common(own, int(vocab)) | convert(own | {"vocab_size": int(vocab)})
    text = hf.read_text(found, "GGUF metadata")
    return GemmaConfig(
        text,
        bos_token_id=int(metadata.get("tokenizer.ggml.bos_token_id", 2)),
        eos_token_id=(int(metadata.get("tokenizer.ggml.eos_token_id", 1)),),
        pad_token_id=int(metadata.get("tokenizer.ggml.padding_token_id", 0)),
        placeholder_ids=hf.placeholders(text),
    )


def _common(own: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    if (
        own.get("attention.value_length", own["attention.key_length"])
        != own["attention.key_length"]
    ):
        raise UnsupportedError("GGUF metadata: key_length and value_length differ")
    return {
        "vocab_size": vocab_size,
        "hidden_size": own["embedding_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "max_position_embeddings": own["context_length"],
        # The file stores float32; the published value is 1e-6.
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        "sliding_window": own["attention.sliding_window"],
    }


def _gemma3(own: Mapping[str, Any]) -> dict[str, Any]:
    """Supply what the file leaves out: the local rope base and the pattern.

    The query scale is hidden / heads at 62 layers (27B), else head_dim.
    """
    heads, head_dim = own["attention.head_count"], own["attention.key_length"]
    deep = own["block_count"] == 62
    pattern = own.get("attention.sliding_window_pattern", 6)
    scaling = own.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedError(f"GGUF metadata: rope.scaling.type {scaling!r}; expected 'linear'")
    factor = float(own.get("rope.scaling.factor", 1.0))
    by_number = isinstance(pattern, int)
    return {
        "model_type": "gemma3_text",
        "intermediate_size": own["feed_forward_length"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": own["embedding_length"] // heads if deep else head_dim,
        "sliding_window_pattern": pattern if by_number else None,
        "layer_types": None if by_number else _kinds(pattern),
        "rope_theta": float(own.get("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": float(own.get("rope.freq_base_swa", 10_000.0)),
        "rope_scaling": {"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
    }


def _gemma4(own: Mapping[str, Any]) -> dict[str, Any]:
    count = own["block_count"]
    pattern = own.get("attention.sliding_window_pattern")
    if pattern is None or isinstance(pattern, int):
        raise UnsupportedError("GGUF metadata: gemma4 needs sliding_window_pattern, one per layer")
    kinds = _kinds(_per_layer(pattern, count, "sliding_window_pattern"))
    heads = _per_layer(own["attention.head_count_kv"], count, "head_count_kv")
    inner = _per_layer(own["feed_forward_length"], count, "feed_forward_length")
    shared = own.get("attention.shared_kv_layers", 0)
    sizes = {
        "sliding_attention": own.get("attention.key_length_swa", own["attention.key_length"]),
        "full_attention": own["attention.key_length"],
    }
    local = next((h for h, kind in zip(heads, kinds, strict=True) if kind == KINDS[0]), heads[0])
    view = {
        str(i): {"head_dim": sizes[kind], "num_key_value_heads": heads[i]}
        for i, kind in enumerate(kinds)
        if kind == "full_attention"
    }
    # All of a head is handed to the rope; which part of it turns is in `rope_freqs.weight`.
    for key, kind in _SAME_SIZES.items():
        if own.get(key, sizes[kind]) != sizes[kind]:
            raise UnsupportedError(
                f"GGUF metadata: gemma4.{key} is {own[key]}, but keys of {kind} have {sizes[kind]}"
            )
    inputs = own.get("embedding_length_per_layer_input", 0)
    bases = own.get("rope.freq_base_swa", 1e4), own.get("rope.freq_base", 1e6)
    wide = len(set(inner)) > 1
    if wide and inner != [inner[0]] * (count - shared) + [2 * inner[0]] * shared:
        raise UnsupportedError(f"GGUF metadata: feed_forward_length {inner} is not supported")
    return {
        "model_type": "gemma4_text",
        "intermediate_size": inner[0],
        "use_double_wide_mlp": wide,
        "num_key_value_heads": local,
        "head_dim": sizes["sliding_attention"],
        "per_layer_config": view,
        "layer_types": kinds,
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": own.get("final_logit_softcapping"),
        # The file does not say it. True where the full layers hold no attn_v tensor; the
        # checkpoint corrects it from its tensors (checkpoints/gguf.py).
        "attention_k_eq_v": False,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": float(bases[0])},
            "full_attention": {
                "rope_type": "proportional", "rope_theta": float(bases[1]),
                "partial_rotary_factor": 0.25,
            },
        },
        "hidden_size_per_layer_input": inputs,
        "vocab_size_per_layer_input": own["vocab_size"],
        # The file does not say it; llama.cpp's gemma4.cpp goes by the model.
        "use_bidirectional_attention": None if inputs else "vision",
        "enable_moe_block": "expert_count" in own and own["expert_count"] > 0,
        "num_experts": own.get("expert_count"),
        "top_k_experts": own.get("expert_used_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
    }  # fmt: skip


def _kinds(pattern: Sequence[Any]) -> list[str]:
    return [KINDS[not sliding] for sliding in pattern]


def _per_layer(value: Any, count: int, name: str) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise UnsupportedError(f"GGUF metadata: {len(values)} values of {name} for {count} layers")
    return values
