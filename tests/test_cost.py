"""Costs from a config equal what is really held."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gemlax import cache, cost, preset, tiny
from gemlax.decoder import Decoder
from gemlax.names import text_weights
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


def held_bytes(caches) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(caches))


KV_CONFIGS = {"tiny 4b": tiny(preset("gemma-3-4b")).text, "270m": preset("gemma-3-270m").text,
              "tiny e2b": tiny(preset("gemma-4-e2b")).text}  # fmt: skip


@pytest.mark.parametrize("name", KV_CONFIGS)
@pytest.mark.parametrize("capacity", [256, 4096, 32_768])
def test_kv_bytes_equal_what_the_caches_take(name, capacity):
    text = KV_CONFIGS[name]

    def held(dtype, **options):
        return held_bytes(
            jax.eval_shape(lambda: cache.new_caches(text, 3, capacity, dtype, **options))
        )

    assert 3 * cost.kv_bytes(text, capacity, 4) == held(jnp.float32)
    assert 3 * cost.kv_bytes(text, capacity, 2) == held(jnp.bfloat16)
    assert 3 * cost.kv_bytes(text, capacity, 1, scale_bytes=4) == held(jnp.float32, storage="int8")


def test_the_table_holds_the_bytes_of_arrays_that_are_there():
    text = KV_CONFIGS["tiny 4b"]
    row = cost.kv_memory(text)[0]
    caches = cache.new_caches(text, 1, row.tokens, jnp.bfloat16)
    assert row.bfloat16_bytes == sum(a.nbytes for a in jax.tree.leaves(caches))
    # 29 layers with a ring of 32 + 511 slots in blocks of 256, and 5 that hold all 4096 tokens.
    bare = (29 * 768 + 5 * 4096) * 2 * 2 * 32 * 2
    assert row.bfloat16_bytes == pytest.approx(bare, rel=0.02)
    assert row.bfloat16_bytes > bare


def test_the_table_ends_where_the_model_does():
    contexts = {name: [r.tokens for r in cost.kv_memory(preset(name).text)] for name in PRESETS}
    assert contexts["gemma-3-1b"] == [4096, 32_768]
    assert contexts["gemma-3-4b"] == contexts["gemma-4-31b"] == [4096, 32_768, 131_072]


def test_naive_kv_bytes_hold_every_token_in_every_layer():
    assert cost.naive_kv_bytes(preset("gemma-3-4b").text, 1000, 2) == 34 * 1000 * 2 * 4 * 256 * 2
    # Of 35 layers 15 own K/V; every fifth is full, with heads of 512.
    heads = 28 * 256 + 7 * 512
    assert cost.naive_kv_bytes(preset("gemma-4-e2b").text, 1000, 2) == 1000 * 2 * heads * 2


def test_decode_bytes_are_the_weights_once_and_the_keys_and_values_seen():
    text = tiny(preset("gemma-3-4b")).text
    seen = 2 * 2 * 32 * (29 * 32 + 5 * 100)  # K and V, 2 heads of 32; a window of 32
    assert cost.decode_bytes(text, 100, 3, 4, 2) == 4 * cost.parameters(text) + 3 * 2 * seen


def test_decode_bytes_leave_out_idle_experts_and_rows_of_the_per_layer_table():
    text = preset("gemma-4-26b-a4b").text
    experts = 30 * 3 * 2816 * 704 * 128
    weights = cost.decode_bytes(text, 1, 1, 1, 0)
    assert weights == pytest.approx(cost.parameters(text) - experts * 120 / 128, abs=30)
    assert cost.decode_bytes(text, 1, 2000, 1, 0) == cost.parameters(text)
    text = preset("gemma-4-e2b").text
    rows = 35 * 256
    assert cost.decode_bytes(text, 1, 1, 1, 0) == cost.parameters(text) - rows * 262_143
    assert cost.decode_bytes(text, 1, 3, 1, 0) - cost.decode_bytes(text, 1, 1, 1, 0) == 2 * rows
