"""What the tests of training share: toy models, examples of random ids, and batches of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemlax import adapters
from gemlax.config import TextConfig
from gemlax.decoder import Decoder, Layers
from gemlax.formats import Coded, encode
from gemlax.presets import preset, tiny
from gemlax.tune.data import Example
from gemlax.tune.packing import Rows, pack
from gemlax.tune.settings import TuneSettings
from gemlax.tune.train import Trainer
from gemlax.weights import build_decoder

# (2 sliding, 1 full) twice, a scan in a scan; a width of 96 is whole groups of codes.
_TINY = tiny(preset("gemma-3-270m"), num_hidden_layers=6).text
SMALL = dataclasses.replace(_TINY, hidden_size=96, layers=(*_TINY.layers[3:6], *_TINY.layers[3:6]))
# One layer, where only the run around it matters.
ONE = dataclasses.replace(SMALL, layers=SMALL.layers[:1])
# Four layers of E2B: a sliding and a full one that own K/V, and one of each that reads theirs.
_E2B = tiny(preset("gemma-4-e2b")).text
SHARING = dataclasses.replace(_E2B, layers=(*_E2B.layers[3:5], *_E2B.layers[18:20]))
WIDTH = 48


def weights_of(config: TextConfig) -> dict[str, np.ndarray]:
    from gemlax.names import text_weights

    rng = np.random.default_rng(5)
    made = {}
    for name, shape in text_weights(config).items():
        value = rng.normal(size=shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        made[name] = (value + (0 if len(shape) > 1 else 1 - config.norm_offset)).astype(np.float32)
    return made


def decoder_of(
    config: TextConfig,
    *,
    layers: Layers = "scan",
    format: str | None = None,
    mesh: Any = None,
    read: Any = "index",
) -> Decoder:
    """Build a decoder of random weights; with `format`, its matrices of layers as codes."""
    weights = weights_of(config)

    def fill(name: str, out: np.ndarray) -> None:
        out[...] = weights[name]

    def codes(name: str) -> Coded | None:
        weight = weights[name]
        if weight.ndim != 2 or weight.shape[1] % 32:
            return None
        return Coded(format, *encode(weight, format))

    return build_decoder(
        config, fill, layers=layers, mesh=mesh, read=read, codes=codes if format else None
    )


def examples(count: int, vocabulary: int, low: int = 5, high: int = 20) -> list[Example]:
    rng = np.random.default_rng(7)
    made = []
    for _ in range(count):
        size = int(rng.integers(low, high))
        ids = [2, *rng.integers(3, vocabulary, size - 1).tolist()]
        cut = int(rng.integers(1, size - 1))
        made.append(Example(ids, [False] * cut + [True] * (size - cut)))
    return made


def rows(config: TextConfig, count: int = 4, width: int = WIDTH) -> Rows:
    """The first `count` rows of packed random examples."""
    return Rows(*(a[:count] for a in pack(examples(40, config.vocab_size), width)))


def trainer(decoder: Decoder, *, rank: int | None = 4, mesh: Any = None, **how: Any) -> Trainer:
    """A trainer of an adapter on a decoder; `rank` None: of all its weights."""
    if rank is not None:
        adapters.attach(decoder, adapters.Rule(rank=rank), key=jax.random.key(1))
    how = {"steps": 20, "learning_rate": 1e-2, "warmup": 0.0, **how}
    return Trainer(decoder, TuneSettings(**how), mesh=mesh)


def token_logprobs(decoder: Decoder, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """The log-probability of each label, from all logits at once: the reference."""
    logits = decoder.logits(hidden)
    at_labels = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return at_labels - jax.nn.logsumexp(logits, axis=-1)


def copy_of(decoder: Decoder) -> Decoder:
    return nnx.merge(*nnx.split(decoder))
