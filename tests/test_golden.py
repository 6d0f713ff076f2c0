"""Parity with transformers without torch: against the files of tests/golden/make_gemma*.py."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import adapters
import numpy as np
import pytest
from golden.conditioned import conditioned_weights, valid_tokens, weight_shapes

from gemlax.config import from_hf
from gemlax.decoder import Decoder
from gemlax.presets import PRESETS, preset, tiny

FOLDER = Path(__file__).resolve().parent / "golden"


class Golden(NamedTuple):
    """The name of a size, its golden data, its weights, and a decoder with them."""

    size: str
    data: dict[str, Any]
    weights: dict[str, np.ndarray]
    decoder: Decoder


@pytest.fixture(scope="module", params=PRESETS)
def toy(request) -> Golden:
    with np.load(FOLDER / f"{request.param}.npz") as file:
        data = dict(file)
    data["config"] = json.loads(str(data["config"]))
    weights = conditioned_weights(request.param, weight_shapes(data["config"]))
    decoder = adapters.build(tiny(preset(request.param)), weights, "index")
    return Golden(request.param, data, weights, decoder)


def ratio(found: np.ndarray, expected: np.ndarray, std: float) -> float:
    return float(np.abs(found - expected).max() / std)


def test_the_golden_config_is_the_tiny_preset(toy):
    assert from_hf(toy.data["config"]).text == tiny(preset(toy.size)).text


def test_the_weights_are_those_the_file_was_made_with(toy):
    found = [float(np.abs(w).sum(dtype="f8")) for w in toy.weights.values()]
    np.testing.assert_allclose(found, toy.data["weights_l1"], rtol=1e-6)


def logits_error(logits: np.ndarray, data: dict[str, Any]) -> float:
    """Return the largest difference at real tokens, but where a router's choice is a tie."""
    valid, flat = valid_tokens(data["lengths"]), logits.reshape(-1, logits.shape[-1])
    clear = np.ones_like(valid)
    if "router_gap" in data:
        clear = data["router_gap"].min(axis=0) >= adapters.ROUTER_GAP
        assert clear[valid].mean() > 0.99
    full = clear.reshape(-1)[data["full_at"]]
    std = data["logits_std"]
    return max(
        ratio(logits[valid & clear][:, data["vocab_ids"]], data["logits_slice"][clear[valid]], std),
        ratio(flat[data["full_at"][full]], data["logits_full"][full], std),
    )


def test_logits_equal_transformers_at_full_depth(toy):
    logits = adapters.logits(toy.decoder, toy.data["tokens"], toy.data["lengths"])
    error = logits_error(logits, toy.data)
    print(f"{toy.size}: logits differ by {error:.1e} std")
    assert error <= adapters.LOGITS
    assert np.isfinite(logits).all()  # at padding too


CACHED = ["gemma-3-4b", "gemma-4-e2b", "gemma-4-26b-a4b"]  # a remainder; shared K/V; experts


@pytest.mark.parametrize("toy", CACHED, indirect=True)
def test_logits_through_caches_equal_transformers(toy):
    data = toy.data
    logits = adapters.cached_logits(toy.decoder, data["tokens"], data["lengths"], steps=8)
    error = logits_error(logits, data)
    print(f"{toy.size}: logits through caches differ by {error:.1e} std")
    assert error <= adapters.LOGITS


def test_layers_equal_transformers_on_its_own_inputs(toy):
    """A layer that owns no K/V gets those that the donor makes of transformers' inputs."""
    size, data, _, decoder = toy
    tokens = data["tokens"][data["row"]][None, : data["layer_inputs"].shape[1]]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    owns = None
    if decoder.config.hidden_size_per_layer_input:
        owns = adapters.per_layer_inputs(decoder, tokens)
    made, errors = {}, {}
    for i, x, y in zip(data["layers"], data["layer_inputs"], data["layer_outputs"], strict=True):
        own = None if owns is None else owns[i]
        shared = made.get(decoder.config.plan.donor(i))
        found, made[int(i)] = adapters.run_layer(decoder, int(i), x[None], positions, own, shared)
        errors[int(i)] = ratio(found[0, data["output_at"]], y, y.std())
    print(f"{size}: layers differ by {max(errors.values()):.1e} std")
    assert max(errors.values()) <= adapters.LAYER, errors
