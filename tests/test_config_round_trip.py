"""What is written as config.json is read back equal, or is refused: any config, three families."""

import dataclasses
import json
import logging

import pytest
from configs import OUTER, configs
from hypothesis import given, settings

from gemlax import GemmaConfig, UnsupportedError, preset
from gemlax.config import RopeSpec


@settings(max_examples=300, deadline=None)
@given(configs())
def test_any_config_is_read_back_as_it_was_written(config):
    assert GemmaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@settings(max_examples=100, deadline=None)
@given(configs())
def test_a_multimodal_file_around_a_config_gives_it_as_well(config):
    text = config.to_hf()
    ids = {key: text.pop(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    outer = OUTER[text["model_type"]]
    whole = ids | {"model_type": outer, "text_config": text, "vision_config": {"hidden_size": 3}}
    if outer == "gemma3":  # such a model has no softcap
        capless = dataclasses.replace(config.text, final_logit_softcapping=None)
        config = dataclasses.replace(config, text=capless)
    assert GemmaConfig.from_hf(whole) == config


def test_a_file_written_for_gemma_3_has_the_older_keys_where_they_can_say_it():
    written = preset("gemma-3-4b").to_hf()
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_parameters" not in written


def changed(size: str, layer: int, **changes):
    """Return the config of a size with one layer changed."""
    config = preset(size)
    layers = list(config.text.layers)
    layers[layer] = dataclasses.replace(layers[layer], **changes)
    text = dataclasses.replace(config.text, layers=tuple(layers))
    return dataclasses.replace(config, text=text)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed("gemma-3-270m", 3, intermediate_size=7), "layers[3].intermediate_size 7"),
        (changed("gemma-3-270m", 0, attention_scale=0.5), "attention_scale"),
        (changed("gemma-3-270m", 5, head_dim=64), "layers[5].head_dim 64 would be read as 256"),
        (changed("gemma-3-1b", 1, window=64), "layers[1].window 64 would be read as 512"),
        (changed("gemma-4-31b", 4, rope=RopeSpec(5.0)), "layers[4].rope"),
        (changed("gemma-4-31b", 4, k_eq_v=True), "layers[4].k_eq_v True"),
        (changed("gemma-4-26b-a4b", 9, num_experts=0), "layers[9].num_experts 0"),
        (changed("gemma-4-e2b", 34, kind="sliding_attention", window=512), "layers[34].kind"),
        (changed("gemma-4-e4b", 2, owns_kv=False), "owns_kv"),
    ],
    ids=str,
)
def test_what_a_config_json_cannot_say_is_named(config, said):
    with pytest.raises(UnsupportedError, match=r"a config\.json cannot hold this config") as error:
        config.to_hf()
    assert said in str(error.value)


def test_writing_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    for size in ("gemma-3-27b", "gemma-4-e2b"):
        preset(size).to_hf()
    assert caplog.records == []
