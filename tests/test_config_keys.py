"""Keys that cannot change the answer pass, in a text config and around one; others are named."""

import logging

import pytest
from configs import published

from gemlax import UnsupportedError, preset
from gemlax.config import from_hf

BASE = published("gemma-3-270m")
MULTIMODAL = published("gemma-3-4b-it")
E2B = published("gemma-4-e2b-it")
MOE = published("gemma-4-26b-a4b-it")
UNIFIED = published("gemma-4-12b")
FILES = {"270m": BASE, "4b": MULTIMODAL, "e2b": E2B, "26b": MOE, "12b": UNIFIED}
SIZES = {"270m": "gemma-3-270m", "4b": "gemma-3-4b", "e2b": "gemma-4-e2b",
         "26b": "gemma-4-26b-a4b", "12b": "gemma-4-12b"}  # fmt: skip

NEUTRAL = [None, False, 0, 0.0, "", [], {}]
INERT = {
    "transformers 4": {
        "torchscript": True, "use_bfloat16": True, "pruned_heads": {}, "is_decoder": True,
        "finetuning_task": "x", "task_specific_params": {"a": 1}, "tf_legacy_loss": True,
        "id2label": {"0": "A"}, "num_labels": 3, "classifier_dropout": 0.1, "prefix": "p",
        "add_cross_attention": False, "tie_encoder_decoder": False, "pretraining_tp": 1,
        "tokenizer_class": "GemmaTokenizer", "cross_attention_hidden_size": None,
        "_commit_hash": "4f2c", "_flash_attn_2_enabled": True, "sep_token_id": 4,
        "decoder_start_token_id": 2, "torch_dtype": "float16",
    },
    "transformers 5": {
        "dtype": "bfloat16", "return_dict": True, "output_hidden_states": True,
        "tie_last_hidden_states": True, "transformers_version": "5.23.0",
        "serialize_explicit_per_layer_config": True, "experts_implementation": "grouped_mm",
        "_attn_implementation_internal": "sdpa", "_attn_implementation_autoset": True,
    },
    "generation": {
        "max_length": 8192, "temperature": 0.7, "top_k": 64, "top_p": 0.95, "do_sample": True,
        "num_beams": 4, "repetition_penalty": 1.2, "suppress_tokens": [3], "max_new_tokens": 9,
        "length_penalty": 2.0, "typical_p": 0.9, "bad_words_ids": [[3]], "min_p": 0.1,
        "forced_eos_token_id": 1, "early_stopping": True, "num_return_sequences": 2,
    },
    "unsloth": {
        "model_name": "unsloth/gemma-3-270m-it", "unsloth_version": "2026.4.4",
        "unsloth_fixed": True, "unsloth_training": {"rank": 8},
    },
    "mlx and training": {
        "ignore_index": -100, "skip_vision": True, "loss_type": "ForCausalLMLoss", "seed": 42,
        "device_map": "auto", "trust_remote_code": True, "router_aux_loss_coef": 0.001,
    },
    "remote code": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
    "easydel": {
        "attn_mechanism": "vanilla", "easy_method": "train", "blocksize_q": 512, "platform": "jax",
        "flash_attention_backward_pass_impl": "triton", "kv_cache_quantization_blocksize": 64,
        "sharding_axis_dims": [1, -1, 1, 1], "gradient_checkpointing": "nothing_saveable",
    },
    "encoders": {
        "vision_soft_tokens_per_image": 280, "image_seq_length": 256, "video_token_id": 258884,
        "boa_token_id": 256000, "eoa_token_index": 258883, "mm_tokens_per_image": 256,
        "vision_feature_layer": -2, "audio_config": {"hidden_size": 7},
    },
}  # fmt: skip
# One key at a time: what it says, and in which file.
REFUSED = [
    ("270m", "head_dims", 128, "head_dims = 128 (not known)"),
    ("270m", "quantization", {"bits": 4, "group_size": 64}, "quantization = {'bits': 4"),
    ("270m", "is_encoder_decoder", True, "is_encoder_decoder = True"),
    ("270m", "add_cross_attention", True, "add_cross_attention = True"),
    ("270m", "is_causal", False, "is_causal = False (the model has True)"),
    ("270m", "hidden_act", "silu", "hidden_act = 'silu' (the model has 'gelu_pytorch_tanh')"),
    ("270m", "use_qk_norm", False, "use_qk_norm = False (the model has True)"),
    ("270m", "num_experts", 8, "num_experts = 8 (not known)"),
    ("270m", "global_head_dim", 512, "global_head_dim = 512 (the model has 256)"),
    ("270m", "rope_global_base_freq", 1e4, "(the model has 1000000.0)"),
    ("270m", "attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0"),
    ("4b", "hidden_size", 2304, "hidden_size = 2304 (the model has 2560)"),
    ("4b", "head_dim", 128, "head_dim = 128 (the model has 256)"),
    ("4b", "rope_theta", 1e4, "rope_theta = 10000.0 (the model has 1000000.0)"),
    ("4b", "language_config", {"hidden_size": 3}, "language_config = {'hidden_size': 3}"),
    ("e2b", "vocab_size", 262_208, "vocab_size = 262208 (the model has 262144)"),
    ("e2b", "use_bidirectional_attention", "all", "use_bidirectional_attention = 'all'"),
    ("12b", "num_experts", 8, "num_experts = 8"),
]


