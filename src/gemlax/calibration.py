"""What the inputs of each matrix weigh, measured by running the decoder over some tokens.

Few columns of Gemma's activations are many times larger than the rest, so an error in a weight that
meets one of them counts as much. Layers are read, run and dropped one at a time: the host holds the
tables, one layer and the activations.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemlax import ops
from gemlax.config import GemmaConfig, TextConfig
from gemlax.decoder import Decoder
from gemlax.layers import DecoderLayer
from gemlax.qtensor import Weight
from gemlax.weights import Fill, abstract_decoder

__all__ = ["Importance", "measure", "own_text", "random_rows", "rows_of"]

# Mean square of the input of each column, by canonical name of the matrix.
Importance = Mapping[str, np.ndarray]

# Tokens of a row, each of which begins with BOS, and rows.
_LENGTH, _MOST_ROWS = 512, 32
_TABLE = "embed_tokens.weight"


def rows_of(ids: Sequence[Sequence[int]], config: GemmaConfig) -> np.ndarray:
    """Cut the ids of texts into rows of 512 that begin with BOS, or one shorter row.

    What does not fill a row is left out, and what comes after the last row.
    """
    bos = config.bos_token_id
    joined = np.array([i for text in ids for i in text if i != bos], np.int32)
    length = min(_LENGTH, len(joined) + 1)
    count = min(_MOST_ROWS, len(joined) // max(1, length - 1))
    rows = joined[: count * (length - 1)].reshape(count, length - 1)
    return np.concatenate([np.full((count, 1), bos, np.int32), rows], axis=1)


def own_text() -> str:
    """Return a page of prose, dialogue, code and letters that was written for this purpose."""
    return Path(__file__).with_suffix(".txt").read_text("utf-8")


def random_rows(config: GemmaConfig) -> np.ndarray:
    """Return one row of BOS and ids by chance, which always are the same."""
    draw = np.random.default_rng(0).integers(0, config.text.vocab_size, _LENGTH - 1)
    return np.concatenate([[config.bos_token_id], draw]).astype(np.int32)[None]


def measure(config: TextConfig, read: Fill, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Measure the inputs of every matrix that projects, and of the head.

    Args:
        read: writes a weight of a canonical name into a float32 array.
        tokens: ids [rows, length]. The first of each row is not counted: activations on it, an
            attention sink, are far larger than all others.
    """
    found: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}

    def watch(x: jax.Array, weights: tuple[Weight, ...]) -> None:
        own = x.astype(jnp.float32).reshape(*tokens.shape, -1)[:, 1:]
        square = np.asarray(jnp.mean(jnp.square(own), axis=(0, 1)))
        for weight in weights:
            found[names[id(weight)]] = square

    graphdef, flat = abstract_decoder(config, "unroll", "index", jnp.dtype(jnp.float32))
    decoder: Decoder = nnx.merge(graphdef, nnx.from_flat_state(dict(flat)))
    layers = _Streamed(decoder.layers)
    layers.fill = lambda i, layer: names.update(_fill(layer, f"layers.{i}.", read))
    decoder.layers = nnx.List()
    names.update(_fill(decoder, "", read))
    decoder.layers = layers
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    with ops.watched(watch), ops.implementation("xla"):
        hidden, _ = decoder(jnp.asarray(tokens), jnp.asarray(positions))
    found[_TABLE] = np.asarray(jnp.mean(jnp.square(hidden[:, 1:]), axis=(0, 1)))
    return found


class _Streamed(nnx.List[DecoderLayer]):
    """Layers that get their weights when their turn comes, and lose them after it."""

    fill: Callable[[int, DecoderLayer], None]

    def __iter__(self) -> Iterator[DecoderLayer]:
        """Fill one layer after another."""
        for i, layer in enumerate(super().__iter__()):
            built = nnx.clone(layer)
            self.fill(i, built)
            yield built


def _fill(module: nnx.Module, prefix: str, read: Fill) -> dict[int, str]:
    """Write a module's weights, which have no values yet; return names by the id of arrays."""
    names = {}
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            name = prefix + ".".join(map(str, path))
            array = np.empty(variable.get_value().shape, np.float32)
            read(name, array)
            variable.set_value(jnp.asarray(array))
            names[id(variable.get_value())] = name
    return names
