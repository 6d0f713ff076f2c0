"""Random configs, of all that gemlax can hold, and the published ones."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from gemlax.config import KINDS, GemmaConfig, Kind, LayerSpec, RopeSpec, TextConfig
from gemlax.config.hf import placeholders

FOLDER = Path(__file__).parent / "golden" / "configs"
# By name: the preset it is, its end ids, where it was found, and the key that it is refused for.
INDEX: dict[str, dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
SLIDING, FULL = KINDS
OUTER = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "gemma4_unified_text": "gemma4_unified"}


def published(name: str) -> dict[str, Any]:
    """Return a config.json as it was found in public."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def ropes() -> st.SearchStrategy[RopeSpec]:
    """Any rope: of any base, scaled or not, of a whole head or a part of it."""
    return st.builds(
        RopeSpec,
        theta=st.sampled_from([10_000.0, 1_000_000.0, 12_345.5]),
        factor=st.sampled_from([1.0, 1.0, 8.0, 2.5, 0.5]),
        rotated=st.sampled_from([1.0, 1.0, 0.25, 0.5, 0.3, 0.0]),
    )


def _kinds(draw: st.DrawFn, *, gemma3: bool) -> list[Kind]:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9))
    return kinds if gemma3 else [*kinds[:-1], FULL]


@st.composite
def gemma3_texts(draw: st.DrawFn) -> TextConfig:
    """Draw the text config of a Gemma 3."""
    heads, scalar = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(1, 400))
    kinds = _kinds(draw, gemma3=True)
    window, rope = draw(st.integers(1, 5000)), {kind: draw(ropes()) for kind in KINDS}
    same: dict[str, Any] = {
        "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3) if heads % k == 0])),
        "head_dim": draw(st.sampled_from([16, 32])),
        "attention_scale": scalar**-0.5,
        "intermediate_size": draw(st.integers(1, 99)),
    }
    layers = tuple(
        LayerSpec(kind=k, window=window if k == SLIDING else None, rope=rope[k], **same)
        for k in kinds
    )
    facts = {"query_pre_attn_scalar": scalar, "norm_offset": 1.0}
    return _text(draw, "gemma3_text", heads, layers, facts)


@st.composite
def gemma4_texts(draw: st.DrawFn) -> TextConfig:
    """Draw the text config of a Gemma 4: shared K/V, k_eq_v, experts, per-layer inputs."""
    model_type = draw(st.sampled_from(["gemma4_text", "gemma4_unified_text"]))
    heads, kinds = draw(st.sampled_from([1, 2, 4, 6])), _kinds(draw, gemma3=False)
    window, rope = draw(st.integers(1, 5000)), {kind: draw(ropes()) for kind in KINDS}
    k_eq_v, inner = draw(st.booleans()), draw(st.integers(1, 99))
    firsts = max(kinds.index(kind) for kind in set(kinds)) + 1  # each kind owns a layer
    shared = draw(st.integers(0, len(kinds) - firsts))
    wide = 2 if shared and draw(st.booleans()) else 1
    experts = draw(st.sampled_from([0, 0, 4])) if model_type == "gemma4_text" else 0
    sizes = {
        kind: {
            "head_dim": draw(st.sampled_from([16, 32])),
            "num_key_value_heads": draw(st.sampled_from([k for k in (1, 2, 3) if heads % k == 0])),
        }
        for kind in KINDS
    }
    layers = []
    for i, kind in enumerate(kinds):
        owns = i < len(kinds) - shared
        layers.append(
            LayerSpec(
                kind=kind, window=window if kind == SLIDING else None, rope=rope[kind],
                attention_scale=1.0, intermediate_size=inner if owns else wide * inner,
                owns_kv=owns, k_eq_v=k_eq_v and kind == FULL and owns, num_experts=experts,
                **sizes[kind],
            )
        )  # fmt: skip
    facts: dict[str, Any] = {
        "norm_offset": 0.0, "v_norm": True, "layer_scalar": True,
        "use_bidirectional_attention": draw(st.sampled_from([None, "vision"])),
    }  # fmt: skip
    if experts:
        facts |= {"top_k_experts": draw(st.integers(1, experts)), "moe_intermediate_size": 24}
    if model_type == "gemma4_text" and draw(st.booleans()):
        facts |= {"hidden_size_per_layer_input": 8}
        facts |= {"vocab_size_per_layer_input": draw(st.sampled_from([400, 512, 262_144]))}
    return _text(draw, model_type, heads, tuple(layers), facts)


def _text(
    draw: st.DrawFn,
    model_type: str,
    heads: int,
    layers: tuple[LayerSpec, ...],
    facts: dict[str, Any],
) -> TextConfig:
    return TextConfig(
        model_type=model_type,
        vocab_size=draw(st.sampled_from([300, 512, 262_144, 262_208])),
        hidden_size=heads * draw(st.integers(1, 40)),
        num_attention_heads=heads,
        max_position_embeddings=draw(st.integers(1, 300_000)),
        layers=layers,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 3e-7])),
        final_logit_softcapping=draw(st.sampled_from([None, 30.0, 50.5])),
        **facts,
    )


@st.composite
def configs(draw: st.DrawFn) -> GemmaConfig:
    """Draw the config of a whole checkpoint."""
    text = draw(st.one_of(gemma3_texts(), gemma4_texts()))
    ids = st.integers(0, 299)
    return GemmaConfig(
        text,
        bos_token_id=draw(ids),
        eos_token_id=tuple(draw(st.lists(ids, max_size=3))),
        pad_token_id=draw(ids),
        placeholder_ids=placeholders(text),
    )
