"""Gemma 4 against transformers with the same random weights: layers, logits, decoding.

The toys keep each size's real layer pattern, K/V sharing and experts; prompts are ragged and up
to three windows long.
"""

import adapters
import numpy as np
import pytest
from golden import hf, make_gemma4
from reference.decoding import check_decoding
from reference.toys import GEMMA_4, check_golden_file, layer_errors, stacks, toy

EDGE = ("gemma-4-e2b", "gemma-4-e4b")
DECODED = ("gemma-4-e2b", "gemma-4-26b-a4b", "gemma-4-31b")
# (owners, donor of the sliding layers, donor of the full layers)
DONORS = {"gemma-4-e2b": (15, 13, 14), "gemma-4-e4b": (24, 22, 23)}


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("size", GEMMA_4)
def test_each_layer_equals_transformers_on_its_own_inputs(size, layers):
    case = toy(size)
    errors = layer_errors(case, adapters.build(case.config, case.weights, layers))
    print(f"{size} {layers}: layers differ by at most {max(errors):.1e} std")
    assert len(errors) == case.hf_config["num_hidden_layers"]
    assert max(errors) <= adapters.LAYER, errors


@pytest.mark.parametrize("size", EDGE)
def test_per_layer_inputs_equal_transformers(size):
    case = toy(size)
    decoder = adapters.build(case.config, case.weights)
    found = adapters.per_layer_inputs(decoder, case.tokens)
    expected = np.stack(case.run.per_layer_inputs)
    error = np.abs(found - expected)[:, case.valid].max() / expected.std()
    print(f"{size}: per-layer inputs differ by {error:.1e} std")
    assert error <= adapters.LAYER


@pytest.mark.parametrize("size", EDGE)
def test_the_donors_are_the_last_layers_that_own_their_kind(size):
    case = toy(size)
    owners, sliding, full = DONORS[size]
    plan = case.config.text.plan
    kinds = {"sliding_attention": sliding, "full_attention": full}
    for i, spec in enumerate(case.config.text.layers):
        assert spec.owns_kv == (i < owners)
        assert plan.donor(i) == (i if i < owners else kinds[spec.kind])
    modes = case.reference.config.kv_sharing_modes
    assert [i for i, mode in enumerate(modes) if mode == "store"] == [sliding, full]


@pytest.mark.parametrize(("size", "layers"), stacks(GEMMA_4, ("gemma-4-e2b", "gemma-4-26b-a4b")))
def test_logits_of_a_ragged_batch_equal_transformers(size, layers):
    case = toy(size)
    decoder = adapters.build(case.config, case.weights, layers)
    logits = adapters.logits(decoder, case.tokens, case.lengths)
    left_out = 1 - case.clear[case.valid].mean()
    print(f"{size} {layers}: logits differ by {case.error(logits):.1e} std; {left_out:.1%} out")
    assert case.error(logits) <= adapters.LOGITS
    assert left_out < 0.01
    assert np.isfinite(logits).all()  # a padding query sees nothing, and still is no NaN


@pytest.mark.parametrize("size", GEMMA_4)
def test_a_golden_file_is_what_transformers_computes_now(size):
    check_golden_file(toy(size), make_gemma4.golden(size))


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        pytest.param("gemma-4-e2b", "unroll", marks=pytest.mark.slow),
        # Shared K/V, experts, and keys that are the values; the others have these layers too.
        *(
            pytest.param(size, "index", marks=() if size in DECODED else pytest.mark.slow)
            for size in GEMMA_4
        ),
    ],
)
def test_decoding_with_a_cache_equals_transformers(size, layers, monkeypatch):
    check_decoding(toy(size), layers, monkeypatch)


@pytest.mark.parametrize("size", EDGE)
def test_sharing_does_not_depend_on_a_cache(size):
    """transformers once made keys of its own where it had no cache (transformers #45242)."""
    case = toy(size)
    reference = hf.run(case.reference, case.tokens, case.lengths, use_cache=True)
    assert case.error(reference.logits) <= adapters.LAYER
    decoder = adapters.build(case.config, case.weights, "index")
    fresh = adapters.logits(decoder, case.tokens, case.lengths)
    cached = adapters.cached_logits(decoder, case.tokens, case.lengths, steps=0)
    assert case.error(cached) <= adapters.LOGITS
    assert np.abs(fresh - cached)[case.valid].max() <= adapters.LOGITS * case.std
