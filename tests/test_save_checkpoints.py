"""Saving a Hugging Face folder: all of it or nothing. The oracle is the safetensors package."""

import errno
import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from disk import BFLOAT16, CONFIG, assert_same_bits, random_weights, read_all
from safetensors import safe_open
from safetensors.numpy import load_file

from gemlax.checkpoints import open_checkpoint, save_safetensors
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError
from gemlax.names import text_weights

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
DTYPES = (F32, F16, BFLOAT16)
TABLE, NORM = "embed_tokens.weight", "norm.weight"
Q = "layers.3.self_attn.q_proj.weight"


def save(folder: Path, weights, config: GemmaConfig = CONFIG, **options) -> None:
    items = weights.items() if isinstance(weights, dict) else weights
    save_safetensors(folder, config, items, generation_config={}, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_saved_is_read_bit_for_bit(tmp_path, dtype):
    weights = random_weights(dtype=dtype)
    save_safetensors(
        tmp_path / "m",
        CONFIG,
        reversed(list(weights.items())),  # in any order
        generation_config={"eos_token_id": [1, 106]},
        write_tokenizer=lambda folder: (folder / "tokenizer.txt").write_text("x") and None,
    )
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.check()
        assert checkpoint.config == CONFIG
        assert checkpoint.stored_dtype == dtype.name
        assert checkpoint.generation_config == {"eos_token_id": [1, 106]}
        assert_same_bits(read_all(checkpoint, dtype), weights)
    # And by the package, with what transformers asks for.
    path = tmp_path / "m" / "model.safetensors"
    assert_same_bits(load_file(path), {f"model.{n}": w for n, w in reversed(weights.items())})
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == dtype.name
    assert (tmp_path / "m/tokenizer.txt").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_dtypes_may_differ_within_a_file(tmp_path):
    weights = random_weights(dtype=BFLOAT16)
    weights |= {n: w.astype(F32) for n, w in weights.items() if n.endswith("norm.weight")}
    save(tmp_path / "m", weights)
    found = load_file(tmp_path / "m/model.safetensors")
    assert_same_bits(found, {f"model.{n}": w for n, w in weights.items()})
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    assert not (tmp_path / "m/generation_config.json").exists()


def test_shards_keep_to_their_size(tmp_path):
    weights, limit = random_weights(), 300_000
    save(tmp_path / "m", weights, max_shard_bytes=limit)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    total = sum(w.nbytes for w in weights.values())
    assert index["metadata"] == {"total_size": total}
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    count = len(files)
    assert total // limit < count <= 2 * total // limit
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    found = {}
    for file in files:
        tensors = load_file(tmp_path / "m" / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    assert_same_bits(dict(sorted(found.items())), dict(sorted(
        (f"model.{n}", w) for n, w in weights.items())))  # fmt: skip
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)


def test_arrays_that_are_not_contiguous_are_saved_right(tmp_path):
    weights = random_weights()
    save(tmp_path / "m", weights | {Q: np.asfortranarray(weights[Q])})
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_same_bits(read_all(checkpoint), weights)


def test_one_weight_at_a_time_is_held(tmp_path):
    alive = []

    def stream():
        for name, shape in text_weights(CONFIG.text).items():
            assert not [ref for ref in alive if ref() is not None]
            array = np.zeros(shape, F32)
            alive.append(weakref.ref(array))
            yield name, array
            del array

    save(tmp_path / "m", stream())
    assert len(alive) == 93


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    weights = random_weights()
    folder = tmp_path / "m"
    folder.mkdir()
    save(folder, weights)  # empty: fine
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"is not empty; pass overwrite=True"):
        save(folder, random_weights(seed=1))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="is a file"):
        save(folder / "config.json", weights, overwrite=True)


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path):
    folder = tmp_path / "m"
    save(folder, random_weights(), max_shard_bytes=300_000)
    weights = random_weights(seed=1)
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", weights, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with open_checkpoint(folder) as checkpoint:
        assert_same_bits(read_all(checkpoint), weights)
    (folder / "sub").mkdir()
    with pytest.raises(FileExistsError, match="it has a sub-folder"):
        save(folder, weights, overwrite=True)
    (folder / "sub").rmdir()
    (folder / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"no config.json"):
        save(folder, weights, overwrite=True)
    assert (folder / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "m"]


def test_a_model_may_be_saved_over_the_one_it_is_read_from(tmp_path):
    weights = random_weights()
    save(tmp_path / "m", weights)
    with open_checkpoint(tmp_path / "m") as source:

        def stream():
            for name, shape in text_weights(CONFIG.text).items():
                out = np.empty(shape, F32)
                source.read(name, out)
                yield name, out

        save(tmp_path / "m", stream(), overwrite=True)
        assert_same_bits(read_all(source), weights)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_same_bits(read_all(checkpoint), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(Q), rf"missing: {Q}"),
        (
            lambda w: w.update({Q: w[Q].T}),
            rf"cannot save '{Q}', float32 \[64, 128\]: expected \(128",
        ),
        (lambda w: w.update({Q: w[Q].astype(np.float64)}), r"float64 \[128, 64\]"),
        (lambda w: w.update({Q: w[Q].astype(np.int8)}), r"int8 \[128, 64\]"),
        (lambda w: w.update({"lm_head.weight": w[TABLE]}), r"'lm_head.weight', .*expected None"),
    ],
)
def test_a_part_of_a_model_is_not_saved(tmp_path, change, message):
    weights = random_weights()
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "m", weights)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="came twice"):
        save(tmp_path / "m", [(NORM, np.ones(64, F32))] * 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError, ValueError])
def test_a_failure_leaves_nothing_behind(tmp_path, kind):
    def stream():
        yield from list(random_weights().items())[:50]
        raise kind("broken")

    with pytest.raises(kind, match="broken"):
        save(tmp_path / "m", stream())
    assert not list(tmp_path.iterdir())
    save(tmp_path / "m", random_weights())
    with pytest.raises(kind, match="broken"):
        save(tmp_path / "m", stream(), overwrite=True)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_same_bits(read_all(checkpoint), random_weights())


def test_the_old_model_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    save(tmp_path / "m", random_weights())
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="cannot save the checkpoint: broken"):
        save(tmp_path / "m", random_weights(seed=1), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_same_bits(read_all(checkpoint), random_weights())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in ("gone", "file"):
        folder = tmp_path / parent / "m"
        with pytest.raises(OSError, match="cannot save the checkpoint: No") as caught:
            save(folder, random_weights())
        assert caught.value.filename == str(folder)
        assert "\n" not in str(caught.value)


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from disk import CONFIG, random_weights
from gemlax.checkpoints import save_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    save_safetensors(sys.argv[1], CONFIG, random_weights().items(), generation_config={})
except OSError as error:
    print(error.errno, error)
"""


@pytest.mark.parametrize("limit", [100, 50_000, 700_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path, limit):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "m"), str(Path(__file__).parent)]
    done = subprocess.run([*command, str(limit)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EFBIG} "), done.stderr
    assert done.stdout.count("\n") == 1
    assert "cannot save the checkpoint: File too large" in done.stdout
    assert str(tmp_path / "m") in done.stdout
    assert not list(tmp_path.iterdir())
