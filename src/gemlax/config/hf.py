"""config.json of Hugging Face read into a `GemmaConfig`.

Gemma 3 and Gemma 4 files become the same data. `keys` says which keys pass that nothing reads,
`rope` reads the rope settings. A config keeps the keys that say it, cleaned: changes are made there
and read again.
Sources: transformers 5.23.0, configuration_gemma3.py, configuration_gemma4.py and
configuration_gemma4_unified.py.
"""

import logging
from collections.abc import Mapping
from typing import Any

from gemlax.config.keys import is_neutral, log_aside, refuse_keys, sort_keys
from gemlax.config.layer import KINDS, Kind, LayerSpec
from gemlax.config.rope import read_ropes, write_rope
from gemlax.config.spec import GemmaConfig, TextConfig
from gemlax.errors import UnsupportedError, check_int, check_positive, show_value

__all__ = ["edit", "from_hf", "resolve"]

_log = logging.getLogger(__name__)

SLIDING, FULL = KINDS
_ID_KEYS = {"bos_token_id", "eos_token_id", "pad_token_id"}
# What a file may leave out.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0,
    "final_logit_softcapping": None, "use_bidirectional_attention": False,
}  # fmt: skip
# Its rope settings are in rope.py, as they go by kind.
_GEMMA4_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 30, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 512,
    "global_head_dim": 512, "num_global_key_value_heads": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
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
# Ids that stand for features: image; image, audio and video.
_PLACEHOLDERS = {
    "gemma3_text": (262_144,),
    "gemma4_text": (258_880, 258_881, 258_884),
    "gemma4_unified_text": (258_880, 258_881, 258_884),
}
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
_READ = _ID_KEYS | {
    "model_type", "layer_types", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor", *_PATTERNS,
}  # fmt: skip
_READ_ALSO = {
    "gemma3_text": set[str](),
    "gemma4_text": {"per_layer_config", "rope_local_base_freq"},
    # Without per-layer embeddings the size of their table says nothing.
    "gemma4_unified_text": {
        "per_layer_config", "rope_local_base_freq", "vocab_size_per_layer_input",
    },
}  # fmt: skip
# Known keys that pass only at these values: another value would change the model's output.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "tie_word_embeddings": (True, False),
    "quantization_config": (None, False, {}),
    "quantization": (None, False, {}),
}
_ALLOWED_GEMMA3: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None, 0),
    "use_bidirectional_attention": (False, ""),
}
_ALLOWED_GEMMA4: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": ("vision", False, "")}
# What all the models are, under names that none of their files has by itself.
_SAME = {"hidden_act": "gelu_pytorch_tanh", "is_causal": True, "use_qk_norm": True}
# All lists of layers are made before the number of layers can be held against the weights.
_MAX_LAYERS = 1024
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "num_kv_shared_layers", "global_head_dim", "num_global_key_value_heads",
    "hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_experts", "top_k_experts",
    "moe_intermediate_size", "expert_intermediate_size", "query_pre_attn_scalar",
)  # fmt: skip
_POSITIVE = _COUNTS[:8]


def from_hf(config: Mapping[str, Any]) -> GemmaConfig:
    """Resolve a Hugging Face `config.json` (text-only, or the text part of a multimodal one).

    Raises:
        UnsupportedError: another architecture, a key that is not known, or a known key at a
            value that is not supported; every offending key is named.
    """
    resolved = resolve(config)
    text = resolved.text
    if text.num_ids < text.vocab_size:
        _log.warning(
            "config: vocab_size is %d, vocab_size_per_layer_input only %d: an id beyond has no "
            "per-layer embedding, so it is refused in a prompt and never generated",
            text.vocab_size, text.num_ids,
        )  # fmt: skip
    return resolved


def edit(config: GemmaConfig, **changes: Any) -> GemmaConfig:
    """Return a config with other values of some keys of its config.json."""
    return resolve(config.to_hf() | changes)


