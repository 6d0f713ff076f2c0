"""Heads that are not the table of embeddings: what is stored counts, from the file to the loss.

What transformers makes of the same folders: tests/reference/test_heads_hf.py.
"""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build, logits
from disk import (
    BFLOAT16,
    CONFIG,
    WIDE,
    assert_same_bits,
    gguf_tensors,
    random_blocks,
    random_weights,
    read_all,
    wide_tensors,
    write_gguf,
    write_hf,
)
from flax import nnx
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tuning import ONE, decoder_of, rows, token_logprobs, trainer, weights_of

import gemlax
from gemlax import adapters, cli, cost, linen
from gemlax.checkpoints import open_checkpoint
from gemlax.config import GemmaConfig, edit, from_hf
from gemlax.errors import CheckpointError, RequestError, UnsupportedError
from gemlax.formats import decode, encode
from gemlax.names import HEAD, text_weights
from gemlax.ops import crossentropy
from gemlax.qtensor import QTensor
from gemlax.quantization import formats_by_rules
from gemlax.scoring import label_logprobs
from gemlax.sharding import make_mesh
from gemlax.weights import named_weights

pytestmark = pytest.mark.deep

TABLE = "embed_tokens.weight"
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
LM_HEADS = ["lm_head.weight", "model.lm_head.weight", "language_model.lm_head.weight",
            "model.language_model.lm_head.weight"]  # fmt: skip


def untied(config: GemmaConfig) -> GemmaConfig:
    return edit(config, tie_word_embeddings=False)


OWN = untied(CONFIG)
# Two layers, where a decoder runs.
SMALL = edit(OWN, num_hidden_layers=2, layer_types=None)
ONE_OWN = dataclasses.replace(ONE, tie_word_embeddings=False)


def says(tied: bool | None, **more) -> dict:
    """Return the config.json of a toy that says `tied` of its head; None: nothing."""
    said = CONFIG.to_hf() | {"tie_word_embeddings": tied} | more
    return {key: value for key, value in said.items() if tied is not None or "tie" not in key}


# The config.


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4_text", "gemma4_unified_text"])
@pytest.mark.parametrize(("said", "tied"), [(True, True), (False, False), (None, True)])
def test_the_config_says_whether_the_head_is_tied(model_type, said, tied):
    found = from_hf({"model_type": model_type, "tie_word_embeddings": said})
    assert found.text.tie_word_embeddings is tied
    assert found.to_hf()["tie_word_embeddings"] is tied
    assert from_hf(found.to_hf()) == found


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [({"tie_word_embeddings": False}, True, False), ({"tie_word_embeddings": True}, False, True),
     ({}, False, True)],
)  # fmt: skip
def test_beside_other_parts_the_key_outside_of_the_text_counts(outer, inner, tied):
    text = CONFIG.to_hf() | {"tie_word_embeddings": inner}
    found = from_hf({"model_type": "gemma3", "text_config": text, **outer})
    assert found.text.tie_word_embeddings is tied


def test_a_head_of_its_own_is_one_more_matrix_of_the_costs():
    text, one = OWN.text, 512 * 64
    shapes = text_weights(text)
    assert list(shapes)[-1] == HEAD
    assert shapes[HEAD] == (512, 64)
    assert cost.parameters(text) == cost.parameters(CONFIG.text) + one
    assert cost.parameters(text) == sum(int(np.prod(shape)) for shape in shapes.values())
    # Of the table that makes no logits a step reads the rows of its tokens.
    more = cost.decode_bytes(text, 9, 3, 4, 2) - cost.decode_bytes(CONFIG.text, 9, 3, 4, 2)
    assert more == 4 * 3 * 64


# Folders.


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("name", LM_HEADS)
def test_a_head_that_differs_is_read_whatever_the_config_says(tmp_path, caplog, name, said):
    weights = random_weights(OWN)
    others = {name: weights[HEAD]}
    tied = {n: w for n, w in weights.items() if n != HEAD}
    with (
        caplog.at_level(logging.INFO, "gemlax"),
        open_checkpoint(write_hf(tmp_path, tied, config=says(said), others=others)) as checkpoint,
    ):
        checkpoint.check()
        assert checkpoint.config == OWN
        assert_same_bits(read_all(checkpoint), weights)
    assert (f"{name} differs from it and is used" in caplog.text) == (said is not False)


