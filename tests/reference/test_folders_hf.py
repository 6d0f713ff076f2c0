"""Folders as people have them: gemlax reads those that transformers reads, and the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import CONFIG, assert_same_bits, random_weights, read_all, write_hf
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from gemlax.checkpoints import open_checkpoint
from gemlax.errors import CheckpointError

WEIGHTS = random_weights()
NAMES = {f"model.{name}": weight for name, weight in WEIGHTS.items()}
TABLE, UP = "model.embed_tokens.weight", "model.layers.6.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shards(folder: Path, change) -> Path:
    """Write two shards and their index, changed; the second holds the last half."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    half = len(NAMES) // 2
    parts = dict(list(NAMES.items())[:half]), dict(list(NAMES.items())[half:])
    where = dict.fromkeys(parts[0], ONE) | dict.fromkeys(parts[1], TWO)
    change(where, *parts)
    for file, part in zip((ONE, TWO), parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def hf_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )


def check_both_read(folder: Path) -> None:
    model, info = hf_of(folder)
    assert not info["missing_keys"]
    state = model.state_dict()
    assert_same_bits({name: state[f"model.{name}"].numpy() for name in WEIGHTS}, WEIGHTS)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), WEIGHTS)


INDICES = {
    "a weight that it does not list": lambda where, one, two: where.pop(UP),
    "a weight that it lists in the other file": lambda where, one, two: where.update({UP: ONE}),
    "a head that no file has": lambda where, one, two: where.update({"lm_head.weight": TWO}),
    "a head that it does not list": lambda where, one, two: two.update(
        {"lm_head.weight": NAMES[TABLE]}
    ),
    "a vision tensor that it does not list": lambda where, one, two: one.update(
        {"model.vision_tower.x": np.zeros(4, np.float32)}
    ),
    "a weight that both files hold": lambda where, one, two: one.update({UP: NAMES[UP]}),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_a_list_of_files(name, tmp_path):
    check_both_read(shards(tmp_path / "m", INDICES[name]))


def test_one_file_stands_before_the_index_and_copies(tmp_path):
    folder = shards(tmp_path / "m", lambda *_: None)
    zeros = {name: np.zeros_like(weight) for name, weight in NAMES.items()}
    for file in (ONE, TWO, "consolidated.safetensors"):
        save_file(zeros, folder / file, metadata={"format": "pt"})
    check_both_read(write_hf(folder, WEIGHTS))


@pytest.mark.parametrize("prefix", ["model.", "", "model.model."])
def test_prefixes_that_transformers_reads_are_read(prefix, tmp_path):
    check_both_read(write_hf(tmp_path, WEIGHTS, prefix=prefix))


@pytest.mark.parametrize("prefix", ["_orig_mod.model.", "module.model.", "base_model.model.model."])
def test_prefixes_that_transformers_makes_random_numbers_of_are_refused(prefix, tmp_path):
    folder = write_hf(tmp_path, WEIGHTS, prefix=prefix)
    assert len(hf_of(folder)[1]["missing_keys"]) >= len(WEIGHTS)
    with pytest.raises(CheckpointError, match="begin with the prefix"):
        open_checkpoint(folder)


def test_buffers_and_float64_change_nothing(tmp_path):
    others = {
        "model.rotary_emb.inv_freq": np.ones(16, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
        "model.position_ids": np.arange(4),
    }
    wide = {name: weight.astype(np.float64) for name, weight in WEIGHTS.items()}
    check_both_read(write_hf(tmp_path, wide, others=others))
