"""Known bugs of Gemma 3 implementations: the parity tests would catch each of them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference.gemma3_traps import TRAPS
from reference.toys import GEMMA_3, toy
from reference.traps import (
    cases,
    check_far,
    mlp_error,
    query_head_n_reads_head_n_mod_k,
    rope_of_adjacent_pairs,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gemlax import ops


@pytest.mark.parametrize(("trap", "size"), cases(TRAPS))
def test_a_wrong_variant_is_far_from_transformers(trap, size):
    check_far(trap, size, TRAPS[trap].error(size))


@pytest.mark.parametrize("size", GEMMA_3)
def test_the_mlps_of_a_period_equal_transformers(size):
    case = toy(size)
    assert mlp_error(case, case.config, case.weights) <= 1


def test_the_reordering_variants_change_only_the_order():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4, 8)), jnp.float32)
    at = jnp.arange(3, dtype=jnp.int32)[None]
    # With K = N, head n reads head n either way.
    same = query_head_n_reads_head_n_mod_k(x, x, x, at, window=None, scale=1.0)
    expected = ops.fresh_attend(x, x, x, at, window=None, scale=1.0)
    np.testing.assert_array_equal(same, expected)
    # Position 0 is not rotated.
    turned = rope_of_adjacent_pairs(x, at, theta=1e4, factor=1.0)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        turned[0, 1, 0, 1], x[0, 1, 0, 1] * np.cos(1) + x[0, 1, 0, 0] * np.sin(1), rtol=1e-5
    )


@pytest.mark.parametrize("hidden", [640, 1152, 2560, 3840, 5376])
def test_the_embedding_scale_is_rounded_to_bfloat16_with_the_table(hidden):
    table = torch.from_numpy(
        np.random.default_rng(0).standard_normal((8, hidden)).astype(np.float32)
    ).bfloat16()
    module = Gemma3TextScaledWordEmbedding(8, hidden, 0, embed_scale=hidden**0.5).bfloat16()
    with torch.no_grad():
        module.weight.copy_(table)
        expected = module(torch.arange(8)[None]).float().numpy()
    stored = jnp.asarray(table.float().numpy()).astype(jnp.bfloat16)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    found = np.asarray(ops.embed(tokens, stored, scale=hidden**0.5).astype(jnp.float32))
    np.testing.assert_array_equal(found, expected)
    unrounded = (stored.astype(jnp.float32) * hidden**0.5).astype(jnp.bfloat16)
    assert (np.asarray(unrounded.astype(jnp.float32)) != expected[0]).any()
