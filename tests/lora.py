"""Adapters whose B is not zero, for tests."""

import jax
import numpy as np

from gemlax import adapters
from gemlax.config import edit
from gemlax.presets import preset, tiny

__all__ = ["SMALL", "put_table", "trained"]

_TINY = tiny(preset("gemma-3-270m"), num_hidden_layers=6)
# Rows of whole groups of codes.
SMALL = edit(_TINY, hidden_size=96)


def values_of(adapter, size, seed):
    """Draw A and B of each module, as training might leave them."""
    values = {}
    for module in adapter:
        rng = np.random.default_rng([seed, *module.name.encode()])
        shapes = ((module.rank, module.shape[1]), (module.shape[0], module.rank))
        values[module.name] = tuple(
            (rng.standard_normal(shape) * size).astype(np.float32) for shape in shapes
        )
    return values


def trained(decoder, rules, *, size=0.05, seed=7):
    """Attach rules to a decoder and make A and B what training might; return the record."""
    adapter = adapters.attach(decoder, rules, key=jax.random.key(3))
    adapters.detach(decoder)
    adapters.put(decoder, [(adapter, values_of(adapter, size, seed))])
    return adapter


def put_table(decoder, *rules, size=0.2):
    """Put one drawn adapter for each of `rules` into the decoder's tables, after the empty one."""
    table = [None]
    for seed, each in enumerate(rules):
        adapter = adapters.attach(decoder, each, key=jax.random.key(3))
        adapters.detach(decoder)
        table.append((adapter, values_of(adapter, size, seed)))
    adapters.put(decoder, table)
