"""Folders whose matrices are codes: written as held, read back bit for bit, damaged ones refused.

The oracle of what lies in the file is the safetensors package.
"""

import functools
import json
import os
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from adapters import build
from disk import (
    BFLOAT16,
    CONFIG,
    NARROW,
    WIDE,
    assert_same_bits,
    importance_of,
    random_weights,
    read_all,
    wide_tensors,
    write_gguf,
    write_hf,
)
from flax import nnx
from gguf import GGMLQuantizationType as T
from golden.conditioned import conditioned_weights
from safetensors.numpy import load_file, save_file

import gemlax
from gemlax import checkpoints, cli
from gemlax.checkpoints import Checkpoint, open_checkpoint, save_safetensors
from gemlax.config import from_hf
from gemlax.errors import CheckpointError, RequestError, UnsupportedError
from gemlax.formats import encode
from gemlax.names import text_weights
from gemlax.qtensor import QTensor
from gemlax.weights import held_weights, named_weights

pytestmark = pytest.mark.deep

UP, DOWN = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"
RULES = {UP: "dense", "layers.1.mlp.*": "int4", "*.k_proj.weight": "nf4", "*": "int8"}
TYPES = {UP: T.Q6_K, DOWN: T.Q5_K, "embed_tokens.weight": T.Q8_0,
         "layers.0.self_attn.q_proj.weight": T.Q5_0,
         "layers.0.self_attn.k_proj.weight": T.Q4_0}  # fmt: skip
TOKENS = np.arange(20, dtype=np.int32).reshape(2, 10)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return conditioned_weights("test_quantised_folders", text_weights(CONFIG.text))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, weights) -> Path:
    return write_hf(tmp_path_factory.mktemp("plain") / "m", weights)


@pytest.fixture(scope="module")
def model(plain) -> gemlax.Model:
    return gemlax.load(plain, quantize=RULES, layers="scan")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    """The model as codes. Tests that damage it take a copy."""
    path = tmp_path_factory.mktemp("codes") / "m"
    gemlax.save(model, path, keep_codes=True)
    return path


def assert_same_state(found: gemlax.Decoder, expected: gemlax.Decoder) -> None:
    """Compare what is held: formats, codes, scales and floats, bit for bit."""
    a, b = nnx.state(found), nnx.state(expected)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, tokens, positions) -> jax.Array:
    decoder = nnx.merge(graphdef, state)
    return decoder.logits(decoder(tokens, positions)[0])


def logits(model: gemlax.Model) -> jax.Array:
    """Return logits; models that are held alike share the program."""
    positions = np.tile(np.arange(10, dtype=np.int32), (2, 1))
    return forward(*nnx.split(model.decoder), TOKENS, positions)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


# There and back.


def test_codes_come_back_bit_for_bit_with_the_same_logits(model, folder):
    again = gemlax.load(folder, layers="scan")
    assert_same_state(again.decoder, model.decoder)
    np.testing.assert_array_equal(logits(again), logits(model))
    assert_same_bits(dict(named_weights(again.decoder)), dict(named_weights(model.decoder)))


def test_the_file_holds_codes_scales_and_floats_by_name(folder, weights):
    found = load_file(folder / "model.safetensors")
    codes, scales = encode(weights[DOWN], "int8")
    np.testing.assert_array_equal(found[f"model.{DOWN}.codes"], codes)
    assert found[f"model.{DOWN}.codes"].dtype == np.int8
    np.testing.assert_array_equal(found[f"model.{DOWN}.scales"], scales.view(BFLOAT16))
    assert found["model.layers.1.mlp.up_proj.weight.codes"].dtype == np.uint8
    np.testing.assert_array_equal(found[f"model.{UP}"], weights[UP])
    written = config_of(folder)
    assert written["dtype"] == "float32"
    own = written["quantization_config"]
    assert own["quant_method"] == "gemlax"
    assert own["version"] == 2
    assert own["formats"][DOWN] == "int8"
    assert own["formats"]["layers.3.self_attn.k_proj.weight"] == "nf4"
    matrices = {name for name, weight in weights.items() if weight.ndim > 1}
    assert own["formats"].keys() == matrices - {UP}


