"""Configs against transformers: what we write it reads alike, and we read ropes as it does.

Only its config and rotary classes are made, no model, but for the softcap.
"""

import copy
from collections.abc import Mapping
from typing import Any

import adapters
import jax.numpy as jnp
import numpy as np
import pytest
from configs import configs
from golden import hf
from golden.conditioned import conditioned_weights, ragged_prompts, weight_shapes
from hypothesis import given, settings
from reference.toys import make_gemma3
from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedTextRotaryEmbedding,
)

from gemlax import UnsupportedError, ops
from gemlax.config import LayerSpec, RopeSpec, from_hf

ROTARY = {
    "gemma3_text": Gemma3RotaryEmbedding,
    "gemma4_text": Gemma4TextRotaryEmbedding,
    "gemma4_unified_text": Gemma4UnifiedTextRotaryEmbedding,
}
# float32 rounds at 6e-8; the angle comes back through a sine, a cosine and an arc tangent.
ANGLE = 1e-6
S, F = "sliding_attention", "full_attention"


def read(config: Mapping[str, Any]) -> Any:
    """Return transformers' config of a config.json."""
    values = copy.deepcopy(dict(config))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def their_frequencies(config: Any) -> dict[str, np.ndarray]:
    """Return the frequencies of each kind of layer, with those that stand still."""
    rotary = ROTARY[config.model_type](config)
    for kind in set(config.layer_types):
        assert getattr(rotary, f"{kind}_attention_scaling") == 1.0
    return {k: getattr(rotary, f"{k}_inv_freq").numpy() for k in set(config.layer_types)}


def our_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """Return by which angles `ops.rope` turns the pairs of a head at position 1."""
    half = head_dim // 2
    x = jnp.concatenate([jnp.ones(half), jnp.zeros(half)]).reshape(1, 1, 1, head_dim)
    position = jnp.ones((1, 1), jnp.int32)
    out = ops.rope(x, position, theta=rope.theta, factor=rope.factor, rotated=rope.rotated)
    first, second = np.split(np.asarray(out, np.float64).reshape(-1), 2)
    return np.arctan2(second, first)


def check_layer(config: Any, i: int, spec: LayerSpec) -> None:
    """Check the facts of one layer that transformers' modules would take from its config."""
    gemma3 = config.model_type == "gemma3_text"
    layer = config if gemma3 else config.per_layer_config[i]
    assert (layer.head_dim, layer.num_key_value_heads) == (spec.head_dim, spec.num_key_value_heads)
    window = config.sliding_window if spec.kind == S else None
    assert window == spec.window
    if gemma3:
        assert config.query_pre_attn_scalar**-0.5 == spec.attention_scale
        assert config.intermediate_size == spec.intermediate_size
        return
    shares = config.kv_sharing_modes[i] == "reuse"
    assert shares == (not spec.owns_kv)
    assert (config.attention_k_eq_v and spec.kind == F and not shares) == spec.k_eq_v
    wide = 2 if config.use_double_wide_mlp and shares else 1
    assert config.intermediate_size * wide == spec.intermediate_size
    moe = config.model_type == "gemma4_text" and config.enable_moe_block
    assert (config.num_experts if moe else 0) == spec.num_experts


@settings(max_examples=250, deadline=None, derandomize=True)
@given(configs())
def test_transformers_reads_what_is_written_alike(config):
    text, theirs = config.text, read(config.to_hf())
    for name in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "num_hidden_layers",
        "final_logit_softcapping",
    ):
        assert getattr(theirs, name) == getattr(text, name), name
    assert theirs.layer_types == [spec.kind for spec in text.layers]
    assert (theirs.bos_token_id, theirs.pad_token_id) == (config.bos_token_id, config.pad_token_id)
    eos = theirs.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else (eos,)) == config.eos_token_id
    if text.model_type == "gemma4_text":
        names = ["hidden_size_per_layer_input"]
        names += ["vocab_size_per_layer_input"] if text.hidden_size_per_layer_input else []
        names += ["top_k_experts", "moe_intermediate_size"] if text.top_k_experts else []
        assert all(getattr(theirs, name) == getattr(text, name) for name in names)
    if text.model_type != "gemma3_text":
        assert theirs.use_bidirectional_attention == text.use_bidirectional_attention
    for i, spec in enumerate(text.layers):
        check_layer(theirs, i, spec)
    for kind, expected in their_frequencies(theirs).items():
        spec = text.first(kind)
        found = our_frequencies(spec.rope, spec.head_dim)
        assert np.abs(found - expected).max() <= ANGLE * expected.max()


SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "layer_types": [S, F],
         "sliding_window": 32, "max_position_embeddings": 4096}  # fmt: skip
