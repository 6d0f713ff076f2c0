"""Caches against the full forward: rings that wrap, chunks, padding, drafts, snapshots, 8 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build, logits
from caches import can_resume
from flax import nnx
from golden.conditioned import conditioned_weights

from gemlax import cache, ops
from gemlax.config import LayerSpec, RopeSpec
from gemlax.names import text_weights
from gemlax.ops.storage import Int8, decode, empty, encode
from gemlax.presets import preset, tiny

# Layers that share K/V read a ring too: [4 S, F] x 3 with their own, then one period without.
CONFIG = tiny(preset("gemma-4-e2b"), num_hidden_layers=20)
TEXT = CONFIG.text
WINDOW = 32
CHUNK = 7
RING = 48  # 32 + 7 - 1, in blocks of 16
CAPACITY = 128
LENGTHS = np.array([120, 71, 33])  # wraps twice, once, not at all
SAME = 5e-5  # as in test_decoder.py


@pytest.fixture(scope="module")
def decoder():
    return build(CONFIG, conditioned_weights("test_cache", text_weights(TEXT)), "index")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(11).integers(3, 512, (3, 120)).astype(np.int32)


@pytest.fixture(scope="module")
def full(decoder, tokens):
    return logits(decoder, tokens, LENGTHS)


@pytest.fixture(scope="module")
def run(decoder):
    """Return a step: (tokens [B, T], positions [B, T], caches) to (logits, caches), on NumPy."""
    graphdef, state = nnx.split(decoder)

    @functools.partial(jax.jit, donate_argnums=3)
    def step(state, tokens, at, caches, rows):
        model = nnx.merge(graphdef, state)
        hidden, caches = model(tokens, at, caches, cache_rows=rows)
        return model.logits(hidden), caches

    def call(tokens, at, caches, rows=None):
        arrays = (jnp.asarray(tokens, jnp.int32), jnp.asarray(at, jnp.int32))
        out, caches = step(state, *arrays, caches, None if rows is None else jnp.asarray(rows))
        return np.asarray(out), caches

    return call


def rings(batch=3, **options):
    return cache.new_caches(TEXT, batch, CAPACITY, jnp.float32, chunk=CHUNK, **options)


def feed(run, caches, tokens, starts, stops, chunk=CHUNK, *, left=False):
    """Feed each row's tokens from its start to its stop in chunks; return logits by position."""
    batch = len(starts)
    out = np.full((batch, tokens.shape[1], TEXT.vocab_size), np.nan, np.float32)
    longest = int((stops - starts).max())
    for begin in range(0, longest, chunk):
        at = np.full((batch, chunk), ops.EMPTY, np.int32)
        for row in range(batch):
            here = np.arange(starts[row] + begin, min(starts[row] + begin + chunk, stops[row]))
            place = slice(chunk - len(here), None) if left else slice(len(here))
            at[row, place] = here
        picked = np.take_along_axis(tokens, np.maximum(at, 0), axis=1)
        some, caches = run(picked, at, caches)
        row, column = np.nonzero(at != ops.EMPTY)
        out[row, at[row, column]] = some[row, column]
    return out, caches


def worst(out, full, starts, stops):
    return max(
        np.abs(out[row, starts[row] : stops[row]] - full[row, starts[row] : stops[row]]).max()
        for row in range(len(out))
    )


ZERO = np.zeros(3, int)


def test_the_ring_is_as_long_as_the_window_and_a_chunk():
    caches = rings()
    sliding, dense = caches["sliding_attention"], caches["full_attention"]
    assert sliding.is_ring
    assert not dense.is_ring
    assert sliding.k.shape[2] == RING
    assert dense.k.shape[2] == CAPACITY


@pytest.mark.parametrize(
    ("window", "chunk", "slots"),
    [(512, 512, 1024), (1024, 512, 1536), (1024, 1, 1024), (32, 7, 48)],
)
def test_ring_slots_are_the_formula_in_whole_blocks(window, chunk, slots):
    spec = LayerSpec("sliding_attention", window, 1, 16, RopeSpec(1e4), 1.0, 96)
    assert spec.cache_slots(1 << 20, chunk) == slots
    assert spec.cache_slots(16, chunk) == 16


@pytest.mark.parametrize(
    ("chunk", "left"),
    [
        # Token by token: test_matrix.py.
        *(pytest.param(1, left, marks=pytest.mark.slow) for left in (False, True)),
        (5, False),
        pytest.param(5, True, marks=pytest.mark.slow),
        (CHUNK, False),
        (CHUNK, True),
    ],
)
def test_rings_that_wrap_equal_the_full_forward(run, tokens, full, chunk, left):
    out, _ = feed(run, rings(), tokens, ZERO, LENGTHS, chunk, left=left)
    assert worst(out, full, ZERO, LENGTHS) < SAME * full.std()


