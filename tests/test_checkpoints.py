"""Hugging Face folders: reading and refusing. The oracle is the safetensors package."""

import json
import logging
import math
import random
import time
import tracemalloc

import numpy as np
import pytest
from disk import BFLOAT16, CONFIG, assert_same_bits, random_weights, read_all, write_hf
from golden.conditioned import weight_shapes
from safetensors.numpy import save_file

from gemlax.checkpoints import open_checkpoint
from gemlax.errors import CheckpointError, Error, UnsupportedError
from gemlax.names import text_weights
from gemlax.presets import PRESETS, preset

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
DTYPES = (F32, F16, BFLOAT16)
# Parameters and tensors of the text decoders, counted in the published headers with the rows
# of the vocabulary that they have there.
COUNTS = {
    "gemma-3-270m": (268_098_176, 236),
    "gemma-3-1b": (999_885_952, 340),
    "gemma-3-4b": (3_880_263_168, 444),
    "gemma-3-12b": (11_766_034_176, 626),
    "gemma-3-27b": (27_009_346_304, 808),
    "gemma-4-e2b": (4_628_569_379, 540),
    "gemma-4-e4b": (7_463_013_418, 665),
    "gemma-4-12b": (11_907_350_320, 666),
    "gemma-4-26b-a4b": (25_233_141_790, 657),
    "gemma-4-31b": (30_697_345_340, 832),
}
TABLE, NORM = "embed_tokens.weight", "norm.weight"
Q = "layers.3.self_attn.q_proj.weight"


# The table of names.


@pytest.mark.parametrize("size", PRESETS)
def test_every_size_has_the_names_and_shapes_of_transformers(size):
    # That they are those of the decoder too: tests/test_decoder.py.
    config = preset(size)
    found = text_weights(config.text)
    assert found == weight_shapes(config.to_hf())
    assert (sum(map(math.prod, found.values())), len(found)) == COUNTS[size]


def test_weights_come_in_the_order_of_the_forward_pass():
    names = list(text_weights(CONFIG.text))
    assert (names[0], names[-1]) == (TABLE, NORM)
    layers = [int(name.split(".")[1]) for name in names[1:-1]]
    assert layers == sorted(layers)
    assert len(names) == 13 * 7 + 2


# Reading.


