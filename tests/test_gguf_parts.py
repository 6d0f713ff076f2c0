"""GGUF models as people have them: in parts, alone in a folder, beside others, from ollama."""

import json
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from disk import (
    CONFIG,
    GEMMA4,
    assert_same_bits,
    gguf_tensors,
    random_weights,
    read_all,
    write_gguf,
)

import gemlax
from gemlax.checkpoints import find, open_checkpoint
from gemlax.errors import CheckpointError, Error, UnsupportedError

ONE = np.float32(1)
WEIGHTS = random_weights()
# A norm is stored plus one.
EXPECTED = {n: (w + ONE) - ONE if n.endswith("norm.weight") else w for n, w in WEIGHTS.items()}


def write_split(folder: Path, weights=None, name: str = "toy.gguf", **options) -> list[Path]:
    """Write a model in parts, as the gguf package splits one, and return them."""
    folder.mkdir(exist_ok=True)
    tensors = gguf_tensors(WEIGHTS if weights is None else weights)
    write_gguf(folder / name, tensors, split=40, **options)
    parts = sorted(folder.glob(f"{Path(name).stem}-0*.gguf"))
    assert len(parts) == 3
    return parts


def altered(path: Path, key: bytes, code: str, value: int) -> None:
    """Write another value of a key into a file."""
    data = path.read_bytes()
    at = data.index(key) + len(key) + 4
    layout = struct.Struct(code)
    path.write_bytes(data[:at] + layout.pack(value) + data[at + layout.size :])


@pytest.mark.parametrize("given", [0, 1, 2, "folder"])
def test_a_split_model_is_read_from_any_part_and_from_its_folder(tmp_path, given):
    parts = write_split(tmp_path / "m")
    with open_checkpoint(tmp_path / "m" if given == "folder" else parts[given]) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == CONFIG.text
        assert checkpoint.tokenizer().encode("ab") == [2, 259 + 4]
        assert_same_bits(read_all(checkpoint), EXPECTED)
    assert gemlax.load_tokenizer(tmp_path / "m").num_tokens == 512


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_another_part_than_the_table_is_compared_with_it(tmp_path, tied):
    tensors = gguf_tensors(WEIGHTS)
    tensors["output.weight"] = (WEIGHTS["embed_tokens.weight"] + (0 if tied else 1), None)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, split=40)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text.tie_word_embeddings == tied


def test_parts_that_are_missing_are_named_in_one_error(tmp_path):
    parts = write_split(tmp_path / "m")
    parts[0].unlink()
    parts[2].unlink()
    for given in (parts[1], tmp_path / "m"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(given)
        assert f"one of 3 parts, and 2 of them are not in {tmp_path / 'm'}" in str(caught.value)
        assert f"{parts[0].name}, {parts[2].name}; fetch them too" in str(caught.value)


def test_parts_by_other_names_are_told_how_to_be_named(tmp_path):
    parts = write_split(tmp_path / "m")
    other = parts[1].rename(tmp_path / "m" / "second.gguf")
    with pytest.raises(CheckpointError, match=r"one of 3 parts; .*NAME-00001-of-00003.gguf"):
        open_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"calls itself part 4 of 3"):
        open_checkpoint(parts[0].rename(tmp_path / "m" / "x-00004-of-00003.gguf"))


@pytest.mark.parametrize(
    ("key", "code", "value", "message"),
    [
        (b"split.no", "<H", 2, r"part 2 of 3 .*by its name it is part 1 of 3"),
        (b"split.count", "<H", 4, r"part 1 of 4 .*by its name it is part 1 of 3"),
        (b"split.tensors.count", "<i", 7, r"is of another model .*split.tensors.count"),
    ],
)
def test_a_part_that_contradicts_the_others_is_named(tmp_path, key, code, value, message):
    parts = write_split(tmp_path / "m")
    altered(parts[1], key, code, value)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(parts[0])


def test_parts_that_hold_too_few_tensors_or_one_twice_are_refused(tmp_path):
    parts = write_split(tmp_path / "m")
    for path in parts:
        altered(path, b"split.tensors.count", "<i", 94)
    with pytest.raises(CheckpointError, match=r"hold 94 tensors .*they hold 93"):
        open_checkpoint(parts[0])
    # The second part of another model, which begins at another tensor.
    other = write_gguf(tmp_path / "other.gguf", gguf_tensors(WEIGHTS), split=39)
    (tmp_path / other.name.replace("-00001", "-00002")).replace(parts[1])
    with pytest.raises(CheckpointError, match=r"which toy-00001-of-00003.gguf has, too|hold"):
        open_checkpoint(parts[0])


def test_the_parts_of_two_models_are_not_mixed(tmp_path):
    parts = write_split(tmp_path / "m")
    copy = parts[1].read_bytes()
    key = b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x06\0\0\0\0\0\0\0gemma4"
    counts = struct.unpack_from("<QQ", copy, 8)
    parts[1].write_bytes(copy[:8] + struct.pack("<QQ", counts[0], counts[1] + 1) + key + copy[24:])
    with pytest.raises(CheckpointError, match=r"of another model .*differ in general.architect"):
        open_checkpoint(parts[0])


