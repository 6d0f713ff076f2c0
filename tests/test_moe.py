"""Experts: the router against NumPy, every way to run experts against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemlax import ops
from gemlax.qtensor import At, pack_bfloat16

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 32, 12
WAYS = ("gather", "sorted", "ragged")
# Sums of 32 terms of size about 1 in another order.
SAME = 3e-5


def draw(*shape: int, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed + len(shape)).standard_normal(shape)
    return jnp.asarray(values * shape[-1] ** -0.5, jnp.float32)


def routed(rows: int, seed: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows with weights and ids of distinct experts; a few experts get many rows, most none."""
    random = np.random.default_rng(seed)
    liked = random.permutation(EXPERTS)[:20]
    ids = np.stack([random.permutation(liked)[:TOP_K] for _ in range(rows)])
    weights = random.random((rows, TOP_K)).astype(np.float32)
    return draw(rows, HIDDEN) * 5, jnp.asarray(weights), jnp.asarray(ids, jnp.int32)


@pytest.fixture(scope="module")
def weights():
    return draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER, seed=9)


def exact(x, weights, ids, gate_up, down):
    """In float64, pair by pair."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros(x.shape)
    for row, place in np.ndindex(ids.shape):
        expert = int(ids[row, place])
        both = gate_up[expert] @ x[row]
        gate, up = both[:INNER], both[INNER:]
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        out[row] += down[expert] @ (gelu * up) * weights[row, place]
    return out


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("way", ["dense", *WAYS, None])
def test_every_way_gives_each_row_the_sum_of_its_experts(weights, way, rows):
    x, share, ids = routed(rows)
    run = jax.jit(ops.experts, static_argnames="algorithm")
    out = run(x, share, ids, *weights, algorithm=way)
    np.testing.assert_allclose(out, exact(x, share, ids, *weights), atol=SAME)


def test_the_gate_comes_first_and_swapping_it_is_seen(weights):
    x, share, ids = routed(7)
    swapped = jnp.roll(weights[0], INNER, axis=1)
    out = ops.experts(x, share, ids, swapped, weights[1])
    assert np.abs(out - exact(x, share, ids, *weights)).max() > 100 * SAME


@pytest.mark.parametrize("way", ["dense", *WAYS])
def test_experts_of_a_layer_of_a_stack_are_read_by_index(weights, way):
    x, share, ids = routed(20)
    stacks = [jnp.stack([jnp.zeros_like(w), w, jnp.ones_like(w)]) for w in weights]
    held = [At(stack, jnp.int32(1)) for stack in stacks]
    out = jax.jit(lambda a, b: ops.experts(x, share, ids, a, b, algorithm=way))(*held)
    np.testing.assert_allclose(
        out, ops.experts(x, share, ids, *weights, algorithm="dense"), atol=SAME
    )


@pytest.mark.parametrize("way", ["dense", *WAYS])
def test_experts_held_as_bfloat16_bits_equal_the_array(weights, way):
    x, share, ids = routed(9)
    narrow = [w.astype(jnp.bfloat16) for w in weights]
    wide = ops.experts(x, share, ids, *(w.astype(jnp.float32) for w in narrow))
    packed = [pack_bfloat16(w) for w in narrow]
    out = ops.experts(x.astype(jnp.bfloat16), share, ids, *packed, algorithm=way)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), wide, atol=0.05)


@pytest.mark.parametrize("way", ["gather", "sorted"])
def test_gradients_equal_the_reference(weights, way):
    x, share, ids = routed(12)

    def loss(x, share, gate_up, down, algorithm):
        out = ops.experts(x, share, ids, gate_up, down, algorithm=algorithm)
        return (out * jnp.arange(HIDDEN, dtype=jnp.float32)[None]).sum()

    both = [
        jax.grad(loss, argnums=(0, 1, 2, 3))(x, share, *weights, name) for name in ("dense", way)
    ]
    for reference, gradient in zip(*both, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=2e-4)


def test_gradients_beside_frozen_experts_equal_the_reference(weights):
    x, share, ids = routed(12)
    stacks = [jnp.stack([jnp.zeros_like(w), w]) for w in weights]
    slope = draw(12, HIDDEN)

    def loss(x, share, way, held):
        return (ops.experts(x, share, ids, *held, algorithm=way) * slope).sum()

    expected = jax.grad(loss, argnums=(0, 1))(x, share, "dense", weights)
    held = [At(stack, jnp.int32(1)) for stack in stacks]
    found = jax.grad(loss, argnums=(0, 1))(x, share, "sorted", held)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_gathering_takes_memory_for_one_expert_however_many_there_are():
    temporaries = {}
    for count in (16, 128):
        gate_up, down = draw(count, 2 * INNER, HIDDEN), draw(count, HIDDEN, INNER)
        x, share = draw(1, HIDDEN), jnp.ones((1, TOP_K), jnp.float32)
        ids = jnp.arange(TOP_K, dtype=jnp.int32)[None]
        for way in ("gather", "ragged"):
            lowered = jax.jit(ops.experts, static_argnames="algorithm").lower(
                x, share, ids, gate_up, down, algorithm=way
            )
            temporaries[way, count] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporaries["gather", 128] <= 1.1 * temporaries["gather", 16]
    # The twin: XLA:CPU's ragged product runs every expert on every row.
    assert temporaries["ragged", 128] > 4 * temporaries["ragged", 16]


def test_the_number_of_blocks_that_run_is_that_of_the_pairs_not_of_the_experts():
    """Skipped blocks cost a branch: a prompt of 32 rows in 2 experts runs 16 blocks of 32."""
    seen = []

    def count(_):
        seen.append(1)

    gate_up, down = draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)
    x, share = draw(256, HIDDEN), jnp.ones((256, 2), jnp.float32)
    ids = jnp.tile(jnp.asarray([[3, 90]], jnp.int32), (256, 1))
    original = ops.moe._expert

    def counted(*args):
        jax.debug.callback(count, args[0][0, 0])
        return original(*args)

    ops.moe._expert = counted
    try:
        jax.block_until_ready(ops.experts(x, share, ids, gate_up, down, algorithm="sorted"))
        jax.effects_barrier()
    finally:
        ops.moe._expert = original
    assert len(seen) == 16


def test_the_router_norms_the_residual_and_scales_once():
    x, proj = draw(9, HIDDEN) * 7, draw(EXPERTS, HIDDEN) * 30
    random = np.random.default_rng(1)
    scale = random.uniform(0.5, 2, HIDDEN).astype(np.float32)
    per_expert = random.uniform(0.5, 2, EXPERTS).astype(np.float32)
    weights, ids = ops.route(
        x, proj, jnp.asarray(scale), jnp.asarray(per_expert), top_k=TOP_K, eps=1e-6
    )
    normed = np.asarray(x, np.float64)
    normed /= np.sqrt((normed**2).mean(-1, keepdims=True) + 1e-6)
    logits = normed * scale * HIDDEN**-0.5 @ np.asarray(proj, np.float64).T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)[:, :TOP_K]
    np.testing.assert_array_equal(ids, order)
    chosen = np.take_along_axis(p, order, -1)
    chosen = chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, chosen * per_expert[order], rtol=1e-4)
    # The traps: the scale applied twice or never, and no renormalisation.
    for wrong in (chosen, chosen * per_expert[order] ** 2):
        assert np.abs(weights - wrong).max() > 0.01