PREFIXES = ["model.", "language_model.model.", "model.language_model.", "", "language_model.",
            "model.model.", "model.language_model.model."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_layout_of_names_is_read(tmp_path, prefix):
    weights = random_weights()
    with open_checkpoint(write_hf(tmp_path, weights, prefix=prefix)) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_every_dtype_is_read_as_every_dtype(tmp_path, stored, wanted):
    weights = random_weights(dtype=stored)
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        checkpoint.check()
        assert checkpoint.stored_dtype == stored.name
        found = read_all(checkpoint, wanted)
    assert_same_bits(found, {n: w.astype(F32).astype(wanted) for n, w in weights.items()})


def test_float32_is_rounded_to_the_nearest_even_bfloat16(tmp_path):
    weights = random_weights()
    # Halfway between two bfloat16: 1 + 1/256 goes down to 1, 1 + 3/256 up to 1 + 4/256.
    weights[NORM][:4] = [1 + 1 / 256, 1 + 3 / 256, np.nextafter(F32.type(1 + 1 / 256), 2), -1.5]
    out = np.empty(weights[NORM].shape, BFLOAT16)
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        checkpoint.read(NORM, out)
    assert out[:4].tolist() == [1, 1 + 4 / 256, 1 + 2 / 256, -1.5]


@pytest.mark.parametrize("stored", [F32, BFLOAT16], ids=str)
def test_values_beyond_float16_are_an_error_not_infinity(tmp_path, stored):
    weights = random_weights(dtype=stored)
    weights[NORM][3] = 1e6
    out = np.empty(weights[NORM].shape, F16)
    with (
        open_checkpoint(write_hf(tmp_path, weights)) as checkpoint,
        pytest.raises(CheckpointError, match=r"norm.weight has values beyond float16's 65504"),
    ):
        checkpoint.read(NORM, out)


def test_the_stored_dtype_is_the_one_most_bytes_are_in(tmp_path):
    weights = random_weights(dtype=BFLOAT16)
    norms = {n: w.astype(F32) for n, w in weights.items() if n.endswith("norm.weight")}
    with open_checkpoint(write_hf(tmp_path, weights | norms)) as checkpoint:
        assert checkpoint.stored_dtype == "bfloat16"
        checkpoint.check()


def test_temporaries_stay_small(tmp_path):
    # A table of 32 MiB that is converted by way of float32.
    config = CONFIG.to_hf() | {"vocab_size": 2**18}
    weights = random_weights(dtype=BFLOAT16)
    weights[TABLE] = np.ones((2**18, 64), BFLOAT16)
    out = np.zeros(weights[TABLE].shape, F16)
    with open_checkpoint(write_hf(tmp_path, weights, config=config)) as checkpoint:
        tracemalloc.start()
        checkpoint.read(TABLE, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert (out == 1).all()


def test_shards_are_read_through_their_index(tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    tmp_path = tmp_path / "m"
    weights = random_weights()
    write_hf(tmp_path, weights)
    (tmp_path / "model.safetensors").unlink()
    where = {}
    last = f"model.{NORM}"
    for i, part in enumerate(np.array_split(list(weights), 3)):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({f"model.{name}": weights[name] for name in part}, tmp_path / file)
        where |= {f"model.{name}": file for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)

    # A list of files, whatever it says of the tensors.
    for other in (
        where | {"model.extra": "model-00001-of-00003.safetensors", "lm_head.weight": where[last]},
        {name: file for name, file in where.items() if Q not in name},
        where | {last: "model-00001-of-00003.safetensors"},
    ):
        index.write_text(json.dumps({"weight_map": other}))
        with open_checkpoint(tmp_path) as checkpoint:
            checkpoint.check()
            assert_same_bits(read_all(checkpoint), weights)
    gone = "model-00009-of-00003.safetensors"
    index.write_text(json.dumps({"weight_map": where | {last: gone}}))
    with pytest.raises(
        CheckpointError, match=rf"lacks 1 of the 4 files .*: {gone}; the model is n"
    ):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": where | {last: "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"outside.safetensors is not a file of the folder"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": ["x"]}))
    with pytest.raises(CheckpointError, match=r"expected 'weight_map'"):
        open_checkpoint(tmp_path)
    index.unlink()
    with open_checkpoint(tmp_path) as checkpoint:  # the names of the files say enough
        assert_same_bits(read_all(checkpoint), weights)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has 2 of 3 files model-\.\.\.-of-00003"):
        open_checkpoint(tmp_path)
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"3 .safetensors files but neither"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_two_shards_hold_must_be_the_same_in_both(tmp_path):
    weights = random_weights()
    write_hf(tmp_path, weights)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({f"model.{Q}": weights[Q]}, second)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
    save_file({f"model.{Q}": weights[Q] + 1}, second)
    with pytest.raises(CheckpointError, match=rf"00001.* and .*00002.* both hold model.{Q}, and t"):
        open_checkpoint(tmp_path)


def test_one_file_stands_before_the_index_and_copies_are_named(tmp_path, caplog):
    weights = random_weights()
    write_hf(tmp_path, weights)
    for name in ("consolidated.safetensors", "model-00001-of-00001.safetensors"):
        save_file({"x": np.zeros(1, F32)}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')
    with caplog.at_level("INFO", "gemlax"), open_checkpoint(tmp_path) as checkpoint:
        assert_same_bits(read_all(checkpoint), weights)
    assert "left aside files of weights: consolidated.safetensors, model-00001" in caplog.text


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_variant_is_read_where_it_is_alone_or_asked_for(tmp_path, given):
    weights = random_weights(dtype=F16)
    path = write_hf(tmp_path, weights) / "model.fp16.safetensors"
    (tmp_path / "model.safetensors").rename(path)
    if given == "file":
        save_file({"model.norm.weight": np.zeros(1, F32)}, tmp_path / "model.safetensors")
    with open_checkpoint(path if given == "file" else tmp_path) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint, F16), weights)


BUFFERS = {
    "model.rotary_emb.inv_freq": F32, "model.rotary_emb_local.inv_freq": F32,
    "model.layers.0.self_attn.rotary_emb.inv_freq": F32, "model.embed_tokens.embed_scale": BFLOAT16,
    "model.position_ids": np.dtype(np.int64), "model.layers.1.self_attn.masked_bias": F32,
    "model.layers.1.attn.mask": np.dtype(bool), "model.bn.num_batches_tracked": np.dtype(np.int64),
    "model.layers.0.self_attn.k_scale": F32,
}  # fmt: skip


def test_buffers_are_left_aside_with_one_line_and_other_extras_refused(tmp_path, caplog):
    others = {name: np.zeros(2, dtype) for name, dtype in BUFFERS.items()}
    with (
        caplog.at_level("INFO", "gemlax"),
        open_checkpoint(write_hf(tmp_path, random_weights(), others=others)) as checkpoint,
    ):
        checkpoint.check()
    (record,) = caplog.records
    assert record.getMessage().endswith(f"left aside {len(BUFFERS)} tensors of buffers, which are "
                                        "not parameters")  # fmt: skip
    others["model.layers.0.self_attn.q_proj.bias"] = np.zeros(128, F32)
    with (
        open_checkpoint(write_hf(tmp_path, random_weights(), others=others)) as checkpoint,
        pytest.raises(CheckpointError, match=r"unexpected: model.layers.0.self_attn.q_proj.bias"),
    ):
        checkpoint.check()


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_float64_is_cast(tmp_path, wanted):
    weights = random_weights(dtype=np.float64)
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        checkpoint.check()
        assert checkpoint.stored_dtype == "float64"
        found = read_all(checkpoint, wanted)
    assert_same_bits(found, {n: w.astype(F32).astype(wanted) for n, w in weights.items()})


def test_float64_beyond_float32_is_an_error(tmp_path):
    weights = random_weights() | {NORM: np.full(64, 1e300)}
    with (
        open_checkpoint(write_hf(tmp_path, weights)) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"norm.weight has values beyond float32's 3.40282e\+38"
        ),
    ):
        checkpoint.read(NORM, np.empty(64, F32))


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("_orig_mod.model.", "prefix '_orig_mod.model.' (_orig_mod. is torch.compile's)"),
        ("module.model.", "prefix 'module.model.' (module. is DataParallel's)"),
        ("base_model.model.model.", "(base_model.model. is peft's)"),
        ("_fsdp_wrapped_module.model.", "(_fsdp_wrapped_module. is FSDP's)"),
        ("policy.model.", "begin with the prefix 'policy.model.', such as"),
        ("text_model.", "begin with the prefix 'text_model.', such as"),
    ],
)
def test_names_with_a_wrappers_prefix_are_one_line(tmp_path, prefix, says):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_hf(tmp_path, random_weights(), prefix=prefix))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
         "hold a wrapper's prefix (_checkpoint_wrapped_module. is activation checkpointing's)"),
        (lambda name: name.replace("6.mlp.", "6._orig_mod.mlp."), "_orig_mod. is torch.compile's"),
        (lambda name: name.replace("3.mlp.up_proj.", "3.mlp.up_proj.base_layer."),
         "it holds 1 tensors of adapters that are not merged, such as model.layers.3.mlp.up_proj"),
        (lambda name: name.replace(".weight", ".base_layer.weight"), "tensors of adapters"),
        (lambda name: "_x." + name.replace("self_attn", "_orig_mod.self_attn"), "prefix"),
    ],
)  # fmt: skip
def test_wrappers_inside_names_are_one_line(tmp_path, change, says):
    weights = {change(name): weight for name, weight in random_weights().items()}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write_hf(tmp_path, weights))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_that_are_not_read_come_before_what_lies_beside_them(tmp_path):
    # As a folder of FP8 does whose config does not say that it is one.
    weights = random_weights()
    coded = {n: np.zeros(w.shape, np.int8) for n, w in weights.items() if n.endswith("proj.weight")}
    scales = {f"model.{n}_scale": np.zeros(1, F32) for n in coded}
    with (
        open_checkpoint(write_hf(tmp_path, weights | coded, others=scales)) as checkpoint,
        pytest.raises(UnsupportedError) as caught,
    ):
        checkpoint.check()
    assert str(caught.value).endswith(f"I8 ({len(coded)}, such as model.{next(iter(coded))})")


