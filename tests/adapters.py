"""What the parity tests need of gemlax's decoder; the only place that knows its interface.

Weights go in and results come out as NumPy arrays, weights under Hugging Face's names.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemlax import cache, ops
from gemlax.config import GemmaConfig
from gemlax.decoder import Decoder, Layers, Read
from gemlax.weights import build_decoder

# How far gemlax may be from transformers at full depth, times std(logits). One rounding of the
# weights moves transformers' own logits by up to 2e-5; never loosened.
LOGITS = 1e-4
# The same for one layer on transformers' own input, times std(output): float32 rounds at 6e-8,
# and a layer is a dozen sums of about 100 terms.
LAYER = 1e-5

# "index" is the scan that reads its matrices as At(stack, index).
Stack = Literal["scan", "index", "unroll"]


def build(
    config: GemmaConfig,
    weights: Mapping[str, np.ndarray],
    layers: Stack = "scan",
    dtype: Any = jnp.float32,
) -> Decoder:
    """Build a decoder with exactly these weights."""
    read: Read = "index" if layers == "index" else "slice"
    rest = dict(weights)

    def fill(name: str, out: np.ndarray) -> None:
        weight = rest.pop(name)
        assert weight.shape == out.shape, f"{name}: {weight.shape}, expected {out.shape}"
        out[...] = weight

    held: Layers = "unroll" if layers == "unroll" else "scan"
    decoder = build_decoder(config.text, fill, dtype=dtype, layers=held, read=read)
    assert not rest, f"no place for {list(rest)}"
    return decoder


def read_caches_in_blocks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a toy's cache several blocks long, as a real one is."""
    monkeypatch.setattr(cache, "BLOCK", tokens)


def logits(decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return logits [B, T, V] of prompts padded on the right.

    Compiled anew on each call, so that a test may replace an operation beforehand.
    """
    graphdef, state = nnx.split(decoder)
    at = np.arange(tokens.shape[1], dtype=np.int32)
    positions = np.where(at < lengths[:, None], at, ops.EMPTY)

    def forward(state: Any, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, positions)[0])

    return np.asarray(jax.jit(forward)(state, jnp.asarray(tokens), jnp.asarray(positions)))


def layer_output(decoder: Decoder, i: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return what layer `i` alone makes of hidden states [B, T, D]."""
    graphdef, state = _layer(decoder, i)
    return np.asarray(_run_layer(graphdef, state, jnp.asarray(x), jnp.asarray(positions)))


def mlp_output(decoder: Decoder, i: int, x: np.ndarray) -> np.ndarray:
    """Return what the MLP of layer `i` alone makes of [B, T, D]; never from a compiled program."""
    return np.asarray(nnx.merge(*_layer(decoder, i)).mlp(jnp.asarray(x)))


def _layer(decoder: Decoder, i: int) -> tuple[Any, Any]:
    if not decoder.scanned:
        graphdef, state = nnx.split(decoder.layers[i])
        return graphdef, state
    at = decoder.config.plan.locate(i)
    graphdef, stacked = nnx.split(decoder.layers[at.segment][at.kind])
    return graphdef, jax.tree.map(lambda a: a[at.row], stacked)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graphdef: Any, state: Any, x: jax.Array, positions: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(x, cache.Fresh(positions))[0]
