"""Several adapters on one model: chosen by row, in one program."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from lora import SMALL, trained
from safetensors.numpy import load_file

import gemlax
from gemlax import adapters, cli
from gemlax.adapters import Rule
from gemlax.errors import RequestError, UnsupportedError
from gemlax.names import text_weights

pytestmark = pytest.mark.deep

# Times std(logits).
CLOSE = 1e-5
ONE = {"*.q_proj": 4, "*.mlp.*": Rule(3, alpha=1.5)}
TWO = {"layers.3.*": Rule(2, alpha=6.0), "*.v_proj": 2}
IDS = np.random.default_rng(1).integers(3, 512, (4, 24)).astype(np.int32)
NAMES = ["one", None, "two", "one"]


@functools.cache
def weights():
    return conditioned_weights("tables", text_weights(SMALL.text))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base on disk, and two adapters of it."""
    folder = tmp_path_factory.mktemp("tables")
    base = build(SMALL, weights(), "unroll")
    gemlax.save(gemlax.Model(SMALL, base), folder / "base")
    for seed, (name, rules) in enumerate({"one": ONE, "two": TWO}.items()):
        trained(base, rules, size=0.2, seed=seed)
        adapters.save(base, folder / name)
        adapters.detach(base)
    return folder


@functools.cache
def alone(folders, name):
    """Return the logits of all rows from a model that has one adapter, attached, or none."""
    decoder = build(SMALL, weights(), "unroll")
    if name is not None:
        adapters.restore(decoder, folders / name)
    return np.asarray(gemlax.Model(SMALL, decoder).logits(IDS))


@pytest.fixture(scope="module", params=[pytest.param("scan", marks=pytest.mark.slow), "unroll"])
def model(request, folders):
    both = {name: folders / name for name in ("one", "two")}
    return gemlax.load(folders / "base", adapters=both, layers=request.param)


def test_each_row_of_a_batch_gets_what_its_adapter_gives_alone(model, folders):
    found = np.asarray(model.logits(IDS, adapter=NAMES))
    for row, name in enumerate(NAMES):
        expected = alone(folders, name)[row]
        assert np.abs(found[row] - expected).max() < CLOSE * expected.std()
    assert np.abs(alone(folders, "one") - alone(folders, "two")).max() > 0.01


def test_rows_without_an_adapter_are_those_of_a_model_without_any(folders):
    model = gemlax.load(folders / "base", adapters={"one": folders / "one"}, layers="unroll")
    for choice in (None, "default"):  # no adapter is called so
        found = np.asarray(model.logits(IDS, adapter=choice))
        np.testing.assert_array_equal(found, alone(folders, None))


