"""Gemma 3 against transformers with the same random weights: layers, logits, greedy decoding.

The toys keep each size's real layer pattern; prompts are ragged and up to three windows long.
"""

import adapters
import numpy as np
import pytest
import torch
from golden import make_gemma3
from golden.conditioned import valid_tokens
from reference.toys import SIZES, Toy, toy

import gemlax
from gemlax import ops

WINDOWS = 2
# A differing greedy token is a tie when the reference's logits are closer than this times noise.
NEAR_TIE = 4


def positions_of(case: Toy) -> np.ndarray:
    return np.where(case.valid, np.arange(case.valid.shape[1]), ops.EMPTY).astype(np.int32)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("size", SIZES)
def test_each_layer_equals_transformers_on_its_own_input(size, layers):
    case = toy(size)
    decoder = adapters.build(case.config, case.weights, layers)
    positions = positions_of(case)
    errors = []
    for i in range(len(case.config.text.layers)):
        found = adapters.layer_output(decoder, i, case.hidden[i], positions)[case.valid]
        expected = case.hidden[i + 1][case.valid]
        errors.append(float(np.abs(found - expected).max() / expected.std()))
    print(f"{size} {layers}: layers differ by at most {max(errors):.1e} std")
    assert len(errors) == case.hf_config["num_hidden_layers"]
    assert max(errors) <= adapters.LAYER, errors


@pytest.mark.parametrize("layers", ["scan", "index", "unroll"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_of_a_ragged_batch_equal_transformers(size, layers):
    case = toy(size)
    decoder = adapters.build(case.config, case.weights, layers)
    logits = adapters.logits(decoder, case.tokens, case.lengths)
    print(f"{size} {layers}: logits differ by {case.error(logits):.1e} std")
    assert case.error(logits) <= adapters.LOGITS
    assert np.isfinite(logits).all()  # a padding query sees nothing, and still is no NaN


@pytest.mark.parametrize("size", ["gemma-3-270m", "gemma-3-27b"])
def test_a_prompt_shorter_than_the_window_equals_transformers(size):
    case = toy(size)
    tokens, lengths = case.tokens[:1, :5], np.array([5], np.int32)
    expected = make_gemma3.run(case.reference, tokens, lengths).logits
    decoder = adapters.build(case.config, case.weights)
    found = adapters.logits(decoder, tokens, lengths)
    assert np.abs(found - expected).max() <= adapters.LOGITS * expected.std()


@pytest.mark.parametrize("size", SIZES)
def test_a_golden_file_is_what_transformers_computes_now(size):
    case = toy(size)
    new = make_gemma3.golden(size)
    with np.load(make_gemma3.path_of(size)) as old:
        assert set(new) == set(old)
        for name, value in new.items():
            if value.dtype == np.float32:
                scale = case.std if name.startswith("logits") else value.std()
                assert np.abs(old[name] - value).max() <= adapters.LAYER * scale, name
            else:
                np.testing.assert_array_equal(old[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("size", "layers"), [("gemma-3-270m", "unroll"), *((size, "scan") for size in SIZES)]
)
def test_greedy_decoding_with_a_cache_gives_transformers_tokens(size, layers, monkeypatch):
    case = toy(size)
    adapters.read_caches_in_blocks_of(32, monkeypatch)
    model = gemlax.Model(case.config, adapters.build(case.config, case.weights, layers))
    prompts = [row[:n].tolist() for row, n in zip(case.tokens, case.lengths, strict=True)]
    count = WINDOWS * case.hf_config["sliding_window"]
    found = model.generate(prompts, max_new_tokens=count, temperature=0.0, logprobs=0)
    # A row may meet the end token, as transformers' does; the others go on.
    lengths = [len(completion.tokens) for completion in found]
    assert lengths.count(count) >= 2
    references, noise = teacher_forced(case, model, prompts, [c.tokens for c in found])
    assert noise <= adapters.LOGITS * case.std
    ties, off = 0, 0.0
    for prompt, completion, reference in zip(prompts, found, references, strict=True):
        tokens = completion.tokens
        ties += check_greedy(tokens, reference, noise)
        expected = greedy(case.reference, prompt, count)
        check_same_until_a_tie(tokens, expected, reference, noise)
        logprobs = log_softmax(reference)[np.arange(len(tokens)), tokens]
        off = max(off, *np.abs([p.logprob for p in completion.logprobs] - logprobs))
    print(
        f"{size} {layers}: {ties} near ties in {sum(lengths)} tokens; noise "
        f"{noise / case.std:.1e} std; cached log-probabilities differ by {off / case.std:.1e} std"
    )
    # Both the logit and the normaliser may be off.
    assert off <= 2 * adapters.LOGITS * case.std


def teacher_forced(
    case: Toy, model: gemlax.Model, prompts: list[list[int]], outputs: list[list[int]]
) -> tuple[list[np.ndarray], float]:
    """Return transformers' logits that predict each output, and gemlax's distance from them.

    Neither uses a cache here.
    """
    rows = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    reference = make_gemma3.run(case.reference, ids, lengths).logits
    off = np.abs(np.asarray(model.logits(ids, lengths)) - reference)[valid_tokens(lengths)]
    steps = [slice(len(prompt) - 1, n - 1) for prompt, n in zip(prompts, lengths, strict=True)]
    return [reference[row, step] for row, step in enumerate(steps)], float(off.max())


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def check_greedy(tokens: list[int], reference: np.ndarray, noise: float) -> int:
    """Check that each token is the reference's arg-max or a near tie; return how many are ties."""
    gaps = reference.max(axis=-1) - reference[np.arange(len(tokens)), tokens]
    assert gaps.max() < NEAR_TIE * noise
    return int((gaps > 0).sum())


def check_same_until_a_tie(
    tokens: list[int], expected: list[int], reference: np.ndarray, noise: float
) -> None:
    """Check that two continuations are equal up to the first near tie of the reference."""
    for logits, token, other in zip(reference, tokens, expected, strict=False):
        if token != other:
            assert abs(logits[token] - logits[other]) < NEAR_TIE * noise
            return
    assert len(tokens) == len(expected)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_the_near_tie_rule_refuses_a_wrong_token():
    reference = np.array([[0.0, 1.0, 0.9999], [0.0, 1.0, 2.0]])
    assert check_greedy([2, 2], reference, noise=1e-4) == 1
    check_same_until_a_tie([2, 0], [1, 1], reference, noise=1e-4)
    with pytest.raises(AssertionError):
        check_greedy([1, 1], reference, noise=1e-4)
    for expected in ([1, 2], [1], [1, 1, 1]):
        with pytest.raises(AssertionError):
            check_same_until_a_tie([1, 1], expected, reference, noise=1e-4)
