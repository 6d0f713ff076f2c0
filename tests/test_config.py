"""Configs: published files give the presets, wrong ones are refused by name, plans are right."""

import dataclasses

import pytest
from configs import published
from hypothesis import given
from hypothesis import strategies as st

from gemlax import RequestError, UnsupportedError, preset, tiny
from gemlax.config import LayerSpec, RopeSpec, Run, StackPlan, edit, from_hf
from gemlax.presets import PRESETS

BASE = published("gemma-3-270m")


def test_ids_of_features_are_known_where_the_table_holds_them():
    assert from_hf(published("gemma-3-4b-it")).placeholder_ids == (262_144,)
    assert from_hf(BASE).placeholder_ids == ()
    assert preset("gemma-4-e2b").placeholder_ids == (258_880, 258_881, 258_884)
    assert tiny(preset("gemma-4-e2b")).placeholder_ids == ()


@pytest.mark.parametrize("name", PRESETS)
def test_three_round_trips_through_config_json_change_nothing(name):
    config = edit(preset(name), eos_token_id=[1, 106])
    again = config
    for _ in range(3):
        again = from_hf(again.to_hf())
    assert again == config


def test_layers_follow_the_published_tables():
    window = {"gemma-3-270m": 512, "gemma-3-1b": 512}
    gemma3 = [name for name in PRESETS if name.startswith("gemma-3")]
    for name in gemma3:
        text = preset(name).text
        for i, spec in enumerate(text.layers):
            full = (i + 1) % 6 == 0
            assert (spec.kind == "full_attention") == full
            assert spec.window == (None if full else window.get(name, 1024))
            factor = 8.0 if full and name not in window else 1.0
            assert spec.rope == RopeSpec(1e6 if full else 1e4, factor)
    # Gemma 3 does not force its last layer to be full.
    last = {name: preset(name).text.layers[-1].kind.split("_")[0] for name in gemma3}
    assert list(last.values()) == ["full", "sliding", "sliding", "full", "sliding"]
    assert preset("gemma-3-27b").text.layers[0].attention_scale == 168**-0.5


# Per size: window, period, K/V heads local and global, MLP width, layers that share K/V.
GEMMA_4 = {
    "gemma-4-e2b": (512, 5, 1, 1, 6144, 20),
    "gemma-4-e4b": (512, 6, 2, 2, 10_240, 18),
    "gemma-4-12b": (1024, 6, 8, 1, 15_360, 0),
    "gemma-4-26b-a4b": (1024, 6, 8, 2, 2112, 0),
    "gemma-4-31b": (1024, 6, 16, 4, 21_504, 0),
}


@pytest.mark.parametrize("name", GEMMA_4)
def test_gemma_4_layers_follow_the_published_tables(name):
    window, period, local, heads, inner, shared = GEMMA_4[name]
    text = preset(name).text
    edge = shared > 0
    for i, spec in enumerate(text.layers):
        full = (i + 1) % period == 0
        owns = i < text.num_hidden_layers - shared
        wide = 2 if name == "gemma-4-e2b" and not owns else 1
        rope = RopeSpec(1e6, 1.0, 0.25) if full else RopeSpec(1e4)
        assert spec == LayerSpec(
            kind="full_attention" if full else "sliding_attention",
            window=None if full else window,
            num_key_value_heads=heads if full else local,
            head_dim=512 if full else 256,
            rope=rope,
            attention_scale=1.0,
            intermediate_size=inner * wide,
            owns_kv=owns,
            k_eq_v=full and not edge,
            num_experts=128 if "a4b" in name else 0,
        )
    assert text.layers[-1].kind == "full_attention"
    facts = (text.norm_offset, text.v_norm, text.layer_scalar, text.final_logit_softcapping)
    assert facts == (0.0, True, True, 30.0)
    assert text.hidden_size_per_layer_input == (256 if edge else 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"global_head_dims": 1}, "global_head_dims = 1 (not known)"),
        ({"num_kv_shared_layers": 30}, "num_kv_shared_layers must be in [0, 30), got 30"),
        ({"num_kv_shared_layers": 25}, "owns K/V to be shared"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ({"enable_moe_block": True}, "num_experts must be a positive integer"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 8,
             "moe_intermediate_size": 8},
            "top_k_experts 8 > num_experts 4",
        ),
        ({"per_layer_config": {"5": {"window": 3}}}, "per_layer_config['5']"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "layers of one kind differ"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping must be a positive"),
        ({"num_global_key_value_heads": 3, "attention_k_eq_v": True}, "is not a multiple of"),
    ],
    ids=str,
)  # fmt: skip
def test_a_gemma_4_config_that_is_not_supported_is_named(change, said):
    with pytest.raises(UnsupportedError) as error:
        from_hf({"model_type": "gemma4_text"} | change)
    assert said in str(error.value)


