"""Configs at work: what a key changes in the weights' folder, in a request and in training."""

import json

import numpy as np
import pytest
from disk import CONFIG, gemma4, random_weights, write_hf
from vocabularies import chat_tokenizer

import gemlax
from gemlax.config import from_hf
from gemlax.errors import RequestError
from gemlax.tune import train

KINDS = ["sliding_attention", "full_attention"]
SMALL = gemma4("e2b", num_hidden_layers=2, num_kv_shared_layers=0, layer_types=KINDS).to_hf()
LENGTH = 500  # of the per-layer table; the vocabulary has 512


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> gemlax.Model:
    """A Gemma 4 whose vocabulary was grown, and its table of per-layer embeddings was not."""
    config = SMALL | {"vocab_size_per_layer_input": LENGTH}
    weights = random_weights(from_hf(config))
    folder = tmp_path_factory.mktemp("grown")
    return gemlax.load(write_hf(folder, weights, config=config))


@pytest.mark.parametrize("call", ["generate", "logits", "score"])
def test_an_id_without_a_per_layer_embedding_is_refused(grown, call):
    with pytest.raises(RequestError, match="token id 505 has no per-layer embedding"):
        getattr(grown, call)([[2, 505, 10]])


def test_ids_within_the_per_layer_table_work_and_no_other_is_generated(grown):
    assert grown.programs.num_tokens == LENGTH
    assert np.isfinite(np.asarray(grown.logits([[2, LENGTH - 1, 10]]))).all()


def test_an_example_without_a_per_layer_embedding_is_not_trained_on(grown, tmp_path):
    config = from_hf(SMALL | {"vocab_size_per_layer_input": 10})
    model = gemlax.Model(config, grown.decoder, chat_tokenizer("gemma4"))
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    with pytest.raises(RequestError, match=r"data\.jsonl: token id \d+ has no per-layer"):
        train(model, tmp_path / "data.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0,
                                                "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 8.0,
                                                "partial_rotary_factor": 0.25,
                                                "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "linear", "factor": 2.0,
                                                   "rope_theta": 1e4}}},
        {"final_logit_softcapping": 5.0},
    ],
    ids=["linear", "proportional", "softcap"],
)  # fmt: skip
def test_a_saved_model_has_the_config_it_was_loaded_with(change, tmp_path):
    config = SMALL | change
    weights = random_weights(from_hf(config))
    model = gemlax.load(write_hf(tmp_path / "theirs", weights, config=config))
    gemlax.save(model, tmp_path / "ours")
    assert gemlax.load(tmp_path / "ours").config == model.config == from_hf(config)


def test_an_empty_quantization_config_says_that_nothing_is_quantised(tmp_path):
    for empty in ({}, None):
        config = CONFIG.to_hf() | {"quantization_config": empty}
        folder = write_hf(tmp_path / "model", random_weights(), config=config)
        assert gemlax.load(folder).config == CONFIG