def test_rings_read_in_several_blocks_equal_the_full_forward(
    run, decoder, tokens, full, monkeypatch
):
    monkeypatch.setattr(cache.slots, "BLOCK", 8)
    graphdef, state = nnx.split(decoder)

    def step(tokens, at, caches):
        hidden, caches = jax.jit(lambda s, *args: nnx.merge(graphdef, s)(*args))(
            state, jnp.asarray(tokens), jnp.asarray(at), caches
        )
        return np.asarray(decoder.logits(hidden)), caches

    # A lambda is traced anew on each call: few calls, from a cache that is already half full.
    starts = LENGTHS - CHUNK
    _, caches = feed(run, rings(), tokens, ZERO, starts)
    out, _ = feed(step, caches, tokens, starts, LENGTHS)
    assert worst(out, full, starts, LENGTHS) < SAME * full.std()


def test_a_ring_refuses_a_chunk_that_overwrites_what_it_sees(run, tokens):
    most = RING - WINDOW + 1
    with pytest.raises(ValueError, match=f"takes {most} tokens at a time, got {most + 1}"):
        feed(run, rings(), tokens, ZERO, LENGTHS, most + 1)
    feed(run, rings(), tokens, ZERO, ZERO + most, most)


def test_the_ring_slot_of_an_overwritten_token_holds_the_newer_one(run, tokens):
    _, caches = feed(run, rings(), tokens, ZERO, LENGTHS)
    held = np.asarray(caches["sliding_attention"].positions)
    for row, length in enumerate(LENGTHS):
        expected = np.arange(max(0, length - RING), length)
        assert sorted(p for p in held[row] if p != ops.EMPTY) == list(expected)
        assert all(p % RING == slot for slot, p in enumerate(held[row]) if p != ops.EMPTY)


def test_rejected_drafts_leave_no_trace(run, tokens, full):
    starts = LENGTHS - 20
    _, caches = feed(run, rings(), tokens, ZERO, starts)
    drafts = np.random.default_rng(5).integers(3, 512, tokens.shape)
    _, caches = feed(run, caches, drafts, starts, starts + 4)
    accepted = starts + np.array([0, 0, 0])
    caches = cache.rollback(caches, accepted)
    out, _ = feed(run, caches, tokens, accepted, LENGTHS)
    assert worst(out, full, accepted, LENGTHS) < SAME * full.std()


def test_a_row_keeps_its_accepted_drafts_while_another_rolls_back(run, tokens, full):
    starts = LENGTHS - 20
    _, caches = feed(run, rings(), tokens, ZERO, starts)
    _, caches = feed(run, caches, tokens, starts, starts + 6)
    accepted = starts + np.array([6, 2, 0])
    out, _ = feed(run, cache.rollback(caches, accepted), tokens, accepted, LENGTHS)
    assert worst(out, full, accepted, LENGTHS) < SAME * full.std()


def test_a_ring_says_what_it_has_overwritten(run, tokens):
    _, caches = feed(run, rings(), tokens, ZERO, LENGTHS)
    # Row 0 holds positions 72 to 119: a query at 103 sees from 72 on, one at 102 from 71.
    for kept, fine in ((120, True), (103, True), (102, False), (10, False)):
        kept = np.minimum(np.array([kept, 71, 33]), LENGTHS)
        assert can_resume(TEXT, caches, kept).tolist() == [fine, True, True]
    # What was rolled back is not held, though its slots are those of the positions before.
    caches = cache.rollback(caches, np.array([110, 0, 0]))
    _, caches = feed(run, caches, tokens, np.array([110, 0, 0]), np.array([116, 5, 5]))
    assert can_resume(TEXT, caches, np.array([116, 5, 5])).all()
    assert not can_resume(TEXT, caches, np.array([118, 5, 5]))[0]


