"""GGUF metadata into a `GemmaConfig`, by way of the keys of config.json.

Source: llama.cpp, conversion/gemma.py, src/models/gemma3.cpp and gemma4.cpp.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gemlax.config import hf
from gemlax.config.keys import is_neutral, log_aside, refuse_keys
from gemlax.config.layer import KINDS
from gemlax.config.spec import GemmaConfig
from gemlax.errors import UnsupportedError, show_value

__all__ = ["from_gguf"]

_REQUIRED = {
    "context_length", "embedding_length", "block_count", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.sliding_window",
}  # fmt: skip
_EPSILON = "attention.layer_norm_rms_epsilon"
_COMMON = _REQUIRED | {
    _EPSILON, "attention.value_length", "attention.sliding_window_pattern", "rope.freq_base",
    "rope.freq_base_swa", "rope.dimension_count", "vocab_size", "final_logit_softcapping",
}  # fmt: skip
_KEYS = {
    "gemma3": _COMMON | {
        "rope.scaling.type", "rope.scaling.factor", "rope.global.freq_base",
        "rope.local.freq_base",
    },
    "gemma4": _COMMON | {
        "attention.key_length_swa", "attention.value_length_swa", "attention.shared_kv_layers",
        "rope.dimension_count_swa", "embedding_length_per_layer_input",
        "expert_count", "expert_used_count", "expert_feed_forward_length",
    },
}  # fmt: skip
# One value, or one for each layer.
_PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
# ollama's files hold the encoders as well. Source: ollama, convert/convert_gemma3.go and
# convert_gemma4.go.
_ENCODERS = ("mm.", "vision.", "audio.")
# Read with types of scaling that are refused, or by nobody.
_INERT = {
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.beta_fast",
    "rope.scaling.beta_slow", "rope.scaling.extrapolation_factor",
    "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "decoder_start_token_id", "use_parallel_residual", "tensor_data_layout",
}  # fmt: skip
# What all the models are, under names that llama.cpp's own files of them do not have.
_SAME = {
    "attention.causal": True, "rope.freq_scale": 1.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.alpha": 1.0, "logit_scale": 1.0, "residual_scale": 1.0,
    "attention.output_scale": 1.0, "expert_weights_scale": 1.0,
}  # fmt: skip

_IDS = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}  # fmt: skip

# Sizes of a head that must be those of its keys.
_SAME_SIZES = {
    "attention.value_length_swa": "sliding_attention",
    "rope.dimension_count_swa": "sliding_attention",
    "rope.dimension_count": "full_attention",
}


def from_gguf(metadata: Mapping[str, Any]) -> GemmaConfig:
    """Resolve the metadata of a GGUF file (keys as llama.cpp writes them).

    Raises:
        UnsupportedError: another architecture, or a key that is missing or unknown.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in _KEYS:
        raise UnsupportedError(
            f"GGUF architecture {architecture!r} is not supported; expected one of {list(_KEYS)}"
        )
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    count = own.get("block_count")
    own = {key: _join_equal(v, count) if key in _PER_LAYER else v for key, v in own.items()}
    _check_keys(own, architecture)
    vocab = own.get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] = (
        _gemma3 if architecture == "gemma3" else _gemma4
    )
    found = _common(own, int(vocab)) | convert(own | {"vocab_size": int(vocab)})
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _IDS.items()}
    said = {name: int(i) for name, i in ids.items() if i is not None and int(i) >= 0}
    return hf.resolve(found | said, "GGUF metadata")


def _check_keys(own: Mapping[str, Any], architecture: str) -> None:
    """Refuse keys that could change the answer and are not read, and files that lack some."""
    same = {
        "attention.key_length_swa": own.get("attention.key_length"),
        "attention.value_length_swa": own.get("attention.key_length"),
        "rope.dimension_count_swa": own.get("attention.key_length"),
    }
    if _is_unscaled(own):
        same |= {key: own[key] for key in own if key.startswith("rope.scaling.")}
    wrong, aside = [], []
    for key in sorted(own.keys() - _KEYS[architecture] - _INERT):
        value = own[key]
        expected = (_SAME | same).get(key)
        if key.startswith(_ENCODERS):
            continue
        if value == expected or (expected is None and is_neutral(value)):
            aside.append(f"{architecture}.{key}")
        else:
            known = "not known" if expected is None else f"the model has {expected}"
            wrong.append(f"{architecture}.{key} = {show_value(value)} ({known})")
    refuse_keys("GGUF metadata", wrong)
    log_aside("GGUF metadata", aside)
    required = _REQUIRED | ({_EPSILON} if architecture == "gemma4" else set())
    missing = sorted(required - own.keys())
    if missing:
        names = ", ".join(f"{architecture}.{key}" for key in missing)
        raise UnsupportedError(f"GGUF metadata lacks {names}")