def test_blocks_of_gguf_keep_their_bytes_in_a_folder(tmp_path):
    tensors, _ = wide_tensors(T.Q4_K, TYPES)
    path = write_gguf(tmp_path / "m.gguf", tensors, WIDE)
    model = gemlax.load(path, quantize="stored", layers="unroll")
    gemlax.save(model, tmp_path / "m", keep_codes=True)
    again = gemlax.load(tmp_path / "m", layers="unroll")
    assert_same_state(again.decoder, model.decoder)
    found = load_file(tmp_path / "m/model.safetensors")
    data, _ = tensors["blk.0.ffn_up.weight"]
    assert found[f"model.{UP}.codes"].tobytes() == data.tobytes()
    assert found[f"model.{DOWN}"].dtype == BFLOAT16
    formats = config_of(tmp_path / "m")["quantization_config"]["formats"]
    assert set(formats.values()) == {"q4_k", "q6_k", "q8_0", "q5_0", "q4_0", "bfloat16"}
    assert again.tokenizer.encode("ab aé") == model.tokenizer.encode("ab aé")


def test_codes_of_a_bfloat16_model_come_back(plain, tmp_path):
    model = gemlax.load(plain, quantize=RULES, dtype="bfloat16", layers="scan")
    gemlax.save(model, tmp_path / "m", keep_codes=True)
    assert config_of(tmp_path / "m")["dtype"] == "bfloat16"
    assert UP not in config_of(tmp_path / "m")["quantization_config"]["formats"]
    again = gemlax.load(tmp_path / "m", dtype="bfloat16", layers="scan")
    assert_same_state(again.decoder, model.decoder)


def test_codes_lie_in_shards_too(model, tmp_path):
    held = dict(held_weights(model.decoder))
    formats = config_of_formats(held)
    save_safetensors(tmp_path / "m", CONFIG, held.items(), generation_config={}, formats=formats,
                     max_shard_bytes=50_000)  # fmt: skip
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 5
    again = gemlax.load(tmp_path / "m", layers="scan")
    assert_same_state(again.decoder, model.decoder)


def config_of_formats(held) -> dict[str, str]:
    return {n: w.format for n, w in held.items() if not isinstance(w, np.ndarray)}


def test_codes_are_kept_without_kernels_and_decoded_when_asked_or_on_a_mesh(model, folder):
    by_xla = gemlax.load(folder, layers="scan", implementation="xla")
    assert_same_state(by_xla.decoder, model.decoder)
    expected = dict(named_weights(model.decoder))
    for options in ({"quantize": "dense"}, {"mesh": "data=8"}):
        dense = gemlax.load(folder, layers="scan", **options).decoder
        assert not any(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(
            nnx.state(dense), is_leaf=lambda leaf: isinstance(leaf, QTensor)))  # fmt: skip
        assert_same_bits(dict(named_weights(dense)), expected)


def test_codes_may_be_quantised_again(model, folder):
    again = gemlax.load(folder, quantize="nf4", layers="scan").decoder
    table = dict(named_weights(model.decoder))["embed_tokens.weight"]
    held = dict(held_weights(again))["embed_tokens.weight"]
    np.testing.assert_array_equal(held.codes, encode(table, "nf4")[0])


