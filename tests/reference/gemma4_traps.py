"""The wrong variants of Gemma 4."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from golden.conditioned import conditioned_weights, weight_shapes
from reference.toys import Toy
from reference.traps import (
    FULL,
    SLIDING,
    Trap,
    Weights,
    cached_error,
    every,
    layers,
    operations,
    per_layer_input_error,
    real,
    text,
)

from gemlax import ops
from gemlax.config import RopeSpec, StackPlan
from gemlax.decoder import Decoder
from gemlax.layers import Attention, DecoderLayer

# The last of each stands for all in the default run.
ALL = ("gemma-4-26b-a4b", "gemma-4-e2b", "gemma-4-e4b", "gemma-4-31b", "gemma-4-12b")
EDGE = ("gemma-4-e4b", "gemma-4-e2b")
K_EQ_V = ("gemma-4-26b-a4b", "gemma-4-31b", "gemma-4-12b")
GROUPED = ("gemma-4-e4b", "gemma-4-26b-a4b", "gemma-4-31b", "gemma-4-12b")
MOE = ("gemma-4-26b-a4b",)

keys_and_values, attend = Attention._keys_and_values, Attention.__call__
rotate, run_layer = Attention._rope, DecoderLayer.__call__
per_layer_inputs, cache_row = Decoder._per_layer_inputs, StackPlan.cache_row


# Rope. `rotated` is the share of the pairs that turn.


def rope_over_rotated_dims(x, positions, *, theta, factor, rotated):
    """Take theta ** (-2i / rotated dims) for theta ** (-2i / head_dim)."""
    return real["rope"](x, positions, theta=theta ** (1 / rotated), rotated=rotated)


def rope_of_first_dims(x, positions, *, theta, factor, rotated):
    """Pair i with i + rotated / 2 inside the first dims, at the right frequencies."""
    first, rest = jnp.split(x, [int(x.shape[-1] * rotated)], axis=-1)
    turned = real["rope"](first, positions, theta=theta**rotated)
    return jnp.concatenate([turned, rest], axis=-1) if rotated < 1 else turned


# Values of layers with one projection for both.


def values_from_normed_keys(self, raw_k, raw_v, positions):
    k, v = keys_and_values(self, raw_k, raw_v, positions)
    if self.spec.k_eq_v:
        v = real["rms_norm"](self.k_norm(raw_k), None, eps=1e-6, offset=0.0)
    return k, v


def values_from_roped_keys(self, raw_k, raw_v, positions):
    k, v = keys_and_values(self, raw_k, raw_v, positions)
    return k, real["rms_norm"](k, None, eps=1e-6, offset=0.0) if self.spec.k_eq_v else v


def values_are_keys(self, raw_k, raw_v, positions):
    k, v = keys_and_values(self, raw_k, raw_v, positions)
    return k, k if self.spec.k_eq_v else v


# Shared keys and values.


def shared_keys_roped_again(self, x, kv, *call):
    if self.spec.owns_kv:
        return attend(self, x, kv, *call)
    return attend(self, x, kv._replace(k=self._rope(kv.k, kv.positions)), *call)[0], kv


def shared_keys_normed_again(self, x, kv, *call):
    if self.spec.owns_kv:
        return attend(self, x, kv, *call)
    k = real["rms_norm"](kv.k, None, eps=1e-6, offset=0.0)
    return attend(self, x, kv._replace(k=k), *call)[0], kv


def shared_layer_writes_the_donor(self, x, kv, *call):
    """Attend rightly, and leave keys of its own to the layers that come after."""
    if self.spec.owns_kv:
        return attend(self, x, kv, *call)
    out, kv = attend(self, x, kv, *call)
    return out, kv._replace(k=self._rope(kv.k, kv.positions))


def shared_queries_one_late(self, x, positions):
    return rotate(self, x, positions if self.spec.owns_kv else positions + 1)


def donor_before_the_donor(plan, layer):
    return cache_row(plan, layer) - (not plan.layers[layer].owns_kv)


def with_keys_of_shared_layers(case: Toy) -> Weights:
    """Return weights in which the layers that share have, as in published files, K/V weights."""
    shapes = weight_shapes({**case.hf_config, "num_kv_shared_layers": 0})
    return conditioned_weights(case.size, shapes) | case.weights


# The rest.


def scalar_on_the_update(self, x, kv, per_layer_input=None, *call):
    out, kv = run_layer(self, x, kv, per_layer_input, *call)
    scalar = self.layer_scalar.get_value().reshape(1, 1, 1)
    return out + x * (1 - scalar), kv


def times(factor):
    """Return what multiplies the per-layer inputs."""
    return lambda self, tokens, x, call: per_layer_inputs(self, tokens, x, call) * factor


def router_on_normed_input(self, x):
    normed = self.pre_feedforward_layernorm_2(x.reshape(-1, x.shape[-1]))
    out = self.experts(normed, *self.router(normed))
    return self.post_feedforward_layernorm_2(out).reshape(x.shape)


def route_without_renorm(x, proj, scale, per_expert_scale, *, top_k, eps):
    """Choose among all, which sum to one, and keep the first."""
    everyone = {"top_k": per_expert_scale.shape[0], "eps": eps}
    weights, ids = real["route"](x, proj, scale, per_expert_scale, **everyone)
    return weights[:, :top_k], ids[:, :top_k]


def changed(ending: str, change):
    """Return the weights with `change` made to those whose name ends so."""
    return lambda case: {
        name: change(value) if name.endswith(ending) else value
        for name, value in case.weights.items()
    }


def swapped_post_norms(case: Toy) -> Weights:
    other = {"_1.weight": "_2.weight", "_2.weight": "_1.weight"}
    return {
        name: case.weights[name[:-9] + other[name[-9:]]]
        if "post_feedforward_layernorm_" in name
        else value
        for name, value in case.weights.items()
    }


def halves_swapped(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2, axis=1)[::-1], axis=1)


TRAPS: dict[str, Trap] = {
    "attention scale head_dim ** -0.5": Trap(
        ALL, layers(lambda i, s: dataclasses.replace(s, attention_scale=s.head_dim**-0.5))
    ),
    "rope exponent over the rotated dims": Trap(ALL, patch=(ops, "rope", rope_over_rotated_dims)),
    "rope of the first dims only": Trap(ALL, patch=(ops, "rope", rope_of_first_dims)),
    "rope of all dims": Trap(ALL, every(FULL, rope=RopeSpec(1e6))),
    "local theta on full layers": Trap(ALL, every(FULL, rope=RopeSpec(1e4, rotated=0.25))),
    "partial rope on sliding layers": Trap(ALL, every(SLIDING, rope=RopeSpec(1e4, rotated=0.25))),
    "norms multiply by 1 + w": Trap(ALL, text(norm_offset=1.0)),
    "values not normed": Trap(ALL, text(v_norm=False)),
    "values from normed keys": Trap(
        K_EQ_V, patch=(Attention, "_keys_and_values", values_from_normed_keys)
    ),
    "values from roped keys": Trap(
        K_EQ_V, patch=(Attention, "_keys_and_values", values_from_roped_keys)
    ),
    "values are the keys": Trap(K_EQ_V, patch=(Attention, "_keys_and_values", values_are_keys)),
    "layer scalar missing": Trap(ALL, weights=changed("layer_scalar", np.ones_like)),
    "layer scalar on the update only": Trap(
        ALL, patch=(DecoderLayer, "__call__", scalar_on_the_update)
    ),
    "softcap missing": Trap(ALL, text(final_logit_softcapping=None)),
    "window one short": Trap(ALL, every(SLIDING, window=31)),
    "window one long": Trap(ALL, every(SLIDING, window=33)),
    **operations(ALL, GROUPED),
    # Norms follow both of these scales: behind them, only an epsilon sees the factor.
    "per-layer inputs not times 2 ** -0.5": Trap(
        EDGE,
        patch=(Decoder, "_per_layer_inputs", times(2**0.5)),
        measure=per_layer_input_error,
    ),
    "per-layer projection not times H ** -0.5": Trap(
        EDGE,
        weights=changed("per_layer_model_projection.weight", lambda w: w * w.shape[1] ** 0.5),
        measure=per_layer_input_error,
    ),
    "per-layer embeddings not scaled": Trap(
        EDGE, weights=changed("embed_tokens_per_layer.weight", lambda w: w / 4)
    ),
    "per-layer embeddings left out": Trap(
        EDGE, weights=changed("embed_tokens_per_layer.weight", np.zeros_like)
    ),
    "shared layers make keys of their own": Trap(
        EDGE, every("", owns_kv=True), with_keys_of_shared_layers
    ),
    "donor before the donor": Trap(
        EDGE, patch=(StackPlan, "cache_row", donor_before_the_donor), measure=cached_error
    ),
    "shared keys roped again": Trap(EDGE, patch=(Attention, "__call__", shared_keys_roped_again)),
    "shared keys normed again": Trap(EDGE, patch=(Attention, "__call__", shared_keys_normed_again)),
    "shared layer writes the donor's keys": Trap(
        EDGE, patch=(Attention, "__call__", shared_layer_writes_the_donor)
    ),
    "shared queries one position late": Trap(
        EDGE, patch=(Attention, "_rope", shared_queries_one_late)
    ),
    "router on the normed input": Trap(MOE, patch=(DecoderLayer, "_mix", router_on_normed_input)),
    "router scale missing": Trap(MOE, weights=changed("router.scale", np.ones_like)),
    "per_expert_scale left out": Trap(MOE, weights=changed("per_expert_scale", np.ones_like)),
    "per_expert_scale twice": Trap(MOE, weights=changed("per_expert_scale", np.square)),
    "chosen experts not renormalised": Trap(MOE, patch=(ops, "route", route_without_renorm)),
    "gate and up swapped in experts": Trap(
        MOE, weights=changed("experts.gate_up_proj", halves_swapped)
    ),
    "post-norms of experts and MLP crossed": Trap(MOE, weights=swapped_post_norms),
}

# Variants whose weights do not even fit: (sizes, change of the config).
MISFITS = {
    "head_dim of sliding layers for both": (ALL, every(FULL, head_dim=32)),
    "head_dim of full layers for both": (ALL, every(SLIDING, head_dim=64)),
    "K/V heads of sliding layers for both": (
        K_EQ_V,
        lambda config: every(FULL, num_key_value_heads=config.text.layers[0].num_key_value_heads)(
            config
        ),
    ),
    "MLP of shared layers not double": (EDGE[1:], every("", intermediate_size=96)),
    "MLP double everywhere": (EDGE[1:], every("", intermediate_size=192)),
    "full layers have a value projection": (K_EQ_V, every(FULL, k_eq_v=False)),
}
