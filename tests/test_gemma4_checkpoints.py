"""Gemma 4 on disk, as Hugging Face folders and GGUF files: what is read, ignored and refused."""

import dataclasses
import json
import logging
import random

import gguf
import numpy as np
import pytest
from disk import (
    BFLOAT16,
    CONFIG,
    GEMMA4,
    NARROW,
    assert_same_bits,
    gemma4,
    gguf_tensors,
    random_weights,
    read_all,
    write_gguf,
    write_hf,
)
from safetensors.numpy import load_file

from gemlax.checkpoints import open_checkpoint, save_safetensors
from gemlax.config import GemmaConfig, edit
from gemlax.errors import CheckpointError, Error, UnsupportedError

E2B, UNIFIED, MOE = (GEMMA4[size] for size in ("e2b", "12b", "26b-a4b"))
SHARED = [i for i, spec in enumerate(E2B.text.layers) if not spec.owns_kv]
FULL = [i for i, spec in enumerate(MOE.text.layers) if spec.kind == "full_attention"]


@pytest.fixture(params=GEMMA4)
def config(request):
    return GEMMA4[request.param]


def multimodal(config: GemmaConfig) -> dict[str, object]:
    """Return the config.json that goes with the prefix model.language_model."""
    text = config.to_hf()
    kind = text["model_type"].removesuffix("_text")
    return {"model_type": kind, "text_config": text, "vision_config": {}, "audio_config": None}


def shared_kv(size: int = 7) -> dict[str, np.ndarray]:
    """Return what published files store for the layers that share K/V, of any shape."""
    names = ("k_proj", "v_proj", "k_norm")
    return {
        f"layers.{i}.self_attn.{name}.weight": np.zeros(size, np.float64)
        for i in SHARED
        for name in names
    }


def messages(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("gemlax")]


# Hugging Face folders.


