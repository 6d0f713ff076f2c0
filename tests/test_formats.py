"""Stored weights: what decodes them, how they are made, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codes import blocks, stored
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from gemlax import ops
from gemlax.formats import FORMATS, MADE, NF4, decode, encode
from gemlax.qtensor import At, Mixed, QTensor, dense, shape_of, take

GGUF = {name: GGMLQuantizationType[name.upper()] for name in FORMATS
        if name.startswith("q")}  # fmt: skip
# Root mean square error over that of N(0, 1) weights; 0.0068, 0.094 and 0.090 were measured.
LOSS = {"int8": 0.008, "int4": 0.11, "nf4": 0.11}


@pytest.mark.parametrize("format", GGUF)
def test_blocks_of_gguf_decode_as_gguf_says(format):
    codes = blocks(format, 13, 768)
    found = jax.jit(decode, static_argnums=2)(jnp.asarray(codes), None, format)
    expected = dequantize(codes, GGUF[format])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    by_numpy = decode(codes, None, format)
    assert isinstance(by_numpy, np.ndarray)
    np.testing.assert_array_equal(by_numpy, expected)


@pytest.mark.parametrize("format", MADE)
def test_what_is_encoded_decodes_within_its_error(format):
    weights = np.random.default_rng(0).standard_normal((7, 5, 256)).astype(np.float32)
    weights[3, 2] = 0
    weights[4, 1, :32] = 1e-30
    codes, scales = encode(weights, format)
    assert codes.dtype == FORMATS[format].dtype
    assert scales.shape == (7, 5, 8)
    assert codes[0, 0].nbytes == 256 * (1 if format == "int8" else 0.5)
    found = np.asarray(decode(jnp.asarray(codes), jnp.asarray(scales), format))
    np.testing.assert_array_equal(decode(codes, scales, format), found)
    assert np.sqrt(((found - weights) ** 2).mean()) < LOSS[format] * weights.std()
    assert not found[3, 2].any()
    np.testing.assert_allclose(found[4, 1, :32], 1e-30, rtol=0.2)
    steps = np.abs(weights).reshape(7, 5, 8, 32).max(axis=-1, keepdims=True)
    most = {"int8": 0.5 / 127, "int4": 1 / 7.9, "nf4": 0.5 * np.diff(NF4).max()}[format]
    error = np.abs(found - weights).reshape(7, 5, 8, 32)
    assert (error <= steps * (most + 2**-8) + 1e-35).all()


def test_what_is_encoded_does_not_depend_on_where_it_lies():
    """Groups are worked on a block at a time; a group of the second block is like one alone."""
    weights = np.random.default_rng(2).standard_normal((4100, 32)).astype(np.float32)
    for format in MADE:
        codes, scales = encode(weights, format)
        own, own_scales = encode(weights[4090:], format)
        np.testing.assert_array_equal(codes[4090:], own)
        np.testing.assert_array_equal(scales[4090:], own_scales)
    weights[4099, 31] = np.inf
    with pytest.raises(ValueError, match="finite"):
        encode(weights, "int8")


def test_int4_takes_the_better_of_two_scales():
    """The largest magnitude may be 7 steps or -8; with one of them alone the error is larger."""
    weights = np.random.default_rng(1).standard_normal((1, 32 * 400)).astype(np.float32)
    found = np.asarray(decode(*map(jnp.asarray, encode(weights, "int4")), "int4"))
    groups = weights.reshape(-1, 32)
    most = np.abs(groups).max(axis=1, keepdims=True) / 7
    plain = np.clip(np.rint(groups / most), -8, 7) * most
    assert ((found - weights) ** 2).sum() < 0.95 * ((plain - groups) ** 2).sum()


@pytest.mark.parametrize(
    ("weights", "format", "message"),
    [
        (np.ones((2, 33)), "int8", "33"),
        (np.full((2, 32), np.nan), "int4", "finite"),
        (np.ones((2, 32)), "q8_0", "int8, int4, nf4"),
    ],
)
def test_what_cannot_be_encoded_says_why(weights, format, message):
    with pytest.raises(ValueError, match=message):
        encode(weights.astype(np.float32), format)


@pytest.mark.parametrize(
    ("format", "codes", "scales"),
    [
        ("int8", (4, 64), (4, 3)),
        ("int8", (4, 64), (3, 2)),
        ("int4", (4, 24), (4, 1)),
        ("int8", (4, 64), None),
        ("q8_0", (4, 34), (4, 1)),
        ("q4_k", (4, 145), None),
    ],
)
def test_codes_and_scales_that_disagree_are_an_error(format, codes, scales):
    held = None if scales is None else jnp.zeros(scales, jnp.uint16)
    weight = QTensor(jnp.zeros(codes, FORMATS[format].dtype), format, held)
    with pytest.raises(ValueError, match=format):
        _ = weight.shape
    with pytest.raises(ValueError, match=format):
        ops.linear(jnp.zeros((1, 64)), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_a_stored_table_are_gathered_and_decoded(format):
    table = stored(format, 0, 50, 256)
    tokens = jnp.array([[3, 49, 0]])
    np.testing.assert_array_equal(take(table, tokens), dense(table)[tokens])
    stack = stored(format, 3, 50, 256)
    layer = At(stack, jnp.int32(2))
    assert shape_of(layer) == (50, 256)
    np.testing.assert_array_equal(take(layer, tokens[0]), dense(layer)[tokens[0]])


def test_a_mixed_stack_gives_each_layer_from_its_part():
    parts = (stored("q4_0", 2, 6, 64), stored("int8", 2, 6, 64))
    which, row = jnp.array([1, 0, 0, 1], jnp.int32), jnp.array([1, 0, 1, 0], jnp.int32)
    stack = Mixed(parts, which, row)
    for i in range(4):
        expected = dense(At(parts[which[i]], row[i]))
        np.testing.assert_array_equal(dense(At(stack, jnp.int32(i))), expected)
        np.testing.assert_array_equal(take(At(stack, jnp.int32(i)), jnp.array([4])), expected[4:5])


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("rows", [2, 20])
def test_logits_of_a_stored_table_in_blocks_equal_the_whole_product(rows, implementation):
    table = stored("q5_0", 0, 8192 * 2 + 77, 64)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 64)), jnp.float32)
    with ops.implementation(implementation):
        # A function of its own: a trace of `unembed` would serve both implementations.
        unembed = jax.jit(lambda x, table: ops.unembed(x, table))
        assert ("gemlax_multiply" in unembed.lower(x, table).as_text()) == (implementation == "cpu")
        found = unembed(x, table)
    expected = np.asarray(x) @ np.asarray(dense(table)).T
    assert np.abs(found - expected).max() < 5e-4 * expected.std()