def around(name: str, **keys):
    """Return a file with keys at its outer level."""
    return FILES[name] | keys


def within(name: str, **keys):
    """Return a file with keys in its text config."""
    if name == "270m":
        return BASE | keys
    return FILES[name] | {"text_config": FILES[name]["text_config"] | keys}


@pytest.mark.parametrize("place", [around, within])
@pytest.mark.parametrize("name", FILES)
def test_an_unknown_key_passes_at_a_neutral_value(name, place):
    keys = {f"a_key_of_tomorrow_{i}": value for i, value in enumerate(NEUTRAL)}
    assert from_hf(place(name, **keys)).text == preset(SIZES[name]).text


@pytest.mark.parametrize("place", [around, within])
@pytest.mark.parametrize("tool", INERT)
@pytest.mark.parametrize("name", FILES)
def test_a_key_that_is_known_to_be_inert_passes_at_any_value(name, tool, place):
    assert from_hf(place(name, **INERT[tool])).text == preset(SIZES[name]).text


@pytest.mark.parametrize(("name", "key", "value", "said"), REFUSED, ids=str)
def test_a_key_that_could_change_the_answer_is_refused_by_name(name, key, value, said):
    with pytest.raises(UnsupportedError) as error:
        from_hf(around(name, **{key: value}))
    assert said in str(error.value)


def test_keys_of_both_levels_are_refused_in_one_error():
    wrong = within("4b", attention_bias=True, one=1) | {"two": 2, "hidden_size": 7}
    with pytest.raises(UnsupportedError) as error:
        from_hf(wrong)
    for said in ("text_config.attention_bias = True (only False", "text_config.one = 1", "two = 2",
                 "hidden_size = 7 (the model has 2560)"):  # fmt: skip
        assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_value_is_not_shown_whole():
    with pytest.raises(UnsupportedError) as error:
        from_hf(BASE | {"quantization_config": {"skip": ["layer"] * 10_000}})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["4b", "e2b", "26b", "12b"])
def test_copies_of_the_text_config_around_it_pass_where_they_agree(name):
    config = FILES[name]
    resolved = preset(SIZES[name]).text
    copies = config["text_config"] | {
        "hidden_size": resolved.hidden_size, "vocab_size": resolved.vocab_size,
        "num_hidden_layers": resolved.num_hidden_layers,
        "num_attention_heads": resolved.num_attention_heads,
    } | config  # fmt: skip
    assert from_hf(copies).text == resolved


def test_one_line_says_what_was_passed_over(caplog):
    caplog.set_level(logging.INFO)
    from_hf(
        BASE | {"unheard_of": 0, "temperature": 0.7, "auto_map": {"AutoModel": "m.M"},
                "unsloth_fixed": True, "bad_words_ids": None}
    )  # fmt: skip
    (record,) = caplog.records
    said = record.getMessage()
    assert "unheard_of, temperature, auto_map (its code is not run)" in said
    assert "unsloth_fixed" not in said
    assert "bad_words_ids" not in said


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_needs_no_word(name, caplog):
    caplog.set_level(logging.WARNING)
    from_hf(FILES[name])
    assert caplog.records == []


@pytest.mark.parametrize("value", [None, {}, False])
@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_no_quantisation_is_none(key, value):
    assert from_hf(BASE | {key: value}).text == preset("gemma-3-270m").text


# Values.


