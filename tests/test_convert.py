"""`gemlax convert`: any checkpoint into a folder, bit for bit or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from disk import (
    BFLOAT16,
    CONFIG,
    GEMMA4,
    assert_same_bits,
    gguf_tensors,
    random_weights,
    read_all,
    write_gguf,
    write_hf,
)
from orbax_trees import flat_tree, flat_tree_of_gemma4
from orbax_trees import write as write_orbax

from gemlax import checkpoints, cli
from gemlax.checkpoints import Checkpoint, convert, open_checkpoint
from gemlax.errors import RequestError

MAIN = "import sys; from gemlax.cli import main; sys.exit(main())"
E2B, MOE = GEMMA4["e2b"], GEMMA4["26b-a4b"]
F32 = np.dtype(np.float32)


def run(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def fails(capsys, *arguments: object) -> str:
    """Run a command that must fail, and return its one line of error."""
    assert run(*arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gemlax: ")
    assert err.count("\n") == 1
    return err


def assert_holds(folder: Path, config, weights, dtype) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == config
        assert checkpoint.stored_dtype == np.dtype(dtype).name
        assert_same_bits(read_all(checkpoint, dtype), weights)


@pytest.mark.parametrize("size", GEMMA4)
def test_a_gguf_becomes_a_folder_bit_for_bit(tmp_path, capsys, size):
    config = GEMMA4[size]
    weights = random_weights(config)
    path = write_gguf(tmp_path / "m.gguf", gguf_tensors(weights, config), config)
    with open_checkpoint(path) as checkpoint:
        read, tokenizer = checkpoint.config, checkpoint.tokenizer()
    assert run(path, tmp_path / "m") == 0
    assert_holds(tmp_path / "m", read, weights, F32)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.tokenizer().encode("ab aé") == tokenizer.encode("ab aé")
        assert checkpoint.generation_config == {
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        }  # fmt: skip
    count = sum(weight.size for weight in weights.values())
    assert capsys.readouterr() == (f"{tmp_path / 'm'}: {count:,} parameters in float32\n", "")


@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_the_chat_template_comes_along(tmp_path, form):
    template = "{{ bos_token }}é"
    if form == "gguf":
        extra = {"tokenizer.chat_template": template}
        source = write_gguf(tmp_path / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    else:
        source = write_hf(tmp_path / "source", random_weights())
        (source / "chat_template.jinja").write_text(template, "utf-8")
    assert run(source, tmp_path / "m") == 0
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.chat_template == template


@pytest.mark.parametrize("size", ["gemma-3", "26b-a4b"])
def test_an_orbax_folder_becomes_a_folder_bit_for_bit(tmp_path, size):
    pytest.importorskip("orbax.checkpoint")
    config = GEMMA4.get(size, CONFIG)
    weights = random_weights(config, BFLOAT16)
    tree = flat_tree_of_gemma4(weights, config) if size in GEMMA4 else flat_tree(weights)
    folder = write_orbax(tmp_path / "orbax", tree)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    assert run(folder, tmp_path / "m") == 0
    assert_holds(tmp_path / "m", config, weights, BFLOAT16)


def test_there_and_back_changes_no_bit_and_says_what_it_did(tmp_path, capsys):
    weights = random_weights(E2B, BFLOAT16)
    source = write_hf(tmp_path / "source", weights, config=E2B.to_hf())
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 106], "top_k": 64}')
    assert run(source, tmp_path / "wide", "--dtype", "float32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    count = sum(weight.size for weight in weights.values())
    assert found.pop("seconds") > 0
    assert found == {
        "source": str(source), "target": str(tmp_path / "wide"), "dtype": "float32",
        "tensors": len(weights), "parameters": count, "nbytes": 4 * count, "tokenizer": False,
    }  # fmt: skip
    wide = {name: weight.astype(F32) for name, weight in weights.items()}
    assert_holds(tmp_path / "wide", E2B, wide, F32)
    assert run(tmp_path / "wide", tmp_path / "back", "--dtype", "bfloat16") == 0
    assert capsys.readouterr().out.endswith("in bfloat16, no tokenizer\n")
    assert_holds(tmp_path / "back", E2B, weights, BFLOAT16)
    with open_checkpoint(tmp_path / "back") as checkpoint:
        assert checkpoint.generation_config["eos_token_id"] == [1, 106]
        assert checkpoint.generation_config["top_k"] == 64


@pytest.mark.parametrize(
    ("stored", "kept"), [(F32, F32), (BFLOAT16, BFLOAT16), (np.dtype(np.float16), F32)], ids=str
)
def test_without_a_dtype_no_value_is_rounded(tmp_path, stored, kept):
    weights = random_weights(dtype=stored)
    assert run(write_hf(tmp_path / "source", weights), tmp_path / "m") == 0
    expected = {name: weight.astype(kept) for name, weight in weights.items()}
    assert_holds(tmp_path / "m", CONFIG, expected, kept)


def test_one_weight_at_a_time_is_read_and_counted(tmp_path, monkeypatch):
    told, order = [], []
    read, append = Checkpoint.read, checkpoints.save._Shard.append
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, out: order.append(name) or read(self, name, out)
    )
    monkeypatch.setattr(
        checkpoints.save._Shard,
        "append",
        lambda self, name, array: order.append(name) or append(self, name, array),
    )
    weights = random_weights()
    with open_checkpoint(write_hf(tmp_path / "source", weights)) as source:
        convert(source, tmp_path / "m", progress=lambda *now: told.append(now))
    assert order == [name for own in weights for name in (own, f"model.{own}")]
    total = sum(weight.nbytes for weight in weights.values())
    done = np.cumsum([weight.nbytes for weight in weights.values()])
    assert told == [(now, total) for now in done]


def test_a_target_that_is_there_is_kept_unless_overwritten(tmp_path, capsys):
    first, second = random_weights(), random_weights(seed=1)
    source = write_hf(tmp_path / "source", second)
    target = write_hf(tmp_path / "m", first)
    assert "is not empty; pass --overwrite to replace it" in fails(capsys, source, target)
    assert_holds(target, CONFIG, first, F32)
    assert run(source, target, "--overwrite") == 0
    assert_holds(target, CONFIG, second, F32)
    assert run(target, target, "--overwrite", "--dtype", "bfloat16") == 0
    rounded = {name: weight.astype(BFLOAT16) for name, weight in second.items()}
    assert_holds(target, CONFIG, rounded, BFLOAT16)
    capsys.readouterr()
    (target / "config.json").unlink()
    assert "no config.json, so it is not just a model" in fails(
        capsys, source, target, "--overwrite"
    )
    assert (target / "model.safetensors").exists()


def test_a_source_that_cannot_be_read_is_one_line(tmp_path, capsys):
    target = tmp_path / "m"
    assert "no model at 'gemma-5'" in fails(capsys, "gemma-5", target)
    assert "it is empty" in fails(capsys, tmp_path, target)
    (tmp_path / "text").write_text("hello")
    assert "begins with b'hell'" in fails(capsys, tmp_path / "text", target)
    drafter = write_hf(tmp_path / "drafter", {}, config={"model_type": "gemma4_assistant"})
    assert "is a drafter" in fails(capsys, drafter, target)
    nowhere = tmp_path / "no" / "m"
    source = write_hf(tmp_path / "source", random_weights())
    assert "cannot save the checkpoint: No such file" in fails(capsys, source, nowhere)
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_source_is_told_before_anything_is_written(tmp_path, monkeypatch):
    weights = random_weights()
    del weights["norm.weight"]
    monkeypatch.setattr(Checkpoint, "read", None)
    with (
        open_checkpoint(write_hf(tmp_path / "source", weights)) as source,
        pytest.raises(ValueError, match=r"missing: model.norm.weight"),
    ):
        convert(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_dtype_is_refused(tmp_path, capsys):
    source = write_hf(tmp_path / "source", random_weights())
    with pytest.raises(SystemExit, match="2"):
        run(source, tmp_path / "m", "--dtype", "float16")
    assert "invalid choice: 'float16'" in capsys.readouterr().err
    with open_checkpoint(source) as opened, pytest.raises(RequestError, match="got 'float16'"):
        convert(opened, tmp_path / "m", dtype="float16")


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    out = capsys.readouterr().out
    assert "gemlax convert gemma-4-26b-a4b.gguf gemma-4-26b-a4b/ --dtype bfloat16" in out


LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1)); {MAIN}"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    source = write_hf(tmp_path / "source", random_weights())
    before = sorted(path.name for path in tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, "convert", str(source), str(tmp_path / "m")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    line = f"gemlax: {tmp_path / 'm'}: cannot save the checkpoint: File too large\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