@pytest.mark.parametrize("prefix", ["model.language_model.", "model."])
def test_both_layouts_of_names_are_read(tmp_path, config, prefix):
    weights = random_weights(config)
    own = config.to_hf() if prefix == "model." else multimodal(config)
    with open_checkpoint(write_hf(tmp_path, weights, prefix=prefix, config=own)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == config.text
        assert_same_bits(read_all(checkpoint), weights)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_what_was_saved_has_the_names_of_transformers_and_is_read_back(tmp_path, config, dtype):
    weights = random_weights(config, dtype)
    save_safetensors(tmp_path / "m", config, weights.items(), generation_config={})
    found = load_file(tmp_path / "m/model.safetensors")
    # That transformers loads them: tests/reference/test_gemma4_interop.py.
    assert_same_bits(found, {f"model.{name}": array for name, array in weights.items()})
    assert found["model.layers.0.layer_scalar"].shape == (1,)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.check()
        assert checkpoint.config == config
        assert_same_bits(read_all(checkpoint, dtype), weights)


def test_other_parts_are_left_aside_with_one_line(tmp_path, caplog):
    names = ("model.vision_tower.a", "model.embed_vision.b", "model.audio_tower.c",
             "model.embed_audio.d", "model.vision_embedder.e", "assistant.f")  # fmt: skip
    others = {name: np.zeros(3, np.float64) for name in names}
    folder = write_hf(tmp_path, random_weights(UNIFIED), prefix="model.language_model.",
                      config=multimodal(UNIFIED), others=others)  # fmt: skip
    with caplog.at_level(logging.INFO, "gemlax"), open_checkpoint(folder) as checkpoint:
        checkpoint.check()
    (line,) = messages(caplog)
    assert line.endswith("left aside 6 tensors of other parts than the text decoder")


@pytest.mark.parametrize("stored", [False, True])
def test_kv_of_layers_that_share_it_may_be_stored_or_not(tmp_path, caplog, stored):
    weights = random_weights(E2B, BFLOAT16)
    more = shared_kv() if stored else {}
    folder = write_hf(tmp_path, weights | more, config=E2B.to_hf())
    with caplog.at_level(logging.INFO, "gemlax"), open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.stored_dtype == "bfloat16"
        assert_same_bits(read_all(checkpoint, BFLOAT16), weights)
        for name in more:
            with pytest.raises(CheckpointError, match="is not a weight of"):
                checkpoint.read(name, np.zeros(7, np.float32))
    expected = ["left aside 15 tensors of layers that read the K/V of another"] if stored else []
    assert [line.split(": ")[1] for line in messages(caplog)] == expected


def test_kv_of_layers_that_own_it_must_be_stored(tmp_path):
    weights = random_weights(E2B)
    owner = SHARED[0] - 1
    for name in ("k_proj", "v_proj", "k_norm"):
        del weights[f"layers.{owner}.self_attn.{name}.weight"]
    with (
        open_checkpoint(write_hf(tmp_path, weights, config=E2B.to_hf())) as checkpoint,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoint.check()
    assert str(error.value).count(f"missing: model.layers.{owner}.self_attn.") == 3


@pytest.mark.parametrize("kind", ["gemma4_assistant", "gemma4_unified_assistant"])
def test_a_drafter_is_refused_by_name(tmp_path, kind):
    tensors = {"pre_projection.weight": np.zeros((4, 8), np.float32)}
    folder = write_hf(tmp_path, tensors, prefix="", config={"model_type": kind})
    with pytest.raises(UnsupportedError, match=rf"is a drafter \({kind}\)"):
        open_checkpoint(folder)


def test_a_wrong_order_of_layer_types_is_told_by_the_tensors(tmp_path):
    wrong = MOE.to_hf()
    kinds = wrong["layer_types"]
    kinds[1], kinds[-1] = "full_attention", "full_attention"
    with (
        open_checkpoint(write_hf(tmp_path, random_weights(MOE), config=wrong)) as checkpoint,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoint.check()
    text = str(error.value)
    sizes = [MOE.text.num_attention_heads * spec.head_dim for spec in MOE.text.layers]
    name = "misshapen: model.layers.1.self_attn.q_proj.weight is"
    assert f"{name} [{sizes[1]}, 80], expected [{sizes[-1]}, 80]" in text
    assert "unexpected: model.layers.1.self_attn.v_proj.weight" in text
    assert "layers.0." not in text


def test_values_of_keys_must_be_what_the_tensors_say(tmp_path):
    weights = random_weights(MOE)
    name = f"layers.{FULL[0]}.self_attn.v_proj.weight"
    keys = weights[f"layers.{FULL[0]}.self_attn.k_proj.weight"]
    folder = write_hf(tmp_path, weights | {name: keys}, config=MOE.to_hf())
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=rf"unexpected: model.{name}"),
    ):
        checkpoint.check()


def test_a_key_that_is_not_known_is_named(tmp_path):
    weights = random_weights(UNIFIED)
    folder = write_hf(tmp_path, weights, config=UNIFIED.to_hf() | {"attention_sinks": 4})
    with pytest.raises(UnsupportedError, match=r"attention_sinks = 4 \(not known\)"):
        open_checkpoint(folder)
    nested = multimodal(UNIFIED)
    nested["text_config"] = UNIFIED.to_hf() | {"attention_sinks": 4}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    with pytest.raises(UnsupportedError, match=r"attention_sinks = 4 \(not known\)"):
        open_checkpoint(tmp_path)


def test_tensors_of_gemma_2_are_not_those_of_gemma_3(tmp_path):
    weights = {name: w for name, w in random_weights().items() if "_norm.weight" not in name}
    with (
        open_checkpoint(write_hf(tmp_path, weights, config=CONFIG.to_hf())) as checkpoint,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoint.check()
    assert str(error.value).count("missing: model.layers.") == 2 * CONFIG.text.num_hidden_layers


# GGUF files.


def write(path, config, weights=None, *, change=None, **options):
    tensors = gguf_tensors(random_weights(config) if weights is None else weights, config)
    tensors |= change or {}
    return write_gguf(path, {n: t for n, t in tensors.items() if t}, config, **options)


def test_gguf_names_are_those_of_the_gguf_package(config):
    assert None not in gguf_tensors(random_weights(config), config)


def test_a_gguf_is_read_bit_for_bit(tmp_path, config):
    weights = random_weights(config)
    with open_checkpoint(write(tmp_path / "m.gguf", config, weights)) as checkpoint:
        checkpoint.check()
        # llama.cpp has one architecture; 12B's own model type says nothing of the text decoder.
        assert checkpoint.config.text == dataclasses.replace(config.text, model_type="gemma4_text")
        assert_same_bits(read_all(checkpoint), weights)  # norms too: nothing was added to them


def test_values_of_keys_are_told_by_the_tensors_of_a_gguf(tmp_path):
    weights = random_weights(MOE)
    values = np.zeros_like(weights[f"layers.{FULL[0]}.self_attn.k_proj.weight"])
    change = {f"blk.{i}.attn_v.weight": (values, None) for i in FULL}
    with open_checkpoint(write(tmp_path / "m.gguf", MOE, weights)) as checkpoint:
        found = [spec.k_eq_v for spec in checkpoint.config.text.layers]
    assert found == [spec.kind == "full_attention" for spec in MOE.text.layers]
    with open_checkpoint(write(tmp_path / "m.gguf", MOE, weights, change=change)) as checkpoint:
        checkpoint.check()
        assert not any(spec.k_eq_v for spec in checkpoint.config.text.layers)


def test_values_of_keys_may_be_shared(tmp_path):
    config = gemma4("e2b", num_hidden_layers=10, num_kv_shared_layers=5, attention_k_eq_v=True,
                    layer_types=[spec.kind for spec in E2B.text.layers])  # fmt: skip
    with open_checkpoint(write(tmp_path / "m.gguf", config)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == config.text


def test_a_gguf_without_some_values_is_damaged(tmp_path):
    path = write(tmp_path / "m.gguf", E2B, change={"blk.1.attn_v.weight": None})
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"missing: blk.1.attn_v.weight"),
    ):
        checkpoint.check()


def test_a_gguf_of_gemma_3_always_has_values(tmp_path):
    tensors = gguf_tensors(random_weights())
    (full,) = (i for i, s in enumerate(CONFIG.text.layers) if s.kind == "full_attention")
    del tensors[f"blk.{full}.attn_v.weight"]
    with (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint,
        pytest.raises(CheckpointError, match=rf"missing: blk.{full}.attn_v.weight"),
    ):
        checkpoint.check()


def test_a_gguf_may_store_kv_of_layers_that_share_it(tmp_path, caplog):
    names = ("attn_k", "attn_v", "attn_k_norm")
    change = {
        f"blk.{i}.{name}.weight": (np.ones(7, np.float32), None) for i in SHARED for name in names
    }
    path = write(tmp_path / "m.gguf", E2B, change=change)
    with caplog.at_level(logging.INFO, "gemlax"), open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert not any(spec.k_eq_v for spec in checkpoint.config.text.layers)
        assert_same_bits(read_all(checkpoint), random_weights(E2B))
    assert ["left aside 15 tensors" in line for line in messages(caplog)] == [True]


def test_quantised_experts_are_read_as_gguf_does(tmp_path):
    config = edit(MOE, hidden_size=64, moe_intermediate_size=32)
    weights = random_weights(config)
    tensors: dict = gguf_tensors(weights, config)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name in ("gate_up", "down"):
        other, ours = f"blk.0.ffn_{name}_exps.weight", f"layers.0.experts.{name}_proj"
        codes = gguf.quants.quantize(weights[ours], kind)
        tensors[other], weights[ours] = (codes, kind), gguf.quants.dequantize(codes, kind)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, config)) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 16,
        [1.0] * 8 + [1e30] * 32,
        [1.0] * 4 + [1e30] * 28,
        [1.0] * 9 + [1e30] * 23,
        [1.0] * 7 + [2.0] + [1e30] * 24,
    ],
    ids=["short", "long", "few", "many", "scaled"],
)
def test_another_rope_is_refused(tmp_path, values):
    change = {"rope_freqs.weight": (np.array(values, np.float32), None)}
    path = write(tmp_path / "m.gguf", UNIFIED, change=change)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(UnsupportedError, match=r"rope_freqs.weight must be 8 ones and 24 times 1e"),
    ):
        checkpoint.check()


