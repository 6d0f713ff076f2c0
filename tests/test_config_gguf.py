"""GGUF metadata, as llama.cpp and as ollama write it: the model, and what is refused."""

import logging

import pytest

from gemlax import UnsupportedError, preset
from gemlax.config import RopeSpec, from_gguf

# The metadata of the real 270M file, without its vocabulary.
GGUF = {
    "general.architecture": "gemma3",
    "general.name": "Gemma 3 270m",
    "gemma3.context_length": 32768,
    "gemma3.embedding_length": 640,
    "gemma3.block_count": 18,
    "gemma3.feed_forward_length": 2048,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.rope.freq_base": 1000000.0,
    "gemma3.attention.sliding_window": 512,
    "gemma3.attention.head_count_kv": 1,
    "tokenizer.ggml.tokens": range(262144),
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
}

EPSILON = "gemma3.attention.layer_norm_rms_epsilon"


def own(**keys):
    """Return keys of Gemma 3, of which a double underscore is a dot."""
    return {f"gemma3.{key.replace('__', '.')}": value for key, value in keys.items()}


# The metadata of the four Gemma 4 GGUFs are those of llama.cpp's converter; E2B's widths and K/V
# heads go by layer.
KINDS_E2B = ([True] * 4 + [False]) * 7
E2B = {
    "general.architecture": "gemma4",
    **{f"gemma4.{key}": value for key, value in {
        "block_count": 35, "context_length": 131_072, "embedding_length": 1536,
        "feed_forward_length": [6144] * 15 + [12_288] * 20, "attention.head_count": 8,
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 512, "attention.value_length": 512,
        "attention.key_length_swa": 256, "attention.value_length_swa": 256,
        "attention.sliding_window": 512, "attention.sliding_window_pattern": KINDS_E2B,
        "attention.shared_kv_layers": 20, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 512, "rope.dimension_count_swa": 256,
        "final_logit_softcapping": 30.0, "embedding_length_per_layer_input": 256,
    }.items()},
    "tokenizer.ggml.tokens": range(262_144),
}  # fmt: skip
VISION = {
    "vision.block_count": 27, "vision.embedding_length": 1152, "vision.image_size": 896,
    "vision.attention.layer_norm_epsilon": 1e-6, "mm.tokens_per_image": 256,
}  # fmt: skip


def test_gguf_metadata_gives_the_preset_with_what_it_leaves_out():
    assert from_gguf(GGUF).text == preset("gemma-3-270m").text


