"""The gates of test_programs.py on Linen, rings, pools and lists, with bad twins."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from test_programs import CAPACITY, TINY, copy_faults, num_bytes, temporaries, temporary_faults

from gemlax import cache, linen, ops
from gemlax.weights import build_decoder

pytestmark = [pytest.mark.programs, pytest.mark.deep]

# The code that users get, where it is timed or compared.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}

FORMS = [  # each pair of two of them
    ("NNX", "float32", "xla"),
    ("NNX", "bfloat16", "cpu"),
    ("Linen", "bfloat16", "xla"),
    ("Linen", "float32", "cpu"),
]


@functools.cache
def made(front, dtype):
    decoder = build_decoder(TINY, lambda name, out: None, dtype=dtype, layers="scan")
    if front == "NNX":
        graphdef, state = nnx.split(decoder)
        return state, lambda state, *args, **rows: nnx.merge(graphdef, state)(*args, **rows)
    module = linen.Decoder(TINY, read="index", dtype=jnp.dtype(dtype))
    return linen.to_linen(decoder), module.apply


def lower_step(
    front, dtype, caches, metadata=None, *, donate=True, implementation="xla", rows=None
):
    """Lower a loop of decode steps, as an engine runs it, over donated caches.

    Attention is XLA's unless the native kernel's program is what is asked for. `rows`: of the
    caches, those that run.
    """
    state, call = made(front, dtype)
    tokens = 2 if rows is None else rows.shape[0]
    flat = metadata is not None
    ids = jax.ShapeDtypeStruct((tokens,) if flat else (tokens, 1), jnp.int32)

    def run(state, ids, caches, metadata, steps, rows=None):
        some = {} if rows is None else {"cache_rows": rows}

        def body(i, carry):
            at = jnp.full(ids.shape, i, jnp.int32)
            hidden, caches = call(state, carry[0], at, carry[1], metadata, **some)
            return carry[0] + hidden[..., 0].astype(jnp.int32), caches

        return jax.lax.fori_loop(0, steps, body, (ids, caches))

    jitted = jax.jit(run, donate_argnums=2 if donate else ())
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    with ops.implementation(implementation):
        return jitted.lower(state, ids, caches, metadata, steps, rows)


def compile_step(*args, **options):
    return lower_step(*args, **options).compile()


def stacked(capacity, dtype, **options):
    return jax.eval_shape(
        lambda: cache.new_caches(TINY, 2, capacity, jnp.dtype(dtype), chunk=16, **options)
    )


@pytest.mark.parametrize(("front", "dtype", "implementation"), FORMS)
def test_scanned_steps_write_dense_and_ring_caches_in_place(front, dtype, implementation):
    caches = stacked(CAPACITY, dtype)
    assert caches["sliding_attention"].is_ring
    program = compile_step(front, dtype, caches, implementation=implementation)
    assert temporary_faults(program, caches) == []
    assert copy_faults(program, caches) == []


ONE_ROW = jax.ShapeDtypeStruct((1,), jnp.int32)


@pytest.mark.parametrize(("dtype", "implementation"), [("float32", "xla"), ("bfloat16", "cpu")])
def test_a_row_of_many_runs_without_a_copy_of_them(dtype, implementation):
    caches = stacked(CAPACITY, dtype)
    program = compile_step("NNX", dtype, caches, implementation=implementation, rows=ONE_ROW)
    assert temporary_faults(program, caches) == []
    assert copy_faults(program, caches) == []


def test_twin_that_takes_the_row_out_and_puts_it_back_fails():
    state, call = made("NNX", "float32")

    def run(state, ids, caches, rows):
        one = jax.tree.map(lambda x: x[:, rows] if x.ndim > 2 else x[rows], caches)
        hidden, one = call(state, ids, ids, one)

        def put(old, new):
            return old.at[:, rows].set(new) if old.ndim > 2 else old.at[rows].set(new)

        return hidden, jax.tree.map(put, caches, one)

    caches, ids = stacked(CAPACITY, "float32"), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with ops.implementation("xla"):
        lowered = jax.jit(run, donate_argnums=2).lower(state, ids, caches, ONE_ROW)
    assert temporary_faults(lowered.compile(), caches)


@pytest.mark.slow  # of NNX in test_programs.py
def test_twin_of_linen_without_donation_fails():
    caches = stacked(2048, "float32")
    assert copy_faults(compile_step("Linen", "float32", caches, donate=False), caches)


def operations(program) -> list[str]:
    """Return the lines of the program's operations, without where in the source they are from."""
    lines = program.as_text().splitlines()
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]


