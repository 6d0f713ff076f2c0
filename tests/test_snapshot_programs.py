"""The gates of test_programs.py on what restores a slot, with a bad twin."""

import functools

import jax
import jax.numpy as jnp
import pytest
from test_programs import CAPACITY, copy_faults, num_bytes, programs_of, temporary_faults

from gemlax import cache
from gemlax.engine.snapshots import PIECE, read, write
from gemlax.presets import preset, tiny

pytestmark = [pytest.mark.programs, pytest.mark.deep]


def compile_write(of, rings: bool, storage=None, donate=True):
    """The program that restores a piece of full layers, or the rings and all positions."""
    caches = jax.eval_shape(
        lambda: cache.new_caches(of.config, 2, CAPACITY, of.dtype, storage=storage)
    )
    kinds = ["sliding_attention" if rings else "full_attention"]
    width = caches[kinds[0]].positions.shape[1] if rings else PIECE
    number = jax.ShapeDtypeStruct((), jnp.int32)
    pieces = jax.eval_shape(functools.partial(read, kinds, width), caches, number, number)
    positions = {}
    if rings:
        positions = {
            k: jax.ShapeDtypeStruct(c.positions.shape[1:], jnp.int32) for k, c in caches.items()
        }
    jitted = jax.jit(functools.partial(write, kinds), donate_argnums=0 if donate else ())
    return jitted.lower(caches, number, number, pieces, positions).compile(), caches


@pytest.mark.parametrize("rings", [False, True])
@pytest.mark.parametrize(
    ("dtype", "storage"), [("float32", None), ("bfloat16", None), ("float32", "int8")]
)
def test_a_slot_is_restored_in_place(rings, dtype, storage):
    of = programs_of(preset("gemma-3-270m").text, dtype=dtype)
    program, caches = compile_write(of, rings, storage)
    assert temporary_faults(program, caches) == []
    if storage is None:
        assert copy_faults(program, caches) == []
    assert program.memory_analysis().alias_size_in_bytes == num_bytes(caches)


def test_twin_without_donation_copies_the_caches():
    of = programs_of(tiny(preset("gemma-3-270m")).text)
    program, caches = compile_write(of, True, donate=False)
    assert copy_faults(program, caches)
