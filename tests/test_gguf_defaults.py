"""What a GGUF file says of stopping, sampling and chatting is done, and goes along when saved."""

import json

import gguf
import numpy as np
import pytest
from disk import gguf_tensors, random_weights, write_gguf

from gemlax.checkpoints import convert, open_checkpoint
from gemlax.checkpoints.gguf_defaults import find_template, read_sampling, read_stops
from gemlax.errors import CheckpointError, UnsupportedError

HERE = "m.gguf"
TEMPLATE = gguf.Keys.Tokenizer.CHAT_TEMPLATE
S = gguf.Keys.General


def toy(folder, **extra):
    return write_gguf(folder / HERE, gguf_tensors(random_weights()), extra=extra)


@pytest.mark.parametrize(
    ("metadata", "stops"),
    [
        ({}, (1,)),
        ({gguf.Keys.Tokenizer.EOT_ID: 106}, (1, 106)),
        ({gguf.Keys.Tokenizer.EOM_ID: 50, gguf.Keys.Tokenizer.EOT_ID: 106}, (1, 106, 50)),
        ({gguf.Keys.Tokenizer.EOS_ID: 106, "tokenizer.ggml.eos_token_ids": [1, 106]}, (106, 1)),
        ({gguf.Keys.Tokenizer.EOT_ID: -1}, (1,)),
        ({gguf.Keys.Tokenizer.EOT_ID: 2**32 - 1}, (1,)),
    ],
)
def test_every_id_that_ends_a_text_is_a_stop(metadata, stops):
    named = {f"{key}": value for key, value in metadata.items()}
    assert read_stops(named, 512, HERE) == stops


@pytest.mark.parametrize("value", ["106", [1, "106"], 1.5, True])
def test_stops_that_are_no_ids_are_named(value):
    with pytest.raises(CheckpointError, match=r"eot_token_id must be an integer or a list"):
        read_stops({gguf.Keys.Tokenizer.EOT_ID: value}, 512, HERE)


@pytest.mark.parametrize(
    ("metadata", "settings"),
    [
        ({}, {}),
        ({S.SAMPLING_TEMP: float(np.float32(0.7)), S.SAMPLING_TOP_K: 64,
          S.SAMPLING_TOP_P: float(np.float32(0.95)), S.SAMPLING_MIN_P: 0.0},
         {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95, "min_p": 0.0}),
        ({S.SAMPLING_TEMP: 1.0}, {"do_sample": True, "temperature": 1.0, "top_k": 0}),
        ({S.SAMPLING_TOP_K: -1}, {"do_sample": True, "top_k": 0}),
        ({S.SAMPLING_TEMP: 0.0, S.SAMPLING_TOP_K: 40}, {"do_sample": False}),
        ({S.SAMPLING_PENALTY_REPEAT: 1.5}, {"repetition_penalty": 1.5}),
        ({S.SAMPLING_PENALTY_REPEAT: 1.5, S.SAMPLING_PENALTY_LAST_N: 0}, {}),
    ],
)  # fmt: skip
def test_sampling_defaults_are_those_of_generation_config(metadata, settings):
    assert read_sampling(metadata, HERE) == settings


def test_samplers_that_are_not_applied_are_named_once(caplog):
    idle = {S.SAMPLING_MIROSTAT: 0, S.SAMPLING_XTC_THRESHOLD: 0.1, S.SAMPLING_XTC_PROBABILITY: 0.0}
    read_sampling(idle, HERE)
    assert caplog.text == ""
    read_sampling({
        S.SAMPLING_MIROSTAT: 2, S.SAMPLING_SEQUENCE: "k;p", S.SAMPLING_TEMP: 1.0,
        S.SAMPLING_PENALTY_REPEAT: 1.1, S.SAMPLING_PENALTY_LAST_N: 64,
    }, HERE)  # fmt: skip
    (record,) = caplog.records
    assert record.getMessage() == (
        "m.gguf: general.sampling.* is not applied: mirostat = 2, sequence = k;p, "
        "penalty_last_n = 64"
    )


@pytest.mark.parametrize("value", ["hot", float("nan"), float("inf"), [1.0], True])
def test_a_setting_that_is_no_number_is_named(value):
    with pytest.raises(CheckpointError, match=r"sampling.temp must be a finite number"):
        read_sampling({S.SAMPLING_TEMP: value}, HERE)


@pytest.mark.parametrize(
    ("metadata", "template"),
    [
        ({}, None),
        ({TEMPLATE: " "}, None),
        (
            {TEMPLATE: "a", f"{TEMPLATE}.tool_use": "b", f"{TEMPLATE}s": ["tool_use"]},
            {"default": "a", "tool_use": "b"},
        ),
        ({f"{TEMPLATE}.chat": "b"}, "b"),
        ({f"{TEMPLATE}.rag": "b", f"{TEMPLATE}.default": "c"}, {"rag": "b", "default": "c"}),
        ({f"{TEMPLATE}.rag": "b", f"{TEMPLATE}.tool_use": "c"}, {"rag": "b", "tool_use": "c"}),
    ],
)
def test_templates_come_by_name_where_there_are_several(metadata, template):
    assert find_template(metadata, HERE) == template


def test_suppressed_ids_are_those_of_generation_config(tmp_path):
    path = toy(tmp_path, **{"tokenizer.ggml.suppress_tokens": [7, 2**31 - 1, 300]})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.generation_config == {"suppress_tokens": [7, 300]}


def test_all_of_it_goes_along_when_converted(tmp_path):
    path = toy(
        tmp_path,
        **{
            gguf.Keys.Tokenizer.EOT_ID: 300, "tokenizer.ggml.eos_token_ids": [1, 301],
            S.SAMPLING_TEMP: 0.5, S.SAMPLING_TOP_K: 64, f"{TEMPLATE}.chat": "{{ bos_token }}",
        },
    )  # fmt: skip
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.eos_token_id == (1, 301, 300)
        convert(checkpoint, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "generation_config.json").read_bytes()) == {
        "bos_token_id": 2, "eos_token_id": [1, 301, 300], "pad_token_id": 0,
        "temperature": 0.5, "top_k": 64, "do_sample": True,
    }  # fmt: skip
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.config.eos_token_id == (1, 301, 300)
        assert checkpoint.chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("key", ["add_eos_token", "add_space_prefix"])
def test_a_vocabulary_that_adds_to_every_text_is_refused(tmp_path, key):
    with open_checkpoint(toy(tmp_path, **{f"tokenizer.ggml.{key}": False})) as checkpoint:
        assert checkpoint.tokenizer() is not None
    with (
        open_checkpoint(toy(tmp_path, **{f"tokenizer.ggml.{key}": True})) as checkpoint,
        pytest.raises(UnsupportedError, match=rf"tokenizer.ggml.{key} is true"),
    ):
        checkpoint.tokenizer()


def test_what_a_file_says_of_bos_goes_along(tmp_path):
    with open_checkpoint(toy(tmp_path, **{"tokenizer.ggml.add_bos_token": False})) as checkpoint:
        assert not checkpoint.tokenizer().add_bos
        convert(checkpoint, tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert not checkpoint.tokenizer().add_bos
