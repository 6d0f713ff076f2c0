"""config.json of Hugging Face: read into a `GemmaConfig`, and written back.

Gemma 3 and Gemma 4 files become the same data. Keys that change nothing are on a list, known
keys pass at the values that are supported, every other key is an error.
Sources: transformers 5.23.0, configuration_gemma3.py, configuration_gemma4.py and
configuration_gemma4_unified.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from gemlax.config.spec import KINDS, GemmaConfig, Kind, LayerSpec, RopeSpec, TextConfig
from gemlax.errors import UnsupportedError

__all__ = ["read", "read_text", "write"]

_ID_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# What a file may leave out.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
}  # fmt: skip
_GEMMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 512,
    "global_head_dim": 512, "num_global_key_value_heads": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
        },
    },
}  # fmt: skip
# The unified text tower has neither per-layer embeddings nor experts.
_UNIFIED_DEFAULTS = _GEMMA4_DEFAULTS | {
    "max_position_embeddings": 262_144, "sliding_window": 1024,
    "use_bidirectional_attention": "vision",
}  # fmt: skip
_GEMMA4_OWN: dict[str, Any] = {
    "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262_144,
    "enable_moe_block": False, "num_experts": None, "top_k_experts": None,
    "moe_intermediate_size": None,
}  # fmt: skip
_DEFAULTS = {
    "gemma3_text": _GEMMA3_DEFAULTS,
    "gemma4_text": _GEMMA4_DEFAULTS | _GEMMA4_OWN,
    "gemma4_unified_text": _UNIFIED_DEFAULTS,
}
_TEXT_OF = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
}
_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
}
# Ids that stand for features: image; image, audio and video. They exist in large tables only.
_PLACEHOLDERS = {
    "gemma3_text": (262_144,),
    "gemma4_text": (258_880, 258_881, 258_884),
    "gemma4_unified_text": (258_880, 258_881, 258_884),
}
_EXTRA_KEYS = {
    "gemma3_text": {
        "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "rope_scaling",
        "rope_parameters", "attn_logit_softcapping", "final_logit_softcapping",
        "use_bidirectional_attention",
    },
    "gemma4_text": {"layer_types", "per_layer_config"},
    "gemma4_unified_text": {"layer_types", "per_layer_config"},
}  # fmt: skip
# Known keys that pass only at these values: another value would change the model's output.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "tie_word_embeddings": (True, False, None),
    "quantization_config": (None,),
}
_NEUTRAL_GEMMA3: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}
_NEUTRAL_GEMMA4: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (None, "vision")}
# Keys that change nothing in the forward pass of a decoder at inference.
_INERT = {
    "architectures", "attention_dropout", "cache_implementation", "chunk_size_feed_forward",
    "dtype", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "_name_or_path",
    "name_or_path", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
_MULTIMODAL_KEYS = _ID_KEYS | _INERT | {
    "model_type", "text_config", "vision_config", "audio_config", "tie_word_embeddings",
    "quantization_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id",
    "boa_token_id", "eoa_token_id", "eoa_token_index", "audio_token_id",
    "vision_soft_tokens_per_image",
}  # fmt: skip


def read(config: Mapping[str, Any]) -> GemmaConfig:
    """Resolve a config.json; see `GemmaConfig.from_hf`."""
    model_type = config.get("model_type")
    if model_type in _TEXT_OF:
        if not isinstance(config.get("text_config"), Mapping):
            raise UnsupportedError(f"config.json: {model_type!r} without a 'text_config'")
        _refuse_unknown(config, _MULTIMODAL_KEYS, _NEUTRAL, "config.json")
        own = {"model_type": _TEXT_OF[model_type], **config["text_config"]}
        outer = {key: config[key] for key in _ID_KEYS if config.get(key) is not None}
        # The key counts where the head lies: outside of the text model.
        outer["tie_word_embeddings"] = config.get("tie_word_embeddings")
        text = own | outer
    else:
        text = dict(config)
    if text.get("model_type") not in _DEFAULTS:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} is not supported; "
            f"expected one of {[*_DEFAULTS, *_TEXT_OF]}"
        )
    ids = {key: text[key] for key in ("bos_token_id", "pad_token_id") if text.get(key) is not None}
    resolved = read_text(text, "config.json")
    return GemmaConfig(
        resolved,
        eos_token_id=_as_ids(text.get("eos_token_id")),
        placeholder_ids=placeholders(resolved),
        **ids,
    )


def read_text(text: Mapping[str, Any], where: str) -> TextConfig:
    """Resolve the keys of a text config, of any of the model types."""
    model_type = text["model_type"]
    defaults = _DEFAULTS[model_type]
    gemma3 = model_type == "gemma3_text"
    known = defaults.keys() | _EXTRA_KEYS[model_type] | _ID_KEYS | _INERT | _NEUTRAL.keys()
    neutral = _NEUTRAL | (_NEUTRAL_GEMMA3 if gemma3 else _NEUTRAL_GEMMA4)
    _refuse_unknown(text, known | {"model_type"}, neutral, where)
    found = {key: value for key, value in text.items() if value is not None}
    # An explicit null means "off" for these, not "the default".
    nulls = {key: None for key in ("use_bidirectional_attention",) if text.get(key, 0) is None}
    c = defaults | found | nulls
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
                "sliding_window"):  # fmt: skip
        _check_count(c, key)
    layers = (_gemma3_layers if gemma3 else _gemma4_layers)(c)
    for spec in layers:
        if c["num_attention_heads"] % spec.num_key_value_heads:
            raise UnsupportedError(
                f"config: num_attention_heads {c['num_attention_heads']} is not a multiple of "
                f"num_key_value_heads {spec.num_key_value_heads}"
            )
    return TextConfig(
        model_type=model_type,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_attention_heads=c["num_attention_heads"],
        max_position_embeddings=c["max_position_embeddings"],
        layers=layers,
        rms_norm_eps=_positive(c, "rms_norm_eps"),
        tie_word_embeddings=bool(c.get("tie_word_embeddings", True)),
        **(_gemma3_facts if gemma3 else _gemma4_facts)(c),
    )


def placeholders(text: TextConfig) -> tuple[int, ...]:
    """Return the ids that stand for features, where the table is large enough to hold them."""
    return tuple(i for i in _PLACEHOLDERS[text.model_type] if i < text.vocab_size)


# --- Gemma 3 -----------------------------------------------------------------------------------


def _gemma3_facts(c: Mapping[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": c["query_pre_attn_scalar"], "norm_offset": 1.0}


def _gemma3_layers(c: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    by_kind = c.get("rope_parameters", {})
    scaling = c.get("rope_scaling", {})
    _check_ropes(by_kind, scaling)
    full = dict(scaling) | dict(by_kind.get("full_attention") or {})
    sliding = dict(by_kind.get("sliding_attention") or {})
    ropes = {
        "sliding_attention": _rope(sliding, c["rope_local_base_freq"]),
        "full_attention": _rope(full, c["rope_theta"]),
    }
    return tuple(
        LayerSpec(
            kind=kind,
            window=c["sliding_window"] if kind == "sliding_attention" else None,
            num_key_value_heads=c["num_key_value_heads"],
            head_dim=c["head_dim"],
            rope=ropes[kind],
            attention_scale=_positive(c, "query_pre_attn_scalar") ** -0.5,
            intermediate_size=c["intermediate_size"],
        )
        for kind in _layer_types(c)
    )


def _write_gemma3(text: TextConfig) -> dict[str, Any]:
    sliding, full = text.first("sliding_attention"), text.first("full_attention")
    spec = text.layers[0]
    factor = full.rope.factor if full else 1.0
    default = _GEMMA3_DEFAULTS
    return {
        "intermediate_size": spec.intermediate_size,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "query_pre_attn_scalar": text.query_pre_attn_scalar,
        "sliding_window": sliding.window if sliding else default["sliding_window"],
        "rope_theta": full.rope.theta if full else default["rope_theta"],
        "rope_local_base_freq": sliding.rope.theta if sliding else default["rope_local_base_freq"],
        "rope_scaling": {"rope_type": "linear", "factor": factor} if factor != 1.0 else None,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


# --- Gemma 4 -----------------------------------------------------------------------------------


def _gemma4_facts(c: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "norm_offset": 0.0,
        "v_norm": True,
        "layer_scalar": True,
        "final_logit_softcapping": c["final_logit_softcapping"],
        "use_bidirectional_attention": c["use_bidirectional_attention"],
    }
    if facts["final_logit_softcapping"] is not None:
        _positive(c, "final_logit_softcapping")
    if c.get("hidden_size_per_layer_input"):
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            facts[key] = _check_count(c, key)
    if c.get("enable_moe_block"):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            _check_count(c, key)
        if c["top_k_experts"] > c["num_experts"]:
            raise UnsupportedError(
                f"config: top_k_experts {c['top_k_experts']} > num_experts {c['num_experts']}"
            )
        facts |= {key: c[key] for key in ("top_k_experts", "moe_intermediate_size")}
    return facts


def _gemma4_layers(c: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    kinds = _layer_types(c)
    if kinds[-1] != "full_attention":
        raise UnsupportedError("config: the last of layer_types must be 'full_attention'")
    _check_ropes(c["rope_parameters"])
    ropes = {
        kind: _rope(c["rope_parameters"].get(kind) or {}, theta)
        for kind, theta in (("sliding_attention", 1e4), ("full_attention", 1e6))
    }
    sizes = _gemma4_sizes(c, kinds)
    shared = c["num_kv_shared_layers"]
    if not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise UnsupportedError(
            f"config: num_kv_shared_layers must be in [0, {len(kinds)}), got {shared!r}"
        )
    owners = set(kinds[: len(kinds) - shared])
    if not owners >= set(kinds):
        raise UnsupportedError(f"config: no {set(kinds) - owners} layer owns K/V to be shared")
    layers = []
    for i, kind in enumerate(kinds):
        owns = i < len(kinds) - shared
        wide = 2 if c["use_double_wide_mlp"] and not owns else 1
        layers.append(
            LayerSpec(
                kind=kind,
                window=c["sliding_window"] if kind == "sliding_attention" else None,
                rope=ropes[kind],
                attention_scale=1.0,
                intermediate_size=c["intermediate_size"] * wide,
                owns_kv=owns,
                k_eq_v=bool(c["attention_k_eq_v"]) and kind == "full_attention" and owns,
                num_experts=c["num_experts"] if c.get("enable_moe_block") else 0,
                **sizes[i],
            )
        )
    return tuple(layers)


def _gemma4_sizes(c: Mapping[str, Any], kinds: list[Kind]) -> list[dict[str, int]]:
    """Return head_dim and K/V heads per layer: flat global fields, or a per-layer view."""
    plain = {key: c[key] for key in ("head_dim", "num_key_value_heads")}
    sizes = [dict(plain) for _ in kinds]
    view = c.get("per_layer_config")
    if view is None:
        for i, kind in enumerate(kinds):
            if kind == "full_attention":
                sizes[i]["head_dim"] = _check_count(c, "global_head_dim")
                if c["attention_k_eq_v"] and c["num_global_key_value_heads"] is not None:
                    sizes[i]["num_key_value_heads"] = _check_count(c, "num_global_key_value_heads")
        return sizes
    for index, changes in view.items():
        if not str(index).isdigit() or int(index) >= len(kinds) or changes.keys() - plain.keys():
            raise UnsupportedError(f"config: per_layer_config[{index!r}] = {changes!r}")
        sizes[int(index)] |= {key: _check_count(changes, key) for key in changes}
    by_kind = {(kind, *sizes[i].values()) for i, kind in enumerate(kinds)}
    if len(by_kind) != len(set(kinds)):
        raise UnsupportedError(f"config: layers of one kind differ in per_layer_config: {by_kind}")
    return sizes


def _write_gemma4(text: TextConfig) -> dict[str, Any]:
    sliding, full = text.first("sliding_attention"), text.first("full_attention")
    plain = sliding or full
    assert plain is not None
    assert full is not None
    k_eq_v = any(spec.k_eq_v for spec in text.layers)
    other_heads = full.num_key_value_heads != plain.num_key_value_heads
    shared = sum(not spec.owns_kv for spec in text.layers)
    first = text.layers[0]
    written: dict[str, Any] = {
        "intermediate_size": first.intermediate_size,
        "num_key_value_heads": plain.num_key_value_heads,
        "head_dim": plain.head_dim,
        "sliding_window": sliding.window if sliding else _GEMMA4_DEFAULTS["sliding_window"],
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads if other_heads else None,
        "attention_k_eq_v": k_eq_v,
        "num_kv_shared_layers": shared,
        "use_double_wide_mlp": text.layers[-1].intermediate_size != first.intermediate_size,
        "final_logit_softcapping": text.final_logit_softcapping,
        "use_bidirectional_attention": text.use_bidirectional_attention,
        "rope_parameters": {
            spec.kind: _write_rope(spec.rope) for spec in (sliding, full) if spec is not None
        },
    }
    if other_heads and not k_eq_v:  # the flat field counts with k_eq_v only
        sizes = {"head_dim": full.head_dim, "num_key_value_heads": full.num_key_value_heads}
        kinds = enumerate(spec.kind for spec in text.layers)
        written["per_layer_config"] = {
            str(i): sizes for i, kind in kinds if kind == "full_attention"
        }
    if text.model_type == "gemma4_text":
        moe = first.num_experts > 0
        written |= {
            "hidden_size_per_layer_input": text.hidden_size_per_layer_input,
            "vocab_size_per_layer_input": text.vocab_size_per_layer_input or text.vocab_size,
            "enable_moe_block": moe,
            "num_experts": first.num_experts or None,
            "top_k_experts": text.top_k_experts or None,
            "moe_intermediate_size": text.moe_intermediate_size or None,
        }
    return written


def _write_rope(rope: RopeSpec) -> dict[str, Any]:
    if rope.rotated == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "proportional",
        "rope_theta": rope.theta,
        "partial_rotary_factor": rope.rotated,
    }


# --- both --------------------------------------------------------------------------------------


def write(config: GemmaConfig) -> dict[str, Any]:
    """Write a text-only config.json; see `GemmaConfig.to_hf`."""
    text, eos = config.text, config.eos_token_id
    own: Callable[[TextConfig], dict[str, Any]] = (
        _write_gemma3 if text.model_type == "gemma3_text" else _write_gemma4
    )
    return {
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
        "tie_word_embeddings": text.tie_word_embeddings,
        **own(text),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) != 1 else eos[0],
        "pad_token_id": config.pad_token_id,
    }


def _refuse_unknown(
    found: Mapping[str, Any], known: Any, neutral: Mapping[str, tuple[Any, ...]], where: str
) -> None:
    wrong = [f"{key} = {found[key]!r} (not known)" for key in found if key not in known]
    wrong += [
        f"{key} = {found[key]!r} (only {allowed[0]!r} is supported)"
        for key, allowed in neutral.items()
        if key in found and found[key] not in allowed
    ]
    if wrong:
        raise UnsupportedError(f"{where}: {'; '.join(sorted(wrong))}")


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return (1,)
    ids = (value,) if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise UnsupportedError(f"config: eos_token_id must be an id or a list of ids, got {ids!r}")
    return tuple(ids)


def _check_count(c: Mapping[str, Any], key: str) -> int:
    value = c[key]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UnsupportedError(f"config: {key} must be a positive integer, got {value!r}")
    return value


def _positive(c: Mapping[str, Any], key: str) -> float:
    value = c[key]
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UnsupportedError(f"config: {key} must be a positive number, got {value!r}")
    return value


def _layer_types(c: Mapping[str, Any]) -> list[Kind]:
    count = c["num_hidden_layers"]
    if "layer_types" not in c:
        period = c.get("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
        if not isinstance(period, int) or period < 1:
            raise UnsupportedError(
                f"config: sliding_window_pattern must be a positive integer, got {period!r}"
            )
        return [KINDS[(i + 1) % period == 0] for i in range(count)]
    kinds = c["layer_types"]
    kinds = list(kinds) if isinstance(kinds, (list, tuple)) else [kinds]
    if len(kinds) != count or any(kind not in KINDS for kind in kinds):
        raise UnsupportedError(
            f"config: layer_types must be {count} of {list(KINDS)}, got {len(kinds)}: "
            f"{sorted(set(map(str, kinds)))}"
        )
    return kinds


def _check_ropes(by_kind: Any, *others: Any) -> None:
    inner = by_kind.values() if isinstance(by_kind, Mapping) else ()
    for found in (by_kind, *others, *(value for value in inner if value is not None)):
        if not isinstance(found, Mapping):
            raise UnsupportedError(f"config: rope settings must be objects, got {found!r}")
    unknown = sorted(by_kind.keys() - set(KINDS))
    if unknown:
        raise UnsupportedError(f"config: rope_parameters has {unknown}; expected {list(KINDS)}")


def _rope(found: Mapping[str, Any], theta: float) -> RopeSpec:
    kind = found.get("rope_type", found.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
    unknown = sorted(found.keys() - known)
    if unknown or kind not in ("default", "linear", "proportional"):
        raise UnsupportedError(
            f"config: rope {dict(found)!r} is not supported; expected rope_type 'default', "
            "'linear' or 'proportional' with rope_theta, factor and partial_rotary_factor"
        )
    spec = {
        "theta": found.get("rope_theta", theta),
        "factor": found.get("factor", 1.0),
        "rotated": found.get("partial_rotary_factor", 1.0),
    }
    rotated = float(_positive(spec, "rotated")) if kind == "proportional" else 1.0
    if rotated > 1.0:
        raise UnsupportedError(f"config: partial_rotary_factor must be at most 1, got {rotated}")
    factor = 1.0 if kind == "default" else float(_positive(spec, "factor"))
    return RopeSpec(theta=float(_positive(spec, "theta")), factor=factor, rotated=rotated)
