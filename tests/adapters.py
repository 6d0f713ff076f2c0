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
from gemlax.layers import LoRACall
from gemlax.weights import build_decoder

# How far gemlax may be from transformers at full depth, times std(logits). One rounding of the
# weights moves transformers' own logits by up to 2e-5; never loosened.
LOGITS = 1e-4
# The same for one layer on transformers' own input, times std(output): float32 rounds at 6e-8,
# and a layer is a dozen sums of about 100 terms.
LAYER = 1e-5

# At full depth, positions at which a router's last choice was closer than this in probability
# are left out: another rounding may choose another expert. Probabilities differ by about 1e-7.
ROUTER_GAP = 3e-7

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
    monkeypatch.setattr(cache.slots, "BLOCK", tokens)


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


def cached_logits(
    decoder: Decoder, tokens: np.ndarray, lengths: np.ndarray, steps: int, chunk: int = 40
) -> np.ndarray:
    """Return logits [B, T, V] computed through caches, which hold each row's own length.

    All but the last `steps` tokens of each row go in by chunks, those one by one. Compiled anew
    on each call, as `logits` is.
    """
    graphdef, state = nnx.split(decoder)
    batch, width = tokens.shape
    caches = cache.new_caches(decoder.config, batch, cache.round_capacity(width), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state: Any, caches: Any, tokens: jax.Array, at: jax.Array) -> Any:
        model = nnx.merge(graphdef, state)
        hidden, caches = model(tokens, at, caches)
        return model.logits(hidden), caches

    rows = np.arange(batch)[:, None]
    out = np.zeros((batch, width, decoder.config.vocab_size), np.float32)
    starts = lengths - steps
    parts = [np.arange(i, i + chunk)[None] for i in range(0, starts.max(), chunk)]
    parts = [np.where(at < starts[:, None], at, ops.EMPTY) for at in parts]
    parts += [starts[:, None] + i for i in range(steps)]
    for at in parts:
        found, caches = step(state, caches, jnp.asarray(tokens[rows, at]), jnp.asarray(at, "int32"))
        real = at != ops.EMPTY
        out[np.broadcast_to(rows, at.shape)[real], at[real]] = np.asarray(found)[real]
    return out


def per_layer_inputs(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Return the per-layer inputs [L, B, T, P] of a model that has them."""
    ids = jnp.asarray(tokens)
    return np.asarray(decoder._per_layer_inputs(ids, decoder.embed_tokens(ids), LoRACall()))


# Keys and values [B, T, K, H].
KeysValues = tuple[np.ndarray, np.ndarray]


def layer_output(
    decoder: Decoder,
    i: int,
    x: np.ndarray,
    positions: np.ndarray,
    per_layer_input: np.ndarray | None = None,
    shared: KeysValues | None = None,
) -> np.ndarray:
    """Return what layer `i` alone makes of hidden states [B, T, D].

    Args:
        per_layer_input: [B, T, P], where the model has them.
        shared: what the layer attends to, if it owns no keys and values.
    """
    return run_layer(decoder, i, x, positions, per_layer_input, shared)[0]


def run_layer(
    decoder: Decoder,
    i: int,
    x: np.ndarray,
    positions: np.ndarray,
    per_layer_input: np.ndarray | None = None,
    shared: KeysValues | None = None,
) -> tuple[np.ndarray, KeysValues]:
    """Return `layer_output`, and the keys and values that the layer attended to."""
    graphdef, state = _layer(decoder, i)
    arrays = jax.tree.map(jnp.asarray, (x, positions, per_layer_input, shared))
    out, k, v = _run_layer(graphdef, state, *arrays)
    return np.asarray(out), (np.asarray(k), np.asarray(v))


def mlp_output(decoder: Decoder, i: int, x: np.ndarray) -> np.ndarray:
    """Return what the MLP of layer `i` alone makes of [B, T, D]; never from a compiled program."""
    return np.asarray(nnx.merge(*_layer(decoder, i)).mlp(jnp.asarray(x)))


def _layer(decoder: Decoder, i: int) -> tuple[Any, Any]:
    if decoder.layout == "unroll":
        graphdef, state = nnx.split(decoder.layers[i])
        return graphdef, state
    at = decoder.config.plan.locate(i)
    graphdef, stacked = nnx.split(decoder.layers[at.segment][at.kind])
    return graphdef, jax.tree.map(lambda a: a[at.row], stacked)


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(
    graphdef: Any, state: Any, x: Any, positions: Any, own: Any, shared: Any
) -> tuple[Any, Any, Any]:
    fresh = cache.Fresh(positions, *(shared or ()))
    out, fresh = nnx.merge(graphdef, state)(x, fresh, own)
    return out, fresh.k, fresh.v