def test_damaged_parts_never_raise_anything_but_errors_of_gemlax(tmp_path):
    parts = write_split(tmp_path / "m")
    whole = [path.read_bytes() for path in parts]
    rng = random.Random(0)
    refused, start = 0, time.monotonic()
    for case in range(150):
        number = rng.randrange(3)
        data = bytearray(whole[number])
        if case % 3:
            for _ in range(rng.choice([1, 2, 8])):
                at = rng.randrange(400 if number else 1200)
                data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 0xFF])
        else:
            del data[rng.randrange(len(data)) :]
        parts[number].write_bytes(data)
        try:
            with open_checkpoint(parts[rng.randrange(3)]) as checkpoint:
                checkpoint.check()
                checkpoint.tokenizer()
                read_all(checkpoint)
        except Error:
            refused += 1
        parts[number].write_bytes(whole[number])
    assert 75 < refused <= 150
    assert time.monotonic() - start < 60


# Folders.


def test_a_folder_with_one_model_is_that_model(tmp_path, caplog):
    path = write_gguf(tmp_path / "toy-Q8_0.gguf", gguf_tensors(WEIGHTS))
    (tmp_path / "mmproj-toy-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    with caplog.at_level("INFO", "gemlax"), open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.source == path
    assert "holds toy-Q8_0.gguf, which is read" in caplog.text


def test_of_several_models_one_must_be_chosen(tmp_path):
    for quant in ("Q4_K_M", "Q8_0"):
        write_gguf(tmp_path / f"toy-{quant}.gguf", gguf_tensors(WEIGHTS))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds 2 models: toy-Q4_K_M.gguf, toy-Q8_0.gguf; give the path of one"
    )
    assert find(f"{tmp_path}:q8_0") == tmp_path / "toy-Q8_0.gguf"
    with pytest.raises(FileNotFoundError, match=r"no .gguf models of .* are 'Q4_K'; there are"):
        find(f"{tmp_path}:Q4_K")


def test_what_lies_beside_a_model_is_not_one(tmp_path):
    write_gguf(tmp_path / "mmproj.gguf", {}, extra={"general.architecture": "clip"})
    with pytest.raises(CheckpointError, match=r"holds mmproj.gguf, which lies beside a model"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=r"holds the encoders of a multimodal model"):
        open_checkpoint(tmp_path / "mmproj.gguf")
    write_gguf(tmp_path / "lora.gguf", {}, extra={"general.type": "adapter"})
    with pytest.raises(UnsupportedError, match=r"is an adapter \(LoRA\) in GGUF"):
        open_checkpoint(tmp_path / "lora.gguf")


def test_a_file_that_was_cut_is_told_how_to_be_joined(tmp_path):
    for name in ("m.gguf-split-a", "m.gguf.part1of2", "m.gguf.aa"):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match=r"join the pieces in order: cat m.gguf\*"):
            open_checkpoint(tmp_path / name)


# ollama.


def test_a_blob_of_ollamas_is_known_by_its_first_bytes(tmp_path, caplog):
    tensors = gguf_tensors(WEIGHTS)
    for name in ("v.blk.0.attn_q.weight", "v.clamp_data", "mm.mm_input_projection.weight",
                 "mm.a.fc.weight", "a.blk.0.conv_dw.weight"):  # fmt: skip
        tensors[name] = (np.zeros((4, 4), np.float16), None)
    path = write_gguf(tmp_path / "sha256-1f3a", tensors)
    with caplog.at_level("INFO", "gemlax"), open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), EXPECTED)
    assert "left aside 5 tensors of other parts than the text decoder" in caplog.text
    assert gemlax.load_tokenizer(path).num_tokens == 512


@pytest.mark.parametrize("size", GEMMA4)
def test_encoders_in_the_file_of_a_gemma_4_are_left_aside(tmp_path, size):
    config = GEMMA4[size]
    tensors = gguf_tensors(random_weights(config), config)
    with open_checkpoint(write_gguf(tmp_path / "plain", tensors, config)) as checkpoint:
        expected = read_all(checkpoint)
    tensors["a.conv1d.0.weight"] = (np.zeros((2, 2, 2), np.float32), None)
    with open_checkpoint(write_gguf(tmp_path / "m", tensors, config)) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), expected)


def test_a_manifest_of_ollamas_names_its_blob(tmp_path):
    layers = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1f3a", "size": 1},
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:2", "size": 1},
    ]
    (tmp_path / "4b").write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    with pytest.raises(
        CheckpointError, match=r"ollama manifest; its model is the file sha256-1f3a"
    ):
        open_checkpoint(tmp_path / "4b")
    (tmp_path / "4b").write_text("[" * 10_000)
    with pytest.raises(CheckpointError, match=r"begins with b'\[\[\[\['"):
        open_checkpoint(tmp_path / "4b")
