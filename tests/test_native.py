"""The native CPU kernels against the plain JAX versions, which are compared with `gguf` elsewhere.

Each test runs with every instruction set that this CPU has, on the programs that were compiled for
the first; the slow ones run the file with other numbers of threads.
"""

import functools
import importlib.util
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codes import FORMATS, stored

from gemlax import ops
from gemlax.cache.slots import LayerView, SlotCache
from gemlax.ops import cpu
from gemlax.ops.storage import decode, encode
from gemlax.qtensor import At, Mixed, QTensor, dense
from gemlax.sharding import Layout, make_mesh

KERNELS = [format for format in FORMATS if format != "nf4"]
# Activations are rounded to 16 bits of the row's largest: 1.5e-4 of the result's size was measured.
EXACT = {"float32": 5e-6, "bfloat16": 5e-6}
ROUNDED = 5e-4


SETS = [name for name in ("portable", "avx2", "avx512") if cpu.use(name)]
cpu.use(None)


@pytest.fixture(autouse=True, params=SETS)
def instructions(request):
    assert cpu.use(request.param)
    yield request.param
    cpu.use(None)


def bound(format):
    return EXACT.get(format, ROUNDED)


def both(x, weight):
    """x @ weight.T by the kernel, and by plain JAX."""
    x = jnp.asarray(x)
    with ops.implementation("xla"):
        expected = ops.linear(x, weight)
    (found,) = jax.jit(cpu.multiply)(x, weight)
    return np.asarray(found), np.asarray(expected, np.float64)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_the_library_numbers_every_format_but_those_of_plain_jax():
    assert set(ops.kernels().formats) == set(FORMATS) - {"nf4"}


def test_this_machine_has_the_kernels(instructions):
    assert ops.kernels_in_use() == instructions
    assert not cpu.use("altivec")
    assert ops.kernels_in_use() == instructions


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 16, 43])
@pytest.mark.parametrize("format", KERNELS)
def test_a_product_equals_the_reference(format, rows):
    stack = stored(format, 3, 37, 768)
    found, expected = both(draw(rows, 768), At(stack, jnp.int32(2)))
    assert found.shape == (rows, 37)
    assert np.abs(found - expected).max() < bound(format) * expected.std()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("features", "width"), [(1, 1), (1, 31), (5, 33), (17, 100), (300, 8)])
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_a_product_of_odd_size_equals_the_reference(format, features, width, rows):
    found, expected = both(draw(rows, width), stored(format, 0, features, width))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.sqrt(width))


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 40])
@pytest.mark.parametrize("groups", [3, 20, 22, 66])
def test_int4_of_any_number_of_groups_equals_the_reference(groups, rows):
    """Entries are read eight, four and one at a time; 640 weights are 20 groups, 2112 are 66."""
    width = 32 * groups
    x = draw(rows, width) + 0.5  # zero points and the sums of activations count
    found, expected = both(x, stored("int4", 0, 5, width))
    assert np.abs(found - expected).max() < ROUNDED * expected.std()


@pytest.mark.parametrize("format", KERNELS)
def test_one_feature_of_one_block_and_no_rows(format):
    width = 256 if format.endswith("_k") else 32
    weight = stored(format, 0, 1, width)
    found, expected = both(draw(1, width), weight)
    size = np.abs(dense(weight)).max() * np.sqrt(width)
    assert np.abs(found - expected).max() < bound(format) * size
    assert cpu.multiply(jnp.zeros((0, width)), weight)[0].shape == (0, 1)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e25])
