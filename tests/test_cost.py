"""Costs from a config equal what is really held."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gemlax import cache, cost, preset, tiny
from gemlax.checkpoints import text_weights
from gemlax.decoder import Decoder
from gemlax.presets import PRESETS

# Published, rounded to a tenth of a percent; and exact counts with numbers of tensors (Gemma 4
# without the K/V that a shared layer's checkpoint holds and no model reads).
MILLIONS = {"gemma-3-270m": 268.1, "gemma-3-1b": 999.9, "gemma-3-4b": 3880.0,
            "gemma-3-12b": 11_766.0, "gemma-3-27b": 27_009.0}  # fmt: skip
EXACT = {
    "gemma-4-e2b": (4_628_569_379, 540),
    "gemma-4-e4b": (7_463_013_418, 665),
    "gemma-4-12b": (11_907_350_320, 666),
    "gemma-4-26b-a4b": (25_233_141_790, 657),
    "gemma-4-31b": (30_697_345_340, 832),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_published_number_and_the_tensors(name):
    text = preset(name).text
    decoder = nnx.eval_shape(lambda: Decoder(text, layers="unroll", rngs=nnx.Rngs(0)))
    held = [v.get_value().size for _, v in nnx.to_flat_state(nnx.state(decoder))]
    found = (cost.parameters(text), len(text_weights(text)))
    assert found == (sum(held), len(held))
    if name in EXACT:
        assert found == EXACT[name]
    else:
        assert found[0] == pytest.approx(MILLIONS[name] * 1e6, rel=1e-3)
        assert found[1] == 13 * text.num_hidden_layers + 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kv_bytes_equal_what_the_caches_take(dtype):
    text = tiny(preset("gemma-3-27b")).text
    caches = jax.eval_shape(lambda: cache.new_caches(text, 1, 1024, jnp.dtype(dtype)))
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))
    assert cost.kv_bytes(text, 1024, jnp.dtype(dtype).itemsize) == held


def test_decode_flops_equal_what_xla_counts():
    text = tiny(preset("gemma-3-1b"), num_hidden_layers=6).text
    decoder = Decoder(text, layers="unroll", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(decoder)

    def step(state, ids, at):
        model = nnx.merge(graphdef, state)
        return model.logits(model(ids, at)[0][:, -1])

    one = jnp.zeros((1, 1), jnp.int32)
    counted = jax.jit(step).lower(state, one, one).compile().cost_analysis()["flops"]
    # Norms, rope and GELU come on top, at toy width a few percent.
    assert cost.decode_flops(text, 1) == pytest.approx(counted, rel=0.1)
    assert cost.decode_flops(text, 100) - cost.decode_flops(text, 1) == 4 * 4 * 32 * (5 * 31 + 99)


def test_decode_flops_count_the_experts_that_are_active():
    text = preset("gemma-4-26b-a4b").text
    every = dataclasses.replace(text, top_k_experts=128)
    idle = 30 * (128 - 8) * 3 * 2816 * 704
    assert cost.decode_flops(every, 9) - cost.decode_flops(text, 9) == 2 * idle
    # The name says it: about 4 billion weights are active, the head among them.
    assert cost.decode_flops(text, 1) / 2 == pytest.approx(4e9, rel=0.1)
