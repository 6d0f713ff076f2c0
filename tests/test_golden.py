"""Parity with transformers without torch: against files that tests/golden/make_gemma3.py wrote."""

import json
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
from golden.conditioned import conditioned_weights, valid_tokens, weight_shapes

from gemlax.config import GemmaConfig
from gemlax.presets import PRESETS, preset, tiny

FOLDER = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="module", params=PRESETS)
def toy(request) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The name of a size, its golden data, and its weights."""
    with np.load(FOLDER / f"{request.param}.npz") as file:
        data = dict(file)
    data["config"] = json.loads(str(data["config"]))
    return request.param, data, conditioned_weights(request.param, weight_shapes(data["config"]))


def ratio(found: np.ndarray, expected: np.ndarray, std: float) -> float:
    return float(np.abs(found - expected).max() / std)


def test_the_golden_config_is_the_tiny_preset(toy):
    size, data, _ = toy
    assert GemmaConfig.from_hf(data["config"]).text == tiny(preset(size)).text


def test_the_weights_are_those_the_file_was_made_with(toy):
    _, data, weights = toy
    found = [float(np.abs(w).sum(dtype="f8")) for w in weights.values()]
    np.testing.assert_allclose(found, data["weights_l1"], rtol=1e-6)


def test_logits_equal_transformers_at_full_depth(toy):
    size, data, weights = toy
    decoder = adapters.build(tiny(preset(size)), weights)
    logits = adapters.logits(decoder, data["tokens"], data["lengths"])
    valid, flat = valid_tokens(data["lengths"]), logits.reshape(-1, logits.shape[-1])
    errors = [
        ratio(logits[valid][:, data["vocab_ids"]], data["logits_slice"], data["logits_std"]),
        ratio(flat[data["full_at"]], data["logits_full"], data["logits_std"]),
    ]
    print(f"{size}: logits differ by {max(errors):.1e} std")
    assert max(errors) <= adapters.LOGITS
    assert np.isfinite(logits).all()  # at padding too


def test_layers_equal_transformers_on_its_own_inputs(toy):
    size, data, weights = toy
    decoder = adapters.build(tiny(preset(size)), weights)
    positions = np.arange(data["layer_inputs"].shape[1], dtype=np.int32)[None]
    errors = {}
    for i, x, y in zip(data["layers"], data["layer_inputs"], data["layer_outputs"], strict=True):
        found = adapters.layer_output(decoder, int(i), x[None], positions)[0, data["output_at"]]
        errors[int(i)] = ratio(found, y, y.std())
    print(f"{size}: layers differ by {max(errors.values()):.1e} std")
    assert max(errors.values()) <= adapters.LAYER, errors