@pytest.mark.parametrize("said", [True, None])
@pytest.mark.parametrize(
    ("table", "head"), [(F32, F32), (BFLOAT16, BFLOAT16), (F32, F16), (F32, BFLOAT16),
                        (BFLOAT16, F32), (BFLOAT16, F16)],
)  # fmt: skip
@pytest.mark.parametrize("name", LM_HEADS[:3:2])
def test_a_copy_of_the_table_is_no_head_of_its_own(tmp_path, name, table, head, said):
    weights = random_weights(dtype=table)
    others = {name: weights[TABLE].astype(F32).astype(head)}
    with open_checkpoint(write_hf(tmp_path, weights, config=says(said), others=others)) as found:
        found.check()
        assert found.config == CONFIG
        assert_same_bits(read_all(found, table), weights)


def test_a_finer_head_than_the_table_is_one_of_its_own(tmp_path):
    fine = random_weights(OWN)
    weights = {name: value.astype(BFLOAT16) for name, value in fine.items() if name != HEAD}
    others = {HEAD: fine[TABLE]}  # rounded it would be the table
    with open_checkpoint(write_hf(tmp_path, weights, others=others)) as checkpoint:
        checkpoint.check()
        assert not checkpoint.config.text.tie_word_embeddings
        np.testing.assert_array_equal(read_all(checkpoint)[HEAD], fine[TABLE])


def test_a_copy_of_the_table_stays_apart_where_the_config_says_so(tmp_path):
    """Training moves the two apart: a folder may begin so."""
    weights = random_weights(OWN)
    weights[HEAD] = weights[TABLE].copy()
    with open_checkpoint(write_hf(tmp_path, weights, config=says(False))) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == OWN
        assert_same_bits(read_all(checkpoint), weights)


def test_a_table_that_is_stored_as_the_head_alone_is_read(tmp_path, caplog):
    """`safetensors.torch.save_model` keeps the first name of shared memory: the head's."""
    weights = random_weights()
    rest = {name: value for name, value in weights.items() if name != TABLE}
    write_hf(tmp_path, rest, others={HEAD: weights[TABLE]})
    with caplog.at_level(logging.INFO, "gemlax"), open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == CONFIG
        assert_same_bits(read_all(checkpoint), weights)
    assert "lm_head.weight is the table, too, which is not stored" in caplog.text
    write_hf(tmp_path, rest, config=says(False), others={HEAD: weights[TABLE]})
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"missing: model.embed_tokens.weight \[512, 64\]"),
    ):
        checkpoint.check()


