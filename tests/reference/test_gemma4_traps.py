"""Known bugs of Gemma 4 implementations: the parity tests would catch each of them."""

import adapters
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference.gemma4_traps import ALL, MISFITS, TRAPS, rope_of_first_dims, rope_over_rotated_dims
from reference.toys import toy
from reference.traps import cases, check_far, mlp_error, real
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from gemlax import ops


@pytest.mark.parametrize(("trap", "size"), cases(TRAPS))
def test_a_wrong_variant_is_far_from_transformers(trap, size):
    check_far(trap, size, TRAPS[trap].error(size))


@pytest.mark.parametrize("name", MISFITS)
def test_weights_do_not_fit_a_wrong_config(name):
    sizes, change = MISFITS[name]
    for size in sizes:
        case = toy(size)
        with pytest.raises((AssertionError, KeyError)):
            adapters.build(change(case.config), case.weights)


@pytest.mark.parametrize("size", ALL)
def test_the_mlps_of_a_period_equal_transformers(size):
    case = toy(size)
    assert mlp_error(case, case.config, case.weights) <= 1


def test_the_rope_variants_change_only_what_they_say():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 64)), jnp.float32)
    at = jnp.arange(3, dtype=jnp.int32)[None]
    full = {"theta": 1e4, "factor": 1.0, "rotated": 1.0}
    for wrong in (rope_of_first_dims, rope_over_rotated_dims):
        np.testing.assert_allclose(wrong(x, at, **full), real["rope"](x, at, **full), atol=1e-5)
    partly = full | {"rotated": 0.25}
    turned = rope_of_first_dims(x, at, **partly)
    np.testing.assert_array_equal(turned[..., 16:], x[..., 16:])
    # The pair (0, 8), not (0, 32), turns, by the same angle.
    right = real["rope"](x[..., [0, 1, 8, 9]], at, theta=1e4 ** (2 / 32))
    np.testing.assert_allclose(turned[..., [0, 1, 8, 9]], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [256, 1536, 2560, 2816, 3840, 5376])
def test_the_embedding_scale_is_rounded_to_bfloat16_with_the_table(width):
    table = torch.from_numpy(
        np.random.default_rng(0).standard_normal((8, width)).astype(np.float32)
    ).bfloat16()
    module = Gemma4TextScaledWordEmbedding(8, width, 0, embed_scale=width**0.5).bfloat16()
    with torch.no_grad():
        module.weight.copy_(table)
        expected = module(torch.arange(8)[None]).float().numpy()
    stored = jnp.asarray(table.float().numpy()).astype(jnp.bfloat16)
    found = ops.embed(jnp.arange(8, dtype=jnp.int32)[None], stored, scale=width**0.5)
    np.testing.assert_array_equal(np.asarray(found.astype(jnp.float32)), expected)
