"""Every front end, layout, cache and way of feeding, against the full forward of unrolled layers.

Shared by test_matrix_*.py (two periods, a remainder and both segments) and scripts/matrix (the real
depths).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from adapters import build
from flax import nnx
from golden.conditioned import conditioned_weights

from gemlax import cache, linen, ops
from gemlax.config import GemmaConfig, TextConfig
from gemlax.names import text_weights
from gemlax.presets import preset, tiny

# Layers of each pattern: two periods and a remainder, in each segment.
LAYERS: dict[str, list[int]] = {
    "gemma-3-270m": list(range(14)),
    "gemma-3-4b": list(range(14)),
    "gemma-3-27b": list(range(14)),
    "gemma-4-e2b": [*range(10), *range(15, 27)],
    "gemma-4-e4b": [*range(12), *range(24, 38)],
    "gemma-4-12b": list(range(14)),
    "gemma-4-26b-a4b": list(range(14)),
    "gemma-4-31b": list(range(14)),
}
LENGTHS = np.array([100, 71])  # the window is 32
WIDTH = 100
CHUNK = 17
CAPACITY = 128
FEEDS = {"one prefill": WIDTH, "chunks": CHUNK, "token by token": 1}
CACHES = ("stacked", "list", "paged")
# Sums of about 100 terms in another order; times std(logits).
SAME = 5e-5

BLOCK = 16
BLOCKS = CAPACITY // BLOCK

# Half the time to compile; the passes over HLO are those of every program.
_QUICK = {"xla_backend_optimization_level": 0}


def pattern(
    name: str, *, whole: bool = False, indices: dict[str, list[int]] = LAYERS
) -> GemmaConfig:
    """Return the toy of a size: its layers as in `indices`, or at its real depth."""
    config = tiny(preset(name))
    if whole:
        return config
    layers = tuple(config.text.layers[i] for i in indices[name])
    return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=layers))


class Held(NamedTuple):
    """A decoder of one front end and layout: its weights, and a function of them and a step."""

    config: TextConfig
    state: Any
    call: Any  # (state, tokens, positions, kv_caches, metadata) -> (logits, kv_caches)


def hold(name: str, config: GemmaConfig, front: str, layers: str, seed: str = "matrix") -> Held:
    weights = conditioned_weights(f"{seed} {name}", text_weights(config.text))
    decoder = build(config, weights, "index" if layers == "scan" else "unroll")
    if front == "NNX":
        graphdef, state = nnx.split(decoder)

        def call(state: Any, tokens: Any, at: Any, caches: Any, metadata: Any) -> Any:
            model = nnx.merge(graphdef, state)
            hidden, caches = model(tokens, at, caches, metadata)
            return model.logits(hidden), caches

        return Held(config.text, state, call)
    module = linen.Decoder(config.text, layers=layers, read="index")

    def apply(variables: Any, tokens: Any, at: Any, caches: Any, metadata: Any) -> Any:
        hidden, caches = module.apply(variables, tokens, at, caches, metadata)
        return module.apply(variables, hidden, method="logits"), caches

    return Held(config.text, linen.to_linen(decoder), apply)


def prompts() -> np.ndarray:
    return np.random.default_rng(21).integers(3, 512, (2, WIDTH)).astype(np.int32)


def full(held: Held) -> np.ndarray:
    """Return logits [B, T, V] of the prompts at once, without a cache."""
    columns = np.arange(WIDTH, dtype=np.int32)
    at = np.where(columns < LENGTHS[:, None], columns, ops.EMPTY)
    step = jax.jit(held.call, compiler_options=_QUICK)
    return np.asarray(step(held.state, jnp.asarray(prompts()), jnp.asarray(at), None, None)[0])


def new_caches(config: TextConfig, form: str, chunk: int) -> Any:
    """Return empty caches for steps of `chunk` tokens, as stacks, as a list, or in pages."""
    if form == "paged":
        return cache.new_pools(config, 2 * BLOCKS, BLOCK, jnp.float32)
    make = cache.new_list if form == "list" else cache.new_caches
    return make(config, 2, CAPACITY, jnp.float32, chunk=chunk)


def metadata(starts: np.ndarray, stops: np.ndarray, width: int) -> ops.AttentionMetadata:
    """Return what paged attention needs for tokens starts..stops of each row, flat and padded."""
    counts = stops - starts
    positions = np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)])
    padded = np.pad(positions, (0, 2 * width - len(positions)))
    tables = np.random.default_rng(4).permutation(2 * BLOCKS)
    fields = (
        padded,
        tables.reshape(2, BLOCKS),
        np.where(counts > 0, stops, 0),
        np.concatenate([[0], np.cumsum(counts)]),
        np.array([0, 0, 2]),
    )
    return ops.AttentionMetadata(*(jnp.asarray(field, jnp.int32) for field in fields))


def spans(width: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for start in range(0, WIDTH, width):
        yield (
            start + np.arange(width),
            np.minimum(start, LENGTHS),
            np.minimum(start + width, LENGTHS),
        )


def fed(held: Held, form: str, feed: str) -> np.ndarray:
    """Return logits [B, T, V] of the prompts, fed through a cache by pieces."""
    width, tokens = FEEDS[feed], prompts()
    # Rings of 48 slots for tokens and chunks; a prefill of all at once needs dense ones.
    caches = new_caches(held.config, form, max(width, CHUNK))
    step = jax.jit(held.call, donate_argnums=3, compiler_options=_QUICK)
    out = np.zeros((2, WIDTH, held.config.vocab_size), np.float32)
    for columns, starts, stops in spans(width):
        at = np.where((columns >= starts[:, None]) & (columns < stops[:, None]), columns, ops.EMPTY)
        row, column = np.nonzero(at != ops.EMPTY)
        place = at[row, column]
        if form == "paged":
            about = metadata(starts, stops, width)
            flat = np.zeros(2 * width, np.int32)
            flat[: len(row)] = tokens[row, place]
            args = (jnp.asarray(flat), about.input_positions, caches, about)
            some, caches = step(held.state, *args)
            out[row, place] = np.asarray(some)[: len(row)]
        else:
            chunk = jnp.asarray(tokens[:, np.minimum(columns, WIDTH - 1)])
            args = (chunk, jnp.asarray(at, jnp.int32), caches, None)
            some, caches = step(held.state, *args)
            out[row, place] = np.asarray(some)[row, column]
    return out


def error(out: np.ndarray, reference: np.ndarray) -> float:
    """Return the largest difference at real positions, times std(logits)."""
    real = np.arange(WIDTH) < LENGTHS[:, None]
    return float(np.abs(out - reference)[real].max() / reference[real].std())