def test_convert_makes_floats_of_codes(model, folder, tmp_path, capsys):
    assert cli.main(["convert", str(folder), str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    assert "quantization_config" not in config_of(tmp_path / "m")
    expected = {f"model.{n}": w for n, w in named_weights(model.decoder)}
    found = load_file(tmp_path / "m/model.safetensors")
    assert_same_bits(found, {name: expected[name] for name in found})
    assert found.keys() == expected.keys()


def test_save_writes_floats_unless_asked(model, tmp_path, weights):
    gemlax.save(model, tmp_path / "m")
    assert "quantization_config" not in config_of(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_same_bits(read_all(checkpoint), dict(named_weights(model.decoder)))
    dense = gemlax.Model(CONFIG, build(CONFIG, weights))
    with pytest.raises(RequestError, match="keep_codes: the model holds no codes; quantize it"):
        gemlax.save(dense, tmp_path / "n", keep_codes=True)
    assert not (tmp_path / "n").exists()


# In memory.


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_model_is_quantised_in_memory_as_it_is_at_load(plain, layers):
    dense = gemlax.load(plain, layers=layers, quantize="dense")
    found = gemlax.quantize(dense, RULES)
    expected = gemlax.load(plain, layers=layers, quantize=RULES)
    assert_same_state(found.decoder, expected.decoder)
    assert found.decoder.read == expected.decoder.read
    assert isinstance(dense.decoder.embed_tokens.weight.get_value(), jax.Array)


def test_a_model_that_is_codes_is_decoded_first_and_keeps_the_rest(folder):
    model = gemlax.load(folder, kv_cache="int8", implementation="xla")
    again = gemlax.quantize(model, "int4")
    assert (again.kv_cache, again.implementation) == ("int8", "xla")
    was = dict(named_weights(model.decoder))
    held = dict(held_weights(again.decoder))[DOWN]
    importance = importance_of(was)[DOWN]
    np.testing.assert_array_equal(held.codes, encode(was[DOWN], "int4", importance)[0])
    dense = gemlax.quantize(model, "dense")
    assert_same_bits(dict(named_weights(dense.decoder)), was)
    assert isinstance(dense.decoder.embed_tokens.weight.get_value(), jax.Array)


def test_what_cannot_be_quantised_in_memory_says_why(plain, model):
    with pytest.raises(RequestError, match="'stored' is for load"):
        gemlax.quantize(model, "stored")
    with pytest.raises(RequestError, match="int8, int4, nf4, got 'int5'"):
        gemlax.quantize(model, "int5")
    with pytest.raises(RequestError, match="on a mesh cannot be quantised"):
        gemlax.quantize(gemlax.load(plain, mesh="data=8"), "int8")


def test_a_calibration_text_is_for_int4_and_has_tokens(plain, model):
    for rules, text, wrong in (
        ("int8", "a text", "is for int4, which these rules do not make"),
        ("stored", "a text", "is for int4; 'stored' takes codes as they are"),
        ("int4", "a text", "needs a tokenizer, which the model does not have"),
    ):
        with pytest.raises(RequestError, match=wrong):
            gemlax.load(plain, quantize=rules, calibration=text)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        gemlax.quantize(model, "int4", calibration=["a text", "another"])


# On the command line.


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["quantize", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_writes_what_load_would_make(plain, model, tmp_path, capsys):
    (tmp_path / "rules.json").write_text(json.dumps(RULES))
    target = tmp_path / "m"
    status, out, err = run(capsys, plain, target, "--rules", tmp_path / "rules.json", "--json")
    assert (status, err) == (0, "")
    assert_same_state(gemlax.load(target, layers="scan").decoder, model.decoder)
    found = json.loads(out)
    assert found.pop("seconds") > 0
    tensors = load_file(target / "model.safetensors")
    assert found == {
        "source": str(plain), "target": str(target), "dtype": "float32",
        "tensors": 93, "parameters": sum(w.size for _, w in named_weights(model.decoder)),
        "nbytes": sum(t.nbytes for t in tensors.values()), "tokenizer": False,
        "matrices": {"int8": 39, "nf4": 7, "int4": 3},
    }  # fmt: skip
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.stored_dtype == "int4, int8, nf4"


def test_the_command_says_what_it_did_and_replaces_only_when_told(plain, tmp_path, capsys):
    target = tmp_path / "m"
    status, out, err = run(capsys, plain, target, "--format", "int8")
    assert (status, err) == (0, "")
    assert out.startswith(f"{target}: 50 matrices in int8, 0.")
    assert out.endswith(" MB of weights, no tokenizer\n")
    status, _, err = run(capsys, plain, target, "--format", "int4")
    assert status == 1
    assert "is not empty; pass --overwrite to replace it" in err
    assert run(capsys, target, target, "--format", "int4", "--overwrite")[0] == 0
    formats = config_of(target)["quantization_config"]["formats"]
    assert formats.pop("embed_tokens.weight") == "int8"
    assert set(formats.values()) == {"int4"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("size", NARROW)
def test_experts_and_per_layer_tables_lie_in_the_folder_as_codes(tmp_path, capsys, size):
    config = NARROW[size]
    weights = random_weights(config, BFLOAT16)
    source = write_hf(tmp_path / "source", weights, config=config.to_hf())
    assert run(capsys, source, tmp_path / "m", "--format", "int4")[0] == 0
    model = gemlax.load(tmp_path / "m", layers="scan")
    assert_same_state(model.decoder, gemlax.load(source, quantize="int4", layers="scan").decoder)
    matrices = {name for name, weight in weights.items() if weight.ndim > 1}
    routers = {name for name in matrices if ".router." in name}
    assert config_of(tmp_path / "m")["quantization_config"]["formats"].keys() == matrices - routers
    found = load_file(tmp_path / "m/model.safetensors")
    kept = sorted(matrices & {"layers.0.experts.down_proj", "embed_tokens_per_layer.weight"})
    for name in kept:
        codes, scales = encode(weights[name].astype(np.float32), "int4")
        np.testing.assert_array_equal(found[f"model.{name}.codes"], codes)
        np.testing.assert_array_equal(found[f"model.{name}.scales"], scales)
    assert len(kept) == 1
    assert all(found[f"model.{name}"].dtype == BFLOAT16 for name in routers)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('{"*": "int5"}', "int8, int4, nf4, got 'int5'"),
        ('["int8"]', "rules.json holds a JSON list; expected an object"),
        ("{", "rules.json is not valid JSON"),
        ("[" * 100_000, "rules.json is not valid JSON"),
        ('{"*.nothing": "int8"}', "the rules fit no matrix"),
    ],
)
def test_rules_of_a_file_that_cannot_be_followed_are_one_line(
    plain, tmp_path, capsys, rules, message
):
    (tmp_path / "rules.json").write_text(rules)
    status, out, err = run(capsys, plain, tmp_path / "m", "--rules", tmp_path / "rules.json")
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rules.json"]


def test_a_weight_that_is_not_finite_leaves_nothing_half_written(tmp_path, weights, capsys):
    damaged = weights | {DOWN: np.full_like(weights[DOWN], np.inf)}
    source = write_hf(tmp_path / "source", damaged)
    status, _, err = run(capsys, source, tmp_path / "m", "--format", "int8")
    assert status == 1
    assert f"{DOWN} holds NaN or infinity" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_one_weight_at_a_time_is_held_and_counted(tmp_path):
    config = gemlax.tiny(gemlax.preset("gemma-3-270m"), num_hidden_layers=1)
    config = from_hf(config.to_hf() | {"vocab_size": 65_536, "hidden_size": 64, "pad_token_id": 0})
    source = write_hf(tmp_path / "m", random_weights(config, BFLOAT16), config=config.to_hf())
    formats = dict.fromkeys((n for n, s in text_weights(config.text).items() if len(s) > 1), "int4")
    told = []
    with open_checkpoint(source) as checkpoint:
        tracemalloc.start()
        done = checkpoints.convert(checkpoint, tmp_path / "n", formats=formats,
                                   progress=lambda *now: told.append(now))  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    table = 65_536 * 64
    codes = table // 2 + table // 16
    assert peak < 4 * table + 2 * codes + 8e6
    assert told[-1] == (done.nbytes, done.nbytes)
    assert told[0] == (codes, done.nbytes)


def test_a_quantised_folder_is_scored_and_described_on_the_command_line(tmp_path, capsys):
    tensors, _ = wide_tensors(T.BF16)
    source = write_gguf(tmp_path / "m.gguf", tensors, WIDE)
    assert run(capsys, source, tmp_path / "m", "--format", "int8")[0] == 0
    (tmp_path / "text").write_text("ab aé ba")
    scores = []
    for arguments in ((tmp_path / "m",), (source, "--quantize", "int8")):
        command = ["perplexity", str(tmp_path / "text"), "--json", "--model", *map(str, arguments)]
        assert cli.main(command) == 0
        scores.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert scores[0] == scores[1]
    assert cli.main(["info", str(tmp_path / "m"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored_as"] == "int8"


# Damaged and foreign folders.


def copied(folder: Path, target: Path, tensors=None, own=None) -> Path:
    """Copy a folder with some of its tensors, and of its quantization_config, changed."""
    target.mkdir()
    found = load_file(folder / "model.safetensors") | (tensors or {})
    save_file({n: t for n, t in found.items() if t is not None}, target / "model.safetensors")
    written = config_of(folder)
    written["quantization_config"] |= own or {}
    (target / "config.json").write_text(json.dumps(written))
    return target


CODES, SCALES = f"model.{DOWN}.codes", f"model.{DOWN}.scales"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({SCALES: np.zeros((64, 2), BFLOAT16)},
         r"misshapen: model.*down_proj.weight.scales is \[64, 2\], expected \[64, 3\](.|\n)*"
         r"disagreeing: model.*down_proj.weight: int8 codes \[64, 96\] need scales of \[64, 3\], "
         r"got \[64, 2\]"),
        ({CODES: np.zeros((64, 64), np.int8)},
         r"codes is \[64, 64\], expected \[64, 96\](.|\n)*"
         r"int8 codes \[64, 64\] need scales of \[64, 2\], got \[64, 3\]"),
        ({SCALES: None}, rf"missing: {SCALES} \[64, 3\]"),
        ({CODES: None}, rf"missing: {CODES} \[64, 96\]"),
        ({SCALES: np.zeros((64, 3), np.float32)}, rf"mistyped: {SCALES} is F32, expected BF16"),
        ({CODES: np.zeros((64, 96), np.uint8)}, rf"mistyped: {CODES} is U8, expected I8"),
        ({f"model.{DOWN}": np.zeros((64, 96), np.float32)}, rf"unexpected: model.{DOWN} \[64, 96"),
        ({"lm_head.weight": np.zeros((512, 32), np.float32)}, r"misshapen: lm_head.weight is"),
        ({"model.extra.codes": np.zeros((2, 2), np.uint8)}, r"unexpected: model.extra.codes"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named_before_any_is_read(
    folder, tmp_path, monkeypatch, tensors, message
):
    monkeypatch.setattr(Checkpoint, "read", None)
    damaged = copied(folder, tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=message):
        gemlax.load(damaged)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({SCALES: None}, CheckpointError, r"scales: expected \[64, 3\], got no such tensor"),
        ({CODES: np.zeros((64, 64), np.int8)}, CheckpointError,
         r"codes: expected \[64, 96\], got \[64, 64\]"),
        ({CODES: np.zeros((64, 96), np.uint8)}, UnsupportedError, r"codes is U8; expected I8"),
    ],
)  # fmt: skip
def test_a_weight_that_was_not_checked_is_checked_when_it_is_read(
    folder, tmp_path, tensors, error, message
):
    with open_checkpoint(copied(folder, tmp_path / "m", tensors)) as checkpoint:
        with pytest.raises(error, match=message):
            checkpoint.read(DOWN, np.empty((64, 96), np.float32))
        with pytest.raises(error, match=message):
            checkpoint.stored(DOWN)


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        ({"version": 1}, UnsupportedError, "has version 1; this gemlax reads version 2"),
        ({"version": None}, UnsupportedError, "has version None"),
        ({"quant_method": "gptq"}, UnsupportedError,
         "quantised by 'gptq', which gemlax does not read; it reads what `gemlax quantize` wrote"),
        ({"formats": {DOWN: "int3"}}, UnsupportedError,
         r"formats that are not known: .*down_proj.weight \('int3'\); expected bfloat16, int8"),
        ({"formats": {DOWN: ["int8"]}}, UnsupportedError, "formats that are not known"),
        ({"formats": {DOWN: "float32"}}, UnsupportedError, "formats that are not known"),
        ({"formats": {}}, UnsupportedError, "not known: none at all"),
        ({"formats": ["int8"]}, CheckpointError, "formats .an object., got"),
        ({"group_size": 64}, CheckpointError, "got .*group_size"),
        ({"formats": {"layers.9.x": "int8"}}, CheckpointError,
         "says that layers.9.x is int8, .*; there is no such weight"),
        ({"formats": {"norm.weight": "int8"}}, CheckpointError, r"norm.weight .* is \[64\]"),
        ({"formats": {DOWN: "q4_k"}}, CheckpointError, r"blocks of 256; its shape is \[64, 96\]"),
        ({"formats": {DOWN: "int8"}}, CheckpointError, "unexpected: .*codes"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(folder, tmp_path, own, error, message):
    with pytest.raises(error, match=message) as caught:
        gemlax.load(copied(folder, tmp_path / "m", own=own))
    assert str(tmp_path) in str(caught.value)


def test_a_config_that_is_no_object_is_refused_and_null_is_none(folder, plain, tmp_path):
    damaged = copied(folder, tmp_path / "m")
    written = config_of(damaged) | {"quantization_config": "int8"}
    (damaged / "config.json").write_text(json.dumps(written))
    with pytest.raises(UnsupportedError, match="quantised by 'int8', which"):
        open_checkpoint(damaged)
    (damaged / "config.json").write_text(json.dumps(written | {"quantization_config": None}))
    with pytest.raises(CheckpointError, match=r"unexpected: .*codes"):
        gemlax.load(damaged)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(folder, tmp_path, part):
    path = copied(folder, tmp_path / "m") / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(CheckpointError, match="truncated"):
        gemlax.load(path.parent)


def test_what_comes_in_another_form_than_announced_is_not_saved(model, tmp_path):
    held = dict(held_weights(model.decoder))
    formats = config_of_formats(held)
    key = "layers.0.self_attn.k_proj.weight"  # nf4, whose codes have the form of int4's
    for change, message in (
        ({key: "int4"}, f"'{key}': it comes as nf4, expected int4"),
        ({DOWN: "nf4"}, f"'{DOWN}': it comes as int8, expected nf4"),
        ({UP: "int8"}, f"'{UP}', float32"),
    ):
        with pytest.raises(CheckpointError, match=f"cannot save {message}"):
            save_safetensors(tmp_path / "m", CONFIG, held.items(), generation_config={},
                             formats=formats | change)  # fmt: skip
    assert not list(tmp_path.iterdir())