def resolve(config: Mapping[str, Any], where: str = "config.json") -> GemmaConfig:
    """Resolve a config.json; see `from_hf`. `where` is named in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in {**_DEFAULTS, **_TEXT_OF}:
        raise UnsupportedError(
            f"config.json: model_type {show_value(model_type)} is not supported; "
            f"expected one of {[*_DEFAULTS, *_TEXT_OF]}"
        )
    multimodal = model_type in _TEXT_OF
    text = _take_text(config) if multimodal else dict(config)
    c = _fill(text)
    wrong, aside = _sort_text_keys(text, c, "text_config." if multimodal else "")
    if multimodal:
        known = _ID_KEYS | {"model_type", "text_config"}
        more = sort_keys(config, known, _ALLOWED, _SAME | c)
        wrong, aside = wrong + more[0], aside + more[1]
    refuse_keys(where, wrong)
    log_aside(where, aside)
    return _resolve(c)


def _take_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the text_config of a multimodal file, with the ids that the outer level has."""
    outer_type, text_config = config["model_type"], config.get("text_config")
    if not isinstance(text_config, Mapping):
        raise UnsupportedError(
            f"config.json: {outer_type!r} without a 'text_config'; a file of the text alone has "
            f"model_type {_TEXT_OF[outer_type]!r}"
        )
    text_type = _TEXT_OF[outer_type]
    inside = text_config.get("model_type")
    if inside not in (None, outer_type, text_type):
        raise UnsupportedError(
            f"config.json: text_config.model_type is {show_value(inside)}; a {outer_type!r} has "
            f"{text_type!r}"
        )
    ids = {key: config[key] for key in _ID_KEYS if config.get(key) is not None}
    text = dict(text_config) | ids | {"model_type": text_type}
    # The key counts where the head lies: outside of the text model.
    text["tie_word_embeddings"] = config.get("tie_word_embeddings")
    cap = text.get("final_logit_softcapping")
    if outer_type == "gemma3" and not is_neutral(cap):
        # transformers' Gemma3ForConditionalGeneration has no softcap, unlike Gemma3ForCausalLM.
        _log.warning(
            "config.json: text_config.final_logit_softcapping = %s is not applied: a multimodal "
            "Gemma 3 has no softcap in transformers",
            show_value(cap),
        )
        text["final_logit_softcapping"] = None
    return text