def test_the_vision_tower_is_left_aside_with_one_line(tmp_path, caplog):
    names = ("vision_tower.a", "multi_modal_projector.b", "model.vision_tower.c",
             "model.multi_modal_projector.d")  # fmt: skip
    others = {name: np.zeros(3, np.float64) for name in names}  # of a type that is not read
    config = {"model_type": "gemma3", "vision_config": {}, "text_config": CONFIG.to_hf()}
    with caplog.at_level(logging.INFO, "gemlax"):
        checkpoint = open_checkpoint(
            write_hf(tmp_path, random_weights(), config=config, others=others)
        )
    checkpoint.check()
    checkpoint.close()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "left aside 4 tensors of other parts than the text decoder" in caplog.text


@pytest.mark.parametrize(
    ("said", "rows"), [(262_208, 262_144), (262_144, 262_208), (262_144, 262_144)]
)
def test_the_64_multimodal_rows_may_be_there_or_not(tmp_path, said, rows):
    config = CONFIG.to_hf() | {"vocab_size": said}
    weights = random_weights(dtype=BFLOAT16) | {TABLE: np.zeros((rows, 64), BFLOAT16)}
    with open_checkpoint(write_hf(tmp_path, weights, config=config)) as checkpoint:
        assert checkpoint.config.text.vocab_size == rows
        checkpoint.check()