def test_the_divisors_of_the_rope_may_be_missing(tmp_path):
    path = write(tmp_path / "m.gguf", UNIFIED, change={"rope_freqs.weight": None})
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text.layers[-1].rope.rotated == 0.25


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.value_length_swa", 48, "value_length_swa is 48, but keys of sliding_attention"),
        ("rope.dimension_count", 16, "rope.dimension_count is 16, but keys of full_attention have"),
        ("attention.sliding_window_pattern", [True] * 5, "5 values of sliding_window_pattern for"),
        ("attention.head_count_kv", [1] * 7, "7 values of head_count_kv for 6 layers"),
        ("attention.sinks", 4, r"gemma4.attention.sinks = 4 \(not known\)"),
    ],
)
def test_metadata_that_contradicts_itself_is_named(tmp_path, key, value, message):
    path = write(tmp_path / "m.gguf", UNIFIED, extra={f"gemma4.{key}": value})
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(path)


def test_flipped_bytes_of_a_header_never_raise_anything_but_errors_of_gemlax(tmp_path):
    path = write(tmp_path / "m.gguf", E2B, vocabulary=False, extra={"gemma4.vocab_size": 512})
    whole = path.read_bytes()
    length = len(whole) - sum(w.nbytes for w in random_weights(E2B).values())
    rng, refused = random.Random(0), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(length)
            data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)])
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as checkpoint:
                checkpoint.check()
        except Error:
            refused += 1
    assert 50 < refused < 200


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma4-assistant", r"is a drafter \(gemma4-assistant\)"),
        ("gemma2", "architecture 'gemma2'"),
    ],
)
def test_another_architecture_is_refused(tmp_path, kind, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("scored", [True, False])
def test_the_tokenizer_goes_by_merges(tmp_path, scored):
    path = write(tmp_path / "m.gguf", UNIFIED)
    if not scored:  # another name for the key: the file has no scores
        path.write_bytes(
            path.read_bytes().replace(b"tokenizer.ggml.scores", b"tokenizer.ggml.scoreX")
        )
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer.add_bos
    ids = tokenizer.encode("ab a")
    assert [tokenizer.piece(i) for i in ids] == ["<bos>", "ab", "▁a"]
    assert tokenizer.decode(ids) == "ab a"


# Experts as other tools lay them out.

EXPERTS = NARROW["26b-a4b"]


def apart(weights, layout):
    """Lay experts out as other tools do."""
    found = {}
    for name, array in weights.items():
        base, experts, own = name.partition("experts.")
        if not experts or layout == "moe":
            found[name.replace("experts.", "moe.experts.")] = array
            continue
        halves = own.removesuffix("_proj").split("_")
        for half, part in zip(halves, np.split(array, len(halves), axis=1), strict=True):
            if layout == "mlx":
                found[f"{base}experts.switch_glu.{half}_proj.weight"] = part.copy()
                continue
            for i, one in enumerate(part):
                found[f"{base}experts.{i}.{half}_proj.weight"] = one.copy()
    return found


@pytest.mark.parametrize("layout", ["alone", "mlx", "moe"])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_experts_that_lie_apart_are_put_together(tmp_path, layout, dtype):
    weights = random_weights(EXPERTS, dtype)
    folder = write_hf(tmp_path / "m", apart(weights, layout), config=EXPERTS.to_hf())
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint, dtype), weights)


