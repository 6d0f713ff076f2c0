"""Rows of several examples, segment masks and remat: the same losses and gradients as without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import SHARING, SMALL, WIDTH, decoder_of, examples, rows, trainer

from gemlax import ops
from gemlax.tune.data import Example, Pair
from gemlax.tune.packing import Batches, Rows, pack

pytestmark = pytest.mark.deep

# float32 sums in another order, over some 100 tokens and a few layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SAME_LOSS = 1e-5


@functools.cache
def program(training):
    return jax.jit(jax.value_and_grad(lambda *args: training._totals(*args)[0]))


def sums(training, batch):
    """The summed loss over a batch and its gradients."""
    return program(training)(training.values, training._frozen, training._put(batch))


def assert_same(a, b, close=CLOSE):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(np.abs(y).max(), 1e-6)
        np.testing.assert_allclose(x / scale, y / scale, **close)


@pytest.fixture(scope="module")
def small():
    return trainer(decoder_of(SMALL))


def with_b(training):
    """Give B values, so that A has a gradient."""
    rng = np.random.default_rng(2)
    for name, value in training.values.items():
        if name.endswith("lora.b"):
            new = jnp.asarray(0.05 * rng.normal(size=value.shape), jnp.float32)
            training.values[name] = new
    return training


def test_a_packed_row_has_the_loss_and_gradients_of_its_examples_alone(small):
    """Sliding layers too: the window of 32 begins anew with each example."""
    training = with_b(small)
    chosen = examples(8, SMALL.vocab_size, 12, 24)
    packed, alone = (pack(chosen, WIDTH, several=several) for several in (True, False))
    assert len(packed.tokens) < len(alone.tokens) == 8
    fill = ((0, 8 - len(packed.tokens)), (0, 0))  # so that one program serves all
    values = zip(packed, (0, -1, -1, 0, 0), strict=True)
    packed = Rows(*(np.pad(a, fill, constant_values=v) for a, v in values))
    loss, expected = sums(training, packed), sums(training, alone)
    assert_same(loss, expected)
    np.testing.assert_allclose(loss[0], expected[0], rtol=SAME_LOSS)
    blind = packed._replace(segments=np.zeros_like(packed.segments))
    wrong = sums(training, blind)[0]
    assert abs(wrong - expected[0]) > 100 * SAME_LOSS * abs(expected[0])


@pytest.mark.parametrize("window", [None, 20])
def test_long_rows_are_masked_by_segments_block_by_block(window):
    length = 300  # more than one block of queries
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 2, 8)), jnp.float32) for _ in range(3))
    at = np.concatenate([np.arange(130), np.arange(120), np.full(50, -1)])
    own = np.concatenate([np.zeros(130), np.ones(120), np.full(50, -1)])
    positions, segments = (jnp.asarray(a[None], jnp.int32) for a in (at, own))
    how = {"window": window, "scale": 0.3}
    whole = ops.fresh_attend(q, k, v, positions, segments=segments, **how)
    for part in (slice(0, 130), slice(130, 250)):
        cut = [a[:, part] for a in (q, k, v, positions)]
        np.testing.assert_allclose(whole[:, part], ops.fresh_attend(*cut, **how), atol=1e-6)
    assert not np.asarray(whole[:, 250:]).any()


REMAT = [(SHARING, "scan", "index", 4)]
MORE = [(SMALL, "unroll", "index", 4), (SHARING, "unroll", "slice", None),
        (SMALL, "scan", "index", 4), (SHARING, "scan", "slice", None)]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "read", "rank"),
    [*REMAT, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_remat_changes_neither_loss_nor_gradients(config, layers, read, rank):
    """K/V that later layers share goes through it too (trap: sharing lost under remat)."""
    found = []
    for remat in (True, False):
        training = trainer(decoder_of(config, layers=layers, read=read), rank=rank, remat=remat)
        found.append(sums(with_b(training), rows(config, 2)))
    assert_same(*found)
    assert all(
        np.abs(g).max() > 0 for name, g in found[0][1].items() if not name.endswith("lora.a")
    )


def saved_faults(remat: bool) -> list[str]:
    """With remat no scan keeps the weights of attention, [..., T, T], for each layer."""
    training = trainer(decoder_of(SMALL), remat=remat)
    batch = training._put(rows(SMALL, 2))
    jaxpr = jax.make_jaxpr(
        lambda values: jax.grad(lambda v: training._totals(v, training._frozen, batch)[0])(values)
    )(training.values)
    return [
        str(var.aval)
        for eqn in scans(jaxpr.jaxpr)
        for var, made in zip(eqn.outvars, eqn.params["jaxpr"].jaxpr.outvars, strict=True)
        # What a scan keeps of each turn has one axis more than what the turn made.
        if var.aval.ndim > made.aval.ndim and var.aval.shape[-2:] == (WIDTH, WIDTH)
    ]


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    yield from scans(inner.jaxpr)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    yield from scans(inner)


def test_remat_keeps_nothing_of_the_inside_of_a_layer():
    assert saved_faults(remat=True) == []
    assert saved_faults(remat=False)


def test_segments_are_refused_beside_caches():
    from gemlax import cache

    decoder = decoder_of(SMALL)
    ids = jnp.zeros((1, 4), jnp.int32)
    caches = cache.new_caches(SMALL, 1, 16, jnp.float32)
    with pytest.raises(ValueError, match="segments are for calls without"):
        decoder(ids, ids, caches, segments=ids)


def test_rows_hold_every_example_once_with_positions_and_labels_of_its_own():
    chosen = examples(30, 512)
    made = pack(chosen, 32)
    assert (made.tokens != 0).sum() == sum(len(e.ids) for e in chosen)
    assert made.weights.sum() == sum(sum(e.learnt[1:]) for e in chosen)
    found = []
    for r in range(len(made.tokens)):
        for s in range(made.segments[r].max() + 1):
            at = np.flatnonzero(made.segments[r] == s)
            assert made.positions[r, at].tolist() == list(range(len(at)))
            assert made.labels[r, at[:-1]].tolist() == made.tokens[r, at[1:]].tolist()
            assert made.weights[r, at[-1]] == 0
            found.append(made.tokens[r, at].tolist())
    assert sorted(found) == sorted(e.ids for e in chosen)


def test_an_epoch_holds_each_row_once_and_a_batch_is_a_function_of_its_step():
    chosen = examples(23, 512)
    batches = Batches(chosen, 32, 4, seed=3, packed=False)
    assert batches.per_epoch == 6
    for epoch in range(2):
        rows = [batches[epoch * 6 + i] for i in range(6)]
        ids = [row[row != 0].tolist() for one in rows for row in one.tokens if row.any()]
        assert sorted(ids) == sorted(e.ids for e in chosen)
    again = Batches(chosen, 32, 4, seed=3, packed=False)
    assert all((a == b).all() for a, b in zip(again[8], batches[8], strict=True))
    assert not (batches[8].tokens == batches[2].tokens).all()


def test_pairs_stay_together():
    pairs = [Pair(Example([2, i, 9], [False, True, True]), Example([2, i], [False, True]))
             for i in range(3, 10)]  # fmt: skip
    batches = Batches(pairs, 16, 2, seed=1)
    assert batches.per_epoch == 4
    for step in range(4):
        tokens = batches[step].tokens
        assert tokens.shape == (4, 16)
        assert (tokens[0::2, 1] == tokens[1::2, 1]).all()
