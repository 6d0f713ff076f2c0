"""Checkpoints that go between gemlax and transformers, and what must be equal then."""

import json
from pathlib import Path

import adapters
import numpy as np
import torch
from golden import hf
from reference.toys import toy
from transformers import AutoConfig, AutoModelForCausalLM

import gemlax
from gemlax.weights import named_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def reference_copy(size: str, dtype: str = "float32"):
    """Return a transformers model of its own, so that the shared one stays in float32."""
    case = toy(size)
    return hf.build(case.hf_config, case.weights).to(DTYPES[dtype])


def text_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return transformers' text weights by canonical name."""
    state = model.state_dict()
    prefix = next(p for p in ("model.language_model.", "model.") if p + "norm.weight" in state)
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def bits(array) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return array.contiguous().view(torch.uint8).numpy()
    return np.ascontiguousarray(array).view(np.uint8)


def check_same_weights(model: gemlax.Model, reference: torch.nn.Module) -> None:
    found, expected = dict(named_weights(model.decoder)), text_state(reference)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert str(found[name].dtype) == str(value.dtype).removeprefix("torch."), name
        assert found[name].shape == tuple(value.shape), name
        np.testing.assert_array_equal(bits(found[name]), bits(value), err_msg=name)


def check_same_logits(model: gemlax.Model, size: str) -> None:
    case = toy(size)
    assert case.error(np.asarray(model.logits(case.tokens, case.lengths))) <= adapters.LOGITS


def check_saved_folder_loads(size: str, dtype: str, folder: Path) -> None:
    """Check that transformers' folder, saved again by gemlax, is the same model to it."""
    case = toy(size)
    reference_copy(size, dtype).save_pretrained(folder / "theirs")
    model = gemlax.load(folder / "theirs", dtype=dtype)
    gemlax.save(model, folder / "ours")
    reference, info = AutoModelForCausalLM.from_pretrained(
        folder / "ours", dtype=DTYPES[dtype], attn_implementation="eager",
        experts_implementation="eager", output_loading_info=True,
    )  # fmt: skip
    assert type(reference) is type(case.reference)
    assert not any(info.values()), info
    check_same_weights(model, reference)
    if dtype == "float32":  # the same weights through the same code
        # From a file they lie at any address, and torch rounds by how they are aligned.
        state = {name: value.clone() for name, value in reference.state_dict().items()}
        reference.load_state_dict(state, assign=True)
        logits = hf.run(reference.eval(), case.tokens, case.lengths).logits
        np.testing.assert_array_equal(logits, case.logits)


def check_three_round_trips(size: str, kept: tuple[str, ...], folder: Path) -> None:
    """Check that a config and its `kept` keys survive; transformers once halved the window.

    transformers #47940: it did so on every save.
    """
    case = toy(size)
    start = reference_copy(size)
    start.save_pretrained(folder / "0")
    expected = start.config.to_dict()
    configs = []
    for i in range(3):
        model = gemlax.load(folder / str(i), dtype="float32")
        gemlax.save(model, folder / f"ours-{i}")
        theirs = AutoModelForCausalLM.from_pretrained(folder / f"ours-{i}")
        theirs.save_pretrained(folder / str(i + 1))
        found = AutoConfig.from_pretrained(folder / str(i + 1)).to_dict()
        assert {key: found[key] for key in kept} == {key: expected[key] for key in kept}
        configs.append(json.loads((folder / f"ours-{i}" / "config.json").read_text()))
        assert model.config == case.config
    assert configs[0] == configs[1] == configs[2]