def test_optimisations_of_llvm_change_no_program_that_a_gate_looks_at():
    lowered = lower_step("NNX", "float32", stacked(2048, "float32"))
    plain, users = lowered.compile(), lowered.compile(OPTIMISED)
    assert operations(plain) == operations(users)
    for figure in ("temp_size_in_bytes", "alias_size_in_bytes"):
        found = [getattr(one.memory_analysis(), figure) for one in (plain, users)]
        assert found[0] == found[1] > 0


def test_rings_do_not_grow_with_the_capacity():
    small, large = (stacked(n, "float32")["sliding_attention"] for n in (2048, CAPACITY))
    assert num_bytes(small) == num_bytes(large)


def test_8_bit_caches_are_written_in_place():
    caches = stacked(CAPACITY, "float32", storage="int8")
    program = compile_step("NNX", "float32", caches)
    assert temporary_faults(program, caches) == []
    assert program.memory_analysis().alias_size_in_bytes >= num_bytes(caches)


@pytest.mark.parametrize("front", ["NNX", pytest.param("Linen", marks=pytest.mark.slow)])
def test_pools_are_written_in_place(front):
    blocks = 2 * CAPACITY // 16
    pools = jax.eval_shape(lambda: cache.new_pools(TINY, blocks, 16, jnp.float32))
    shapes = ((2,), (2, blocks // 2), (2,), (3,), (3,))
    about = ops.AttentionMetadata(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in shapes))
    program = compile_step(front, "float32", pools, about)
    assert temporary_faults(program, pools) == []
    assert program.memory_analysis().alias_size_in_bytes >= num_bytes(pools)


def test_a_list_through_the_scan_costs_about_one_copy_and_so_fails_the_gate():
    entries = jax.eval_shape(lambda: cache.new_list(TINY, 2, CAPACITY, jnp.float32, chunk=16))
    program = compile_step("NNX", "float32", entries)
    assert temporary_faults(program, entries)
    assert temporaries(program) < 2.5 * num_bytes(entries)


# What a busy machine may do to a ratio of two least times; a pass over all takes about 16.
SLOWER = 3


def write_times(write, dtype):
    """Return the least seconds of 64 one-row writes into a small buffer and one 16 times it."""
    times = []
    for capacity in (2048, 32_768):

        def run(stack, new):
            return jax.lax.fori_loop(0, 64, lambda i, k: write(k, i, new), stack)

        stack = jnp.zeros((8, 1, capacity, 2, 32), dtype)
        program = jax.jit(run, donate_argnums=0).lower(stack, stack[0, 0, 0]).compile(OPTIMISED)
        new, taken = jnp.ones((2, 32), dtype), []
        for _ in range(8):
            begin = time.perf_counter()
            stack = jax.block_until_ready(program(stack, new))
            taken.append(time.perf_counter() - begin)
        times.append(min(taken))
    return times


def write_row(stack, i, new):
    return stack.at[i % 8, 0, i].set(new, mode="drop")


def select_row(stack, i, new):
    """The twin: the same result by a pass over the whole buffer."""
    layer, _, slot = (jax.lax.broadcasted_iota(jnp.int32, stack.shape, axis) for axis in range(3))
    return jnp.where((layer == i % 8) & (slot == i), new[None, None, None], stack)


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
def test_a_small_write_takes_as_long_in_a_buffer_16_times_as_large(dtype):
    """jaxlib 0.11.1 rewrote the buffer for each (jax issue 40101); bfloat16 is why uint16 is."""
    small, large = write_times(write_row, jnp.dtype(dtype))
    assert large < SLOWER * small


def test_twin_that_passes_over_the_buffer_takes_longer_in_a_larger_one():
    small, large = write_times(select_row, jnp.dtype("float32"))
    assert large > SLOWER * small
