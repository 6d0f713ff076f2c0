"""What is measured of the inputs of matrices: against products that are watched here, and texts."""

import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from disk import CONFIG, NARROW, random_weights
from vocabularies import chat_tokenizer

from gemlax import calibration, ops
from gemlax.errors import RequestError
from gemlax.names import text_weights
from gemlax.quantization import importance_by_rules

IDS = np.array([[2, 7, 100, 4], [2, 300, 5, 511]], np.int32)


def filler(weights):
    def fill(name, out):
        out[...] = weights[name]

    return fill


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG)


def test_the_inputs_are_those_of_the_whole_decoder_without_the_first_tokens(weights):
    found = calibration.measure(CONFIG.text, filler(weights), IDS)
    decoder = build(CONFIG, weights, "unroll")
    seen = []
    with ops.watched(lambda x, matrices: seen.append(np.asarray(x))), ops.implementation("xla"):
        hidden, _ = decoder(jnp.asarray(IDS), jnp.asarray(np.tile(np.arange(4), (2, 1))))
    # Four products of a layer: queries, keys and values; the output; gate and up; down.
    names = ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert len(seen) == 4 * CONFIG.text.num_hidden_layers
    for i, x in enumerate(seen):
        own = (x.reshape(2, 4, -1)[:, 1:] ** 2).mean(axis=(0, 1))
        name = f"layers.{i // 4}.{names[i % 4]}.weight"
        np.testing.assert_allclose(found[name], own, rtol=1e-4)
    square = (np.asarray(hidden)[:, 1:] ** 2).mean(axis=(0, 1))
    np.testing.assert_allclose(found["embed_tokens.weight"], square, rtol=1e-4)


@pytest.mark.parametrize("size", NARROW)
def test_every_projection_of_gemma_4_is_measured(size):
    config = NARROW[size]
    shapes = text_weights(config.text)
    found = calibration.measure(config.text, filler(random_weights(config)), IDS)
    assert all(found[name].shape == (shapes[name][-1],) for name in found)
    assert all(np.isfinite(own).all() for own in found.values())
    # Of experts, routers and the other table only the outputs are known.
    missing = {n for n, s in shapes.items() if len(s) > 1} - found.keys()
    assert all(part in name for name in missing for part in (
        ["per_layer.weight"] if name == "embed_tokens_per_layer.weight"
        else ["router."] if ".router." in name else [".experts."]))  # fmt: skip


def test_one_layer_is_held_at_a_time(weights):
    """A layer is read after the one before has run."""
    order = []

    def fill(name, out):
        order.append(name)
        out[...] = weights[name]

    with ops.watched(lambda *_: None):
        calibration.measure(CONFIG.text, fill, IDS)
    layers = [int(name.split(".")[1]) for name in order if name.startswith("layers.")]
    assert layers == sorted(layers)
    assert len(order) == len(set(order))


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [([2000], (3, 512)), ([300, 400], (1, 512)), ([5, 3], (1, 9)), ([], (0, 1))],
)
def test_texts_become_rows_that_begin_with_bos(lengths, shape):
    bos = CONFIG.bos_token_id
    rows = calibration.rows_of([[bos, *range(10, 10 + n)] for n in lengths], CONFIG)
    assert rows.shape == shape
    assert (rows[:, :1] == bos).all()
    assert (rows[:, 1:] != bos).all()
    assert (calibration.rows_of([range(10, 10**6)], CONFIG)).shape == (32, 512)


def test_int4_alone_is_measured_on_the_text_or_ours_or_chance(weights, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "gemlax.quantization.measure", lambda config, read, rows: measured.append(rows) or {}
    )
    tokenizer, fill = chat_tokenizer("gemma3"), filler(weights)
    for rules in ("int8", "nf4", "dense", {"*": "int8"}):
        assert importance_by_rules(rules, CONFIG, fill, tokenizer) == {}
    assert not measured
    importance_by_rules("int4", CONFIG, fill, tokenizer, "some text")
    importance_by_rules({"*.up_proj.*": "int4"}, CONFIG, fill, tokenizer)
    importance_by_rules("int4", CONFIG, fill)
    text, ours, chance = measured
    assert text.tolist() == [[2, *[i for i in tokenizer.encode("some text") if i != 2]]]
    assert ours.shape[1] == 512
    np.testing.assert_array_equal(chance, calibration.random_rows(CONFIG))
    with pytest.raises(RequestError, match="the calibration text is empty"):
        importance_by_rules("int4", CONFIG, fill, tokenizer, [""])