@pytest.mark.parametrize("format", KERNELS)
def test_huge_and_tiny_activations(format, scale):
    weight = stored(format, 0, 9, 256)
    found, expected = both(draw(2, 256) * np.float32(scale), weight)
    assert np.isfinite(found).all()
    # Below 1e-38 the reference itself flushes some products to zero.
    lost = 1e-34 if scale < 1e-36 else 0
    assert np.abs(found - expected).max() <= bound(format) * expected.std() + lost


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", KERNELS)
def test_what_is_not_finite_stays_so_and_stays_in_its_row(format, value):
    weight, x = stored(format, 0, 9, 256), np.array(draw(3, 256))
    clean = both(x, weight)[0]
    x[1, 77] = value
    found, expected = both(x, weight)
    assert not np.isfinite(found[1]).any()
    assert not np.isfinite(expected[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


def test_a_weight_that_is_not_finite_reaches_the_result():
    codes = np.array(draw(4, 64))
    codes[2, 5] = np.nan
    weight = QTensor(jnp.asarray(codes), "float32")
    found, _ = both(draw(1, 64), weight)
    assert np.isnan(found[0]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_codes_need_no_alignment(offset):
    weight = stored("q8_0", 0, 8, 64)
    raw = np.zeros(weight.codes.size + 64, np.uint8)
    raw[offset : offset + weight.codes.size] = np.asarray(weight.codes).ravel()
    rows = raw[offset : offset + weight.codes.size].reshape(weight.codes.shape)
    found, expected = both(draw(1, 64), QTensor(jnp.asarray(rows), "q8_0"))
    assert np.abs(found - expected).max() < ROUNDED * expected.std()


@pytest.mark.parametrize("format", KERNELS)
def test_a_decoded_weight_equals_the_reference_bit_for_bit(format):
    weight = At(stored(format, 3, 21, 512), jnp.int32(1))
    found = jax.jit(cpu.decode)(weight)
    np.testing.assert_array_equal(found, np.asarray(dense(weight), np.float32))


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_several_weights_at_once_equal_each_alone(rows):
    weights = [stored("q8_0", 0, 33, 256), At(mixed(), jnp.int32(2)), stored("bfloat16", 0, 5, 256)]
    x = draw(rows, 256)
    together = jax.jit(cpu.multiply)(x, *weights)
    assert [out.shape for out in together] == [(rows, 33), (rows, 6), (rows, 5)]
    for weight, out in zip(weights, together, strict=True):
        np.testing.assert_array_equal(out, cpu.multiply(x, weight)[0])


def mixed():
    parts = tuple(stored(format, n, 6, 256) for format, n in (("q5_0", 2), ("q8_0", 1)))
    return Mixed(parts, jnp.array([0, 1, 0], jnp.int32), jnp.array([0, 0, 1], jnp.int32))


def test_the_layers_of_a_mixed_stack_equal_those_of_its_parts():
    stack, x = mixed(), draw(2, 256)
    assert stack.shape == (3, 6, 256)

    @jax.jit
    def scanned(x, stack):
        layers = jnp.arange(3, dtype=jnp.int32)
        return jax.lax.scan(lambda c, i: (c, ops.linear(x, At(stack, i))), 0, layers)[1]

    found = scanned(x, stack)
    with ops.implementation("xla"):
        expected = jax.jit(lambda x, stack: [ops.linear(x, At(stack, i)) for i in range(3)])(
            x, stack
        )
        part = ops.linear(x, At(stack.parts[1], jnp.int32(0)))
    np.testing.assert_array_equal(expected[1], part)
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() < ROUNDED * np.std(b)


@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_are_those_of_the_reference_and_stop_at_the_codes(rows):
    weight, x, slope = At(mixed(), jnp.int32(2)), draw(rows, 256), draw(rows, 6, seed=1)

    def loss(x):
        return (ops.linear(x, weight) * slope).sum()

    found = jax.grad(loss)(x)
    np.testing.assert_allclose(found, slope @ np.asarray(dense(weight)), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError):
        jax.vmap(lambda x: cpu.multiply(x, weight))(x.reshape(-1, 1, 256))


@pytest.mark.parametrize("index", [-1, 3])
def test_a_layer_that_is_not_there_is_an_error(index):
    with pytest.raises(Exception, match="of a stack of 3"):
        cpu.multiply(draw(1, 256), At(stored("int8", 3, 4, 256), jnp.int32(index)))


def test_what_no_kernel_serves_says_so():
    weight = stored("int8", 0, 4, 256)
    for other, reason in (
        (stored("nf4", 0, 4, 256), "no kernel reads nf4"),
        (jnp.ones((4, 256)), "the weight is not held as codes"),
        (stored("int8", 2, 4, 256), "a weight of 3 axes is not a matrix"),
    ):
        assert ops.fault("decode", "cpu", other) == ops.fault("multiply", "cpu", other, 1) == reason
    with pytest.raises(ValueError, match="scales"):
        cpu.decode(QTensor(weight.codes, "int8", weight.scales[:, :-1]))


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_a_layer_of_floats_is_read_where_it_lies_for_a_few_rows(rows):
    stack, x = jnp.asarray(draw(3, 48, 40)), jnp.asarray(draw(rows, 40, seed=1))
    multiply = lambda x, i: ops.linear(x, At(stack, i))  # noqa: E731
    np.testing.assert_allclose(jax.jit(multiply)(x, 2), x @ stack[2].T, rtol=1e-5, atol=1e-5)
    few = rows <= cpu.MAX_ROWS
    assert ("dynamic_slice" not in str(jax.make_jaxpr(multiply)(x, 2))) == few


# Attention.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 1), (1, 2), (5, 4), (16, 4), (75, 2)])
def test_attention_over_a_cache_equals_the_reference(length, kv_heads, window, dtype):
    batch, slots, heads, rows = 3, 200, 4, 2
    size = 112 if length < 16 else 40  # those of a multiple of 16 may be read in place
    rng = np.random.default_rng(length)
    held = np.zeros((), np.uint16 if dtype == "bfloat16" else np.float32)
    k, v = (encode((draw(rows, batch, slots, kv_heads, size, seed=s)), held) for s in (1, 2))
    ring = window is not None
    if length > cpu.MAX_ROWS and ops.kernels_in_use() != "avx512":
        return  # XLA attends
    last = np.array([7 + length, 90, 190])
    at = np.full((batch, slots), ops.EMPTY, np.int32)
    for row in range(batch):
        known = np.arange(max(0, last[row] + 1 - slots), last[row] + 1)
        at[row, known % slots] = known
    if ring:
        at[2] = rng.permutation(at[2])  # positions, not places, say what is seen
    positions = (last[:, None] - length + 1 + np.arange(length)[None]).astype(np.int32)
    positions[1, 0] = ops.EMPTY
    q = draw(batch, length, heads, size)
    found = jax.jit(functools.partial(cpu.attend, ring=ring, window=window, scale=0.2))(
        q, k, v, jnp.asarray(at), jnp.int32(1), jnp.asarray(positions)
    )
    wide = [np.asarray(decode(x, jnp.float32))[1] for x in (k, v)]
    mask = ops.causal_mask(jnp.asarray(positions), jnp.asarray(at), window)
    expected = ops.attend(q, *map(jnp.asarray, wide), mask, scale=0.2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)
    if length > 1:
        assert not np.asarray(found[1, 0]).any()  # padding sees nothing
    # The same with the rows of the cache in another order, and fewer of them.
    order = jnp.array([2, 0], jnp.int32)
    some = jax.jit(functools.partial(cpu.attend, ring=ring, window=window, scale=0.2))(
        q[order], k, v, jnp.asarray(at), jnp.int32(1), jnp.asarray(positions)[order], order
    )
    np.testing.assert_array_equal(some, found[order])


@pytest.mark.parametrize("size", [8, 16])
def test_attention_passes_on_what_is_not_a_number(size):
    k = np.array(draw(1, 1, 300, 1, size))
    k[0, 0, 170, 0, 3] = np.nan
    at = np.arange(300, dtype=np.int32)[None]
    out = cpu.attend(
        jnp.ones((1, 2, 1, size)), jnp.asarray(k), jnp.asarray(k), jnp.asarray(at), 0,
        jnp.array([[160, 299]], jnp.int32), ring=False, window=None, scale=1.0,
    )  # fmt: skip
    assert np.isfinite(out[0, 0]).all()
    assert np.isnan(out[0, 1]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 40_000), (0, 7)])
def test_the_place_of_the_largest_equals_the_reference(shape):
    x = np.array(draw(*shape))
    if shape[1] > 1 and shape[0]:
        x[0] = np.minimum(x[0], 1)  # many equals
        x[1, [20_000, 35_000]] = -np.nan, np.nan
        x[2] = -np.inf
        x[2, [17_000, 30_000]] = -0.0, 0.0
    np.testing.assert_array_equal(jax.jit(cpu.arg_max)(x), np.argmax(x, axis=-1))


def test_other_caches_are_left_to_the_reference():
    caches = jnp.zeros((1, 1, 16, 1, 8), jnp.int8)
    assert "float32 or bfloat16" in ops.fault("attend", "cpu", jnp.ones((1, 1, 1, 8)), caches)
    assert ops.choose("attend", jnp.ones((1, 1, 1, 8)), caches) == "xla"
    many = jnp.ones((1, 17, 1, 8)), jnp.zeros((1, 1, 16, 1, 8))
    expected = None if ops.kernels_in_use() == "avx512" else "16 tokens of a row, not 17"
    assert (expected or "None") in str(ops.fault("attend", "cpu", *many))


def test_a_backend_without_a_kernel_says_so_and_xla_does_everything():
    assert ops.fault("arg_max", "tpu") == "it has no kernel for arg_max"
    assert ops.fault("arg_max", "cpu") is ops.fault("arg_max", "xla") is None
    floats = stored("float32", 0, 4, 256)
    assert ops.fault("decode", "cpu", floats) is None
    assert ops.fault("multiply", "cpu", floats, 17) == "XLA multiplies 17 rows of floats faster"


# Choosing.


def test_no_choice_follows_the_one_around_it():
    def in_use(name):
        with ops.implementation(name):
            return ops.kernels_in_use()

    assert in_use("xla") is None
    assert in_use(None) is not None
    with ops.implementation("xla"):
        assert in_use(None) is None
        assert in_use("cpu") is not None


def test_a_layout_traces_for_its_own_implementation():
    chosen = []

    def note(x):
        chosen.append(ops.choose("arg_max"))
        return x

    for layout in (Layout(), Layout(None, "xla"), Layout(make_mesh("data=8"), "cpu")):
        layout.jit(note)(jnp.zeros(8))
    assert chosen == ["cpu", "xla", "xla"]


def test_without_the_library_everything_runs_on_xla_and_one_line_says_so(monkeypatch, caplog):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gemlax._native" else real(name)
    )
    cpu.library.cache_clear()
    ops.backend._warn.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert ops.kernels_in_use() is None
            x, weight = draw(2, 256), stored("q8_0", 0, 5, 256)
            np.testing.assert_allclose(ops.linear(x, weight), x @ np.asarray(dense(weight)).T, 1e-4)
        assert [record.message for record in caplog.records] == [
            "no native CPU kernels, stored weights run on XLA, more slowly: they were not built "
            "when gemlax was installed"
        ]
        assert ops.kernels() == (None, (), "they were not built when gemlax was installed")
        with ops.implementation("cpu"), pytest.raises(NotImplementedError, match="when gemlax is"):
            ops.kernels_in_use()
    finally:
        cpu.library.cache_clear()


