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
# Root mean square error over that of N(0, 1) weights; 0.0068, 0.072 and 0.090 were measured.
LOSS = {"int8": 0.008, "int4": 0.075, "nf4": 0.11}


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
    # The smallest scale of int4 is 2^-19; the others' exponents are those of bfloat16.
    atol = 2.0**-19 if format == "int4" else 0
    np.testing.assert_allclose(found[4, 1, :32], 1e-30, rtol=0.2, atol=atol)
    steps = np.abs(weights).reshape(7, 5, 8, 32).max(axis=-1, keepdims=True)
    most = {"int8": 0.5 / 127, "int4": 1 / 7.4, "nf4": 0.5 * np.diff(NF4).max()}[format]
    error = np.abs(found - weights).reshape(7, 5, 8, 32)
    assert (error <= steps * (most + 2**-8) + 1e-35 + atol).all()


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


def test_every_entry_of_int4_decodes_as_it_is_defined():
    """The scale is a float16 of 4 exponent bits and 5 of mantissa, the zero point in eighths."""
    entries = np.arange(2**16, dtype=np.uint16)
    codes = np.full((2**16, 16), 0x70, np.uint8)  # code 0, then code 7
    found = decode(codes, entries[:, None], "int4").reshape(-1, 32)
    exponent, mantissa = (entries >> 5 & 15).astype(int), (entries & 31) / 32
    scale = np.where(exponent == 0, mantissa * 2.0**-14, 2.0 ** (exponent - 15) * (1 + mantissa))
    zero = (entries >> 9) / 8
    np.testing.assert_array_equal(found[:, 0], (scale * (0 - zero)).astype(np.float32))
    np.testing.assert_array_equal(found[:, 31], (scale * (7 - zero)).astype(np.float32))


def grid_error(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Return the least error of each group [n, 32] over a dense grid of scales and minima."""
    least = np.full(len(x), np.inf)
    low, span = x.min(axis=1, keepdims=True), np.ptp(x, axis=1, keepdims=True)
    for below in np.linspace(-0.05, 0.3, 30):
        for above in np.linspace(-0.05, 0.3, 30):
            start, step = low + below * span, span * (1 - below - above) / 15
            codes = np.clip(np.rint((x - start) / step), 0, 15)
            error = importance * (codes * step + start - x) ** 2
            least = np.minimum(least, error.sum(axis=1))
    return least


@pytest.mark.parametrize("important", [False, True])
def test_the_search_of_int4_comes_near_the_best_scales_and_minima(important):
    """Even with scales and zero points of 16 bits together, against exact ones from a grid."""
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((64, 256)).astype(np.float32)
    importance = np.exp(rng.standard_normal(256)).astype(np.float32) ** 2
    own = importance if important else np.ones(256, np.float32)
    found = decode(*encode(weights, "int4", own if important else None), "int4")
    error = (own * (found - weights) ** 2).reshape(-1, 32).sum()
    best = grid_error(weights.reshape(-1, 32), np.tile(own.reshape(8, 32), (64, 1))).sum()
    assert error < 1.15 * best
    if important:
        plain = decode(*encode(weights, "int4"), "int4")
        assert error < 0.8 * (own * (plain - weights) ** 2).sum()


def test_int4_uses_its_codes_where_weights_lie_on_one_side_of_zero():
    weights = np.random.default_rng(2).uniform(1, 2, (4, 64)).astype(np.float32)
    lopsided = np.concatenate([np.zeros((4, 32), np.float32), weights[:, :32] - 1.2], axis=1)
    found = decode(*encode(lopsided, "int4"), "int4")
    assert np.abs(found - lopsided).max() < 1 / 15


@pytest.mark.parametrize(
    ("weights", "format", "message"),
    [
        (np.ones((2, 33)), "int8", "33"),
        (np.full((2, 32), np.nan), "int4", "finite"),
        (np.full((2, 32), 30.0), "int4", "29.53125"),
        (np.full((2, 32), 1e-5), "int4", "0.00024"),
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
