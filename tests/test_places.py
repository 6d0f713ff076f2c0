"""What people give in place of a model is named; what stands for one is read."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from disk import CONFIG, gguf_tensors, random_weights, write_gguf, write_hf

import gemlax
from gemlax import cli
from gemlax.checkpoints import open_checkpoint
from gemlax.errors import CheckpointError, Error

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"
PAGE = "\n<!DOCTYPE html>\n<html class=''>"
WEIGHTS = random_weights()


def toy(folder: Path) -> Path:
    return write_hf(folder, WEIGHTS)


def files(folder: Path, **texts: str) -> Path:
    """Write files by name; two underscores stand for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def error_of(path: Path) -> str:
    """Return what opening says; it is one line."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files that are not what their name says.

SAVED = {
    "config.json": None, "generation_config.json": None, "model.safetensors": None,
    "tokenizer.json": None, "tokenizer.model": None, "tokenizer_config.json": None,
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself; run in its folder: git lfs pull"),
        (PAGE, "is a web page that was saved in place of the file"),
        ("Entry not found", "holds a server's answer in place of the file: 'Entry not found'"),
        ("Access to model google/x is restricted.", "holds a server's answer"),
        ("", "is empty; fetch it again"),
    ],
    ids=["pointer", "page", "not found", "restricted", "empty"],
)
def test_what_stands_in_for_a_file_is_named(tmp_path, name, text, says):
    (toy(tmp_path) / name).write_text(text)
    with pytest.raises(CheckpointError) as caught, open_checkpoint(tmp_path) as checkpoint:
        checkpoint.tokenizer()
    assert f"{tmp_path / name} {says}" in str(caught.value)


def test_the_pointer_of_an_index_a_shard_or_a_gguf_is_named(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        folder = files(tmp_path / name, **{name.replace(".", "__"): POINTER})
        where = {"x": "model-00001-of-00002.safetensors"}
        (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
        index = folder / "model.safetensors.index.json"
        index.exists() or index.write_text(json.dumps({"weight_map": where}))
        assert "is a Git LFS pointer" in error_of(folder)
    assert "is a Git LFS pointer" in error_of(files(tmp_path / "g", m__gguf=POINTER) / "m.gguf")
    assert "is a Git LFS pointer" in error_of(tmp_path / "g")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        gemlax.load_tokenizer(files(tmp_path / "t", tokenizer__json=POINTER))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_the_pointer_of_an_adapter_is_named(tmp_path, name):
    said = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    folder = files(tmp_path, adapter_config__json=said, adapter_model__safetensors="x")
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer"):
        gemlax.adapters.read_folder(folder, CONFIG.text)


# Folders and files that are something else.


def test_an_adapter_names_its_base_and_how_to_load_both(tmp_path):
    said = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-1b-it"})
    folder = files(tmp_path / "lora", adapter_config__json=said, adapter_model__safetensors="x")
    message = (
        f"{folder} is an adapter of google/gemma-3-1b-it, not a model; load the base and the "
        f"adapter: gemlax.load('google/gemma-3-1b-it', adapters='{folder}'), or --model "
        f"google/gemma-3-1b-it --adapter {folder}"
    )
    for given in (folder, folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        assert error_of(given) == message
    for text in ("{}", "[", '{"base_model_name_or_path": null}', "[" * 9000):
        (folder / "adapter_config.json").write_text(text)
        assert "is an adapter, not a model; load the base" in error_of(folder)


@pytest.mark.parametrize(
    "names",
    [
        [
            "checkpoint-500/model.safetensors",
            "checkpoint-1000/model.safetensors",
            "trainer_state.json",
        ],
        ["500/default/_METADATA", "1000/default/_METADATA"],
    ],
)
def test_a_run_names_its_sub_folders_the_last_one_first(tmp_path, names):
    for name in names:
        files(tmp_path / Path(name).parent, **{Path(name).name.replace(".", "__"): "{}"})
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path} has no model of its own; give one of the folders in it")
    if "checkpoint" in names[0]:
        assert message.index("checkpoint-1000") < message.index("checkpoint-500")


def test_a_folder_with_the_model_one_deeper_names_it(tmp_path):
    toy(tmp_path / "gemma")
    assert error_of(tmp_path).endswith(f"give the folder in it: {tmp_path / 'gemma'}")
    deep = tmp_path / "hub" / "models--google--gemma-3-1b-it" / "snapshots" / "abc"
    toy(files(deep))
    assert str(deep) in error_of(deep.parent.parent)


def test_a_tuning_runs_folder_names_its_result(tmp_path):
    run = files(tmp_path / "run", run__json="{}", log__jsonl="")
    files(run / "checkpoints" / "12", _METADATA="{}")
    files(run / "adapter", adapter_config__json="{}", adapter_model__safetensors="x")
    assert error_of(run).endswith(f"give the folder in it: {run / 'adapter'}")
    assert "is a checkpoint inside a tuning run, for `gemlax tune --resume`" in error_of(
        run / "checkpoints" / "12"
    )


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["optimizer.pt", "trainer_state.json"], "is of a training run and holds no weights"),
        (["tokenizer.json", "tokenizer_config.json"], "holds a tokenizer (tokenizer.json, "),
        (["config.json", "tokenizer.json"], "has no weights: the model is not downloaded complet"),
        (["config.json", "pytorch_model.bin"], "its weights are PyTorch's (pytorch_model.bin)"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "are PyTorch's"),
        (["config.json", "flax_model.msgpack"], "holds flax_model.msgpack, a Flax file (msgpack)"),
        (["model.weights.h5"], "holds model.weights.h5, a Keras (HDF5) file, which is not read"),
        (["gemma3-1b-it-int4.task"], "holds gemma3-1b-it-int4.task, a MediaPipe bundle"),
        (["model.onnx"], "holds model.onnx, an ONNX file"),
        (["README.md"], "is no checkpoint: it holds README.md; expected a Hugging Face folder"),
        (["model.safetensors"], "has .safetensors files but no config.json"),
    ],
)
def test_a_folder_without_a_model_says_what_it_holds(tmp_path, names, says):
    files(tmp_path, **{name.replace(".", "__"): "x" for name in names})
    assert says in error_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "start", "says"),
    [
        ("pytorch_model.bin", b"PK\3\4", "is a PyTorch file (pickle), which is not read"),
        ("model.pth", b"\x80\2", "is a PyTorch file (pickle), which is not read"),
        ("weights", b"\x80\4\x95", "is a pickle, which is not read"),
        ("weights.data", b"\x89HDF\r\n\x1a\n", "is a Keras (HDF5) file"),
        ("gemma.litertlm", b"LITERTLM", "is a LiteRT-LM file"),
        ("model", b"\x1c\0\0\0TFL3", "is a LiteRT file"),
        ("model.mlmodel", b"x", "is a Core ML file"),
        ("ggml-model.bin.old", b"tjgg", "is a GGML file, from before GGUF"),
        ("gemma3-4b-it-sfp.sbs", b"SBS", "is a file of gemma.cpp"),
        ("gemma.tar.gz", b"\x1f\x8b", "is an archive; unpack it"),
        ("model.safetensors.incomplete", b"x", "is a download that did not end"),
        ("notes.txt", b"hello", "begins with b'hell'; expected a Hugging Face folder"),
        ("train.json", b"[{}]", "begins with b'[{}]'; expected a Hugging Face folder"),
    ],
)
def test_a_file_of_another_program_says_what_it_is(tmp_path, name, start, says):
    (tmp_path / name).write_bytes(start + bytes(16))
    assert says in error_of(tmp_path / name)


def test_a_cache_without_the_weights_says_how_to_fetch_them(tmp_path):
    snapshot = tmp_path / "models--google--gemma-3-1b-it" / "snapshots" / "abc"
    files(snapshot, config__json="{}")
    wanted = "fetch it with: hf download google/gemma-3-1b-it"
    assert error_of(snapshot).endswith(wanted)
    (snapshot / "model.safetensors").symlink_to(snapshot / "gone")  # a download that was cut off
    assert error_of(snapshot).endswith(wanted)


# What stands for a model.


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_of_a_models_folder_stands_for_the_folder(tmp_path, name):
    path = toy(tmp_path) / name
    path.exists() or path.write_text("{}")
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == CONFIG


# `info` and `load`.

INPUTS = {
    "folder": toy,
    "a file of it": lambda folder: toy(folder) / "config.json",
    "gguf": lambda folder: write_gguf(folder / "m", gguf_tensors(WEIGHTS)),
    "folder of one gguf": lambda folder: (
        write_gguf(folder / "m.gguf", gguf_tensors(WEIGHTS)).parent
    ),
    "parts": lambda folder: write_gguf(folder / "m.gguf", gguf_tensors(WEIGHTS), split=40),
    "gone": lambda folder: folder / "gone",
    "empty": lambda folder: folder,
    "pointer": lambda folder: files(folder, config__json="{}", model__safetensors=POINTER),
    "tokenizer": lambda folder: files(toy(folder), tokenizer__json=POINTER),
    "missing": lambda folder: write_hf(folder, {"norm.weight": WEIGHTS["norm.weight"]}),
    "types": lambda folder: write_hf(
        folder, {n: w.astype(np.int16) if "mlp" in n else w for n, w in WEIGHTS.items()}
    ),
    "prefix": lambda folder: write_hf(folder, WEIGHTS, prefix="_orig_mod.model."),
    "vocabulary": lambda folder: write_gguf(
        folder / "m.gguf", gguf_tensors(WEIGHTS), extra={"tokenizer.ggml.scores": ["a"]}
    ),
    "two": lambda folder: files(folder, a__gguf="x", b__gguf="x"),
}


def message_of(action) -> str | None:
    try:
        action()
    except (Error, OSError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", INPUTS)
def test_info_reads_what_load_reads_and_refuses_what_it_refuses(
    tmp_path, monkeypatch, capsys, name
):
    path = INPUTS[name](tmp_path)
    monkeypatch.setattr(gemlax.model, "build_decoder", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(gemlax.model.lora, "put_folders", lambda *_: None)
    monkeypatch.setattr(gemlax.model, "Model", lambda *_, **__: None)
    expected = message_of(lambda: gemlax.load(str(path)))
    status = cli.main(["info", str(path), "--json"])
    out, err = capsys.readouterr()
    if expected is None:
        assert (status, json.loads(out)["layers"], err) == (0, 7, "")
    else:
        assert (status, out, err) == (1, "", f"gemlax: {expected}\n")
    assert (expected is None) == (name in list(INPUTS)[:5])


# What is wrong is said before the weights are read.


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapters": "/no/such"}, "no adapter at /no/such"),
        ({"dtype": "float16"}, "activations overflow float16"),
        ({"dtype": "bf17"}, "dtype must be float32, bfloat16 or 'auto', got 'bf17'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_weight_is_read(tmp_path, given, says):
    seen = []
    with pytest.raises((gemlax.Error, FileNotFoundError), match=says):
        gemlax.load(toy(tmp_path), progress=lambda *done: seen.append(done), **given)
    assert not seen


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", jnp.bfloat16, "torch.bfloat16"])
def test_a_dtype_has_all_its_names(tmp_path, dtype):
    assert gemlax.load(toy(tmp_path), dtype=dtype).dtype == "bfloat16"


def test_a_model_whose_folder_is_gone_is_saved_with_its_vocabulary(tmp_path, caplog):
    source = toy(tmp_path / "source")
    whole = write_gguf(tmp_path / "m.gguf", gguf_tensors(WEIGHTS))
    gemlax.load_tokenizer(whole).save(source)
    model = gemlax.load(source, dtype="auto")
    ids = model.tokenizer.encode("ab <bos>", parse_special=True)
    shutil.rmtree(source)
    gemlax.save(model, tmp_path / "saved")
    assert "tokenizer.json, tokenizer_config.json cannot be copied" in caplog.text
    saved = gemlax.load_tokenizer(tmp_path / "saved")
    assert saved.encode("ab <bos>", parse_special=True) == ids
    assert saved.special_ids == model.tokenizer.special_ids