@pytest.mark.parametrize(
    ("said", "others", "message"),
    [
        (False, {}, r"missing: lm_head.weight \[512, 64\]\n.*tie_word_embeddings false; where"),
        (True, {HEAD: np.zeros((512, 63), F32)}, r"weight is \[512, 63\], expected \[512, 64\]"),
        (None, {HEAD: np.zeros((448, 64), F32)}, r"weight is \[448, 64\], expected \[512, 64\]"),
        (True, {HEAD: np.zeros((512, 64), F32), LM_HEADS[1]: np.ones((512, 64), F32)},
         r"unexpected: model.lm_head.weight \[512, 64\]"),
        (False, {HEAD: np.zeros((512, 64), F32), "lm_head.bias": np.ones(512, F32)},
         r"unexpected: lm_head.bias \[512\]"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_named(tmp_path, said, others, message):
    folder = write_hf(tmp_path, random_weights(), config=says(said), others=others)
    with open_checkpoint(folder) as found, pytest.raises(CheckpointError, match=message):
        found.check()


def test_a_head_of_a_type_that_is_not_read_is_named(tmp_path):
    others = {HEAD: np.zeros((512, 64), np.int8)}
    with (
        open_checkpoint(write_hf(tmp_path, random_weights(), others=others)) as checkpoint,
        pytest.raises(UnsupportedError, match=r"types .*lm_head.weight"),
    ):
        checkpoint.check()


def test_two_copies_of_a_head_are_one(tmp_path):
    weights = random_weights(OWN)
    others = {LM_HEADS[2]: weights[HEAD].copy()}
    with open_checkpoint(write_hf(tmp_path, weights, others=others)) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), weights)


# GGUF and Orbax.


def test_a_gguf_file_with_a_head_is_read(tmp_path):
    weights = random_weights(OWN)
    tensors = gguf_tensors(weights, OWN)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == OWN.text
        np.testing.assert_array_equal(read_all(checkpoint)[HEAD], weights[HEAD])


@pytest.mark.parametrize(("kind", "tied"), [(T.F16, True), (T.F32, True), (T.Q8_0, False)])
def test_a_gguf_head_of_another_type_is_the_table_where_its_numbers_are(tmp_path, kind, tied):
    tensors, expected = wide_tensors(T.F32)
    table = expected[TABLE]
    data = table.astype(kind.name.lower().replace("f", "float")) if tied else None
    if data is None:
        data = random_blocks(np.random.default_rng(1), table.shape, kind)
    tensors["output.weight"] = (data, kind)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text.tie_word_embeddings is tied
        if not tied:
            np.testing.assert_array_equal(read_all(checkpoint)[HEAD], dequantize(data, kind))
            stored = checkpoint.stored(HEAD)
            assert stored is not None
            np.testing.assert_array_equal(stored.codes, data)


def test_a_gguf_head_that_does_not_fit_is_named(tmp_path):
    tensors = gguf_tensors(random_weights()) | {"output.weight": (np.zeros((512, 32), F32), None)}
    with (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint,
        pytest.raises(CheckpointError, match=r"output.weight is \[512, 32\], expected \[512, 64\]"),
    ):
        checkpoint.check()


# There and back.


@pytest.fixture(scope="module")
def weights():
    return random_weights(SMALL)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("plain") / "m"
    return write_hf(folder, weights, config=SMALL.to_hf())


@pytest.fixture(scope="module")
def model(plain):
    return gemlax.load(plain, quantize="dense")


def test_a_saved_head_lies_beside_the_model_and_comes_back_bit_for_bit(model, weights, tmp_path):
    gemlax.save(model, tmp_path / "m")
    found = load_file(tmp_path / "m" / "model.safetensors")
    np.testing.assert_array_equal(found[HEAD], weights[HEAD])
    assert "model.lm_head.weight" not in found
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    again = gemlax.load(tmp_path / "m", quantize="dense")
    assert_same_bits(dict(named_weights(again.decoder)), weights)


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_a_conversion_keeps_the_head(plain, weights, tmp_path, source):
    path = plain
    if source == "gguf":
        path = write_gguf(tmp_path / "m.gguf", gguf_tensors(weights, SMALL), SMALL)
    assert cli.main(["convert", str(path), str(tmp_path / "m"), "--quiet"]) == 0
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.check()
        np.testing.assert_array_equal(read_all(checkpoint)[HEAD], weights[HEAD])


def test_a_head_is_quantised_by_its_name_and_kept_as_codes(plain, model, weights, tmp_path):
    rules = {HEAD: "int4", TABLE: "int8"}
    assert formats_by_rules(rules, SMALL.text) == rules
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    command = ["quantize", str(plain), str(tmp_path / "disk"), "--rules"]
    assert cli.main([*command, str(tmp_path / "rules.json"), "--quiet"]) == 0
    gemlax.save(gemlax.quantize(model, rules), tmp_path / "memory", keep_codes=True)
    codes, scales = encode(weights[HEAD], "int4")
    for folder in (tmp_path / "disk", tmp_path / "memory"):
        found = load_file(folder / "model.safetensors")
        np.testing.assert_array_equal(found[f"{HEAD}.codes"], codes)
        held = gemlax.load(folder).decoder.lm_head.weight.get_value()
        assert isinstance(held, QTensor)
        np.testing.assert_array_equal(held.codes, codes)
        np.testing.assert_array_equal(held.dense(), decode(codes, scales, "int4"))


# The model.


def hidden_of(config, count=3):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(1, count, config.hidden_size)), jnp.float32)


@pytest.mark.parametrize("quantize", ["dense", "int8"])
def test_logits_are_made_by_the_head(model, quantize):
    decoder = model.decoder if quantize == "dense" else gemlax.quantize(model, quantize).decoder
    head = decoder.lm_head.weight.get_value()
    hidden = hidden_of(SMALL.text)
    exact = hidden @ (head if quantize == "dense" else head.dense()).T
    error = np.abs(decoder.logits(hidden) - exact).max()
    assert error < 1e-3 * np.abs(exact).max()  # kernels multiply activations of 16 bits


@pytest.mark.parametrize("layers", ["unroll", "index"])
def test_scanned_and_unrolled_layers_have_the_head(weights, layers):
    ids, lengths = np.asarray([[2, 9, 40, 41]], np.int32), np.asarray([4])
    found, scanned = (
        logits(build(SMALL, weights, form), ids, lengths) for form in (layers, "scan")
    )
    np.testing.assert_allclose(found, scanned, atol=1e-4)