def test_whole_numbers_may_be_written_as_floats():
    keys = ("hidden_size", "intermediate_size", "head_dim", "sliding_window", "vocab_size",
            "max_position_embeddings", "query_pre_attn_scalar", "num_key_value_heads",
            "num_hidden_layers", "bos_token_id", "eos_token_id")  # fmt: skip
    assert from_hf(BASE | {key: float(BASE[key]) for key in keys}) == (from_hf(BASE))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 640.5}, "hidden_size must be a positive integer, got 640.5"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, got True"),
        ({"num_hidden_layers": 1e9, "layer_types": None}, "1000000000 layers; at most 1024"),
        ({"head_dim": 31}, "head_dim must be even, got 31"),
        ({"sliding_window": None}, "sliding_window must be a positive integer, got None"),
        ({"eos_token_id": [1, None]}, "eos_token_id must be an id or a list of ids"),
        ({"eos_token_id": -1}, "eos_token_id must be an id, got -1"),
        ({"bos_token_id": [2]}, "bos_token_id must be an id, got [2]"),
        ({"pad_token_id": -2}, "pad_token_id must be an id, got -2"),
        ({"model_type": ["gemma3_text"]}, "model_type ['gemma3_text'] is not supported"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_named(change, said):
    with pytest.raises(UnsupportedError) as error:
        from_hf(BASE | change)
    assert said in str(error.value)


def test_ids_around_a_text_config_come_before_those_in_it():
    inner = within("4b", eos_token_id=1, bos_token_id=7, pad_token_id=None)
    found = from_hf(inner | {"eos_token_id": [106, 1], "bos_token_id": None})
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == ((106, 1), 7, 0)


def test_no_padding_is_null_or_minus_one():
    for none in (None, -1):
        assert from_hf(BASE | {"pad_token_id": none}).pad_token_id == 0


@pytest.mark.parametrize("inner", [None, "gemma3", "gemma3_text"])
def test_a_text_config_may_leave_out_its_type(inner):
    assert from_hf(within("4b", model_type=inner)).text == preset("gemma-3-4b").text


def test_a_text_config_of_another_model_is_refused():
    with pytest.raises(UnsupportedError, match=r"text_config.model_type is 'gemma4_text'"):
        from_hf(within("4b", model_type="gemma4_text"))


@pytest.mark.parametrize(("name", "value"), [("270m", ""), ("270m", None), ("e2b", False)])
def test_attention_that_is_not_bidirectional_has_several_spellings(name, value):
    found = from_hf(within(name, use_bidirectional_attention=value))
    assert found.text == preset(SIZES[name]).text


WRONG = [
    True, 0, -1, 2.5, float("nan"), float("inf"), 1e9, 10**30, "", "x", [], [1], [None], {},
    {"a": 1}, {"0": 3}, {"0": {"head_dim": "x"}}, {"full_attention": []}, {"full_attention": 3},
    {"sliding_attention": None, "full_attention": {"rope_theta": [1]}},
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "vocab_size", "layer_types", "rope_parameters", "rope_scaling", "rope_theta",
     "per_layer_config", "sliding_window", "sliding_window_pattern", "num_kv_shared_layers",
     "eos_token_id", "final_logit_softcapping", "rms_norm_eps", "num_hidden_layers",
     "enable_moe_block", "attention_k_eq_v", "partial_rotary_factor", "model_type"],
)  # fmt: skip
def test_a_value_of_any_type_is_read_or_refused_by_name(name, key):
    for value in WRONG:
        try:
            found = from_hf(within(name, **{key: value}))
        except UnsupportedError as error:
            assert len(str(error)) < 600
        else:
            assert from_hf(found.to_hf()) == found


# Layers.


@pytest.mark.parametrize("name", ["270m", "26b", "12b"])
@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_a_pattern_of_six_stands_for_the_list_of_layers(name, key):
    found = from_hf(within(name, layer_types=None, **{key: 6}))
    assert found.text == preset(SIZES[name]).text


def test_the_list_of_layers_comes_before_a_pattern():
    pattern = {"sliding_window_pattern": 5, "_sliding_window_pattern": 2}
    for name in ("270m", "26b"):
        assert from_hf(within(name, **pattern)).text == preset(SIZES[name]).text


def test_gemma_3_takes_its_pattern_where_there_is_no_list():
    found = from_hf(within("270m", layer_types=None, sliding_window_pattern=3,
                                       _sliding_window_pattern=None))  # fmt: skip
    assert [s.window is None for s in found.text.layers] == [False, False, True] * 6


@pytest.mark.parametrize(
    ("name", "key"), [("270m", "_sliding_window_pattern"), ("26b", "sliding_window_pattern")]
)
def test_a_pattern_that_transformers_does_not_read_must_agree(name, key):
    with pytest.raises(UnsupportedError, match=f"{key} = 5 without layer_types"):
        from_hf(within(name, layer_types=None, **{key: 5}))


