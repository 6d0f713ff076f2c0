"""Gemma 3 against transformers with the same random weights: layers, logits, greedy decoding.

The toys keep each size's real layer pattern; prompts are ragged and up to three windows long.
"""

import adapters
import numpy as np
import pytest
from golden import hf, make_gemma3
from reference.decoding import check_decoding, check_greedy, check_same_until_a_tie
from reference.toys import GEMMA_3, check_golden_file, layer_errors, stacks, toy


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("size", GEMMA_3)
def test_each_layer_equals_transformers_on_its_own_input(size, layers):
    case = toy(size)
    errors = layer_errors(case, adapters.build(case.config, case.weights, layers))
    print(f"{size} {layers}: layers differ by at most {max(errors):.1e} std")
    assert len(errors) == case.hf_config["num_hidden_layers"]
    assert max(errors) <= adapters.LAYER, errors


@pytest.mark.parametrize(("size", "layers"), stacks(GEMMA_3, ("gemma-3-270m", "gemma-3-4b")))
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
    expected = hf.run(case.reference, tokens, lengths).logits
    decoder = adapters.build(case.config, case.weights)
    found = adapters.logits(decoder, tokens, lengths)
    assert np.abs(found - expected).max() <= adapters.LOGITS * expected.std()


@pytest.mark.parametrize("size", GEMMA_3)
def test_a_golden_file_is_what_transformers_computes_now(size):
    check_golden_file(toy(size), make_gemma3.golden(size))


# Each layout once; depth is what the other sizes add.
DECODED = (("gemma-3-270m", "unroll"), ("gemma-3-4b", "scan"))


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        *DECODED,
        *(
            pytest.param(size, "scan", marks=pytest.mark.slow)
            for size in GEMMA_3
            if (size, "scan") not in DECODED
        ),
    ],
)
def test_greedy_decoding_with_a_cache_gives_transformers_tokens(size, layers, monkeypatch):
    check_decoding(toy(size), layers, monkeypatch, cached=False)


def test_the_near_tie_rule_refuses_a_wrong_token():
    reference = np.array([[0.0, 1.0, 0.9999], [0.0, 1.0, 2.0]])
    assert check_greedy([2, 2], reference, noise=1e-4) == 1
    check_same_until_a_tie([2, 0], [1, 1], reference, noise=1e-4)
    with pytest.raises(AssertionError):
        check_greedy([1, 1], reference, noise=1e-4)
    for expected in ([1, 2], [1], [1, 1, 1]):
        with pytest.raises(AssertionError):
            check_same_until_a_tie([1, 1], expected, reference, noise=1e-4)