def test_a_library_that_does_not_load_is_not_used(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(broken))
    )
    cpu.library.cache_clear()
    try:
        assert ops.kernels_in_use() is None
        assert "cannot be used" in caplog.text
        assert str(broken) in ops.kernels().reason
    finally:
        cpu.library.cache_clear()


def test_the_environment_asks_for_an_instruction_set(instructions):
    if instructions != SETS[0]:
        pytest.skip("one is enough")
    done = subprocess.run(
        [sys.executable, "-c", "from gemlax import ops; print(ops.kernels_in_use())"],
        env=os.environ | {"GEMLAX_KERNELS": "portable"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "portable", done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"NPROC": "1"}, id="1 thread", marks=pytest.mark.slow),
        pytest.param({"NPROC": "8"}, id="8 threads", marks=pytest.mark.slow),
    ],
)
def test_the_same_holds_with(environment, instructions):
    if instructions != SETS[0]:
        pytest.skip("the file itself runs with every set")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "not same_holds", __file__],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_view_of_a_cache_uses_the_kernel():
    caches = SlotCache(
        (draw(2, 1, 64, 1, 16)), (draw(2, 1, 64, 1, 16, seed=3)),
        jnp.arange(64, dtype=jnp.int32)[None], is_ring=True,
    )  # fmt: skip
    view = LayerView(caches, jnp.int32(1), jnp.array([[63]], jnp.int32))
    q = draw(1, 1, 2, 16)
    out = {}
    for name in ("xla", "cpu"):
        with ops.implementation(name):
            attend = jax.jit(lambda q: view.attend(q, window=20, scale=0.3))
            out[name] = attend(q)
            assert ("gemlax_attention" in attend.lower(q).as_text()) == (name == "cpu")
    np.testing.assert_allclose(out["cpu"], out["xla"], rtol=1e-5, atol=1e-6)
