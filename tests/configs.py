"""Random configs, of all that gemlax can hold, and the published ones."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from gemlax.config import KINDS, GemmaConfig, Kind
from gemlax.config.hf import resolve

FOLDER = Path(__file__).parent / "golden" / "configs"
# By name: the preset it is, its end ids, where it was found, and the key that it is refused for.
INDEX: dict[str, dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
SLIDING, FULL = KINDS
OUTER = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4_unified"}


def published(name: str) -> dict[str, Any]:
    """Return a config.json as it was found in public."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """Draw rope settings: of any base, scaled or not, of a whole head or a part of it."""
    rope: dict[str, Any] = {"rope_theta": draw(st.sampled_from([10_000.0, 1_000_000.0, 12_345.5]))}
    factor = draw(st.sampled_from([1.0, 1.0, 8.0, 2.5, 0.5]))
    part = draw(st.sampled_from([1.0, 1.0, 0.25, 0.5, 0.3, 0.0]))
    scale = {} if factor == 1.0 else {"factor": factor}
    if part == 1.0:
        return rope | {"rope_type": "linear" if scale else "default"} | scale
    return rope | {"rope_type": "proportional", "partial_rotary_factor": part} | scale


@st.composite
def texts(draw: st.DrawFn, model_type: str, kinds: list[Kind]) -> dict[str, Any]:
    """Draw the keys that every family has."""
    heads, ids = draw(st.sampled_from([1, 2, 4, 6])), st.integers(0, 299)
    return {
        "model_type": model_type,
        "vocab_size": draw(st.sampled_from([300, 512, 262_144, 262_208])),
        "hidden_size": heads * draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(1, 99)),
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3) if heads % k == 0])),
        "head_dim": draw(st.sampled_from([16, 32])),
        "sliding_window": draw(st.integers(1, 5000)),
        "max_position_embeddings": draw(st.integers(1, 300_000)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 3e-7])),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0, 50.5])),
        "rope_parameters": {kind: draw(ropes()) for kind in KINDS},
        "tie_word_embeddings": draw(st.sampled_from([True, True, False])),
        "bos_token_id": draw(ids),
        "eos_token_id": draw(st.lists(ids, max_size=3)),
        "pad_token_id": draw(ids),
    }


def some_kinds() -> st.SearchStrategy[list[Kind]]:
    return st.lists(st.sampled_from(KINDS), min_size=1, max_size=9)


@st.composite
def gemma3_texts(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the keys of a Gemma 3."""
    config = draw(texts("gemma3_text", draw(some_kinds())))
    return config | {"query_pre_attn_scalar": draw(st.integers(1, 400))}


@st.composite
def gemma4_texts(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the keys of a Gemma 4: shared K/V, k_eq_v, experts, per-layer inputs."""
    model_type = draw(st.sampled_from(["gemma4_text", "gemma4_unified_text"]))
    kinds: list[Kind] = [*draw(some_kinds())[:-1], FULL]
    config = draw(texts(model_type, kinds))
    heads = config["num_attention_heads"]
    firsts = max(kinds.index(kind) for kind in set(kinds)) + 1  # each kind owns a layer
    config |= {
        "num_kv_shared_layers": draw(st.integers(0, len(kinds) - firsts)),
        "attention_k_eq_v": draw(st.booleans()),
        "use_double_wide_mlp": draw(st.booleans()),
        "use_bidirectional_attention": draw(st.sampled_from([None, "vision"])),
    }
    whole = {
        "head_dim": draw(st.sampled_from([16, 32])),
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3) if heads % k == 0])),
    }
    if draw(st.booleans()):
        full = [str(i) for i, kind in enumerate(kinds) if kind == FULL]
        config["per_layer_config"] = dict.fromkeys(full, whole)
    else:
        config["global_head_dim"] = whole["head_dim"]
        config["num_global_key_value_heads"] = whole["num_key_value_heads"]
    if model_type == "gemma4_unified_text":
        return config
    if draw(st.booleans()):
        config |= {"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 24}
        config["top_k_experts"] = draw(st.integers(1, 4))
    config["hidden_size_per_layer_input"] = draw(st.sampled_from([0, 8]))
    config["vocab_size_per_layer_input"] = draw(st.sampled_from([400, 512, 262_144]))
    return config


def files() -> st.SearchStrategy[dict[str, Any]]:
    """Any config.json of a text model."""
    return st.one_of(gemma3_texts(), gemma4_texts())


def configs() -> st.SearchStrategy[GemmaConfig]:
    """Any config of a whole checkpoint."""
    return files().map(resolve)
