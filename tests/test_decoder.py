"""What must not change the numbers: how layers are held, a prompt is cut, padded and batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build, logits
from flax import nnx
from golden.conditioned import conditioned_weights

from gemlax import cache, ops
from gemlax.decoder import Decoder, weight_path
from gemlax.names import text_weights
from gemlax.presets import PRESETS, preset, tiny
from gemlax.sharding import Layout, make_mesh
from gemlax.weights import build_decoder, default_layers, named_weights

pytestmark = pytest.mark.deep

# Two periods of (5 sliding, 1 full) and a remainder of two, with two K/V heads and scaled rope.
CONFIG = tiny(preset("gemma-3-4b"), num_hidden_layers=14)
WINDOW = 32
LENGTHS = np.array([100, 71, 33])  # more than three windows; one just beyond one window
# Sizes whose unrolled tree is quick to make.
SHALLOW = ("gemma-3-270m", "gemma-4-e2b")
STACKS = ("scan", "index", "unroll")
# Sums of about 100 terms in another order, 14 layers deep; logits are of size about 1.
SAME = 5e-5


@pytest.fixture(scope="module")
def weights():
    return conditioned_weights("test_decoder", text_weights(CONFIG.text))


@pytest.fixture(scope="module")
def decoders(weights):
    return {stack: build(CONFIG, weights, stack) for stack in STACKS}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(7).integers(3, 512, (3, 100)).astype(np.int32)


@pytest.fixture(scope="module")
def full(decoders, tokens):
    """Logits of the whole prompts at once, unrolled: the reference of this file."""
    return logits(decoders["unroll"], tokens, LENGTHS)


def positions(lengths, width, *, left=False):
    columns = np.arange(width)[None]
    start = (width - lengths[:, None]) * left
    inside = (columns >= start) & (columns < start + lengths[:, None])
    return np.where(inside, columns - start, ops.EMPTY).astype(np.int32)


def difference(a, b, lengths=LENGTHS):
    """Largest difference at real positions, times the spread of the reference."""
    real = positions(lengths, a.shape[1]) != ops.EMPTY
    return np.abs(a - b)[real].max() / b[real].std()


@pytest.mark.parametrize("stack", ["scan", "index"])
def test_scanned_equals_unrolled(decoders, tokens, full, stack):
    assert difference(logits(decoders[stack], tokens, LENGTHS), full) < SAME


def test_the_two_ways_to_read_a_stack_give_the_same_bits(decoders, tokens):
    both = [logits(decoders[stack], tokens, LENGTHS) for stack in ("scan", "index")]
    np.testing.assert_array_equal(*both)


def run_chunks(decoder, tokens, at, chunk, dtype=jnp.float32):
    """Feed columns in chunks through a cache and return all logits."""
    graphdef, state = nnx.split(decoder)

    def step(state, tokens, at, caches):
        model = nnx.merge(graphdef, state)
        hidden, caches = model(tokens, at, caches)
        return model.logits(hidden), caches

    step = jax.jit(step, donate_argnums=3)
    pad = -tokens.shape[1] % chunk
    tokens = np.pad(tokens, ((0, 0), (0, pad)))
    at = np.pad(at, ((0, 0), (0, pad)), constant_values=ops.EMPTY)
    caches = cache.new_caches(CONFIG.text, len(tokens), 128, dtype)
    out = []
    for i in range(0, tokens.shape[1], chunk):
        piece = np.s_[:, i : i + chunk]
        some, caches = step(state, jnp.asarray(tokens[piece]), jnp.asarray(at[piece]), caches)
        out.append(np.asarray(some))
    return np.concatenate(out, axis=1)[:, : tokens.shape[1] - pad]


@pytest.mark.parametrize(
    ("stack", "chunk"),
    # Caches of blocks of 16 and rings have their own: test_cache.py.
    [("index", c) for c in (1, 7, WINDOW + 1, 100)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("index", WINDOW - 1), ("index", WINDOW), ("scan", 7))
    ]
    + [("unroll", WINDOW)],
)
def test_any_chunking_through_the_cache_equals_the_full_forward(
    decoders, tokens, full, stack, chunk
):
    out = run_chunks(decoders[stack], tokens, positions(LENGTHS, 100), chunk)
    assert difference(out, full) < SAME


def shifted(rows, lengths):
    """Move right-padded rows to the right end."""
    moved = np.zeros_like(rows)
    for row, length in enumerate(lengths):
        moved[row, rows.shape[1] - length :] = rows[row, :length]
    return moved


@pytest.mark.parametrize("chunk", [7, 100])
def test_padding_on_the_left_gives_the_same_logits(decoders, tokens, full, chunk):
    left = positions(LENGTHS, 100, left=True)
    out = run_chunks(decoders["index"], shifted(tokens, LENGTHS), left, chunk)
    for row, length in enumerate(LENGTHS):
        error = np.abs(out[row, 100 - length :] - full[row, :length]).max()
        assert error < SAME * full.std()


def test_every_amount_of_left_padding_gives_the_same_logits(decoders):
    width, length = 105, 40
    ids = np.random.default_rng(3).integers(3, 512, length)
    graphdef, state = nnx.split(decoders["index"])
    run = jax.jit(lambda s, t, p: nnx.merge(graphdef, s)(t, p)[0])
    outs = []
    for pad in range(width - length + 1):
        row, at = np.zeros((1, width), np.int32), np.full((1, width), ops.EMPTY, np.int32)
        row[0, pad : pad + length], at[0, pad : pad + length] = ids, np.arange(length)
        outs.append(
            np.asarray(run(state, jnp.asarray(row), jnp.asarray(at)))[0, pad : pad + length]
        )
    assert max(np.abs(out - outs[0]).max() for out in outs) < SAME


def test_a_row_in_a_ragged_batch_equals_the_row_alone(decoders, tokens, full):
    for row, length in enumerate(LENGTHS):
        alone = logits(decoders["index"], tokens[row : row + 1, :length], LENGTHS[row : row + 1])
        assert np.abs(alone[0] - full[row, :length]).max() < SAME * full.std()


def test_padding_rows_stay_finite(decoders, tokens):
    lengths = np.array([100, 1, 33])
    assert np.isfinite(logits(decoders["index"], tokens, lengths)).all()


@pytest.mark.parametrize("stack", ["index", pytest.param("unroll", marks=pytest.mark.slow)])
def test_bfloat16_cache_stored_as_bits_equals_the_full_forward(weights, tokens, stack):
    narrow = {name: w.astype(jnp.bfloat16) for name, w in weights.items()}
    decoder = build(CONFIG, narrow, stack, dtype=jnp.bfloat16)
    stored = cache.new_caches(CONFIG.text, 1, 16, jnp.bfloat16)
    assert {c.k.dtype for c in stored.values()} == {jnp.dtype(jnp.uint16)}  # on CPU
    exact = logits(build(CONFIG, {n: w.astype("f4") for n, w in narrow.items()}), tokens, LENGTHS)
    full = logits(decoder, tokens, LENGTHS)
    out = run_chunks(decoder, tokens, positions(LENGTHS, 100), 25, jnp.bfloat16)
    # 8 bits a number: both are off by roundings, the cache must not add to them.
    assert 0 < difference(full, exact) < 0.2
    assert difference(out, exact) < 1.5 * difference(full, exact)


@pytest.mark.parametrize(
    ("dtype", "implementation", "layers"),
    [(jnp.float32, "xla", "unroll"), (jnp.float32, "cpu", "scan"), (jnp.bfloat16, "xla", "scan")],
)
def test_the_default_is_the_faster_layout_of_the_cpu(weights, dtype, implementation, layers):
    if implementation == "cpu" and ops.kernels().instructions is None:
        pytest.skip("no native kernels")

    def fill(name, out):
        out[...] = weights[name].astype(out.dtype)

    with ops.implementation(implementation):
        assert default_layers(jnp.dtype(dtype)) == layers
        assert build_decoder(CONFIG.text, fill, dtype=dtype).layout == layers
    if dtype == jnp.float32:
        assert default_layers(jnp.dtype(dtype), Layout(make_mesh("tensor=8"))) == "unroll"


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_no_two_matrices_of_a_new_decoder_are_alike(layers):
    made = Decoder(CONFIG.text, layers=layers, rngs=nnx.Rngs(0))
    starts = [w.flat[:8].tobytes() for _, w in named_weights(made) if w.ndim > 1]
    assert len(set(starts)) == len(starts) == 1 + 14 * 7


@pytest.mark.parametrize("stack", STACKS)
def test_weights_come_back_under_their_names_bit_for_bit(decoders, weights, stack):
    back = dict(named_weights(decoders[stack]))
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(back[name], weight, err_msg=name)


def test_a_weight_is_a_row_of_its_stack():
    text = preset("gemma-3-4b").text
    name = "layers.31.mlp.up_proj.weight"
    assert weight_path(text, "unroll", name) == (("layers", 31, "mlp", "up_proj", "weight"), None)
    path = ("layers", 1, "sliding_attention", "mlp", "up_proj", "weight")
    assert weight_path(text, "scan", name) == (path, 1)
    assert weight_path(text, "scan", "norm.weight") == (("norm", "weight"), None)


@pytest.mark.parametrize(
    ("name", "layers"),
    [(name, "scan") for name in PRESETS]
    + [
        pytest.param(name, "unroll", marks=() if name in SHALLOW else pytest.mark.slow)
        for name in PRESETS
    ],
)
def test_full_width_shapes_are_those_of_the_checkpoint(name, layers):
    config = preset(name).text
    decoder = nnx.eval_shape(lambda: Decoder(config, layers=layers, rngs=nnx.Rngs(0)))
    flat = dict(nnx.to_flat_state(nnx.state(decoder)))
    shapes = text_weights(config)
    for canonical, shape in shapes.items():
        path, row = weight_path(config, layers, canonical)
        assert flat[path].get_value().shape[row is not None :] == shape, canonical
    held = sum(v.get_value().size for v in flat.values())
    assert held == sum(int(np.prod(shape)) for shape in shapes.values())
