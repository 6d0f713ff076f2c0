"""Log-probabilities by blocks against those of all logits: values, gradients, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tuning import token_logprobs

from gemlax import ops
from gemlax.decoder import Decoder
from gemlax.formats import encode
from gemlax.ops import Head, chunked_logprobs, crossentropy
from gemlax.presets import preset, tiny
from gemlax.qtensor import from_numpy, pack_bfloat16

pytestmark = pytest.mark.programs

# float32 sums of 512 exponentials in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
SMALL = tiny(preset("gemma-3-270m"), num_hidden_layers=1).text
BATCH, LENGTH = 4, 40


def decoder_of(cap=None, format=None):
    config = dataclasses.replace(SMALL, hidden_size=96, final_logit_softcapping=cap)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    if format is not None:
        table = decoder.embed_tokens.weight.get_value()
        if format == "bfloat16":
            stored = pack_bfloat16(table.astype(jnp.bfloat16))
        else:
            stored = from_numpy(*encode(np.asarray(table), format), format)
        decoder.embed_tokens.weight = nnx.Param(stored, axes=("vocab", "embed"), matrix=True)
    return decoder


def inputs(decoder):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 96)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, SMALL.vocab_size, (BATCH, LENGTH)), jnp.int32)
    wanted = jnp.asarray(rng.random((BATCH, LENGTH)) < [[0.5], [0.1], [1.0], [0.0]])
    weight = jnp.asarray(rng.random((BATCH, LENGTH)), jnp.float32)
    return hidden, labels, wanted, weight


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of tokens, the last not full, and of the table: two and a rest."""
    monkeypatch.setattr(crossentropy, "_TOKENS", 24)
    monkeypatch.setattr(crossentropy, "_TABLE_ROWS", 200)


def both(decoder, frozen, groups=1, shards=1):
    """Loss and slopes by hidden states and, unless frozen, by the table; reference first."""
    hidden, labels, wanted, weight = inputs(decoder)
    graph, state = nnx.split(decoder)

    def reference(state, hidden):
        found = token_logprobs(nnx.merge(graph, state), hidden, labels)
        return (jnp.where(wanted, found, 0.0) * weight).sum()

    def chunked(state, hidden):
        decoder = nnx.merge(graph, state)
        table, cap = decoder.head.weight.get_value(), decoder.config.final_logit_softcapping
        head = Head(table, cap, frozen, shards)
        return (chunked_logprobs(head, hidden, labels, wanted, groups=groups) * weight).sum()

    which = 1 if frozen else (0, 1)
    return [jax.jit(jax.value_and_grad(f, which))(state, hidden) for f in (reference, chunked)]


@pytest.mark.parametrize(("cap", "groups", "shards"), [(None, 1, 1), (30.0, 2, 1), (30.0, 2, 2)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_give_the_log_probabilities_and_slopes_of_all_logits(cap, groups, shards, frozen):
    expected, found = both(decoder_of(cap), frozen, groups, shards)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("format", ["int8", "nf4", "bfloat16"])
@pytest.mark.usefixtures("small_blocks")
def test_a_stored_table_gives_the_slopes_of_its_floats(format):
    decoder = decoder_of(30.0, format)
    found = both(decoder, True)[1]
    table = decoder.embed_tokens.weight.get_value().dense()
    decoder.embed_tokens.weight = nnx.Param(table, axes=("vocab", "embed"), matrix=True)
    expected = both(decoder, True)[0]
    # Logits are made of bfloat16 in both; only here the slopes are as well.
    close = {"rtol": 2e-2, "atol": 2e-3} if format == "bfloat16" else CLOSE
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, **close)


@pytest.mark.usefixtures("small_blocks")
def test_the_slope_of_a_label_that_is_nearly_certain_keeps_its_digits():
    """A model that has learnt its task has little slope left: the difference of near equals."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(SMALL.vocab_size, 96))
    labels = np.array([[3, 70, 299]])
    hidden = table[labels] / 3.0
    logits = hidden[0] @ table.T
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    own = np.take_along_axis(chances, labels.T, -1)
    assert (1 - own).max() < 1e-6
    others = chances.copy()
    np.put_along_axis(others, labels.T, 0.0, -1)
    expected = others.sum(-1, keepdims=True) * table[labels[0]] - others @ table

    def loss(hidden):
        head = Head(jnp.asarray(table, jnp.float32), None, True)
        ids = jnp.asarray(labels, jnp.int32)
        return chunked_logprobs(head, hidden, ids, ids >= 0).sum()

    found = jax.grad(loss)(jnp.asarray(hidden, jnp.float32))[0]
    error = np.abs(found - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() < 1e-3  # of exponents near 30 in float32


def memory_faults(loss, vocabulary: int, frozen: bool) -> list[str]:
    """Temporaries of value and slopes must stay below an eighth of float32 [B, T, V].

    Where the table is trained, its slope is made beside them.
    """
    shapes = (2, 512, 64), (vocabulary, 64)
    hidden, table = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    which = 0 if frozen else (0, 1)
    program = jax.jit(jax.value_and_grad(loss, which)).lower(hidden, table, ids).compile()
    size, limit = program.memory_analysis().temp_size_in_bytes, 2 * 512 * vocabulary * 4 // 8
    limit += 0 if frozen else vocabulary * 64 * 4
    return [f"temporaries of {size} bytes > {limit}"] if size >= limit else []


@pytest.mark.parametrize(("frozen", "cap"), [(True, None), (True, 30.0), (False, 30.0)])
def test_logits_of_all_tokens_never_exist(frozen, cap):
    def chunked(hidden, table, labels):
        head = Head(table, cap, frozen)
        return chunked_logprobs(head, hidden, labels, labels >= 0).sum()

    def whole(hidden, table, labels):
        logits = ops.softcap(ops.unembed(hidden.reshape(-1, 64), table), cap)
        own = jnp.take_along_axis(logits, labels.reshape(-1, 1), axis=-1)[:, 0]
        return (own - jax.nn.logsumexp(logits, axis=-1)).sum()

    assert memory_faults(chunked, 32_768, frozen) == []
    assert memory_faults(whole, 32_768, frozen)
