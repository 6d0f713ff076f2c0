"""Log-probabilities by blocks against those of all logits: values, gradients, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemlax import ops
from gemlax.decoder import Decoder
from gemlax.formats import encode
from gemlax.presets import preset, tiny
from gemlax.qtensor import from_numpy
from gemlax.tune.losses import Head, chunked_logprobs, preference_loss, token_logprobs

pytestmark = pytest.mark.optimised

# float32 sums of 512 exponentials in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
SMALL = tiny(preset("gemma-3-270m"), num_hidden_layers=1).text
BATCH, LENGTH = 4, 40


def decoder_of(cap=None, format=None):
    config = dataclasses.replace(SMALL, hidden_size=96, final_logit_softcapping=cap)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    if format is not None:
        table = np.asarray(decoder.embed_tokens.weight.get_value())
        stored = from_numpy(*encode(table, format), format)
        decoder.embed_tokens.weight = nnx.Param(stored, axes=("vocab", "embed"), matrix=True)
    return decoder


def inputs(decoder):
    rng = np.random.default_rng(3)
    hidden = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 96)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, SMALL.vocab_size, (BATCH, LENGTH)), jnp.int32)
    wanted = jnp.asarray(rng.random((BATCH, LENGTH)) < [[0.5], [0.1], [1.0], [0.0]])
    weight = jnp.asarray(rng.random((BATCH, LENGTH)), jnp.float32)
    return hidden, labels, wanted, weight


def both(decoder, frozen, groups=1):
    """Loss and slopes by hidden states and, unless frozen, by the table; reference first."""
    hidden, labels, wanted, weight = inputs(decoder)
    graph, state = nnx.split(decoder)

    def reference(state, hidden):
        found = token_logprobs(nnx.merge(graph, state), hidden, labels)
        return (jnp.where(wanted, found, 0.0) * weight).sum()

    def chunked(state, hidden):
        head = Head.of(nnx.merge(graph, state), frozen=frozen)
        return (chunked_logprobs(head, hidden, labels, wanted, groups=groups) * weight).sum()

    which = 1 if frozen else (0, 1)
    return [jax.jit(jax.value_and_grad(f, which))(state, hidden) for f in (reference, chunked)]


@pytest.mark.parametrize(("cap", "groups"), [(None, 1), (30.0, 2)])
@pytest.mark.parametrize("frozen", [True, False])
def test_blocks_give_the_log_probabilities_and_slopes_of_all_logits(cap, groups, frozen):
    expected, found = both(decoder_of(cap), frozen, groups)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize(("format", "implementation"), [("int8", None), ("nf4", "xla")])
def test_a_stored_table_gives_the_slopes_of_its_floats(format, implementation, monkeypatch):
    from gemlax.tune import losses

    monkeypatch.setattr(losses, "_TABLE_ROWS", 200)  # two blocks and a rest
    decoder = decoder_of(30.0, format)
    with ops.implementation(implementation):
        found = both(decoder, True)[1]
    table = decoder.embed_tokens.weight.get_value().dense()
    decoder.embed_tokens.weight = nnx.Param(table, axes=("vocab", "embed"), matrix=True)
    expected = both(decoder, True)[0]
    native = implementation is None and format == "int8" and ops.cpu.live() is not None
    # Kernels round activations to 16 bits.
    close = {"rtol": 1e-3, "atol": 1e-3} if native else CLOSE
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, **close)


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


def test_the_preference_loss_is_that_of_its_paper():
    policy, reference = np.array([-1.0, -3.0, -2.0, -1.5]), np.array([-2.0, -2.5, -2.0, -1.0])
    margins = 0.1 * np.array([1.0 + 0.5, 0.0 + 0.5])
    arrays = (jnp.asarray(a, jnp.float32) for a in (policy, reference))
    loss, margin = preference_loss(*arrays, beta=0.1)
    np.testing.assert_allclose(margin, margins, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margins)), rtol=1e-6)
