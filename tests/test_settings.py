"""What a generation_config.json says: what applies, what is told, what is refused at load."""

import json
import logging

import pytest
from vocabularies import toy

from gemlax.errors import CheckpointError
from gemlax.generation.defaults import read_defaults, read_stop, tell

VOCAB = 298
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
          "no_repeat_ngram_size": 0}  # fmt: skip
SAMPLED = GREEDY | {"temperature": 1.0, "top_k": 50}


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
         GREEDY | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}),
        ({"do_sample": True}, SAMPLED),
        ({"do_sample": True, "temperature": None, "top_p": None}, SAMPLED),
        ({"do_sample": True, "top_k": 0}, SAMPLED | {"top_k": 0}),
        ({"do_sample": True, "top_k": -1}, SAMPLED | {"top_k": -1}),
        ({"do_sample": True, "top_k": 64.0, "top_p": 0}, SAMPLED | {"top_k": 64, "top_p": 0}),
        # A caller who samples gets what the file says of it.
        ({"top_k": 64, "top_p": 0.9, "min_p": 0.1},
         GREEDY | {"top_k": 64, "top_p": 0.9, "min_p": 0.1}),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_is_read_as_transformers_reads_it(said, want):
    assert read_defaults(said, VOCAB).sampling == want


NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0, "guidance_scale": 1.0, "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0, "forced_eos_token_id": None, "watermarking_config": None,
    "use_cache": True, "cache_implementation": "hybrid", "length_penalty": 2.0,
    "early_stopping": True, "transformers_version": "5.23.0", "_from_model_config": True,
    "pad_token_id": 0, "bos_token_id": 2, "output_scores": True, "constraints": [],
    "prompt_lookup_num_tokens": 4, "renormalize_logits": True, "bad_words_ids": None,
}  # fmt: skip


def told(caplog, said, tokenizer=None):
    with caplog.at_level(logging.INFO, logger="gemlax.generation.defaults"):
        tell(read_defaults(said, VOCAB), tokenizer, "some file")
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_what_changes_nothing_passes_without_a_word(caplog):
    assert told(caplog, NEUTRAL) == []


def test_what_is_not_applied_is_named_in_one_line(caplog):
    said = {"num_beams": 4, "typical_p": 0.9, "eta_cutoff": 1e-3, "guidance_scale": 0,
            "exponential_decay_length_penalty": [5, 1.1], "penalty_alpha": 0.6,
            "forced_eos_token_id": 0, "watermarking_config": {"bias": 2.5}}  # fmt: skip
    ((level, line),) = told(caplog, NEUTRAL | said)
    assert level == "WARNING" and line.startswith("some file: not applied")
    assert all(f"{name}={value!r}" in line for name, value in said.items())
    assert not set(NEUTRAL) - set(said) & set(line.replace("=", " ").split())


def test_what_transformers_does_not_know_is_told_in_a_line_of_its_own(caplog):
    ((level, line),) = told(caplog, {"presence": 1, "author": "me"})
    assert level == "INFO" and "author, presence" in line


def test_stop_strings_that_cannot_come_are_named(caplog):
    said = {"stop_strings": ["###", "<end_of_turn>", "a<end_of_turn>b"]}
    ((level, line),) = told(caplog, said, toy())
    assert level == "WARNING" and "stop_strings=['a<end_of_turn>b']" in line
    caplog.clear()
    assert "'###'" in told(caplog, said)[0][1]  # without a tokenizer there is no text


def test_a_stop_string_is_a_token_a_text_or_nothing_that_can_come():
    tokenizer = toy()
    assert read_stop("<end_of_turn>", tokenizer) == tokenizer.id_of("<end_of_turn>")
    assert read_stop("</b>\n", tokenizer) == "</b>\n"
    assert read_stop("<end_of_turn", tokenizer) == "<end_of_turn"
    for text in ("<end_of_turn>\n", "x<bos>", "<bos><eos>"):
        assert read_stop(text, tokenizer) is None


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"temperature": -1}, "temperature must be a finite number"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_k": -3}, "top_k must be an integer >= -1, got -3"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"do_sample": "yes"}, "do_sample must be true or false"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"max_length": -5}, "max_length"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"eos_token_id": [1.5]}, "eos_token_id"),
        ({"eos_token_id": "1"}, "eos_token_id"),
        ({"suppress_tokens": {"1": 2}}, "suppress_tokens"),
        ({"bad_words_ids": [1, 2]}, "bad_words_ids must be lists of token ids"),
        ({"bad_words_ids": [[]]}, "none empty"),
        ({"bad_words_ids": [[5], [VOCAB]]}, f"bad_words_ids: id {VOCAB} is outside"),
        ({"sequence_bias": {"5": 1.0}}, "sequence_bias must be a list of [ids, bias]"),
        ({"sequence_bias": [[[5], None]]}, "sequence_bias"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be non-empty strings"),
        ({"stop_strings": 3}, "stop_strings"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_file(said, named):
    with pytest.raises(CheckpointError) as error:
        read_defaults(json.loads(json.dumps(said)), VOCAB, "folder/generation_config.json")
    assert str(error.value).startswith("folder/generation_config.json: ")
    assert named in str(error.value)