def test_the_template_of_the_only_adapter_is_used_and_others_are_named(folders, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("one", "two"):
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(name)
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    assert gemlax.load(folders / "base", adapters=tmp_path / "one").chat_template == "one"
    assert "differs from the base's, is used" in caplog.text
    assert "tokenizer.json: left aside" in caplog.text
    both = {name: tmp_path / name for name in ("one", "two")}
    assert gemlax.load(folders / "base", adapters=both).chat_template is None
    assert caplog.text.count("is left aside: it is one of several") == 2


def generated(model, ids, **settings):
    found = model.generate(ids, max_new_tokens=6, stop_ids=(), **settings)
    return [completion.tokens for completion in found]


def test_another_choice_generates_otherwise_in_the_same_programs(model, folders):
    prompts = [IDS[0].tolist()] * 4  # the same one, so that adapters alone differ
    mixed = generated(model, prompts, adapter=NAMES)
    programs = model.programs.counters.programs
    each = {name: generated(model, prompts, adapter=name) for name in ("one", "two", None)}
    assert model.programs.counters.programs == programs
    assert mixed == [each[name][row] for row, name in enumerate(NAMES)]
    assert mixed[0] == mixed[3] and len({tuple(row) for row in mixed}) == 3
    base = gemlax.Model(SMALL, build(SMALL, weights(), "unroll"))
    assert each[None] == generated(base, prompts)


def test_one_folder_is_the_adapter_of_every_call(folders):
    model = gemlax.load(folders / "base", adapters=folders / "one", layers="unroll")
    expected = alone(folders, "one")
    assert np.abs(np.asarray(model.logits(IDS)) - expected).max() < CLOSE * expected.std()
    scores = [model.score([IDS[0].tolist()], adapter=a)[0] for a in ("default", None)]
    assert scores[0].log_likelihood != scores[1].log_likelihood


@pytest.mark.parametrize(
    ("choice", "match"),
    [("three", "no adapter 'three': this model has one, two"), (["one"], "or 4 of them, got 1")],
)
def test_a_choice_that_is_not_there_is_an_error(choice, match, model):
    with pytest.raises(RequestError, match=match):
        model.generate(IDS.tolist(), adapter=choice)


def test_a_name_without_any_adapters_is_an_error(folders):
    model = gemlax.Model(SMALL, build(SMALL, weights(), "unroll"))
    with pytest.raises(RequestError, match=r"load\(adapters=...\)"):
        model.logits(IDS, adapter="one")


def test_adapters_are_not_dropped_in_silence(model, tmp_path):
    with pytest.raises(RequestError, match="has adapters"):
        gemlax.save(model, tmp_path / "out")
    with pytest.raises(RequestError, match="with adapters cannot be quantised"):
        gemlax.quantize(model, "int8")
    assert not list(tmp_path.iterdir())


def test_a_merged_model_is_saved_and_convert_writes_the_same(folders, tmp_path):
    decoder = build(SMALL, weights(), "unroll")
    adapters.restore(decoder, folders / "one")
    adapters.merge(decoder)
    gemlax.save(gemlax.Model(SMALL, decoder), tmp_path / "merged")
    asked = [str(folders / "base"), str(tmp_path / "converted"), "--adapter", str(folders / "one")]
    assert cli.main(["convert", *asked, "--quiet"]) == 0
    for name in ("merged", "converted"):
        found = gemlax.load(tmp_path / name, layers="unroll")
        for ours, theirs in zip(
            *(jax.tree.leaves(d) for d in map(state_of, (found.decoder, decoder))), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def state_of(decoder):
    from flax import nnx

    return nnx.state(decoder)


@pytest.fixture(scope="module")
def together(folders, tmp_path_factory):
    """A model's folder with an adapter in it."""
    folder = tmp_path_factory.mktemp("together") / "model"
    shutil.copytree(folders / "base", folder)
    shutil.copytree(folders / "one", folder, dirs_exist_ok=True)
    return folder


def logits_of(folder, **how):
    return np.asarray(gemlax.load(folder, layers="unroll", **how).logits(IDS))


def test_an_adapter_beside_the_weights_is_applied_once(together, folders, caplog):
    """transformers does so for a folder with config.json and adapter_config.json."""
    caplog.set_level("INFO", "gemlax")
    expected = alone(folders, "one")
    for given in (None, together):
        found = logits_of(together, adapters=given)
        assert np.abs(found - expected).max() <= CLOSE * expected.std()
    assert caplog.text.count("the adapter beside the weights is applied") == 1


def test_adapters_that_are_given_take_the_place_of_the_one_beside(together, folders, caplog):
    for given, name in (({}, None), (str(folders / "two"), "two")):
        expected = alone(folders, name)
        found = logits_of(together, adapters=given)
        assert np.abs(found - expected).max() <= CLOSE * expected.std()
    assert caplog.text.count("is left aside for those given") == 2


def test_an_adapter_beside_the_weights_is_merged_by_convert(together, folders, tmp_path, capsys):
    assert cli.main(["convert", str(together), str(tmp_path / "merged"), "--quiet"]) == 0
    assert "merging the adapter beside the weights" in capsys.readouterr().err
    expected = alone(folders, "one")
    assert np.abs(logits_of(tmp_path / "merged") - expected).max() <= CLOSE * expected.std()


def test_a_config_of_an_adapter_without_weights_is_passed_with_a_warning(
    together, folders, tmp_path, caplog
):
    shutil.copytree(folders / "base", tmp_path / "model")
    shutil.copy(together / "adapter_config.json", tmp_path / "model")
    assert not gemlax.load(tmp_path / "model", layers="unroll").adapters
    assert "there are no weights of an adapter" in caplog.text
    (tmp_path / "model" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="is a pickle"):
        gemlax.load(tmp_path / "model", layers="unroll")


def test_an_adapter_names_its_base_and_has_its_names(folders, tmp_path):
    """A multimodal config alone makes the modules lie deeper, as transformers reads it."""
    base = tmp_path / "multimodal"
    shutil.copytree(folders / "base", base)
    text = json.loads((base / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (base / "config.json").write_text(json.dumps(whole))
    for folder, prefix in ((base, "model.language_model."), (folders / "base", "model.")):
        decoder = gemlax.load(str(folder), layers="unroll").decoder
        trained(decoder, {"*.q_proj": 2})
        for multimodal, expected in ((None, prefix), (False, "model."), (True, PREFIX)):
            adapters.save(decoder, tmp_path / "lora", multimodal=multimodal, overwrite=True)
            names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
            assert all(name.startswith(f"base_model.model.{expected}layers.") for name in names)
        said = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == str(folder)


PREFIX = "model.language_model."


@pytest.mark.parametrize(("rows", "multimodal"), [((), False), ((300,), True)])
def test_a_base_without_a_config_is_multimodal_where_its_table_is(rows, multimodal, tmp_path):
    config = dataclasses.replace(SMALL, placeholder_ids=rows)
    found = adapters.base_of("model.gguf", tmp_path / "model.gguf", config)
    assert found == adapters.Base("model.gguf", multimodal)
    demo = adapters.base_of("demo", tmp_path / "model.gguf", config)
    assert demo.name == "google/gemma-3-270m"
