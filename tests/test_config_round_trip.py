"""What is written as config.json is read back equal, or is refused: any config, three families."""

import dataclasses
import json
import logging

import pytest
from configs import OUTER, SLIDING, configs, files
from hypothesis import given

from gemlax import UnsupportedError, preset
from gemlax.config import from_hf


@given(configs())
def test_any_config_is_read_back_as_it_was_written(config):
    assert from_hf(json.loads(json.dumps(config.to_hf()))) == config


OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")


@given(configs())
def test_a_multimodal_file_around_a_config_gives_it_as_well(config):
    text = config.to_hf()
    ids = {key: text.pop(key) for key in OUTSIDE}
    outer = OUTER[text["model_type"]]
    whole = ids | {"model_type": outer, "text_config": text, "vision_config": {"hidden_size": 3}}
    if outer == "gemma3":  # such a model has no softcap
        capless = dataclasses.replace(config.text, final_logit_softcapping=None)
        config = dataclasses.replace(config, text=capless)
    assert from_hf(whole) == config


def test_a_file_written_for_gemma_3_has_the_older_keys_where_they_can_say_it():
    written = preset("gemma-3-4b").to_hf()
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_parameters" not in written


@given(files())
def test_what_is_written_says_what_the_file_said(file):
    written = from_hf(file).to_hf()
    same = file.keys() & written.keys() - {"num_global_key_value_heads", "eos_token_id"}
    same -= {"rope_parameters", "head_dim", "num_key_value_heads"}
    if SLIDING not in file["layer_types"]:
        same -= {"sliding_window"}
    assert {key: written[key] for key in same} == {key: file[key] for key in same}
    assert from_hf(written).to_hf() == written


def test_a_config_that_was_changed_by_hand_is_not_written():
    config = dataclasses.replace(preset("gemma-3-270m"), eos_token_id=(1, 106))
    with pytest.raises(UnsupportedError, match=r"from_hf\(config.to_hf\(\) \| \{key: value\}\)"):
        config.to_hf()
    assert from_hf(preset("gemma-3-270m").to_hf() | {"eos_token_id": [1, 106]}) == config


def test_what_to_hf_gives_can_be_changed_without_changing_the_config():
    config = preset("gemma-4-e2b")
    config.to_hf()["layer_types"].clear()
    assert from_hf(config.to_hf()) == config


def test_writing_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    for size in ("gemma-3-27b", "gemma-4-e2b"):
        preset(size).to_hf()
    assert caplog.records == []
