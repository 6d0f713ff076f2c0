"""Snapshots of slots: what comes back is bit for bit what was there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights

from gemlax.engine import Programs
from gemlax.engine.prefix import HostCopy, PrefixCache, Root
from gemlax.engine.snapshots import Snapshots
from gemlax.errors import UnsupportedError
from gemlax.names import text_weights
from gemlax.presets import preset, tiny
from gemlax.sampling import make_sampling
from gemlax.sharding import make_mesh

pytestmark = pytest.mark.deep

PLACES = make_sampling(512, [0]).places()
ROOT = Root("weights", 0)
# The ring of a toy has 768 places: a window of 32 and a chunk.
TOKENS = np.random.default_rng(3).integers(3, 500, 960).astype(np.int32)


@functools.cache
def toy(name="gemma-3-270m", dtype="float32", storage=None):
    small = tiny(preset(name), **({"num_hidden_layers": 6} if name == "gemma-3-270m" else {}))
    decoder = build(small, conditioned_weights("snapshots", text_weights(small.text)), "index")
    return Programs(decoder, num_tokens=512, dtype=jnp.dtype(dtype), storage=storage)


def fill(programs, state, slot, start, stop, tokens=TOKENS):
    """Prefill tokens [start, stop) of one slot, in chunks of two widths."""
    for begin in range(start, stop, 512):
        end, width = min(begin + 512, stop), 16 if stop - start <= 16 else 512
        chunk, positions = (np.full((1, width), fill, np.int32) for fill in (0, -1))
        chunk[0, : end - begin] = tokens[begin:end]
        positions[0, : end - begin] = np.arange(begin, end)
        state = programs.prefill(state, chunk, positions, np.array([slot], np.int32))
    return state


def seen(programs, state, slot, stop):
    """Return the keys and values that a query at `stop` sees, by kind."""
    result = {}
    for spec in programs.config.layers:
        if spec.owns_kv:
            kept = state.caches[spec.kind]
            first = 0 if spec.window is None else max(0, stop - spec.window + 1)
            wanted = np.arange(first, stop)
            places = wanted % kept.positions.shape[1]
            assert np.asarray(kept.positions)[slot, places].tolist() == wanted.tolist()
            leaves = jax.tree.leaves((kept.k, kept.v))
            result[spec.kind] = [np.asarray(leaf)[:, slot, places] for leaf in leaves]
    return result


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A model, its form, and a bucket to restore in.
FORMS = [
    ("gemma-3-270m", "float32", None, (2, 1024)),
    pytest.param("gemma-3-270m", "bfloat16", None, (2, 1024), marks=pytest.mark.deep),
    ("gemma-3-270m", "float32", "int8", (2, 1024)),
    ("gemma-4-e2b", "float32", None, (2, 1024)),
    pytest.param("gemma-4-e4b", "bfloat16", None, (2, 2048), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dtype", "storage", "bucket"), FORMS)
def test_a_restored_slot_goes_on_bit_for_bit_as_the_one_that_was_saved(
    name, dtype, storage, bucket
):
    programs = toy(name, dtype, storage)
    snapshots, tree = Snapshots(programs), PrefixCache(10**9)
    state = programs.new_state(2, 1024, PLACES)
    for start, stop in ((0, 10), (10, 690), (690, 905)):  # the last one has wrapped the ring
        state = fill(programs, state, 1, start, stop)
        tree.insert(ROOT, TOKENS[:stop], start, *snapshots.save(state, 1, start, stop))
    kept = seen(programs, state, 1, 905)
    state = fill(programs, state, 1, 905, 920)
    # A slot that was used, a neighbour that stays.
    other = fill(programs, programs.new_state(*bucket, PLACES), 0, 0, 950, TOKENS[::-1].copy())
    other = fill(programs, other, 1, 0, 100)
    neighbour = seen(programs, other, 1, 100)
    match = tree.match(ROOT, TOKENS, snapshots.reach)
    assert match.length == 905
    other = snapshots.restore(other, 0, match)
    for spec in programs.config.layers:
        if spec.owns_kv:
            positions = np.asarray(other.caches[spec.kind].positions)[0]
            assert (positions >= 0).sum() == 905 - max(0, 906 - (spec.window or 1000))
    assert_same(seen(programs, other, 0, 905), kept)
    assert_same(seen(programs, other, 1, 100), neighbour)
    other = fill(programs, other, 0, 905, 920)
    assert_same(seen(programs, other, 0, 920), seen(programs, state, 1, 920))


def test_a_snapshot_is_restored_up_to_where_its_window_reaches():
    programs = toy()
    snapshots, tree = Snapshots(programs), PrefixCache(10**9)
    state = fill(programs, programs.new_state(2, 1024, PLACES), 0, 0, 12)
    tree.insert(ROOT, TOKENS[:12], 0, *snapshots.save(state, 0, 0, 12))
    match = tree.match(ROOT, [*TOKENS[:9], 1, 2], snapshots.reach)
    assert match.length == 9
    kept = seen(programs, state, 0, 9)
    state = snapshots.restore(programs.new_state(1, 64, PLACES), 0, match)  # no rings in this one
    assert_same(seen(programs, state, 0, 9), kept)


def test_a_longer_ring_still_has_the_window_at_each_place_of_the_last_chunk():
    programs = toy()
    snapshots = Snapshots(programs)
    state = fill(programs, programs.new_state(2, 1024, PLACES), 0, 0, 400)
    state = fill(programs, state, 0, 400, 401)
    _, early = snapshots.save(state, 0, 401, 401)
    state = fill(programs, state, 0, 401, 913)
    _, late = snapshots.save(state, 0, 401, 401)
    assert_same(early.payload.leaves, late.payload.leaves)


def test_four_programs_serve_any_span():
    programs = toy()
    snapshots, tree = Snapshots(programs), PrefixCache(10**9)
    state = fill(programs, programs.new_state(2, 1024, PLACES), 1, 0, 700)
    for stop in (5, 300, 700):
        start, _ = tree.covered(ROOT, TOKENS[:stop])
        tree.insert(ROOT, TOKENS[:stop], start, *snapshots.save(state, 1, start, stop))
        state = snapshots.restore(state, 0, tree.match(ROOT, TOKENS[:stop], snapshots.reach))
    shape = state.caches["full_attention"].positions.shape
    kinds = [key for key in programs.compiled if key[0] in ("save", "restore") and shape in key]
    assert len(kinds) == 4


def test_the_bytes_of_a_snapshot_are_those_of_its_tokens():
    programs = toy()
    state = fill(programs, programs.new_state(2, 1024, PLACES), 0, 0, 100)
    span, window = Snapshots(programs).save(state, 0, 40, 100)
    full, sliding = (state.caches[f"{kind}_attention"] for kind in ("full", "sliding"))
    per_token = [2 * c.k.shape[0] * c.k.shape[3] * c.k.shape[4] * 4 for c in (full, sliding)]
    assert span.num_bytes == 60 * per_token[0]
    assert window.payload.num_bytes == 31 * per_token[1]
    first, rest = HostCopy(span.leaves).split(7)
    assert first.num_bytes + rest.num_bytes == span.num_bytes
    assert first.leaves[0].base is None and rest.leaves[0].base is None


def test_a_mesh_is_refused():
    programs = toy()
    layout = type(programs.layout)(make_mesh("data=8"))
    other = object.__new__(Programs)
    other.__dict__.update(programs.__dict__ | {"layout": layout})
    with pytest.raises(UnsupportedError, match="not reused on a mesh"):
        Snapshots(other)
