"""Adapters in the Linen decoder: a collection of their own, and the numbers of NNX."""

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
from lora import SMALL, trained

from gemlax import adapters, linen
from gemlax.errors import CheckpointError
from gemlax.names import text_weights

pytestmark = pytest.mark.deep

RULES = {"layers.3.*": adapters.Rule(2, alpha=6.0), "*.q_proj": 4, "*.mlp.*": 3}
IDS = jnp.asarray(np.random.default_rng(1).integers(3, 512, (2, 24)), jnp.int32)
AT = jnp.tile(jnp.arange(24, dtype=jnp.int32), (2, 1))
MODULE = linen.Decoder(SMALL.text, read="index")


@pytest.fixture(scope="module")
def decoder():
    made = build(SMALL, conditioned_weights("linen", text_weights(SMALL.text)), "index")
    trained(made, RULES)
    return made


@pytest.fixture(scope="module")
def variables(decoder):
    return linen.to_linen(decoder)


def test_an_adapter_is_a_collection_at_the_paths_of_its_weights(variables):
    assert set(variables) == {"params", "lora", "lora_constants"}
    specs = traverse_util.flatten_dict(nn.get_partition_spec(variables["lora"]), sep="/")
    at = "layers/0/sliding_attention/self_attn/q_proj"
    assert specs[f"{at}/lora/a"] == P("layers", None, None, "embed")
    assert specs[f"{at}/lora/b"] == P("layers", None, "heads", None)


def test_values_and_gradients_are_those_of_nnx(decoder, variables):
    rest = {name: variables[name] for name in ("params", "lora_constants")}

    def of_linen(lora):
        hidden = MODULE.apply({**rest, "lora": lora}, IDS, AT)[0]
        return jnp.square(hidden).sum(), hidden

    graphdef, trained, other = nnx.split(decoder, nnx.LoRAParam, ...)

    def of_nnx(trained):
        hidden = nnx.merge(graphdef, trained, other)(IDS, AT)[0]
        return jnp.square(hidden).sum(), hidden

    lora = nn.meta.unbox(variables["lora"])
    (_, ours), found = jax.jit(jax.value_and_grad(of_linen, has_aux=True))(lora)
    (_, theirs), expected = jax.jit(jax.value_and_grad(of_nnx, has_aux=True))(trained)
    assert np.abs(ours - theirs).max() < 1e-5 * np.std(theirs)
    flat = traverse_util.flatten_dict(found, sep="/")
    for path, variable in nnx.to_flat_state(expected):
        slope = np.asarray(variable.get_value())
        error = np.abs(np.asarray(flat["/".join(map(str, path))]) - slope).max()
        assert error <= 1e-5 * np.abs(slope).max(), path
    base = jax.jit(MODULE.apply)({"params": variables["params"]}, IDS, AT)[0]
    assert np.abs(base - theirs).max() > 0.01


def test_rows_and_dropout_of_a_call_are_those_of_nnx():
    made = build(SMALL, conditioned_weights("linen", text_weights(SMALL.text)), "index")
    rules = {"*.q_proj": adapters.Rule(4, dropout=0.5), "*.mlp.*": 3}
    adapter = trained(made, rules)
    entry = adapter, {module.name: (a, b) for module, a, b in adapters.read(made)}
    adapters.detach(made)
    adapters.put(made, [None, entry])
    call = {"adapter_rows": jnp.asarray([0, 1], jnp.int32), "dropout_key": jax.random.key(5)}
    ours = jax.jit(functools.partial(MODULE.apply, **call))(linen.to_linen(made), IDS, AT)[0]
    graphdef, state = nnx.split(made)
    run = jax.jit(lambda state, **call: nnx.merge(graphdef, state)(IDS, AT, **call)[0])
    theirs, base = run(state, **call), run(state)
    assert np.abs(ours - theirs).max() < 1e-5 * np.std(theirs)
    np.testing.assert_allclose(theirs[0], base[0], atol=1e-5 * np.std(base))
    kept = run(state, adapter_rows=call["adapter_rows"])
    for other in (base, kept):
        assert np.abs(theirs[1] - other[1]).max() > 0.01


def test_an_adapter_goes_to_linen_and_back(decoder, variables, tmp_path):
    back = linen.to_nnx(MODULE, variables, decoder.adapter)
    for one, name in ((decoder, "first"), (back, "second")):
        adapters.save(one, tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        both = [(tmp_path / name / file).read_bytes() for name in ("first", "second")]
        assert both[0] == both[1]


@pytest.mark.parametrize("change", ["drop", "rename"])
def test_leaves_that_do_not_fit_are_an_error(change, variables):
    flat = traverse_util.flatten_dict(nn.meta.unbox(variables["lora"]))
    path = next(path for path in flat if path[-1] == "b")
    leaf = flat.pop(path)
    if change == "rename":
        flat[(*path[:-2], "nothing", "b")] = leaf
    wrong = {**variables, "lora": traverse_util.unflatten_dict(flat)}
    with pytest.raises(CheckpointError, match="the adapter does not fit"):
        jax.eval_shape(functools.partial(MODULE.apply, wrong), IDS, AT)
