"""The list contract of outside engines, and the two functions that stack and unstack for a scan."""

import dataclasses

import jax
import jax.numpy as jnp
import matrix
import numpy as np
import pytest
from flax import nnx
from test_programs import count

from gemlax import cache, ops
from gemlax.decoder import Decoder
from gemlax.presets import preset, tiny

pytestmark = pytest.mark.deep

NAME = "gemma-4-e2b"
# A period with its own keys and values, and one that shares them.
_WHOLE = tiny(preset(NAME), num_hidden_layers=20)
_LAYERS = _WHOLE.text.layers[:5] + _WHOLE.text.layers[15:]
CONFIG = dataclasses.replace(_WHOLE, text=dataclasses.replace(_WHOLE.text, layers=_LAYERS))
TEXT = CONFIG.text
OWNERS = sum(spec.owns_kv for spec in TEXT.layers)


@pytest.fixture(scope="module")
def decoders():
    return {layers: Decoder(TEXT, layers=layers, rngs=nnx.Rngs(0)) for layers in ("scan", "unroll")}


METADATA = matrix.metadata(np.array([0, 0]), np.array([3, 3]), 3)


def step(decoder, kv_caches, metadata=None, *, flat=False):
    ids = jnp.ones((2, 3), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32)[None], (2, 3))
    if flat:
        ids, at = ids.reshape(-1), None
    return decoder(ids, at, kv_caches, metadata)


def listed(chunk=8):
    return matrix.new_caches(TEXT, "list", chunk)


def nested(i):
    return {"a": (jnp.full((2,), i), [jnp.full((), i)]), "b": cache.LayerCache(1.0 * i, i, i)}


def test_stacking_puts_layers_first_and_unstacking_undoes_it():
    layers = [jax.tree.map(jnp.asarray, nested(i)) for i in range(3)]
    stacked = cache.stack_layers(layers, 3)
    assert stacked["a"][0].shape == (3, 2)
    assert stacked["b"].k.tolist() == [0, 1, 2]
    back = cache.unstack_layers(stacked, 3)
    assert jax.tree.structure(back) == jax.tree.structure(layers)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(layers), strict=True):
        np.testing.assert_array_equal(one, other)


def test_none_is_stacked_to_none():
    assert cache.stack_layers(None, 3) is None
    assert cache.unstack_layers(None, 3) is None


@pytest.mark.parametrize("entries", [(jnp.zeros(2),), jnp.zeros((1, 2)), {"a": jnp.zeros(2)}])
def test_only_a_list_is_stacked(entries):
    with pytest.raises(TypeError, match=f"from a list, got {type(entries).__name__}"):
        cache.stack_layers(entries, 1)


def test_stacking_wants_the_right_number_of_equal_trees():
    with pytest.raises(ValueError, match="expected 2 entries to stack, got 1"):
        cache.stack_layers([jnp.zeros(2)], 2)
    with pytest.raises(ValueError, match="differ in shape or dtype"):
        cache.stack_layers([jnp.zeros(2), jnp.zeros(3)], 2)
    with pytest.raises(TypeError, match="entry 1 is"):
        cache.stack_layers([jnp.zeros(2), (jnp.zeros(2),)], 2)
    with pytest.raises(ValueError, match="expected 3 layers first"):
        cache.unstack_layers({"a": jnp.zeros((2, 5))}, 3)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_the_entries_are_replaced_in_the_list_that_comes_back(decoders, layers):
    @jax.jit  # operation by operation this is 300 programs
    def run():
        mine = listed()
        before = list(mine)
        _, out = step(decoders[layers], mine)
        assert out is mine
        assert not any(new is old for old, new in zip(before, mine, strict=True))
        return before, mine

    before, mine = run()
    assert len(mine) == OWNERS < TEXT.num_hidden_layers
    for old, new in zip(before, mine, strict=True):
        assert isinstance(new, cache.LayerCache)
        assert new.k.shape == old.k.shape
        assert new.positions[:, :3].tolist() == [[0, 1, 2]] * 2
        assert (np.asarray(new.k)[:, :3] != 0).any()
        assert (np.asarray(new.k)[:, 3:] == 0).all()


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("wrong", [tuple, np.asarray, iter])
def test_anything_but_a_list_is_a_type_error(decoders, layers, wrong):
    with pytest.raises(TypeError, match="kv_caches must be a list with one entry per layer"):
        step(decoders[layers], wrong([1.0, 2.0]))


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("entry", [None, (1, 2, 3), np.zeros(3)])
def test_any_other_entry_is_a_type_error(decoders, layers, entry):
    mine = listed()
    mine[4] = entry
    with pytest.raises(TypeError, match=r"kv_caches\[4\] must be a LayerCache"):
        step(decoders[layers], mine)


def test_a_list_of_another_length_or_shape_is_an_error(decoders):
    with pytest.raises(ValueError, match=f"{OWNERS} of {TEXT.num_hidden_layers} layers, got 2"):
        step(decoders["scan"], listed()[:2])
    mine = listed()
    mine[1] = mine[1]._replace(k=mine[1].k[..., :-1])
    with pytest.raises(ValueError, match=r"kv_caches\[1\]: expected k and v of"):
        step(decoders["scan"], mine)