def test_the_last_layer_of_a_gemma_4_is_made_a_full_one(caplog):
    short = {"model_type": "gemma4_text", "num_hidden_layers": 4}
    kinds = [spec.kind for spec in from_hf(short).text.layers]
    assert kinds == ["sliding_attention"] * 3 + ["full_attention"]
    assert "the last layer is full_attention" in caplog.text


def test_the_older_name_of_a_full_layer_is_read():
    kinds = ["attention" if k == "full_attention" else k for k in BASE["layer_types"]]
    assert from_hf(BASE | {"layer_types": kinds}).text == preset("gemma-3-270m").text


def test_the_per_layer_view_of_transformers_gives_the_preset():
    text = {
        k: v for k, v in MOE["text_config"].items()
        if k not in ("global_head_dim", "num_global_key_value_heads")
    }  # fmt: skip
    sizes = {"head_dim": 512, "num_key_value_heads": 2, "skip": [], "sliding_window": 1024}
    view = {f"{i:02}": sizes for i in range(5, 30, 6)}
    found = from_hf(MOE | {"text_config": text | {"per_layer_config": view}})
    assert found.text == preset("gemma-4-26b-a4b").text


def test_an_empty_per_layer_view_makes_all_heads_alike():
    found = from_hf(within("26b", per_layer_config={}))
    assert {spec.head_dim for spec in found.text.layers} == {256}


def test_the_older_name_of_the_experts_width_is_read():
    older = within("26b", moe_intermediate_size=None, expert_intermediate_size=704)
    assert from_hf(older).text == preset("gemma-4-26b-a4b").text
    with pytest.raises(UnsupportedError, match=r"expert_intermediate_size = 7 .the model has 704"):
        from_hf(within("26b", expert_intermediate_size=7))


def test_other_names_of_the_experts_pass_where_they_agree():
    named = within("26b", num_local_experts=128, num_experts_per_tok=8)
    assert from_hf(named).text == preset("gemma-4-26b-a4b").text
    with pytest.raises(UnsupportedError, match=r"num_local_experts = 4 .the model has 128"):
        from_hf(within("26b", num_local_experts=4))


def test_no_per_layer_inputs_is_null_or_zero():
    for none in (None, 0):
        found = from_hf(within("26b", hidden_size_per_layer_input=none))
        assert found.text == preset("gemma-4-26b-a4b").text


# Softcap.


def test_gemma_3_keeps_the_softcap_of_its_logits():
    found = from_hf(BASE | {"final_logit_softcapping": 30})
    assert found.text.final_logit_softcapping == 30.0
    assert from_hf(found.to_hf()) == found
    assert from_hf(BASE | {"final_logit_softcapping": 0.0}).text == (preset("gemma-3-270m").text)


def test_a_multimodal_gemma_3_has_no_softcap_as_in_transformers(caplog):
    found = from_hf(within("4b", final_logit_softcapping=30.0))
    assert found.text == preset("gemma-3-4b").text
    assert "final_logit_softcapping = 30.0 is not applied" in caplog.text


# Tables of two sizes.


def test_ids_without_a_per_layer_embedding_are_counted_out(caplog):
    grown = from_hf(within("e2b", vocab_size=262_150)).text
    assert (grown.vocab_size, grown.num_ids) == (262_150, 262_144)
    assert "vocab_size is 262150, vocab_size_per_layer_input only 262144" in caplog.text
    assert grown.refusal(262_143) is None
    assert "token id 262145 has no per-layer embedding" in str(grown.refusal(262_145))
    assert grown.refusal(262_150) == "token id 262150 is outside [0, 262150)"


def test_what_a_file_is_warned_of_is_not_said_again_where_it_is_written(caplog):
    from_hf(within("e2b", vocab_size=262_150)).to_hf()
    assert len(caplog.records) == 1


def test_mlxs_name_of_the_global_base_passes_where_it_agrees():
    assert from_hf(within("270m", rope_global_base_freq=1e6)) == from_hf(within("270m"))


@pytest.mark.parametrize("name", ["26b", "12b"])
def test_without_per_layer_embeddings_the_size_of_their_table_says_nothing(name, caplog):
    text = from_hf(within(name, vocab_size_per_layer_input=5)).text
    assert (text, text.num_ids) == (preset(SIZES[name]).text, 262_144)
    assert caplog.records == []