def test_flat_fields_and_the_per_layer_view_give_one_config():
    flat = {"model_type": "gemma4_text", "attention_k_eq_v": True, "global_head_dim": 512,
            "num_global_key_value_heads": 2}  # fmt: skip
    sizes = {"head_dim": 512, "num_key_value_heads": 2}
    view = {"model_type": "gemma4_text", "attention_k_eq_v": True,
            "per_layer_config": {str(i): sizes for i in range(5, 30, 6)}}  # fmt: skip
    assert from_hf(flat) == from_hf(view)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
        ({"hidden_sizes": 3}, "hidden_sizes = 3 (not known)"),
        ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' (only 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias = True (only False is supported)"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 17}, "layer_types must be 17 of"),
        ({"layer_types": ["chunked_attention"] * 18}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"hidden_size": "640"}, "hidden_size must be a positive integer, got '640'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor must be a positive"),
        ({"rope_parameters": {"chunked_attention": {}}}, "rope_parameters has"),
        ({"rope_scaling": [8.0]}, "rope settings must be objects, got [8.0]"),
        ({"rope_parameters": {"full_attention": 3}}, "rope settings must be objects, got 3"),
        ({"layer_types": "sliding_attention"}, "layer_types must be 18 of"),
        ({"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ({"eos_token_id": "1"}, "eos_token_id must be an id or a list of ids"),
        ({"model_type": "gemma3"}, "without a 'text_config'"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_named(change, said):
    with pytest.raises(UnsupportedError) as error:
        from_hf(BASE | change)
    assert said in str(error.value)


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(UnsupportedError) as error:
        from_hf(BASE | {"one": 1, "two": 2, "attention_bias": True})
    assert all(word in str(error.value) for word in ("one = 1", "two = 2", "attention_bias"))


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(RequestError, match="no preset 'gemma-9'; there are gemma-3-270m"):
        preset("gemma-9")


@pytest.mark.parametrize("name", PRESETS)
def test_tiny_keeps_what_makes_a_size_itself(name):
    real, toy = preset(name).text, tiny(preset(name)).text
    assert [s.kind for s in toy.layers] == [s.kind for s in real.layers]
    assert [s.rope for s in toy.layers] == [s.rope for s in real.layers]
    spec = toy.layers[0]
    assert spec.window == 32
    assert spec.head_dim != toy.hidden_size // toy.num_attention_heads
    by_head = [s.attention_scale == s.head_dim**-0.5 for s in (spec, real.layers[0])]
    assert by_head[0] == by_head[1]
    for small, large in zip(toy.layers, real.layers, strict=True):
        ratio = real.num_attention_heads // large.num_key_value_heads
        if large.num_key_value_heads > 1:
            assert small.num_key_value_heads > 1
            assert toy.num_attention_heads // small.num_key_value_heads == ratio
        same = [(s.owns_kv, s.k_eq_v, s.num_experts) for s in (small, large)]
        assert same[0] == same[1]
        wide = [s.intermediate_size // c.layers[0].intermediate_size
                for s, c in ((small, toy), (large, real))]  # fmt: skip
        assert wide[0] == wide[1]
    sizes = {s.kind: s.head_dim for s in toy.layers}
    assert (len(set(sizes.values())) == 2) == ("gemma-4" in name)


SPEC = preset("gemma-3-4b").text
S, F = SPEC.layers[0], SPEC.layers[5]


def shared(spec: LayerSpec) -> LayerSpec:
    return dataclasses.replace(spec, owns_kv=False, intermediate_size=2 * spec.intermediate_size)


E2B = ((S,) * 4 + (F,)) * 3 + ((shared(S),) * 4 + (shared(F),)) * 4
E4B = ((S,) * 5 + (F,)) * 4 + ((shared(S),) * 5 + (shared(F),)) * 3


def shape(layers):
    plan = StackPlan.of(tuple(layers))
    return [([run.count for run in s.runs], s.repeats) for s in plan.segments]


def test_plans_are_the_fewest_bodies():
    assert shape(preset("gemma-3-4b").text.layers) == [([5, 1], 5), ([1], 4)]
    assert shape(preset("gemma-3-27b").text.layers) == [([5, 1], 10), ([1], 2)]
    assert shape(preset("gemma-3-12b").text.layers) == [([5, 1], 8)]
    assert shape(E2B) == [([4, 1], 3), ([4, 1], 4)]
    assert shape(E4B) == [([5, 1], 4), ([5, 1], 3)]
    assert shape([S]) == [([1], 1)]
    assert shape([S, S, S, F]) == [([3, 1], 1)]


def test_shared_layers_read_the_last_owner_of_their_kind():
    plan = StackPlan.of(E2B)
    assert {plan.donor(i) for i in range(15, 35)} == {13, 14}
    assert all(plan.layers[plan.donor(i)].kind == plan.layers[i].kind for i in range(35))
    assert [plan.donor(i) for i in range(15)] == list(range(15))
    assert {StackPlan.of(E4B).donor(i) for i in range(24, 42)} == {22, 23}
    assert plan.cache_rows("sliding_attention") == 12
    assert plan.cache_rows("full_attention") == 3
    assert (plan.cache_row(13), plan.cache_row(14), plan.cache_row(34)) == (11, 2, 2)


def test_a_shared_layer_without_an_owner_before_it_is_an_error():
    with pytest.raises(ValueError, match="owns no K/V"):
        StackPlan.of((S, shared(F))).donor(1)


def test_layers_beyond_the_stack_have_no_place():
    with pytest.raises(IndexError, match="layer 34 of 34"):
        SPEC.plan.locate(34)


@given(st.lists(st.sampled_from([S, F, shared(S), shared(F)]), min_size=1, max_size=24))
def test_any_pattern_is_covered_once_with_one_spec_per_stack(layers):
    plan = StackPlan.of(tuple(layers))
    expanded = [
        run.spec
        for segment in plan.segments
        for _ in range(segment.repeats)
        for run in segment.runs
        for _ in range(run.count)
    ]
    assert expanded == layers
    places = [plan.locate(i) for i in range(len(layers))]
    assert len(set(places)) == len(layers)
    for i, place in enumerate(places):
        assert plan.segments[place.segment].specs[place.kind] == layers[i]


def test_a_run_knows_its_layers():
    (segment, rest) = SPEC.plan.segments
    assert segment.runs == (Run(S, 5), Run(F, 1))
    assert (segment.period, segment.num_layers, segment.per_period("sliding_attention")) == (
        6,
        30,
        5,
    )
    assert (rest.first, rest.num_layers) == (30, 4)