def test_gguf_of_62_layers_scales_queries_by_hidden_over_heads():
    wide = {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32,
            "attention.key_length": 128, "attention.value_length": 128,
            "attention.head_count_kv": 16, "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0}  # fmt: skip
    deep = GGUF | {f"gemma3.{key}": value for key, value in wide.items()}
    specs = from_gguf(deep).text.layers
    assert specs[0].attention_scale == 168**-0.5
    assert (specs[0].rope, specs[5].rope) == (RopeSpec(1e4), RopeSpec(1e6, 8.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama'"),
        ({"gemma3.attn_logit_softcapping": 1.0}, "attn_logit_softcapping = 1.0 (not known)"),
        ({"gemma3.attention.value_length": 128}, "key_length and value_length differ"),
        ({"gemma3.rope.scaling.type": "yarn"}, "yarn"),
    ],
    ids=str,
)
def test_gguf_metadata_that_is_not_supported_is_named(change, said):
    with pytest.raises(UnsupportedError) as error:
        from_gguf(GGUF | change)
    assert said in str(error.value)


def test_gguf_metadata_that_is_missing_is_named():
    less = {k: v for k, v in GGUF.items() if not k.endswith(("block_count", "head_count"))}
    with pytest.raises(UnsupportedError, match=r"lacks gemma3.attention.head_count, gemma3.block_"):
        from_gguf(less)


def test_gemma_4_metadata_gives_the_preset():
    assert from_gguf(E2B).text == preset("gemma-4-e2b").text


@pytest.mark.parametrize("prefix", ["vision", "audio", "mm"])
def test_keys_of_encoders_in_a_file_of_ollama_pass(prefix):
    keys = {f"gemma4.{prefix}.attention.head_count": 12, f"gemma4.{prefix}.block_count": 16}
    assert from_gguf(E2B | keys).text == preset("gemma-4-e2b").text


def test_ollamas_names_of_the_rope_bases_are_read():
    """The keys of ollama's gemma3:1b, but for the size of the model."""
    theirs = {k: v for k, v in GGUF.items() if not k.endswith("rope.freq_base")}
    theirs |= own(rope__global__freq_base=2e6, rope__local__freq_base=3e4)
    specs = from_gguf(theirs).text.layers
    assert (specs[0].rope, specs[5].rope) == (RopeSpec(3e4), RopeSpec(2e6))


def test_llama_cpps_names_come_before_ollamas():
    both = GGUF | own(rope__global__freq_base=2e6, rope__freq_base_swa=1e4,
                      rope__local__freq_base=3e4)  # fmt: skip
    assert from_gguf(both).text == preset("gemma-3-270m").text


def test_the_metadata_of_ollamas_gemma_3_4b_gives_the_preset():
    """ollama writes neither an epsilon nor a rope, and the encoder's keys beside the text's."""
    less = {k: v for k, v in GGUF.items() if k not in (EPSILON, "gemma3.rope.freq_base")}
    large = {
        "context_length": 131_072, "embedding_length": 2560, "block_count": 34,
        "feed_forward_length": 10_240, "attention.head_count": 8, "attention.head_count_kv": 4,
        "attention.sliding_window": 1024, **VISION,
    }  # fmt: skip
    theirs = less | {f"gemma3.{key}": value for key, value in large.items()}
    theirs["tokenizer.ggml.tokens"] = range(262_208)
    assert from_gguf(theirs).text == preset("gemma-3-4b").text


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1.0),
        (own(context_length=131_072), 1.0),  # llama.cpp would have said it
        (own(context_length=131_072, mm__tokens_per_image=256), 8.0),
        (own(context_length=131_072, rope__local__freq_base=1e4), 8.0),
        (own(context_length=32_768, mm__tokens_per_image=256), 1.0),
        (own(context_length=131_072, mm__tokens_per_image=256, rope__scaling__type="none"), 1.0),
        (own(context_length=131_072, mm__tokens_per_image=256, rope__scaling__factor=4.0), 4.0),
        (own(rope__scaling__type="linear", rope__scaling__factor=8.0,
             rope__scaling__original_context_length=4096, rope__scaling__finetuned=True), 8.0),
        (own(rope__scaling__factor=8.0), 8.0),
        (own(rope__scaling__type="none", rope__scaling__factor=8.0), 1.0),
        (own(rope__scaling__type="linear", rope__scaling__factor=0.0), 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_the_factor_of_full_layers(change, factor):
    specs = from_gguf(GGUF | change).text.layers
    assert (specs[0].rope.factor, specs[5].rope.factor) == (1.0, factor)


@pytest.mark.parametrize(
    "pattern", [None, 6, [True, True, True, True, True, False] * 3, ([1] * 5 + [0]) * 3], ids=str
)
def test_the_pattern_of_layers_is_a_period_or_a_list(pattern):
    keys = {} if pattern is None else own(attention__sliding_window_pattern=pattern)
    assert from_gguf(GGUF | keys).text == preset("gemma-3-270m").text


def test_a_value_for_each_layer_may_be_one_value():
    many = own(feed_forward_length=[2048] * 18, attention__head_count_kv=[1] * 18,
               attention__head_count=[4] * 18)  # fmt: skip
    assert from_gguf(GGUF | many).text == preset("gemma-3-270m").text


def test_the_softcap_of_the_logits_is_read():
    capped = from_gguf(GGUF | own(final_logit_softcapping=30.0)).text
    assert capped.final_logit_softcapping == 30.0
    off = from_gguf(GGUF | own(final_logit_softcapping=0.0)).text
    assert off == preset("gemma-3-270m").text


def test_keys_that_change_nothing_pass(caplog):
    caplog.set_level(logging.INFO)
    keys = own(
        expert_count=0, attn_logit_softcapping=0.0, attention__causal=True, pooling_type=0,
        leading_dense_block_count=0, rope__freq_scale=1.0, attention__key_length_swa=256,
        rope__dimension_count=256, rope__dimension_count_swa=256, nextn_predict_layers=0,
        rope__scaling__attn_factor=1.0, something_new="",
    )  # fmt: skip
    assert from_gguf(GGUF | keys).text == preset("gemma-3-270m").text
    (record,) = caplog.records
    assert "gemma3.something_new" in record.getMessage()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (own(attention__causal=False), "attention.causal = False (the model has True)"),
        (own(rope__freq_scale=0.125), "rope.freq_scale = 0.125 (the model has 1.0)"),
        (own(pooling_type=1), "pooling_type = 1 (not known)"),
        (own(expert_count=8), "expert_count = 8 (not known)"),
        (own(attention__key_length_swa=128), "key_length_swa = 128 (the model has 256)"),
        (own(rope__dimension_count=128), "rope.dimension_count is 128, but keys have 256"),
        (own(dense_2_feat_in=768), "dense_2_feat_in = 768 (not known)"),
        (own(feed_forward_length=[2048] * 17 + [1]), "intermediate_size must be a positive"),
        (own(final_logit_softcapping=-3.0), "final_logit_softcapping must be a positive"),
    ],
    ids=str,
)
def test_keys_that_change_the_answer_are_refused_by_name(change, said):
    with pytest.raises(UnsupportedError) as error:
        from_gguf(GGUF | change)
    assert said in str(error.value)


def test_gemma_4_metadata_must_have_its_epsilon():
    less = {k: v for k, v in E2B.items() if not k.endswith("rms_epsilon")}
    with pytest.raises(UnsupportedError, match=r"lacks gemma4.attention.layer_norm_rms_epsilon"):
        from_gguf(less)


def four(**keys):
    """Return keys of Gemma 4, of which a double underscore is a dot."""
    return {f"gemma4.{key.replace('__', '.')}": value for key, value in keys.items()}


@pytest.mark.parametrize(
    "keys",
    [
        four(attention__sliding_window_pattern=5),
        four(rope__scaling__type="none"),
        four(rope__scaling__type="none", rope__scaling__factor=8.0),
        four(rope__scaling__type="linear", rope__scaling__factor=1.0),
        four(rope__scaling__factor=0.0),
    ],
    ids=str,
)
def test_other_spellings_of_gemma_4_give_the_preset(keys):
    assert from_gguf(E2B | keys).text == preset("gemma-4-e2b").text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (four(attention__sliding_window_pattern=0), "needs sliding_window_pattern"),
        (four(rope__scaling__type="linear", rope__scaling__factor=8.0), "scaling.factor = 8.0"),
        (four(rope__scaling__factor=8.0), "rope.scaling.factor = 8.0"),
        (four(rope__scaling__type="yarn", rope__scaling__factor=1.0), "scaling.type = 'yarn'"),
    ],
    ids=str,
)
def test_a_gemma_4_of_another_rope_or_without_kinds_is_refused(keys, said):
    with pytest.raises(UnsupportedError, match=said):
        from_gguf(E2B | keys)