def _is_unscaled(own: Mapping[str, Any]) -> bool:
    """Return whether the rope stays as it is: of no type whatever the factor, or linear by 1."""
    kind, factor = own.get("rope.scaling.type"), own.get("rope.scaling.factor", 1.0)
    return kind == "none" or (kind in (None, "", "linear") and factor in (0.0, 1.0))


def _join_equal(value: Any, count: object) -> Any:
    """Return the one value of a list that has it `count` times, for each layer; else the value."""
    joined = isinstance(value, (list, tuple)) and len(value) == count and len(set(value)) == 1
    return value[0] if joined else value


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
        "rms_norm_eps": float(f"{own.get(_EPSILON, 1e-6):.6g}"),
        "sliding_window": own["attention.sliding_window"],
        "final_logit_softcapping": own.get("final_logit_softcapping"),
    }


def _gemma3(own: Mapping[str, Any]) -> dict[str, Any]:
    """Supply what the file leaves out: the local rope base and the pattern.

    The query scale is hidden / heads at 62 layers (27B), else head_dim.
    """
    heads, head_dim = own["attention.head_count"], own["attention.key_length"]
    deep = own["block_count"] == 62
    pattern = own.get("attention.sliding_window_pattern", 6)
    by_number = isinstance(pattern, int)
    base = own.get("rope.freq_base", own.get("rope.global.freq_base", 1_000_000.0))
    local = own.get("rope.freq_base_swa", own.get("rope.local.freq_base", 10_000.0))
    dimensions = own.get("rope.dimension_count", head_dim)
    if dimensions != head_dim:
        raise UnsupportedError(
            f"GGUF metadata: gemma3.rope.dimension_count is {dimensions}, but keys have {head_dim}"
        )
    return {
        "model_type": "gemma3_text",
        "intermediate_size": own["feed_forward_length"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": own["embedding_length"] // heads if deep else head_dim,
        "sliding_window_pattern": pattern if by_number else None,
        "layer_types": None if by_number else _kinds(pattern),
        "rope_theta": float(base),
        "rope_local_base_freq": float(local),
        "rope_scaling": _gemma3_scaling(own),
    }


def _gemma3_scaling(own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling of full layers; what ollama converted does not say that of 4B to 27B.

    Source: ollama, llama/compat: linear, 8, at 131072 tokens, where a file has ollama's keys.
    """
    scaling = own.get("rope.scaling.type", "none") or "none"
    if scaling not in ("none", "linear"):
        raise UnsupportedError(
            f"GGUF metadata: rope.scaling.type {show_value(scaling)}; expected 'linear'"
        )
    given = "rope.scaling.type" in own or "rope.scaling.factor" in own
    theirs = _EPSILON not in own or any(
        key.startswith((*_ENCODERS, "rope.global.", "rope.local.")) for key in own
    )
    if not given and theirs and own["context_length"] >= 131_072:
        return {"rope_type": "linear", "factor": 8.0}
    factor = float(own.get("rope.scaling.factor", 1.0))
    if _is_unscaled(own):
        return None
    return {"rope_type": "linear", "factor": factor}


def _gemma4(own: Mapping[str, Any]) -> dict[str, Any]:
    count = own["block_count"]
    pattern = own.get("attention.sliding_window_pattern")
    if is_neutral(pattern):
        raise UnsupportedError("GGUF metadata: gemma4 needs sliding_window_pattern, one per layer")
    if isinstance(pattern, int):  # a period, as Gemma 3 has it
        pattern = [(i + 1) % pattern != 0 for i in range(count)]
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