def test_other_differences_of_the_vocabulary_are_errors(tmp_path):
    weights = random_weights() | {TABLE: np.zeros((512 + 64, 64), F32)}
    with (
        open_checkpoint(write_hf(tmp_path, weights)) as checkpoint,
        pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[576, 64\], expected \[512"),
    ):
        checkpoint.check()


def test_generation_config_is_read(tmp_path):
    write_hf(tmp_path, random_weights())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.generation_config == {}
        assert checkpoint.source == tmp_path
        assert checkpoint.tokenizer() is None
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.generation_config == {"eos_token_id": [1, 106]}


# Refusing.


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    weights = random_weights()
    del weights[NORM], weights["layers.6.mlp.up_proj.weight"]
    weights[Q] = weights[Q].T.copy()
    weights["layers.2.self_attn.q_norm.weight"] = np.zeros(31, F32)
    weights["layers.6.mlp.up_projection.weight"] = np.zeros(2, F32)
    weights["rotary"] = np.zeros(1, F32)
    with (
        open_checkpoint(write_hf(tmp_path, weights)) as checkpoint,
        pytest.raises(CheckpointError) as caught,
    ):
        checkpoint.check()
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert str(tmp_path) in lines[0]
    assert sorted(lines[1:]) == sorted(
        [
            "missing: model.layers.6.mlp.up_proj.weight [96, 64]",
            "missing: model.norm.weight [64]",
            "unexpected: model.layers.6.mlp.up_projection.weight [2] "
            "(nearest: model.layers.6.mlp.up_proj.weight)",
            "unexpected: model.rotary [1]",
            f"misshapen: model.{Q} is [64, 128], expected [128, 64]",
            "misshapen: model.layers.2.self_attn.q_norm.weight is [31], expected [32]",
        ]
    )


def test_a_type_that_is_not_read_is_named(tmp_path):
    weights = random_weights() | {Q: np.zeros((128, 64), np.int8)}
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        with pytest.raises(UnsupportedError, match=rf"I8 \(1, such as model.{Q}\)"):
            checkpoint.check()
        with pytest.raises(UnsupportedError, match=rf"model.{Q} is I8"):
            checkpoint.read(Q, np.empty((128, 64), F32))


def test_reading_needs_the_right_array(tmp_path):
    weights = random_weights()
    del weights[NORM]
    weights["layers.0.self_attn.q_norm.weight"] = np.zeros(31, F32)
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        with pytest.raises(ValueError, match=r"of shape \[128, 64\], got \[64, 128\]"):
            checkpoint.read(Q, np.empty((64, 128), F32))
        with pytest.raises(ValueError, match="C-contiguous"):
            checkpoint.read(Q, np.empty((64, 128), F32).T)
        with pytest.raises(TypeError, match=r"out is float64; expected float32"):
            checkpoint.read(Q, np.empty((128, 64), np.float64))
        with pytest.raises(CheckpointError, match=r"'layers.7.x' is not a weight of"):
            checkpoint.read("layers.7.x", np.empty(1, F32))
        with pytest.raises(CheckpointError, match=r"model.norm.weight: .*got no such tensor"):
            checkpoint.read(NORM, np.empty(64, F32))
        with pytest.raises(CheckpointError, match=r"q_norm.weight: expected \[32\], got \[31\]"):
            checkpoint.read("layers.0.self_attn.q_norm.weight", np.empty(32, F32))


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/gone; expected"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"it is empty; expected"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"it holds notes.txt; expected"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"begins with b'hell'; expected"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "m.gguf").write_text("GGUF")
    with pytest.raises(CheckpointError, match=r"m.gguf: damaged GGUF header"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    with pytest.raises(CheckpointError, match=r"has no config.json beside it"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model.safetensors is empty"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", r"config.json is not valid JSON"),
        ("[1]", r"config.json holds a JSON list; expected an object"),
        ("[" * 100_000, r"config.json is not valid JSON"),
        ({"num_hidden_layers": 10**12}, r"1000000000000 layers, but only 93 tensors"),
        ({"num_attention_heads": "4"}, r"num_attention_heads"),
        ({"rope_scaling": [1]}, r"rope settings must be objects, got \[1\]"),
        ({"layer_types": 7}, r"layer_types must be 7 of"),
        ({"model_type": "llama"}, r"model_type 'llama' is not supported"),
        ({"model_type": "gemma2"}, r"model_type 'gemma2' is not supported"),
    ],
)
def test_a_bad_config_is_an_error_of_gemlax(tmp_path, change, message):
    text = change if isinstance(change, str) else json.dumps(CONFIG.to_hf() | change)
    write_hf(tmp_path, random_weights())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Error, match=message):
        open_checkpoint(tmp_path)


