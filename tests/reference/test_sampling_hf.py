"""What a generation_config does, by transformers and by gemlax: the logits, and whole answers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from adapters import build
from reference.toys import GEMMA_3, toy
from transformers.generation import logits_process as theirs

from gemlax import Model
from gemlax.generation.defaults import read_defaults
from gemlax.sampling import adjust, make_sampling

VOCAB, ROWS, WIDTH = 30, 6, 24
ENDS = [1, 7]
BAD = [[4], [5, 6], [7, 8, 9], [2, 3, 2], [1]]
BIAS = {(3,): 1.5, (5, 9): -2.0, (2, 2): 4.0}
# Name -> our settings, and transformers' processors for a prompt of so many tokens.
CASES = {
    "ngrams of 1": (
        {"no_repeat_ngram_size": 1},
        lambda n: [theirs.NoRepeatNGramLogitsProcessor(1)],
    ),
    "ngrams of 2": (
        {"no_repeat_ngram_size": 2},
        lambda n: [theirs.NoRepeatNGramLogitsProcessor(2)],
    ),
    "ngrams of 3": (
        {"no_repeat_ngram_size": 3},
        lambda n: [theirs.NoRepeatNGramLogitsProcessor(3)],
    ),
    "bad words": (
        {"sequence_bias": {tuple(word): -np.inf for word in BAD[:4]}},
        lambda n: [theirs.NoBadWordsLogitsProcessor(BAD, ENDS)],
    ),
    "least tokens": (
        {"forbidden_until": dict.fromkeys(ENDS, 3)},
        lambda n: [theirs.MinNewTokensLengthLogitsProcessor(n, 3, ENDS)],
    ),
    "begin": (
        {"forbidden_until": {9: 1, 4: 1}},
        lambda n: [theirs.SuppressTokensAtBeginLogitsProcessor([9, 4], n)],
    ),
    "all": (
        {
            "no_repeat_ngram_size": 2,
            "repetition_penalty": 1.7,
            "sequence_bias": BIAS | {tuple(word): -np.inf for word in BAD[:4]},
            "forbidden_until": {1: 3, 7: 3, 9: 1},
            "logit_bias": {11: -np.inf},
        },
        lambda n: [
            theirs.SequenceBiasLogitsProcessor([[list(ids), bias] for ids, bias in BIAS.items()]),
            theirs.RepetitionPenaltyLogitsProcessor(1.7),
            theirs.NoRepeatNGramLogitsProcessor(2),
            theirs.NoBadWordsLogitsProcessor(BAD, ENDS),
            theirs.MinNewTokensLengthLogitsProcessor(n, 3, ENDS),
            theirs.SuppressTokensLogitsProcessor([11]),
            theirs.SuppressTokensAtBeginLogitsProcessor([9], n),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_what_transformers_makes_of_them(case):
    ours, processors = CASES[case]
    random = np.random.default_rng(3)
    for _ in range(4):
        logits = random.standard_normal((ROWS, VOCAB)).astype(np.float32) * 3
        lengths = random.integers(1, WIDTH, ROWS)
        prompts = np.maximum(1, lengths - random.integers(0, 5, ROWS))
        history = random.integers(0, 10, (ROWS, WIDTH))  # few ids, so that much repeats
        history[np.arange(WIDTH)[None] >= lengths[:, None]] = VOCAB
        made = make_sampling(VOCAB, [0] * ROWS, **ours)
        ends = (jnp.asarray(x, jnp.int32) for x in (prompts, lengths))
        found = np.asarray(
            adjust(jnp.asarray(logits), made, jnp.asarray(history, jnp.int32), *ends)
        )
        for row in range(ROWS):
            ids = torch.tensor(history[row : row + 1, : lengths[row]])
            scores = torch.tensor(logits[row : row + 1])
            for processor in processors(int(prompts[row])):
                scores = processor(ids, scores)
            np.testing.assert_allclose(found[row], scores[0].numpy(), rtol=1e-5)


FILES = [
    {},
    {"repetition_penalty": 1.8},
    {"do_sample": False, "repetition_penalty": 1.8, "temperature": 0.3, "top_k": 3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"max_length": 9},
    {"max_new_tokens": 3},
    {"max_length": 40, "max_new_tokens": 4},
    {"do_sample": True, "top_k": 1, "repetition_penalty": 1.3},
]
PROMPT = [2, 10, 20, 30, 10, 20]


@pytest.fixture(scope="module")
def pair():
    """A toy in transformers, and the same weights here."""
    case = toy(GEMMA_3[0])
    case.reference.eval()
    return case, Model(case.config, build(case.config, case.weights, "index"))


def answer(pair, said):
    """What both say with a file: ours and theirs."""
    case, model = pair
    known = {"eos_token_id": 1, "pad_token_id": 0, **said}
    case.reference.generation_config = transformers.GenerationConfig(**known)
    limit = {} if {"max_length", "max_new_tokens"} & said.keys() else {"max_new_tokens": 6}
    ids = torch.tensor([PROMPT])
    found = case.reference.generate(ids, attention_mask=torch.ones_like(ids), **limit)
    model.generation_config = known
    return model.generate([PROMPT], **limit)[0].tokens, found[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("said", FILES, ids=str)
def test_a_file_gives_the_answer_that_transformers_gives(pair, said):
    ours, theirs = answer(pair, said)
    assert ours == theirs


def test_words_and_beginnings_that_a_file_forbids_are_those_of_transformers(pair):
    first, second, *_ = answer(pair, {})[0]
    for said in (
        {"bad_words_ids": [[first]]},
        {"bad_words_ids": [[first, second], [PROMPT[-1], 99]]},
        {"suppress_tokens": [first, second]},
        {"begin_suppress_tokens": [first]},
        {"eos_token_id": [first], "min_new_tokens": 4},
        {"eos_token_id": [first], "min_length": len(PROMPT) + 2},
        {"sequence_bias": [[[first], -3.0], [[first, second], -50.0]]},
    ):
        ours, theirs = answer(pair, said)
        assert ours == theirs, said


@pytest.mark.parametrize("said", [{}, {"top_k": None}, {"top_k": 0}, {"top_k": 7}], ids=str)
def test_top_k_of_a_file_that_samples_is_that_of_transformers(pair, said):
    case, _ = pair
    case.reference.generation_config = transformers.GenerationConfig(do_sample=True, **said)
    config, _ = case.reference._prepare_generation_config(None)
    ours = read_defaults({"do_sample": True, **said}, 512).sampling["top_k"]
    assert ours == config.top_k