def pages(dtype=jnp.float32, packing=1):
    """Pages in tpu-inference's layout, wider than the heads need."""
    made = []
    for spec in TEXT.layers:
        if spec.owns_kv:
            rows = -(-2 * spec.num_key_value_heads // packing)
            made.append(jnp.zeros((16, 16, rows, packing, 128), dtype))
    return made


def test_pages_need_attention_metadata(decoders):
    with pytest.raises(TypeError, match="needs attention_metadata, got None"):
        step(decoders["scan"], pages())
    with pytest.raises(TypeError, match="positions may be None only"):
        step(decoders["scan"], pages(), flat=True)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_pages_take_no_rows_of_tokens(decoders, layers):
    with pytest.raises(ValueError, match=r"flat tokens \[T\] or \[1, T\], got 2 rows"):
        step(decoders[layers], pages(), METADATA)
    pools = cache.new_pools(TEXT, 16, 16, jnp.float32)
    with pytest.raises(ValueError, match="got 2 rows"):
        step(decoders[layers], pools, METADATA)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_stacked_caches_must_name_the_kinds_of_the_layers(decoders, layers):
    caches = cache.new_caches(TEXT, 2, 16, jnp.float32)
    full = caches.pop("full_attention")
    with pytest.raises(ValueError, match="full_attention, sliding_attention; got sliding_att"):
        step(decoders[layers], caches)
    with pytest.raises(ValueError, match="got none"):
        step(decoders[layers], {})
    with pytest.raises(ValueError, match=r"got sliding_attention, full_attention, full$"):
        step(decoders[layers], caches | {"full_attention": full, "full": full})


def test_pages_and_layer_caches_do_not_mix(decoders):
    mine = listed()
    mine[0] = pages()[0]
    with pytest.raises(TypeError, match="mixes"):
        step(decoders["scan"], mine)
    with pytest.raises(ValueError, match=r"expected pages \[blocks"):
        step(decoders["scan"], [page[..., :8] for page in pages()])


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize(("dtype", "packing"), [(jnp.float32, 1), (jnp.bfloat16, 2)])
def test_a_list_of_pages_gives_what_layer_caches_give(decoders, layers, dtype, packing):
    expected, _ = step(decoders[layers], listed())
    mine = pages(dtype, packing)
    hidden, out = step(decoders[layers], mine, METADATA, flat=True)
    assert out is mine
    assert {entry.dtype for entry in mine} == {jnp.dtype(dtype)}
    assert [entry.shape for entry in mine] == [entry.shape for entry in pages(dtype, packing)]
    error = np.abs(np.asarray(hidden).reshape(expected.shape) - np.asarray(expected)).max()
    assert error < (1e-4 if dtype == jnp.float32 else 0.3)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_attention_metadata_reaches_every_layer_unchanged(decoders, layers, monkeypatch):
    seen = []
    layer = cache.PagedPool.layer

    def spy(self, row, positions, spec, metadata, rows=None):
        seen.append(metadata)
        return layer(self, row, positions, spec, metadata)

    monkeypatch.setattr(cache.PagedPool, "layer", spy)
    step(decoders[layers], pages(), METADATA, flat=True)
    bodies = sum(len(segment.runs) for segment in TEXT.plan.segments)
    assert len(seen) >= (bodies if layers == "scan" else TEXT.num_hidden_layers)
    assert all(metadata is METADATA for metadata in seen)


def test_metadata_may_differ_by_kind_or_be_named_by_layer(decoders):
    one, _ = step(decoders["scan"], pages(), METADATA, flat=True)
    twin = METADATA._replace()
    by_kind = {"sliding_attention": METADATA, "full_attention": twin}
    by_layer = {f"layer.{i}": by_kind[spec.kind] for i, spec in enumerate(TEXT.layers)}
    owned = {name: by_layer[name] for name in list(by_layer)[:OWNERS]}
    for metadata in (by_kind, by_layer, owned):
        two, _ = step(decoders["scan"], pages(), metadata, flat=True)
        np.testing.assert_array_equal(one, two)


def test_metadata_of_other_layers_or_unequal_within_a_kind_is_an_error(decoders):
    with pytest.raises(TypeError, match=r"layer\.0 to layer\.9; got layer\.0$"):
        step(decoders["scan"], pages(), {"layer.0": METADATA}, flat=True)
    by_layer = {f"layer.{i}": METADATA for i in range(len(TEXT.layers))}
    with pytest.raises(TypeError, match=r"got .*layer\.10"):
        step(decoders["scan"], pages(), by_layer | {"layer.10": METADATA}, flat=True)
    with pytest.raises(ValueError, match=r"'layer\.1'\] is another object than .* sliding"):
        step(decoders["scan"], pages(), by_layer | {"layer.1": METADATA._replace()}, flat=True)


@pytest.mark.parametrize("front", ["NNX", "Linen"])
def test_a_list_keeps_the_scan_over_blocks(front):
    """The products in the jaxpr are those of the bodies, as with stacked caches."""
    held = matrix.hold(NAME, CONFIG, front, "scan")
    ids = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    products = {}
    for form in ("stacked", "list"):
        caches = jax.eval_shape(lambda form=form: matrix.new_caches(TEXT, form, 8))
        jaxpr = jax.make_jaxpr(held.call)(held.state, ids, ids, caches, None).jaxpr
        products[form] = count(jaxpr, "dot_general")
        assert count(jaxpr, "scan") >= len(TEXT.plan.segments)
    assert products["list"] == products["stacked"]
    # Four bodies for ten layers, each of which has nine to eleven products.
    assert products["list"] <= 4 * 11 + 2


def test_a_window_layers_short_entry_is_a_ring_and_a_long_one_is_not():
    short = cache.LayerListCache(TEXT, listed(), 2).by_kind()
    assert short["sliding_attention"].is_ring
    assert not short["full_attention"].is_ring
    long = cache.LayerListCache(TEXT, listed(chunk=120), 2).by_kind()
    assert not long["sliding_attention"].is_ring
    assert ops.EMPTY in np.asarray(long["sliding_attention"].positions)