def _fill(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a text config, with defaults where there is none or null."""
    given = {key: value for key, value in text.items() if value is not None}
    # An explicit null means "off" for these, not "the default".
    off = {"use_bidirectional_attention": None, "sliding_window": None,
           "hidden_size_per_layer_input": 0}  # fmt: skip
    nulls = {key: none for key, none in off.items() if text.get(key, 0) is None}
    c = _DEFAULTS[text["model_type"]] | given | nulls
    if c.get("pad_token_id") == -1:  # another way to say that there is none
        del c["pad_token_id"]
    for key in ("attention_k_eq_v", "use_double_wide_mlp", "enable_moe_block"):
        if c.get(key, 0) not in (0, 1):  # "false" would be true
            raise UnsupportedError(f"config: {key} must be true or false, got {show_value(c[key])}")
    for key in _COUNTS:
        if isinstance(c.get(key), float) and c[key].is_integer():
            c[key] = int(c[key])
    if "moe_intermediate_size" in c and c["moe_intermediate_size"] is None:
        c["moe_intermediate_size"] = c.get("expert_intermediate_size")  # its first name
    return c


def _sort_text_keys(
    text: Mapping[str, Any], c: Mapping[str, Any], prefix: str
) -> tuple[list[str], list[str]]:
    model_type = c["model_type"]
    same = dict(_SAME)
    if model_type == "gemma3_text":
        allowed = _ALLOWED | _ALLOWED_GEMMA3
        same |= {
            "global_head_dim": c["head_dim"],
            "num_global_key_value_heads": c["num_key_value_heads"],
            "rope_global_base_freq": c["rope_theta"],  # mlx's name
        }
    else:
        allowed = _ALLOWED | _ALLOWED_GEMMA4
        same |= {
            "expert_intermediate_size": c.get("moe_intermediate_size"),
            "num_experts_per_tok": c.get("top_k_experts"),
            "num_local_experts": c.get("num_experts"),
            "query_pre_attn_scalar": 1,
        }
    known = _DEFAULTS[model_type].keys() | _READ | _READ_ALSO[model_type]
    return sort_keys(text, known, allowed, same, prefix)


def _resolve(c: Mapping[str, Any]) -> GemmaConfig:
    for key in _POSITIVE:
        _count(c, key)
    if c["num_hidden_layers"] > _MAX_LAYERS:
        raise UnsupportedError(
            f"config: {c['num_hidden_layers']} layers; at most {_MAX_LAYERS} are supported"
        )
    layers = _layers(c)
    for spec in layers:
        if c["num_attention_heads"] % spec.num_key_value_heads:
            raise UnsupportedError(
                f"config: num_attention_heads {c['num_attention_heads']} is not a multiple of "
                f"num_key_value_heads {spec.num_key_value_heads}"
            )
        if spec.head_dim % 2:
            raise UnsupportedError(f"config: head_dim must be even, got {spec.head_dim}")
    text = TextConfig(
        model_type=c["model_type"],
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        num_attention_heads=c["num_attention_heads"],
        max_position_embeddings=c["max_position_embeddings"],
        layers=layers,
        rms_norm_eps=float(_positive(c, "rms_norm_eps")),
        final_logit_softcapping=_softcap(c),
        tie_word_embeddings=bool(c.get("tie_word_embeddings", True)),
        **({} if c["model_type"] == "gemma3_text" else _gemma4_facts(c)),
    )
    defaults = {"bos_token_id": 2, "pad_token_id": 0}
    ids = {key: _as_id(key, c.get(key, default)) for key, default in defaults.items()}
    config = GemmaConfig(
        text,
        eos_token_id=_as_ids(c.get("eos_token_id")),
        # Features have ids in large tables only.
        placeholder_ids=tuple(i for i in _PLACEHOLDERS[text.model_type] if i < text.vocab_size),
        **ids,
    )
    object.__setattr__(config, "_hf", _clean(c, config))
    return config


def _clean(c: Mapping[str, Any], config: GemmaConfig) -> dict[str, Any]:
    """Return the keys that say a config, each in the one form that transformers reads alike.

    Gemma 3 has those of transformers 4 where they can say it.
    """
    text, eos = config.text, config.eos_token_id
    sliding, full = text.first(SLIDING), text.first(FULL)
    plain, whole = sliding or text.layers[0], full or text.layers[0]
    kept = {
        "architectures": [_ARCHITECTURES[text.model_type]],
        "model_type": text.model_type,
        **{key: c[key] for key in _DEFAULTS[text.model_type]},
        "sliding_window": plain.window or _DEFAULTS[text.model_type]["sliding_window"],
        "head_dim": plain.head_dim,
        "num_key_value_heads": plain.num_key_value_heads,
        "layer_types": [layer.kind for layer in text.layers],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": text.final_logit_softcapping,
        "use_bidirectional_attention": text.use_bidirectional_attention,
        "tie_word_embeddings": text.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) != 1 else eos[0],
        "pad_token_id": config.pad_token_id,
    }
    ropes = {spec.kind: write_rope(spec.rope) for spec in (sliding, full) if spec is not None}
    if text.model_type == "gemma3_text":
        kept["use_bidirectional_attention"] = False
        local, far = ropes.get(SLIDING, {}), ropes.get(FULL, {})
        if local.get("rope_type", "default") == "default" and "partial_rotary_factor" not in far:
            scaling = {"rope_type": "linear", "factor": far["factor"]} if "factor" in far else None
            flat = {"rope_theta": far, "rope_local_base_freq": local}
            bases = {key: rope.get("rope_theta", c[key]) for key, rope in flat.items()}
            return kept | bases | {"rope_scaling": scaling}
        del kept["rope_theta"], kept["rope_local_base_freq"]
        return kept | {"rope_parameters": ropes}
    kept |= {"rope_parameters": ropes, "global_head_dim": whole.head_dim}
    kept["num_global_key_value_heads"] = None
    if whole.num_key_value_heads != plain.num_key_value_heads:
        kept["num_global_key_value_heads"] = whole.num_key_value_heads
        if not c["attention_k_eq_v"]:  # the flat field counts with k_eq_v only
            heads = whole.num_key_value_heads
            sizes = {"head_dim": whole.head_dim, "num_key_value_heads": heads}
            kinds = enumerate(spec.kind for spec in text.layers)
            kept["per_layer_config"] = {str(i): sizes for i, kind in kinds if kind == FULL}
    return kept


def _gemma4_facts(c: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "norm_offset": 0.0,
        "v_norm": True,
        "layer_scalar": True,
        "use_bidirectional_attention": c["use_bidirectional_attention"] or None,
    }
    if c.get("hidden_size_per_layer_input"):
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            facts[key] = _count(c, key)
    if c.get("enable_moe_block"):
        for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            _count(c, key)
        if c["top_k_experts"] > c["num_experts"]:
            raise UnsupportedError(
                f"config: top_k_experts {c['top_k_experts']} > num_experts {c['num_experts']}"
            )
        facts |= {key: c[key] for key in ("top_k_experts", "moe_intermediate_size")}
    return facts


def _layers(c: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    gemma3, kinds = c["model_type"] == "gemma3_text", _layer_types(c)
    scale = _positive(c, "query_pre_attn_scalar") ** -0.5 if gemma3 else 1.0
    sizes = _sizes(c, kinds)
    head_dims = {kind: size["head_dim"] for kind, size in zip(kinds, sizes, strict=True)}
    ropes = read_ropes(c, set(kinds), head_dims, gemma3=gemma3)
    shared = 0 if gemma3 else c["num_kv_shared_layers"]
    if not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise UnsupportedError(
            f"config: num_kv_shared_layers must be in [0, {len(kinds)}), got {show_value(shared)}"
        )
    owners = set(kinds[: len(kinds) - shared])
    if not owners >= set(kinds):
        raise UnsupportedError(f"config: no {set(kinds) - owners} layer owns K/V to be shared")
    layers = []
    for i, kind in enumerate(kinds):
        owns = i < len(kinds) - shared
        wide = 1 if owns or not c["use_double_wide_mlp"] else 2
        layers.append(
            LayerSpec(
                kind=kind,
                window=_count(c, "sliding_window") if kind == SLIDING else None,
                rope=ropes[kind],
                attention_scale=scale,
                intermediate_size=c["intermediate_size"] * wide,
                owns_kv=owns,
                k_eq_v=bool(c.get("attention_k_eq_v")) and kind == FULL and owns,
                num_experts=c["num_experts"] if c.get("enable_moe_block") else 0,
                **sizes[i],
            )
        )
    return tuple(layers)


def _sizes(c: Mapping[str, Any], kinds: list[Kind]) -> list[dict[str, int]]:
    """Return head_dim and K/V heads per layer: flat global fields, or a per-layer view."""
    plain = {key: c[key] for key in ("head_dim", "num_key_value_heads")}
    sizes = [dict(plain) for _ in kinds]
    if c["model_type"] == "gemma3_text":
        return sizes
    view = c.get("per_layer_config")
    if is_neutral(view) and view != {}:  # an empty view says that all layers are alike
        for i, kind in enumerate(kinds):
            if kind == FULL:
                sizes[i]["head_dim"] = _count(c, "global_head_dim")
                if c["attention_k_eq_v"] and c["num_global_key_value_heads"] is not None:
                    sizes[i]["num_key_value_heads"] = _count(c, "num_global_key_value_heads")
        return sizes
    if not isinstance(view, Mapping):
        raise UnsupportedError(
            f"config: per_layer_config must be an object, got {show_value(view)}"
        )
    for index, changes in view.items():
        layer = _layer_sizes(c, str(index), changes, len(kinds))
        sizes[int(index)] |= {key: _count(layer, key) for key in layer}
    by_kind = {(kind, *sizes[i].values()) for i, kind in enumerate(kinds)}
    if len(by_kind) != len(set(kinds)):
        raise UnsupportedError(f"config: layers of one kind differ in per_layer_config: {by_kind}")
    return sizes


def _layer_sizes(c: Mapping[str, Any], index: str, changes: Any, count: int) -> dict[str, Any]:
    """Return head_dim and K/V heads of one layer of a view; what else it has must repeat `c`."""
    names = ("head_dim", "num_key_value_heads")
    given = changes if isinstance(changes, Mapping) else {"": changes}
    same = all(
        key in names or (is_neutral(v) if key == "skip" else key in c and v == c[key])
        for key, v in given.items()
    )
    if not index.isdecimal() or int(index) >= count or not same:
        raise UnsupportedError(
            f"config: per_layer_config[{index!r}] = {show_value(changes)}; expected the number of "
            f"a layer, with {' and '.join(names)}"
        )
    layer = {key: given[key] for key in names if key in given}
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in layer.items()}


def _layer_types(c: Mapping[str, Any]) -> list[Kind]:
    kinds: list[Kind]
    count, given = c["num_hidden_layers"], c.get("layer_types")
    if is_neutral(given):
        period = _period(c)
        kinds = [KINDS[(i + 1) % period == 0] for i in range(count)]
    else:
        named: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        kinds = [FULL if kind == "attention" else kind for kind in named]  # its older name
        if len(kinds) != count or any(kind not in KINDS for kind in kinds):
            raise UnsupportedError(
                f"config: layer_types must be {count} of {list(KINDS)}, got {len(kinds)}: "
                f"{sorted(set(map(str, kinds)))}"
            )
    if c["model_type"] != "gemma3_text" and kinds[-1] != FULL:
        _log.warning("config: the last layer is %s, as transformers makes it for Gemma 4", FULL)
        kinds[-1] = FULL
    return kinds


def _period(c: Mapping[str, Any]) -> int:
    """Return the period of the layers where no list names them.

    transformers reads `sliding_window_pattern`, and for Gemma 3 only. Another reader may take
    another key, so all that there are must agree.
    """
    named = {key: c[key] for key in _PATTERNS if key in c}
    for key, period in named.items():
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise UnsupportedError(
                f"config: {key} must be a positive integer, got {show_value(period)}"
            )
    read = named.get(_PATTERNS[0], 6) if c["model_type"] == "gemma3_text" else 6
    for key, period in named.items():
        if period != read:
            raise UnsupportedError(
                f"config: {key} = {period} without layer_types (transformers takes {read}); "
                "name the layers in layer_types"
            )
    return read


def _softcap(c: Mapping[str, Any]) -> float | None:
    """Return the cap of the logits; nothing and 0 mean that there is none."""
    if is_neutral(c["final_logit_softcapping"]):
        return None
    return float(_positive(c, "final_logit_softcapping"))


def _as_id(key: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UnsupportedError(f"config: {key} must be an id, got {show_value(value)}")
    return value


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return (1,)
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(i, (bool, str, list, dict)) or i is None for i in ids):
        raise UnsupportedError(
            f"config: eos_token_id must be an id or a list of ids, got {show_value(value)}"
        )
    return tuple(_as_id("eos_token_id", i) for i in ids)


def _count(c: Mapping[str, Any], key: str, least: int = 1) -> int:
    return check_int(f"config: {key}", c[key], least, error=UnsupportedError)


def _positive(c: Mapping[str, Any], key: str) -> float:
    return check_positive(f"config: {key}", c[key], error=UnsupportedError)
