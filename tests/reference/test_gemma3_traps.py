"""Known bugs of Gemma 3 implementations, each as a one-line wrong variant that the gate must see.

A variant passes the test when its logits are at least 100 times further from transformers than
the tolerance allows: then the parity tests would catch it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden import make_gemma3
from reference.toys import SIZES, toy
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gemlax import ops
from gemlax.config import GemmaConfig, LayerSpec, RopeSpec

FACTOR = 100
SLIDING, FULL = "sliding_attention", "full_attention"
SCALED = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")  # rope factor 8; two K/V heads

Change = Callable[[GemmaConfig], GemmaConfig]


def every(kind: str, **fields) -> Change:
    """Return the config with fields of each layer of a kind ("" is both) replaced."""
    return layers(
        lambda i, spec: dataclasses.replace(spec, **fields) if kind in spec.kind else spec
    )


def layers(change: Callable[[int, LayerSpec], LayerSpec]) -> Change:
    def apply(config: GemmaConfig) -> GemmaConfig:
        specs = tuple(change(i, spec) for i, spec in enumerate(config.text.layers))
        return dataclasses.replace(config, text=dataclasses.replace(config.text, layers=specs))

    return apply


def pattern(is_full: Callable[[int, int], bool]) -> Change:
    """Return the config with the kind of layer i of n decided by `is_full(i, n)`."""

    def apply(config: GemmaConfig) -> GemmaConfig:
        text = config.text
        kinds = {False: text.first(SLIDING), True: text.first(FULL)}
        return layers(lambda i, _: kinds[is_full(i, len(text.layers))])(config)

    return apply


def without_norm_offset(config: GemmaConfig) -> GemmaConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, norm_offset=0.0))


def cases(table: Mapping[str, tuple[Any, tuple[str, ...]]]) -> list[Any]:
    """Return (trap, size) for each size of each row; 27B has every feature, so the rest is slow."""
    return [
        pytest.param(trap, size, marks=() if size == SIZES[-1] else pytest.mark.slow)
        for trap, (_, sizes) in table.items()
        for size in sizes
    ]


CONFIGS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "query scale head_dim ** -0.5": (every("", attention_scale=16**-0.5), ("gemma-3-27b",)),
    "query scale 1": (every("", attention_scale=1.0), SIZES),
    "linear rope on sliding layers": (every(SLIDING, rope=RopeSpec(1e4, 8.0)), SCALED),
    "rope factor dropped": (every(FULL, rope=RopeSpec(1e6)), SCALED),
    "global theta on sliding layers": (every(SLIDING, rope=RopeSpec(1e6)), SIZES),
    "local theta on full layers": (every(FULL, rope=RopeSpec(1e4)), SIZES),
    "norms multiply by w": (without_norm_offset, SIZES),
    "window one short": (every(SLIDING, window=31), SIZES),
    "window one long": (every(SLIDING, window=33), SIZES),
    "all layers sliding": (pattern(lambda i, n: False), SIZES),
    "all layers full": (pattern(lambda i, n: True), SIZES),
    "first of six full": (pattern(lambda i, n: i % 6 == 0), SIZES),
    "last layer forced full": (
        pattern(lambda i, n: i % 6 == 5 or i == n - 1),
        ("gemma-3-1b", "gemma-3-4b", "gemma-3-27b"),
    ),
}


@pytest.mark.parametrize(("trap", "size"), cases(CONFIGS))
def test_a_wrong_config_is_far_from_transformers(trap, size):
    case = toy(size)
    wrong = CONFIGS[trap][0](case.config)
    check_far(trap, size, wrong)


def check_far(trap: str, size: str, config: GemmaConfig) -> None:
    case = toy(size)
    decoder = adapters.build(config, case.weights)
    error = case.error(adapters.logits(decoder, case.tokens, case.lengths))
    print(f"{size}, {trap}: {error / adapters.LOGITS:.0f} times the tolerance")
    assert error >= FACTOR * adapters.LOGITS


real = {name: getattr(ops, name) for name in ("embed", "unembed", "rope", "fresh_attend")}


def embed_unscaled(tokens, table, *, scale):
    return real["embed"](tokens, table, scale=1.0)


def embed_scaled_twice(tokens, table, *, scale):
    return real["embed"](tokens, table, scale=scale**2)


def unembed_scaled(x, table):
    return real["unembed"](x, table * x.shape[-1] ** 0.5)


def gelu_erf(gate, up):
    return jax.nn.gelu(gate, approximate=False) * up


def gelu_sigmoid(gate, up):
    return gate * jax.nn.sigmoid(1.702 * gate) * up


def silu(gate, up):
    return jax.nn.silu(gate) * up


def rope_of_adjacent_pairs(x, positions, **rope):
    size = x.shape[-1]
    order = np.arange(size).reshape(-1, 2).T.reshape(-1)  # evens, then odds
    return real["rope"](x[..., order], positions, **rope)[..., np.argsort(order)]


def query_head_n_reads_head_n_mod_k(q, k, v, positions, **settings):
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    order = np.arange(heads).reshape(groups, -1).T.reshape(-1)
    out = real["fresh_attend"](q[:, :, order], k, v, positions, **settings)
    return out[:, :, np.argsort(order)]


OPS: dict[str, tuple[tuple[str, Callable], tuple[str, ...]]] = {
    "embeddings not scaled": (("embed", embed_unscaled), SIZES),
    "embeddings scaled twice": (("embed", embed_scaled_twice), SIZES),
    "head scaled too": (("unembed", unembed_scaled), SIZES),
    "sigmoid GELU": (("geglu", gelu_sigmoid), SIZES),
    "SiLU": (("geglu", silu), SIZES),
    "rope of adjacent pairs": (("rope", rope_of_adjacent_pairs), SIZES),
    "query heads interleaved": (("fresh_attend", query_head_n_reads_head_n_mod_k), SCALED),
}


@pytest.mark.parametrize(("trap", "size"), cases(OPS))
def test_a_wrong_operation_is_far_from_transformers(trap, size, monkeypatch):
    name, wrong = OPS[trap][0]
    monkeypatch.setattr(ops, name, wrong)
    check_far(trap, size, toy(size).config)


@pytest.mark.parametrize("size", SIZES)
def test_the_mlps_of_a_period_tell_tanh_gelu_from_erf(size, monkeypatch):
    """The two differ by 5e-4 at most; at full depth that is 30 to 60 times the tolerance."""
    right = mlp_error(size)
    monkeypatch.setattr(ops, "geglu", gelu_erf)
    wrong = mlp_error(size)
    print(f"{size}: an MLP differs by {right:.1e} std, with erf by {wrong:.1e}")
    assert right <= adapters.LAYER
    assert wrong >= FACTOR * adapters.LAYER


def mlp_error(size: str) -> float:
    """Return how far the first six MLPs are from transformers' on its own input, times std."""
    case = toy(size)
    decoder = adapters.build(case.config, case.weights)
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, x, y: runs.append((x[0].numpy(), y.numpy())))
        for layer in case.reference.model.layers[:6]
    ]
    make_gemma3.run(case.reference, case.tokens, case.lengths)
    for hook in hooks:
        hook.remove()
    assert len(runs) == 6
    return max(
        float(np.abs(adapters.mlp_output(decoder, i, x) - y)[case.valid].max() / y.std())
        for i, (x, y) in enumerate(runs)
    )


