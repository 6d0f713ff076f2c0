"""The matrix of front ends, layouts, caches and ways of feeding: see matrix.py.

Of NNX's scan for the pattern with shared K/V every way of feeding stacks and every form for chunks,
its unrolled layers in lists and pages, and chunks in every form for one pattern with a remainder
and one with experts; the rest is slow. So are two periods of unrolled layers and of experts.
"""

import functools

import jax
import matrix
import numpy as np
import pytest

pytestmark = pytest.mark.deep

WHOLE = ("gemma-4-e2b",)
ROUGH = ("gemma-3-4b", "gemma-4-26b-a4b")
# One period and a remainder, in each segment, for experts and for unrolled layers.
SHORT = matrix.LAYERS | {
    "gemma-4-e2b": [*range(5), *range(15, 22)],
    "gemma-4-26b-a4b": list(range(8)),
}
CASES = [
    (name, front, layers, form, feed)
    for name in matrix.LAYERS
    for front in ("NNX", "Linen")
    for layers in ("scan", "unroll")
    for form in matrix.CACHES
    for feed in matrix.FEEDS
    # Unrolled layers are slow to compile: chunks alone, and Linen's program is the same (below).
    if layers == "scan" or (front, feed) == ("NNX", "chunks")
]


def is_quick(name, front, layers, form, feed):
    if name in WHOLE:
        if front == "Linen":
            return (form, feed) == ("stacked", "chunks")
        if layers == "unroll":
            return form != "stacked"
        return feed == "chunks" or form == "stacked"
    forms = {"NNX": ("list", "paged"), "Linen": ("stacked",)}
    return name in ROUGH and layers == "scan" and feed == "chunks" and form in forms[front]


@functools.cache
def held(name, front, layers, short):
    config = matrix.pattern(name, indices=SHORT if short else matrix.LAYERS)
    return matrix.hold(name, config, front, layers)


@functools.cache
def reference(name, short):
    return matrix.full(held(name, "NNX", "unroll", short))


@pytest.mark.parametrize(
    ("name", "front", "layers", "form", "feed"),
    [pytest.param(*case, marks=[] if is_quick(*case) else pytest.mark.slow) for case in CASES],
)
def test_every_way_through_the_decoder_equals_the_full_forward(name, front, layers, form, feed):
    short = is_quick(name, front, layers, form, feed) and (name not in WHOLE or layers == "unroll")
    out = matrix.fed(held(name, front, layers, short), form, feed)
    assert matrix.error(out, reference(name, short)) < matrix.SAME


@pytest.mark.parametrize("front", ["NNX", "Linen"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_full_forward_through_the_scan_equals_the_unrolled_one(name, front):
    out = matrix.full(held(name, front, "scan", False))
    assert matrix.error(out, reference(name, False)) < matrix.SAME


def test_linen_unrolled_traces_to_the_same_program_as_nnx():
    """So that its numbers need no run of their own here."""
    name = "gemma-4-e2b"
    programs = []
    for front in ("NNX", "Linen"):
        made = held(name, front, "unroll", True)
        caches = matrix.new_caches(made.config, "stacked", matrix.CHUNK)
        ids = jax.ShapeDtypeStruct((2, matrix.CHUNK), np.int32)
        lowered = jax.jit(lambda *args, made=made: made.call(*args, None)).lower(
            made.state, ids, ids, caches
        )
        text = lowered.as_text()
        operations = [line.split("=", 1)[-1].split("(")[0].split()[0] for line in text.splitlines()
                      if " = stablehlo." in line]  # fmt: skip
        programs.append(operations)
    assert programs[0] == programs[1]
    assert len(programs[0]) > 1000


def test_rings_of_the_matrix_wrap_and_prompts_pass_two_windows():
    caches = matrix.new_caches(matrix.pattern("gemma-3-4b").text, "stacked", matrix.CHUNK)
    ring = caches["sliding_attention"].positions.shape[1]
    assert caches["sliding_attention"].is_ring
    assert matrix.LENGTHS.min() > 2 * 32
    assert ring < matrix.LENGTHS.min()