def test_an_expert_that_is_missing_is_named(tmp_path):
    tensors = apart(random_weights(EXPERTS), "alone")
    del tensors["layers.1.experts.2.up_proj.weight"]
    folder = write_hf(tmp_path / "m", tensors, config=EXPERTS.to_hf())
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"missing: model.layers.1.experts.2.up_proj.weight"),
    ):
        checkpoint.check()


def split(tensors, axis=1):
    for name in [name for name in tensors if "gate_up" in name]:
        both, kind = tensors.pop(name)
        for half, part in zip(("gate", "up"), np.split(both, 2, axis=axis), strict=True):
            tensors[name.replace("gate_up", half)] = (part.copy(), kind)
    return tensors


def test_a_gguf_may_hold_gate_and_up_apart(tmp_path):
    weights = random_weights(EXPERTS)
    path = write_gguf(tmp_path / "m.gguf", split(gguf_tensors(weights, EXPERTS)), EXPERTS)
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)


def test_codes_of_gate_and_up_apart_are_those_of_both(tmp_path):
    name, found = "layers.0.experts.gate_up_proj", []
    for change in (dict, split):
        tensors = gguf_tensors(random_weights(EXPERTS), EXPERTS)
        own = next(n for n in tensors if n.startswith("blk.0") and "gate_up" in n)
        blocks = gguf.quants.quantize(tensors[own][0], gguf.GGMLQuantizationType.Q8_0)
        tensors[own] = (blocks, gguf.GGMLQuantizationType.Q8_0)
        path = write_gguf(tmp_path / f"{change.__name__}.gguf", change(tensors), EXPERTS)
        with open_checkpoint(path) as checkpoint:
            assert not checkpoint.is_float(name)
            found.append(checkpoint.stored(name).codes.copy())
    assert np.array_equal(*found)


def test_a_layer_without_an_output_scale_has_one_of_1(tmp_path, caplog):
    weights = random_weights(EXPERTS)
    tensors = gguf_tensors(weights, EXPERTS)
    del tensors["blk.1.layer_output_scale.weight"]
    with caplog.at_level(logging.INFO, "gemlax"):
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, EXPERTS))
    with checkpoint:
        checkpoint.check()
        expected = weights | {"layers.1.layer_scalar": np.ones(1, np.float32)}
        assert_same_bits(read_all(checkpoint), expected)
    assert "blk.1.layer_output_scale.weight is not there and taken as 1" in caplog.text
