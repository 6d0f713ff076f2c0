"""The maths against NumPy in float64, and every other way of computing it against the reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemlax import ops
from gemlax.ops.attention import attend_blocks
from gemlax.qtensor import At, dense, pack_bfloat16

TIGHT = 2e-6  # float32 rounding over a few hundred terms of size about 1


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(normal(*shape, seed=seed))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + len(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_multiplies_by_offset_plus_weight(offset):
    x, w = draw(2, 3, 8), draw(8)
    exact = np.asarray(x, np.float64)
    exact = (
        exact
        / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
        * (offset + np.asarray(w, np.float64))
    )
    np.testing.assert_allclose(
        ops.rms_norm(x, w, eps=1e-6, offset=offset), exact, rtol=1e-5, atol=1e-6
    )


def test_rms_norm_of_bfloat16_is_the_float32_result_rounded_once():
    x = draw(4, 64).astype(jnp.bfloat16)
    w = jnp.asarray(draw(64), jnp.bfloat16)
    wide = ops.rms_norm(x.astype(jnp.float32), w.astype(jnp.float32), eps=1e-6, offset=1.0)
    narrow = ops.rms_norm(x, w, eps=1e-6, offset=1.0)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 1.0), (1e6, 8.0)])
def test_rope_rotates_pairs_half_a_head_apart(theta, factor):
    x = draw(2, 5, 3, 16)
    positions = np.array([[0, 1, 2, 30_000, 4], [7, 8, 9, 10, -1]], np.int32)
    out = ops.rope(x, jnp.asarray(positions), theta=theta, factor=factor)
    for i in range(8):
        angle = positions.astype(np.float64)[..., None] * theta ** (-2 * i / 16) / factor
        a, b = (np.asarray(x[..., j], np.float64) for j in (i, i + 8))
        # At position 30,000 the float32 angle itself is off by up to 2e-3.
        near = np.s_[:, [0, 1, 2, 4]]
        want = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        for j, exact in zip((i, i + 8), want, strict=True):
            np.testing.assert_allclose(np.asarray(out)[..., j][near], exact[near], atol=2e-5)
            np.testing.assert_allclose(out[..., j], exact, atol=1e-2)


def test_geglu_uses_the_tanh_form_of_gelu():
    gate, up = draw(2, 40), draw(2, 40, seed=1)
    g, u = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    tanh = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    np.testing.assert_allclose(ops.geglu(gate, up), tanh * u, atol=TIGHT)
    exact = 0.5 * g * (1 + np.vectorize(math.erf)(g / np.sqrt(2)))
    assert np.abs(exact * u - ops.geglu(gate, up)).max() > 100 * TIGHT


@pytest.mark.parametrize("window", [1, 4, 5, 6, None])
def test_a_window_covers_exactly_its_number_of_keys_itself_included(window):
    positions = jnp.arange(12, dtype=jnp.int32)[None]
    seen = np.asarray(ops.causal_mask(positions, positions, window))[0].sum(axis=-1)
    np.testing.assert_array_equal(seen, np.minimum(np.arange(12) + 1, window or 12))


def test_the_mask_goes_by_position_not_by_column():
    keys = jnp.asarray([[-1, 7, 5, 6, -1]], jnp.int32)
    queries = jnp.asarray([[6, -1, 7]], jnp.int32)
    mask = np.asarray(ops.causal_mask(queries, keys, 2))[0]
    np.testing.assert_array_equal(mask[0], [False, False, True, True, False])
    assert not mask[1].any()  # padding sees nothing, an empty slot included
    np.testing.assert_array_equal(mask[2], [False, True, False, True, False])


def exact_attention(q, k, v, mask, scale):
    """Attention in float64, one head at a time."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        logits = q[b, :, n].astype(np.float64) @ k[b, :, n // group].T.astype(np.float64) * scale
        weights = np.where(mask[b], np.exp(logits - logits.max()), 0)
        total = weights.sum(-1, keepdims=True)
        out[b, :, n] = weights @ v[b, :, n // group] / np.where(total == 0, 1, total)
    return out


def blocks(q, k, v, positions, *, window, scale):
    """Attention over blocks of 64 keys."""
    size = 64

    def read(i):
        cut = [jax.lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in (k, v, positions)]
        return tuple(cut)

    bounds = (jnp.int32(0), jnp.int32(k.shape[1] // size))
    return attend_blocks(
        q, read, bounds, positions, num_kv_heads=k.shape[2], window=window, scale=scale
    )


def whole(q, k, v, positions, *, window, scale):
    """The reference."""
    return ops.attend(q, k, v, ops.causal_mask(positions, positions, window), scale=scale)


@pytest.mark.parametrize("implementation", [whole, ops.fresh_attend, blocks])
@pytest.mark.parametrize("window", [70, None])
def test_attention_equals_float64(implementation, window):
    length = 640  # more than one block of queries and of keys
    q, k, v = draw(2, length, 4, 8), draw(2, length, 2, 8, seed=1), draw(2, length, 2, 8, seed=2)
    positions = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    positions[1, :100] = ops.EMPTY  # padding on the left, whose rows see no key at all
    positions[1, 100:] -= 100
    mask = np.asarray(ops.causal_mask(jnp.asarray(positions), jnp.asarray(positions), window))
    run = jax.jit(implementation, static_argnames=("window", "scale"))
    out = run(*map(jnp.asarray, (q, k, v, positions)), window=window, scale=0.3)
    np.testing.assert_allclose(
        out, exact_attention(*map(np.asarray, (q, k, v, mask)), 0.3), atol=2e-5
    )
    np.testing.assert_array_equal(out[1, :100], 0.0)


def test_rows_without_a_key_have_zero_gradient():
    q, k, v = draw(1, 4, 2, 8), draw(1, 4, 1, 8), draw(1, 4, 1, 8)
    positions = jnp.full((1, 4), ops.EMPTY, jnp.int32)

    def loss(q):
        return ops.fresh_attend(q, k, v, positions, window=None, scale=1.0).sum()

    gradient = jax.grad(loss)(q)
    np.testing.assert_array_equal(gradient, 0.0)


def weights_of_every_kind(stack: jax.Array) -> dict[str, object]:
    """Layer 1 of a stack, held in each way a weight can be. All are exact in bfloat16."""
    narrow = jnp.asarray(stack, jnp.bfloat16)
    packed = pack_bfloat16(narrow)
    return {
        "array": narrow[1],
        "qtensor": pack_bfloat16(np.asarray(narrow[1])),
        "at": At(narrow, jnp.int32(1)),
        "at_qtensor": At(packed, jnp.int32(1)),
    }


@pytest.mark.parametrize("kind", ["array", "qtensor", "at", "at_qtensor"])
def test_linear_gives_the_same_bits_for_every_kind_of_weight(kind):
    stack = draw(3, 24, 16)
    weight = weights_of_every_kind(stack)[kind]
    x = jnp.asarray(draw(2, 5, 16), jnp.bfloat16)
    reference = ops.linear(x, jnp.asarray(stack[1], jnp.bfloat16))
    out = jax.jit(ops.linear)(x, weight)
    assert out.dtype == jnp.bfloat16
    assert out.shape == (2, 5, 24)
    np.testing.assert_array_equal(out, reference)
    np.testing.assert_array_equal(dense(weight), jnp.asarray(stack[1], jnp.bfloat16))


def test_embedding_scale_is_rounded_to_the_dtype_of_the_table():
    table, tokens = draw(20, 640), jnp.asarray([[3, 19]], jnp.int32)
    wide = ops.embed(tokens, jnp.asarray(table), scale=640**0.5)
    np.testing.assert_allclose(wide, np.asarray(table)[[[3, 19]]] * np.float32(640**0.5), rtol=1e-6)
    narrow = jnp.asarray(table, jnp.bfloat16)
    for held in (narrow, pack_bfloat16(narrow)):
        out = ops.embed(tokens, held, scale=640**0.5)
        np.testing.assert_array_equal(out, narrow[tokens] * jnp.bfloat16(25.25))


@pytest.mark.parametrize("rows", [100, 8192, 8192 * 2, 8192 + 7])
def test_unembed_decodes_a_stored_table_by_blocks_with_the_same_result(rows):
    table, x = jnp.asarray(draw(rows, 16), jnp.bfloat16), jnp.asarray(draw(3, 16), jnp.bfloat16)
    logits = ops.unembed(x, pack_bfloat16(table))
    assert logits.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    np.testing.assert_allclose(logits, exact, atol=1e-5)
    np.testing.assert_allclose(ops.unembed(x, table), exact, atol=1e-5)