def test_the_reordering_variants_change_only_the_order():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4, 8)), jnp.float32)
    at = jnp.arange(3, dtype=jnp.int32)[None]
    # With K = N, head n reads head n either way.
    same = query_head_n_reads_head_n_mod_k(x, x, x, at, window=None, scale=1.0)
    expected = ops.fresh_attend(x, x, x, at, window=None, scale=1.0)
    np.testing.assert_array_equal(same, expected)
    # Position 0 is not rotated.
    turned = rope_of_adjacent_pairs(x, at, theta=1e4, factor=1.0)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(
        turned[0, 1, 0, 1], x[0, 1, 0, 1] * np.cos(1) + x[0, 1, 0, 0] * np.sin(1), rtol=1e-5
    )


@pytest.mark.parametrize("hidden", [640, 1152, 2560, 3840, 5376])
def test_the_embedding_scale_is_rounded_to_bfloat16_with_the_table(hidden):
    table = torch.from_numpy(
        np.random.default_rng(0).standard_normal((8, hidden)).astype(np.float32)
    ).bfloat16()
    module = Gemma3TextScaledWordEmbedding(8, hidden, 0, embed_scale=hidden**0.5).bfloat16()
    with torch.no_grad():
        module.weight.copy_(table)
        expected = module(torch.arange(8)[None]).float().numpy()
    stored = jnp.asarray(table.float().numpy()).astype(jnp.bfloat16)
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    found = np.asarray(ops.embed(tokens, stored, scale=hidden**0.5).astype(jnp.float32))
    np.testing.assert_array_equal(found, expected)
    unrounded = (stored.astype(jnp.float32) * hidden**0.5).astype(jnp.bfloat16)
    assert (np.asarray(unrounded.astype(jnp.float32)) != expected[0]).any()