@pytest.mark.parametrize("implementation", ["xla", None])  # None: the kernels, where there are some
def test_a_few_rows_of_a_larger_cache_run_alone_and_touch_no_other(
    run, tokens, full, implementation
):
    with ops.implementation(implementation):
        caches = rings(5)
        rows = np.array([4, 0, 2], np.int32)
        on_rows = functools.partial(run, rows=rows)
        _, caches = feed(on_rows, caches, tokens, ZERO, LENGTHS - 20)
        others = {kind: np.asarray(stack.k)[:, [1, 3]] for kind, stack in caches.items()}
        assert not any(map(np.any, others.values()))
        saved = {kind: np.array(stack.k[:, 4]) for kind, stack in caches.items()}
        # The second row goes on alone, then the other two in another order.
        order = [1], [2, 0]
        for some in order:
            out, caches = feed(
                functools.partial(run, rows=rows[some]), caches, tokens[some],
                LENGTHS[some] - 20, LENGTHS[some],
            )  # fmt: skip
            assert worst(out, full[some], LENGTHS[some] - 20, LENGTHS[some]) < SAME * full.std()
            if some == [1]:
                for kind, stack in caches.items():
                    np.testing.assert_array_equal(stack.k[:, 4], saved[kind])


def test_pages_and_lists_have_no_rows_to_choose(decoder):
    one = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="stacked"):
        decoder(one, one, cache.new_list(TEXT, 1, 16, jnp.float32), cache_rows=one[0])


@pytest.mark.parametrize(("storage", "limit"), [(None, SAME), ("int8", 0.4)])
def test_a_cache_that_grows_into_a_ring_keeps_its_tokens(run, tokens, full, storage, limit):
    small = cache.new_caches(TEXT, 3, 32, jnp.float32, chunk=CHUNK, storage=storage)
    assert not small["sliding_attention"].is_ring
    kept = np.minimum(LENGTHS, 30)
    _, caches = feed(run, small, tokens, ZERO, kept)
    caches = cache.resume(TEXT, caches, kept, CAPACITY, CHUNK)
    assert caches["sliding_attention"].is_ring
    out, _ = feed(run, caches, tokens, kept, LENGTHS)
    assert worst(out, full, kept, LENGTHS) < limit * full.std()


def test_8_bit_codes_are_within_half_a_step_of_every_value():
    x = np.random.default_rng(8).standard_normal((5, 3, 2, 32)).astype(np.float32)
    x[0, 0] = 0
    x[1] *= 1e30
    x[2] *= 1e-30
    back = np.asarray(decode(encode(jnp.asarray(x), empty(x.shape, jnp.float32, "int8")), "f4"))
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    assert (np.abs(back - x) <= step * 0.5001).all()
    assert (np.abs(back - x) > 0).any()


def attended(storage, q, k, v):
    """Attend to a cache of one layer that holds all of k and v."""
    at = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    positions = jnp.full(at.shape, ops.EMPTY, jnp.int32)
    stacks = [empty((1, *k.shape), jnp.float32, storage) for _ in range(2)]
    caches = cache.record_positions({"full_attention": cache.SlotCache(*stacks, positions)}, at)
    view = caches["full_attention"].layer(jnp.int32(0), at, TEXT.layers[4], None)
    return np.asarray(view.update(k, v).attend(q, window=None, scale=0.25))


def test_attention_over_8_bit_codes_is_within_its_bound():
    """A logit moves by at most e = scale |q|1 max|k| / 254, a weight by a factor exp(2e)."""
    random = np.random.default_rng(9)
    q, k, v = (jnp.asarray(random.standard_normal((1, 40, 2, 16)), jnp.float32) for _ in range(3))
    error = np.abs(attended("int8", q, k, v) - attended(None, q, k, v))
    most_k, most_v = (np.abs(x).max() for x in (k, v))
    moved = 0.25 * np.abs(q).sum(axis=-1, keepdims=True) * most_k / 254
    bound = np.expm1(2 * moved) * most_v + most_v / 254
    assert (error <= bound).all()
    assert error.max() > 0


def test_8_bit_caches_move_the_logits_by_a_few_hundredths(run, tokens, full):
    caches = rings(storage="int8")
    assert all(isinstance(c.k, Int8) for c in caches.values())
    out, caches = feed(run, caches, tokens, ZERO, LENGTHS)
    assert all(c.k.codes.dtype == jnp.int8 for c in caches.values())
    errors = [(out[r, :n] - full[r, :n]).ravel() for r, n in enumerate(LENGTHS)]
    rms = np.sqrt(np.square(np.concatenate(errors)).mean()) / full.std()
    print(f"RMS error {rms:.4f} x std(logits)")
    assert SAME < rms < 0.05  # measured: 0.03, 20 layers deep


def test_8_bit_caches_take_a_quarter_of_the_bytes_and_their_scales():
    plain, small = rings(), rings(storage="int8")
    for kind, spec in ((spec.kind, spec) for spec in TEXT.layers if spec.owns_kv):
        codes = small[kind].k.codes.nbytes + small[kind].k.scales.nbytes
        assert codes == plain[kind].k.nbytes // 4 * (spec.head_dim + 4) // spec.head_dim
