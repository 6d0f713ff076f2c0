"""Known bugs of Gemma implementations, each as a one-line wrong variant, and how far it is off.

A variant counts as caught when it is at least `FACTOR` times further from transformers than the
tolerance allows: then the parity tests would fail.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import adapters
import jax
import numpy as np
import pytest
from golden import hf
from reference.toys import Toy, toy

from gemlax import ops
from gemlax.config import GemmaConfig, LayerSpec

FACTOR = 100
SLIDING, FULL = "sliding_attention", "full_attention"

Weights = Mapping[str, np.ndarray]
# Returns how far a decoder is from transformers, in tolerances.
Measure = Callable[[Toy, GemmaConfig, Weights], float]


def logits_error(case: Toy, config: GemmaConfig, weights: Weights) -> float:
    decoder = adapters.build(config, weights)
    return case.error(adapters.logits(decoder, case.tokens, case.lengths)) / adapters.LOGITS


def cached_error(case: Toy, config: GemmaConfig, weights: Weights) -> float:
    decoder = adapters.build(config, weights)
    found = adapters.cached_logits(decoder, case.tokens, case.lengths, steps=0)
    return case.error(found) / adapters.LOGITS


def per_layer_input_error(case: Toy, config: GemmaConfig, weights: Weights) -> float:
    decoder = adapters.build(config, weights)
    expected = np.stack(case.run.per_layer_inputs)
    off = np.abs(adapters.per_layer_inputs(decoder, case.tokens) - expected)[:, case.valid].max()
    return float(off / expected.std()) / adapters.LAYER


def mlp_error(case: Toy, config: GemmaConfig, weights: Weights) -> float:
    """Return how far the first six MLPs are from transformers' on its own input."""
    decoder = adapters.build(config, weights)
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, x, y: runs.append((x[0].numpy(), y.numpy())))
        for layer in case.reference.model.layers[:6]
    ]
    hf.run(case.reference, case.tokens, case.lengths)
    for hook in hooks:
        hook.remove()
    assert len(runs) == 6
    off = max(
        float(np.abs(adapters.mlp_output(decoder, i, x) - y)[case.valid].max() / y.std())
        for i, (x, y) in enumerate(runs)
    )
    return off / adapters.LAYER


class Trap(NamedTuple):
    """A wrong variant: another config, other weights, or another value of (object, name).

    `sizes` are the toys that have what goes wrong; the last one stands for all in the default run
    and in docs/parity.md.
    """

    sizes: tuple[str, ...]
    config: Callable[[GemmaConfig], GemmaConfig] = lambda config: config
    weights: Callable[[Toy], Weights] = lambda case: case.weights
    patch: tuple[Any, str, Any] | None = None
    measure: Measure = logits_error

    def error(self, size: str) -> float:
        """Return how far the variant is from transformers, in tolerances."""
        case = toy(size)
        swap = mock.patch.object(*self.patch) if self.patch else contextlib.nullcontext()
        with swap:
            return self.measure(case, self.config(case.config), self.weights(case))


def cases(traps: Mapping[str, Trap]) -> list[Any]:
    """Return (trap, size) for each size of each trap; all but the last size are slow."""
    return [
        pytest.param(name, size, marks=() if size == trap.sizes[-1] else pytest.mark.slow)
        for name, trap in traps.items()
        for size in trap.sizes
    ]


def check_far(trap: str, size: str, error: float) -> None:
    print(f"{size}, {trap}: {error:.0f} times the tolerance")
    assert error >= FACTOR


# Changes of a config.


Change = Callable[[GemmaConfig], GemmaConfig]


def text(**fields: Any) -> Change:
    """Return the config with fields of its text part replaced."""
    return lambda config: dataclasses.replace(
        config, text=dataclasses.replace(config.text, **fields)
    )


def every(kind: str, **fields: Any) -> Change:
    """Return the config with fields of each layer of a kind ("" is both) replaced."""
    return layers(
        lambda i, spec: dataclasses.replace(spec, **fields) if kind in spec.kind else spec
    )


def layers(change: Callable[[int, LayerSpec], LayerSpec]) -> Change:
    def apply(config: GemmaConfig) -> GemmaConfig:
        specs = tuple(change(i, spec) for i, spec in enumerate(config.text.layers))
        return text(layers=specs)(config)

    return apply


# Wrong operations. The right ones are kept here, since they are replaced meanwhile.


real = {
    name: getattr(ops, name)
    for name in ("embed", "unembed", "rope", "fresh_attend", "route", "rms_norm")
}


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


def operations(sizes: tuple[str, ...], grouped: tuple[str, ...]) -> dict[str, Trap]:
    """Return the traps in operations that both families share.

    Args:
        grouped: the sizes with several K/V heads, and several query heads for each.
    """
    return {
        "embeddings not scaled": Trap(sizes, patch=(ops, "embed", embed_unscaled)),
        "embeddings scaled twice": Trap(sizes, patch=(ops, "embed", embed_scaled_twice)),
        "head scaled too": Trap(sizes, patch=(ops, "unembed", unembed_scaled)),
        "sigmoid GELU": Trap(sizes, patch=(ops, "geglu", gelu_sigmoid)),
        "SiLU": Trap(sizes, patch=(ops, "geglu", silu)),
        # The two differ by 5e-4 at most: 30 to 60 times the tolerance at full depth.
        "erf GELU (each MLP)": Trap(sizes, patch=(ops, "geglu", gelu_erf), measure=mlp_error),
        "rope of adjacent pairs": Trap(sizes, patch=(ops, "rope", rope_of_adjacent_pairs)),
        "query heads interleaved": Trap(
            grouped, patch=(ops, "fresh_attend", query_head_n_reads_head_n_mod_k)
        ),
    }