# Hostile files: a header and how many bytes of data follow it.

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def packed(header: object, data: int = 8, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


HOSTILE = {
    "empty header": (packed(""), "header is not valid"),
    "list": (packed([], 0), "not a JSON object"),
    "cut": (packed({"a": ENTRY})[:20], "truncated"),
    "short file": (b"\x01\0\0", "truncated or not a safetensors file"),
    "length beyond the file": (packed({"a": ENTRY}, length=10**6), "announces a header of 1000000"),
    "length beyond the limit": (packed({"a": ENTRY}, length=2**63), "truncated"),
    "not JSON": (packed("{'a': 1}"), "header is not valid"),
    "not UTF-8": (b"\x02" + bytes(7) + b"\xff\xfe", "header is not valid"),
    "deep": (packed("[" * 50_000), "header is not valid"),
    "long number": (packed('{"a": ' + "9" * 5000 + "}"), "header is not valid"),
    "twice": (packed(f'{{"a": {json.dumps(ENTRY)}, "a": {json.dumps(ENTRY)}}}'), "is there twice"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [2]}}), "expected dtype, shape and"),
    "extra key": (packed({"a": ENTRY | {"b": 1}}), "expected dtype, shape and"),
    "unknown dtype": (packed({"a": ENTRY | {"dtype": "F33"}}), "dtype F33 is not known"),
    "dtype a list": (packed({"a": ENTRY | {"dtype": []}}), r"dtype \[\] is not known"),
    "negative": (packed({"a": ENTRY | {"shape": [-2]}}), "must be lists of sizes"),
    "float": (packed({"a": ENTRY | {"shape": [2.0]}}), "must be lists of sizes"),
    "bool": (packed({"a": ENTRY | {"shape": [2, True]}}), "must be lists of sizes"),
    "huge": (packed({"a": ENTRY | {"shape": [2**63]}}), "must be lists of sizes"),
    "many dimensions": (packed({"a": ENTRY | {"shape": [1] * 17 + [2]}}), "must be lists of sizes"),
    "overflow": (packed({"a": ENTRY | {"shape": [2**62, 2**62, 4]}}), r"takes \d+ bytes"),
    "reversed": (packed({"a": ENTRY | {"data_offsets": [8, 0]}}), "takes 8 bytes"),
    "three offsets": (packed({"a": ENTRY | {"data_offsets": [0, 8, 8]}}), "must be lists of sizes"),
    "wrong size": (packed({"a": ENTRY | {"data_offsets": [0, 12]}}, 12), "takes 8 bytes"),
    "half bytes": (packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}), "takes 1"),
    "beyond the end": (packed({"a": ENTRY}, 4), "truncated"),
    "more data": (packed({"a": ENTRY}, 12), "longer than its header says"),
    "overlap": (packed({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, 12), "b overlaps"),
    "same": (packed({"a": ENTRY, "b": ENTRY}), "b overlaps"),
    "gap": (packed({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, 20), "b follows a gap"),
    "long name": (packed({"a\n" * 999: ENTRY | {"shape": 1}}), r": '(a\\n){60}'\.\.\."),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_error_of_gemlax(tmp_path, case):
    data, message = HOSTILE[case]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(Error, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    write_hf(tmp_path, {NORM: np.ones(64, F32), Q: np.ones((128, 64), F32)})
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(whole), 997), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"truncated|empty"):
            open_checkpoint(tmp_path)


def test_flipped_bytes_never_raise_anything_but_errors_of_gemlax(tmp_path):
    write_hf(tmp_path, random_weights())
    names = ["model.safetensors", "config.json"]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    length = int.from_bytes(whole[names[0]][:8], "little") + 8
    rng = random.Random(0)
    refused, start = 0, time.monotonic()
    for case in range(400):
        name = names[case % 4 == 3]
        data = bytearray(whole[name])
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(length if name == names[0] else len(data))
            data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)])
        (tmp_path / name).write_bytes(data)
        try:
            with open_checkpoint(tmp_path) as checkpoint:
                checkpoint.check()
                read_all(checkpoint)
        except Error:
            refused += 1
        (tmp_path / name).write_bytes(whole[name])
    assert 300 < refused <= 400
    assert time.monotonic() - start < 60


def test_many_unexpected_names_are_listed_quickly(tmp_path):
    others = {f"other.{i % 7}.{'x' * 500}{i}": np.zeros(0, F32) for i in range(5000)}
    start = time.monotonic()
    with (
        open_checkpoint(write_hf(tmp_path, random_weights(), others=others)) as checkpoint,
        pytest.raises(CheckpointError, match="and 3000 more like the last one"),
    ):
        checkpoint.check()
    assert time.monotonic() - start < 10