def test_generating_and_scoring_use_the_head(model):
    ids = np.asarray([[2, 9, 40, 41, 42, 43, 44, 45]], np.int32)
    hidden = np.asarray(model.hidden(ids))[0]
    exact = hidden @ np.asarray(model.decoder.lm_head.weight.get_value()).T
    (answer,) = model.generate(ids.tolist(), max_new_tokens=1)
    assert answer.tokens == [exact[-1].argmax()]
    (score,) = model.score(ids.tolist())
    logprobs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    own = logprobs[np.arange(7), ids[0, 1:]].sum()
    assert score.log_likelihood == pytest.approx(own, rel=1e-4)


def test_a_mesh_cuts_the_head_as_it_cuts_the_table():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    decoder, own = decoder_of(ONE_OWN, mesh=mesh), weights_of(ONE_OWN)[HEAD]
    head = decoder.lm_head.weight.get_value()
    assert head.sharding.spec == P(("tensor",), ("fsdp",))
    assert head.sharding == decoder.embed_tokens.weight.get_value().sharding
    hidden = hidden_of(ONE_OWN)
    np.testing.assert_allclose(
        jax.jit(lambda d, x: d.logits(x))(decoder, hidden), np.asarray(hidden) @ own.T, atol=1e-4
    )


def test_linen_has_the_head_of_nnx():
    decoder = decoder_of(ONE_OWN)
    variables = linen.to_linen(decoder)
    hidden = hidden_of(ONE_OWN)
    module = linen.Decoder(ONE_OWN, read="index")
    found = module.apply(variables, hidden, method="logits")
    np.testing.assert_allclose(found, np.asarray(hidden) @ weights_of(ONE_OWN)[HEAD].T, atol=1e-4)
    del variables["params"]["lm_head"]
    with pytest.raises(CheckpointError, match="lm_head/weight is missing"):
        module.apply(variables, hidden, method="logits")


# Training.


def test_losses_and_slopes_by_blocks_are_those_of_the_head(monkeypatch):
    monkeypatch.setattr(crossentropy, "_TABLE_ROWS", 200)
    decoder = decoder_of(ONE_OWN, read="slice")
    graph, state = nnx.split(decoder)
    hidden = hidden_of(ONE_OWN, 24)
    labels = jnp.arange(24, dtype=jnp.int32)[None] + 100

    def whole(state, hidden):
        return token_logprobs(nnx.merge(graph, state), hidden, labels).sum()

    def blocks(state, hidden):
        made = nnx.merge(graph, state)
        return label_logprobs(made, hidden, labels, labels > 0, frozen=False).sum()

    slopes = [jax.jit(jax.value_and_grad(f, (0, 1))) for f in (whole, blocks)]
    expected, found = (f(state, hidden) for f in slopes)
    slope = found[1][0]
    assert np.abs(slope["lm_head"]["weight"].get_value()).max() > 0.1
    assert not np.asarray(slope["embed_tokens"]["weight"].get_value()).any()
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_all_weights_are_trained_with_the_head_and_an_adapter_leaves_it_as_it_is():
    batch = rows(ONE_OWN)
    full = trainer(decoder_of(ONE_OWN), rank=None)
    before = {name: np.asarray(value) for name, value in full.values.items()}
    full.step(0, batch)
    moved = np.abs(np.asarray(full.values[HEAD]) - before[HEAD]).max(axis=1) > 0
    assert moved.all()  # softmax reaches every row
    table = np.abs(np.asarray(full.values[TABLE]) - before[TABLE]).max(axis=1) > 0
    assert table.any()
    assert set(np.flatnonzero(table)) <= set(batch.tokens.flat)  # no row that only makes logits
    small = trainer(decoder_of(ONE_OWN))
    assert not any("lm_head" in name for name in small.values)
    small.step(0, batch)
    np.testing.assert_array_equal(small.decoder().lm_head.weight.get_value(), before[HEAD])


# What cannot be done.


def test_an_adapter_of_the_head_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"lm_head.weight: adapters of such weights"):
        adapters.attach(decoder_of(ONE_OWN), {"lm_head": 4}, key=jax.random.key(0))
    with pytest.raises(RequestError, match="fits no weight"):
        adapters.attach(decoder_of(ONE), {"lm_head": 4}, key=jax.random.key(0))