BASES = {
    "gemma3": SMALL | {"model_type": "gemma3_text"},
    "gemma4": SMALL | {"model_type": "gemma4_text", "global_head_dim": 32},
    "unified": SMALL | {"model_type": "gemma4_unified_text", "global_head_dim": 64},
}
LINEAR, DEFAULT = {"rope_type": "linear", "factor": 8.0}, {"rope_type": "default"}
PART = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
BOTH = {F: LINEAR | {"rope_theta": 5e5}, S: DEFAULT | {"rope_theta": 2e4}}
SPELLINGS: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5e5, "rope_local_base_freq": 3e4},
    {"rope_theta": 1_000_000},
    {"partial_rotary_factor": 0.5},
    {"rope_scaling": LINEAR},
    {"rope_scaling": LINEAR | {"type": "default"}},
    {"rope_scaling": LINEAR | {"rope_theta": 7e5}, "rope_theta": 5e5},
    {"rope_scaling": LINEAR | {"original_max_position_embeddings": 512, "beta_fast": 32}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"factor": 8.0}},
    {"rope_scaling": DEFAULT | {"factor": 8.0}},
    {"rope_scaling": {"rope_type": "su", "factor": 8.0}},
    {"rope_scaling": PART},
    {"rope_parameters": BOTH},
    {"rope_parameters": BOTH | LINEAR},
    {"rope_parameters": BOTH, "rope_theta": 3e5, "partial_rotary_factor": 1.0},
    {"rope_parameters": {F: LINEAR, S: DEFAULT}},
    {"rope_parameters": {F: LINEAR, S: DEFAULT}, "rope_theta": 5e5, "rope_local_base_freq": 3e4},
    {"rope_parameters": {F: LINEAR | {"rope_theta": 1e6}}},
    {"rope_parameters": {S: LINEAR | {"rope_theta": 1e4}}},
    {"rope_parameters": BOTH | {S: LINEAR | {"rope_theta": 1e4}}},
    {"rope_parameters": BOTH | {F: PART | {"rope_theta": 1e6, "factor": 4.0}}},
    {"rope_parameters": BOTH | {F: PART | {"rope_theta": 1e6}, S: PART | {"rope_theta": 1e4}}},
    {"rope_parameters": BOTH | {F: {"rope_type": "proportional", "rope_theta": 1e6}},
     "partial_rotary_factor": 0.5},
    {"rope_parameters": BOTH | {F: DEFAULT | {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}},
    {"rope_parameters": BOTH | {F: PART | {"rope_theta": 1e6, "partial_rotary_factor": 0.0}}},
    {"rope_parameters": BOTH | {F: PART | {"rope_theta": 1e6, "partial_rotary_factor": 0.33}}},
    {"rope_parameters": {F: {"rope_theta": 3e5}}, "rope_scaling": LINEAR},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.rope_scaling. is deprecated:FutureWarning")
@pytest.mark.parametrize("settings", SPELLINGS, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_rope_is_read_as_transformers_reads_it_or_refused_as_it_is_there(base, settings):
    config = BASES[base] | settings
    try:
        expected = their_frequencies(read(config))
    except (KeyError, TypeError):
        with pytest.raises(UnsupportedError):
            from_hf(config)
        return
    text = from_hf(config).text
    for kind, frequencies in expected.items():
        spec = text.first(kind)
        found = our_frequencies(spec.rope, spec.head_dim)
        np.testing.assert_allclose(found, frequencies, rtol=ANGLE, atol=0, err_msg=kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_scaling": {F: LINEAR, S: DEFAULT}},
        {"rope_parameters": LINEAR | {"rope_theta": 1e6}},
    ],
    ids=str,
)
def test_three_spellings_of_gemma_3_keep_the_factor_that_transformers_loses(settings):
    """transformers 4 read the first so, and nothing else can be meant by the others."""
    config = BASES["gemma3"] | settings
    assert their_frequencies(read(config))[F][0] == 1.0
    assert from_hf(config).text.first(F).rope == RopeSpec(1e6, 8.0)


# Softcap.

CAP = 0.25  # felt: the toy's logits go up to 0.47


@pytest.fixture(scope="module")
def capped():
    """transformers' Gemma 3 with a softcap, its config, weights, prompts and logits."""
    config = make_gemma3.COMMON | make_gemma3.SMALL
    config |= {"num_hidden_layers": 2, "layer_types": [S, F], "final_logit_softcapping": CAP}
    weights = conditioned_weights("softcap", weight_shapes(config))
    tokens, lengths = ragged_prompts("softcap", config["vocab_size"])
    expected = hf.run(hf.build(config, weights), tokens, lengths).logits
    return config, weights, tokens, lengths, expected


def check_logits(config, weights, tokens, lengths, expected):
    decoder = adapters.build(from_hf(config), weights)
    found = adapters.logits(decoder, tokens, lengths)
    valid = np.arange(tokens.shape[1]) < lengths[:, None]
    assert np.abs(found - expected)[valid].max() <= adapters.LOGITS * expected[valid].std()


def test_the_softcap_of_a_gemma_3_equals_transformers(capped):
    config, weights, tokens, lengths, expected = capped
    assert 0.6 * CAP < np.abs(expected).max() < CAP
    check_logits(config, weights, tokens, lengths, expected)


def test_a_multimodal_gemma_3_passes_over_the_softcap_as_transformers_does(capped):
    config, weights, tokens, lengths, _ = capped
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 56, "patch_size": 14}  # fmt: skip
    whole = Gemma3Config(text_config=dict(config), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(whole).eval()
    state = {f"model.language_model.{n}": hf.torch.from_numpy(w) for n, w in weights.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.tie_weights()
    with hf.torch.no_grad():
        ids = hf.torch.from_numpy(tokens[:, : lengths.min()]).long()
        expected = model(ids).logits.numpy()
    assert np.abs(expected).max() > CAP
    outer = {"model_type": "gemma3", "text_config": config, "vision_config": vision}
    short = np.full(len(tokens), lengths.min())
    check_logits(outer, weights, tokens[:, : lengths.min()], short, expected)
