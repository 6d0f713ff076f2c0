"""LoRA adapters on a decoder: what they change, what they leave, merging, and folders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from adapters import build
from flax import nnx
from golden.conditioned import conditioned_weights

from gemlax import adapters, ops
from gemlax.checkpoints import text_weights
from gemlax.presets import preset, tiny

CONFIG = tiny(preset("gemma-4-e2b"), num_hidden_layers=20)
MOE = tiny(preset("gemma-4-26b-a4b"), num_hidden_layers=6)
TEXT = CONFIG.text
IDS = jnp.asarray(np.random.default_rng(1).integers(3, 512, (2, 24)), jnp.int32)
AT = np.where(np.arange(24) < np.array([[24], [9]]), np.arange(24), ops.EMPTY)
AT = jnp.asarray(AT, jnp.int32)
# Of different ranks and scales inside one stack, and layers of a stack that have none.
RULES = {
    "layers.3.*": adapters.Rule(2, alpha=6.0),
    "*.q_proj": 4,
    "*.v_proj.weight": adapters.Rule(3, alpha=1.5),
    "*.mlp.*": 3,
}
# Float32 rounds at 6e-8, and a projection sums about 100 terms.
MERGED = 1e-5


@functools.cache
def weights():
    return conditioned_weights("test_adapters", text_weights(TEXT))


def trained(decoder, rules=RULES, *, size=0.05):
    """Attach rules and make B what training might."""
    adapter = adapters.attach(decoder, rules, key=jax.random.key(3))
    rng = np.random.default_rng(7)
    values = {}
    for module in adapter:
        values[module.name] = tuple(
            (rng.standard_normal(shape) * size).astype(np.float32)
            for shape in ((module.rank, module.shape[1]), (module.shape[0], module.rank))
        )
    adapters.detach(decoder)
    adapters.put(decoder, adapter, values)
    return adapter


def logits(decoder):
    graphdef, state = nnx.split(decoder)
    return np.asarray(_logits(graphdef, state))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state):
    decoder = nnx.merge(graphdef, state)
    return decoder.logits(decoder(IDS, AT)[0])


def test_a_folder_gives_the_same_adapter_bit_for_bit(tmp_path):
    first = build(CONFIG, weights(), "index")
    adapter = trained(first)
    adapters.save(first, tmp_path / "lora")
    second = build(CONFIG, weights(), "unroll")
    assert adapters.restore(second, tmp_path / "lora") == adapter
    ours = {m.name: (a, b) for m, a, b in adapters.read(first)}
    for module, a, b in adapters.read(second):
        np.testing.assert_array_equal(a, ours[module.name][0])
        np.testing.assert_array_equal(b, ours[module.name][1])
