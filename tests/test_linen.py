"""The Linen front end: the NNX decoder's parameters at the same paths, checked, and its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from flax import linen as nn
from flax import nnx, traverse_util
from golden.conditioned import conditioned_weights
from jax.sharding import PartitionSpec as P

from gemlax import cache, linen, ops
from gemlax.decoder import Decoder
from gemlax.errors import CheckpointError
from gemlax.names import text_weights
from gemlax.presets import PRESETS, preset, tiny

pytestmark = pytest.mark.deep

CONFIG = tiny(preset("gemma-4-e2b"), num_hidden_layers=20)
TEXT = CONFIG.text
IDS = jnp.asarray(np.random.default_rng(1).integers(3, 512, (2, 24)), jnp.int32)
AT = np.where(np.arange(24) < np.array([[24], [9]]), np.arange(24), ops.EMPTY)
AT = jnp.asarray(AT, jnp.int32)


@pytest.fixture(scope="module")
def decoder():
    return build(CONFIG, conditioned_weights("test_linen", text_weights(TEXT)), "scan")


@pytest.fixture(scope="module")
def variables(decoder):
    return linen.to_linen(decoder)


def paths(tree):
    return {"/".join(map(str, path)) for path in traverse_util.flatten_dict(tree)}


@pytest.mark.parametrize(
    ("name", "layers"),
    [(name, "scan") for name in PRESETS] + [("gemma-3-270m", "unroll"), ("gemma-4-e2b", "unroll")],
)
def test_every_size_has_the_paths_and_shapes_of_nnx(name, layers):
    config = preset(name).text
    module = linen.Decoder(config, layers=layers)
    hidden = jax.ShapeDtypeStruct((1, config.hidden_size), jnp.float32)
    init = functools.partial(module.init, method="logits")
    made = jax.eval_shape(init, jax.random.key(0), hidden)
    twin = nnx.eval_shape(lambda: Decoder(config, layers=layers, rngs=nnx.Rngs(0)))
    expected = {
        "/".join(map(str, path)): v.get_value().shape
        for path, v in nnx.to_flat_state(nnx.state(twin))
    }
    flat = traverse_util.flatten_dict(nn.meta.unbox(made)["params"], sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == expected


def test_the_partition_spec_names_the_axis_of_layers(variables):
    specs = traverse_util.flatten_dict(nn.get_partition_spec(variables)["params"], sep="/")
    stack = "layers/0/sliding_attention/self_attn"
    assert specs[f"{stack}/q_proj/weight"] == P("layers", "heads", "embed")
    assert specs[f"{stack}/q_norm/weight"] == P("layers", None)
    assert specs["embed_tokens/weight"] == P("vocab", "embed")
    assert all(spec != P() for spec in specs.values())


def test_init_gives_other_weights_for_another_key_and_they_run():
    module = linen.Decoder(tiny(preset("gemma-3-4b"), num_hidden_layers=8).text)
    made = [jax.jit(module.init)(jax.random.key(seed), IDS, AT) for seed in (0, 1)]
    first, second = (nn.meta.unbox(v)["params"]["embed_tokens"]["weight"] for v in made)
    assert not np.allclose(first, second)
    hidden, caches = jax.jit(module.apply)(made[0], IDS, AT)
    assert caches is None
    assert np.isfinite(module.apply(made[0], hidden, method="logits")).all()


@pytest.mark.parametrize(
    ("name", "depth"),
    [("gemma-3-4b", 8), pytest.param("gemma-4-e2b", 20, marks=pytest.mark.slow)],
)
def test_gradients_through_the_linen_scan_are_those_of_nnx(name, depth):
    config = tiny(preset(name), num_hidden_layers=depth)
    decoder = build(config, conditioned_weights("gradients", text_weights(config.text)), "scan")
    variables = linen.to_linen(decoder)
    module = linen.Decoder(config.text, read="slice")
    graphdef, state = nnx.split(decoder)

    def of_linen(params):
        return jnp.square(module.apply({"params": params}, IDS, AT)[0]).sum()

    def of_nnx(state):
        return jnp.square(nnx.merge(graphdef, state)(IDS, AT)[0]).sum()

    params = nn.meta.unbox(variables)["params"]
    ours = traverse_util.flatten_dict(jax.jit(jax.grad(of_linen))(params), sep="/")
    for path, variable in nnx.to_flat_state(jax.jit(jax.grad(of_nnx))(state)):
        other = np.asarray(variable.get_value())
        error = np.abs(np.asarray(ours["/".join(map(str, path))]) - other).max()
        assert error <= 1e-5 * max(np.abs(other).max(), 1e-6), path


def changed(variables, change):
    flat = traverse_util.flatten_dict(nn.meta.unbox(variables)["params"], sep="/")
    change(flat)
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


GATE = "layers/0/sliding_attention/mlp/gate_proj/weight"


def test_a_missing_leaf_is_an_error(variables):
    wrong = changed(variables, lambda flat: flat.pop(GATE))
    with pytest.raises(CheckpointError, match=f"{GATE} is missing"):
        linen.Decoder(TEXT).apply(wrong, IDS, AT)


def test_no_parameters_at_all_is_an_error():
    with pytest.raises(CheckpointError, match=r"is missing.* more"):
        linen.Decoder(TEXT).apply({}, IDS, AT)


def test_an_unknown_leaf_is_an_error(variables):
    wrong = changed(variables, lambda flat: flat.update({"layers/0/extra": jnp.zeros(1)}))
    with pytest.raises(CheckpointError, match="layers/0/extra is unknown"):
        linen.Decoder(TEXT).apply(wrong, IDS, AT)


def test_a_leaf_of_another_shape_is_an_error(variables):
    wrong = changed(variables, lambda flat: flat.update({GATE: flat[GATE][:, :-1]}))
    with pytest.raises(
        CheckpointError, match=rf"{GATE} is \[12, 95, 80\], expected \[12, 96, 80\]"
    ):
        linen.Decoder(TEXT).apply(wrong, IDS, AT)


def test_parameters_of_the_other_layout_are_an_error(variables):
    with pytest.raises(CheckpointError, match="config, layers and dtype"):
        linen.Decoder(TEXT, layers="unroll").apply(variables, IDS, AT)


def test_a_decoder_goes_to_linen_and_back_bit_for_bit(decoder, variables):
    back = linen.to_nnx(linen.Decoder(TEXT), variables)
    for (path, old), (same, new) in zip(
        nnx.to_flat_state(nnx.state(decoder)), nnx.to_flat_state(nnx.state(back)), strict=True
    ):
        assert path == same
        np.testing.assert_array_equal(old.get_value(), new.get_value())


def test_bfloat16_weights_held_as_bits_pass_through_linen():
    weights = conditioned_weights("test_linen", text_weights(TEXT))
    narrow = {name: w.astype(jnp.bfloat16) for name, w in weights.items()}
    decoder = build(CONFIG, narrow, "index", dtype=jnp.bfloat16)
    module = linen.Decoder(TEXT, read="index", dtype=jnp.bfloat16)
    caches = cache.new_caches(TEXT, 2, 32, jnp.bfloat16)
    ours, _ = jax.jit(module.apply)(linen.to_linen(decoder), IDS, AT, caches)
    graphdef, state = nnx.split(decoder)
    theirs, _ = jax.jit(lambda s, *args: nnx.merge(graphdef, s)(*args))(
        state, IDS, AT, cache.new_caches(TEXT, 2, 32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
