"""The decoder layer of Gemma as Flax NNX modules: wiring between weights and `ops`.

A layer knows its `LayerSpec` and no index, no mesh, no cache layout and no weight format.
"""

from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemlax import ops
from gemlax.config import LayerSpec, TextConfig

__all__ = [
    "MLP",
    "Attention",
    "DecoderLayer",
    "Embedder",
    "Experts",
    "Head",
    "KV",
    "Keys",
    "Linear",
    "LoRA",
    "LoRACall",
    "LoRAConstant",
    "RMSNorm",
    "Router",
]


@runtime_checkable
class KV(Protocol):
    """Where a layer's keys and values go and come from: a cache view, or this call alone."""

    @property
    def positions(self) -> Any:
        """The positions of this step's tokens, [B, T]."""
        ...

    def update(self, k: Array, v: Array) -> Any:
        """Take in this step's keys and values, [B, T, K, H]."""
        ...

    def attend(self, q: Array, *, window: int | None, scale: float) -> Array:
        """Attend to all that was taken in, up to now."""
        ...


View = TypeVar("View", bound=KV)


class Keys:
    """Gives a key to each weight that is made.

    `nnx.Rngs` counts in a variable; while tracing, flax asks each new count for what tracers have
    not, and the time of jax's answer grows with all that was traced before: 3.2 of 3.6 s for E2B.
    """

    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def __call__(self) -> Array:
        """Return a key that was not given before."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count)


class LoRACall(NamedTuple):
    """What one call asks of the adapters on a decoder; see the arguments of `Decoder`."""

    rows: Any = None  # int32 [B]
    dropout_key: Any = None
    enabled: bool = True


_DEFAULT = LoRACall()


class LoRAConstant(nnx.Variable):
    """What an adapter has beside A and B; it is not trained."""


class LoRA(nnx.Module):
    """A table of E low-rank updates of one weight: entry e adds scale * b @ a.

    A single adapter is a table of one. `dropout` are the rates of the entries, and `seed` tells
    the draws for this weight from those for others; both are None without dropout.
    """

    def __init__(
        self,
        axes: tuple[str | None, str | None],
        *,
        a: Any,  # [E, r, in]
        b: Any,  # [E, out, r]
        scale: Any,  # [E]
        dropout: Any = None,  # [E]
        seed: Any = None,  # uint32
    ):
        self.a = nnx.LoRAParam(a, axes=(None, None, axes[1]))
        self.b = nnx.LoRAParam(b, axes=(None, axes[0], None))
        self.scale = LoRAConstant(scale, axes=(None,))
        if dropout is not None:
            self.dropout = LoRAConstant(dropout, axes=(None,))
            self.seed = LoRAConstant(seed, axes=())
        self.drops = dropout is not None

    def __call__(self, x: Array, out: Array, call: LoRACall) -> Array:
        """Return `out`, what the weight made of `x`, with the update that each row takes."""
        table = ops.LowRank(self.a.get_value(), self.b.get_value(), self.scale.get_value())
        dropout = None
        if self.drops and call.dropout_key is not None:
            key = jax.random.fold_in(call.dropout_key, self.seed.get_value())
            dropout = key, self.dropout.get_value()
        return ops.add_low_rank(x, out, table, call.rows, dropout)


class Linear(nnx.Module):
    """x @ weight.T. The only module that holds a projection.

    `matrix` marks the weights that may be held as codes, and handed in as `At(stack, index)`.
    `gemlax.adapters` puts a `lora` on it.
    """

    lora: LoRA | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        dtype: jnp.dtype,
        keys: Keys,
    ):
        shape = (out_features, in_features)
        scale = jnp.asarray(in_features**-0.5, dtype)
        value = jax.random.normal(keys(), shape, dtype) * scale
        self.weight = nnx.Param(value, axes=axes, matrix=True)

    def put_lora(self, **parts: Any) -> None:
        """Put a `LoRA` of these parts on the projection, in place of the one it has."""
        self.lora = LoRA(self.weight.get_metadata()["axes"], **parts)

    def __call__(
        self, x: Float[Array, "B T D"], call: LoRACall = _DEFAULT
    ) -> Float[Array, "B T F"]:
        """Return x @ weight.T in the dtype of `x`."""
        return _together(x, call, self)[0]


def _together(x: Array, call: LoRACall, *layers: Linear) -> tuple[Array, ...]:
    """Apply several projections to one input."""
    outs = ops.linears(x, *(layer.weight.get_value() for layer in layers))
    return tuple(
        layer.lora(x, out, call) if layer.lora is not None and call.enabled else out
        for layer, out in zip(layers, outs, strict=True)
    )


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis; its gain is `config.norm_offset` + weight."""

    def __init__(self, size: int, config: TextConfig, *, dtype: jnp.dtype):
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        self.weight = nnx.Param(jnp.full((size,), 1 - self.offset, dtype), axes=(None,))

    def __call__(self, x: Float[Array, "*batch H"]) -> Float[Array, "*batch H"]:
        """Norm the last axis."""
        return ops.rms_norm(x, self.weight.get_value(), eps=self.eps, offset=self.offset)


class Embedder(nnx.Module):
    """A table whose rows embed tokens, times sqrt(width); or, unscaled, make logits."""

    def __init__(self, rows: int, width: int, scale: float, *, dtype: jnp.dtype, keys: Keys):
        self.scale = scale
        deviation = jnp.asarray(width**-0.5, dtype)
        value = jax.random.normal(keys(), (rows, width), dtype) * deviation
        self.weight = nnx.Param(value, axes=("vocab", "embed"), matrix=True)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return the scaled embeddings."""
        return ops.embed(tokens, self.weight.get_value(), scale=self.scale)

    def unembed(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Return float32 logits."""
        return ops.unembed(x, self.weight.get_value())


class Head(nnx.Module):
    """The matrix that makes logits, where it is not the table of embeddings."""

    def __init__(self, rows: int, width: int, *, dtype: jnp.dtype, keys: Keys):
        deviation = jnp.asarray(width**-0.5, dtype)
        value = jax.random.normal(keys(), (rows, width), dtype) * deviation
        self.weight = nnx.Param(value, axes=("vocab", "embed"), matrix=True)

    def unembed(self, x: Float[Array, "R D"]) -> Float[Array, "R V"]:
        """Return float32 logits."""
        return ops.unembed(x, self.weight.get_value())


class Attention(nnx.Module):
    """Grouped-query self-attention with normed queries and keys, and values where Gemma 4 does.

    A layer that owns no K/V has only the query side; it attends to its donor's.
    Sources: transformers modeling_gemma3.py, Gemma3Attention; modeling_gemma4.py,
    Gemma4TextAttention.
    """

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, keys: Keys):
        hidden, size = config.hidden_size, spec.head_dim
        heads, kv_heads = config.num_attention_heads, spec.num_key_value_heads
        make: dict[str, Any] = {"dtype": dtype, "keys": keys}
        self.spec, self.norms_values, self.eps = spec, config.v_norm, config.rms_norm_eps
        self.q_proj = Linear(hidden, heads * size, ("heads", "embed"), **make)
        self.q_norm = RMSNorm(size, config, dtype=dtype)
        if spec.owns_kv:
            self.k_proj = Linear(hidden, kv_heads * size, ("kv_heads", "embed"), **make)
            self.k_norm = RMSNorm(size, config, dtype=dtype)
            if not spec.k_eq_v:
                self.v_proj = Linear(hidden, kv_heads * size, ("kv_heads", "embed"), **make)
        self.o_proj = Linear(heads * size, hidden, ("embed", "heads"), **make)

    def __call__(
        self, x: Float[Array, "B T D"], kv: View, call: LoRACall = _DEFAULT
    ) -> tuple[Float[Array, "B T D"], View]:
        """Return what the layer attends to, and `kv` with this step taken in."""
        spec = self.spec
        raw = [self._heads(out) for out in _together(x, call, *self._projections())]
        if spec.owns_kv:
            kv = kv.update(*self._keys_and_values(raw[1], raw[-1], kv.positions))
        q = self._rope(self.q_norm(raw[0]), kv.positions)  # [B, T, N, H]
        out = kv.attend(q, window=spec.window, scale=spec.attention_scale)
        return self.o_proj(out.reshape(*x.shape[:2], -1), call), kv

    def _projections(self) -> list[Linear]:
        """Return those of the input: of queries, keys and values, as far as the layer has them."""
        if not self.spec.owns_kv:
            return [self.q_proj]
        both = [self.q_proj, self.k_proj]
        return both if self.spec.k_eq_v else [*both, self.v_proj]

    def _keys_and_values(self, k: Array, v: Array, positions: Array) -> tuple[Array, Array]:
        """Return roped keys and normed values, [B, T, K, H]; k_eq_v makes both of one array."""
        if self.norms_values:
            v = ops.rms_norm(v, None, eps=self.eps, offset=0.0)
        return self._rope(self.k_norm(k), positions), v

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.spec.head_dim)

    def _rope(self, x: Array, positions: Array) -> Array:
        rope = self.spec.rope
        return ops.rope(x, positions, theta=rope.theta, factor=rope.factor, rotated=rope.rotated)


class MLP(nnx.Module):
    """GeGLU: down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, keys: Keys):
        hidden, inner = config.hidden_size, spec.intermediate_size
        make: dict[str, Any] = {"dtype": dtype, "keys": keys}
        self.gate_proj = Linear(hidden, inner, ("mlp", "embed"), **make)
        self.up_proj = Linear(hidden, inner, ("mlp", "embed"), **make)
        self.down_proj = Linear(inner, hidden, ("embed", "mlp"), **make)

    def __call__(
        self, x: Float[Array, "B T D"], call: LoRACall = _DEFAULT
    ) -> Float[Array, "B T D"]:
        """Return the update of the residual."""
        return self.down_proj(ops.geglu(*_together(x, call, self.gate_proj, self.up_proj)), call)


class Router(nnx.Module):
    """Chooses the experts of each row from the raw residual."""

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, keys: Keys):
        self.top_k, self.eps = config.top_k_experts, config.rms_norm_eps
        axes = ("experts", "embed")
        self.proj = Linear(config.hidden_size, spec.num_experts, axes, dtype=dtype, keys=keys)
        self.scale = nnx.Param(jnp.ones((config.hidden_size,), dtype), axes=(None,))
        self.per_expert_scale = nnx.Param(jnp.ones((spec.num_experts,), dtype), axes=(None,))

    def __call__(self, x: Float[Array, "R D"]) -> tuple[Float[Array, "R k"], Int[Array, "R k"]]:
        """Return the weights and the ids of the chosen experts."""
        return ops.route(
            x,
            self.proj.weight.get_value(),
            self.scale.get_value(),
            self.per_expert_scale.get_value(),
            top_k=self.top_k,
            eps=self.eps,
        )


class Experts(nnx.Module):
    """The experts of one layer, stacked: gate and up in one array, the gate's rows first."""

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, keys: Keys):
        hidden, inner, count = config.hidden_size, config.moe_intermediate_size, spec.num_experts

        def draw(*shape: int) -> Array:
            deviation = jnp.asarray(shape[-1] ** -0.5, dtype)
            return jax.random.normal(keys(), shape, dtype) * deviation

        self.gate_up_proj = nnx.Param(
            draw(count, 2 * inner, hidden), axes=("experts", "mlp", "embed"), matrix=True
        )
        self.down_proj = nnx.Param(
            draw(count, hidden, inner), axes=("experts", "embed", "mlp"), matrix=True
        )

    def __call__(
        self, x: Float[Array, "R D"], weights: Float[Array, "R k"], ids: Int[Array, "R k"]
    ) -> Float[Array, "R D"]:
        """Return the weighted sum of each row's experts."""
        return ops.experts(
            x, weights, ids, self.gate_up_proj.get_value(), self.down_proj.get_value()
        )


class DecoderLayer(nnx.Module):
    """Attention and MLP, each between a norm before and a norm after, around the residual.

    Gemma 4 adds, where its config has them: experts beside the MLP, a gated per-layer input, and
    a scalar on the whole stream. Sources: transformers modeling_gemma3.py, Gemma3DecoderLayer;
    modeling_gemma4.py, Gemma4TextDecoderLayer.
    """

    def __init__(self, config: TextConfig, spec: LayerSpec, *, dtype: jnp.dtype, keys: Keys):
        make: dict[str, Any] = {"dtype": dtype, "keys": keys}

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config, dtype=dtype)

        self.self_attn = Attention(config, spec, **make)
        self.mlp = MLP(config, spec, **make)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.has_experts = spec.num_experts > 0
        if self.has_experts:
            self.router = Router(config, spec, **make)
            self.experts = Experts(config, spec, **make)
            self.post_feedforward_layernorm_1 = norm()
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_2 = norm()
        width, self.has_input = config.hidden_size_per_layer_input, False
        if width:
            self.has_input = True
            self.per_layer_input_gate = Linear(config.hidden_size, width, (None, "embed"), **make)
            self.per_layer_projection = Linear(width, config.hidden_size, ("embed", None), **make)
            self.post_per_layer_input_norm = norm()
        self.has_scalar = config.layer_scalar
        if self.has_scalar:
            self.layer_scalar = nnx.Param(jnp.ones((1,), dtype), axes=(None,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        kv: View,
        per_layer_input: Float[Array, "B T P"] | None = None,
        call: LoRACall = _DEFAULT,
    ) -> tuple[Float[Array, "B T D"], View]:
        """Return the residual stream after the layer, and `kv` with this step taken in."""
        with jax.named_scope("attention"):
            out, kv = self.self_attn(self.input_layernorm(x), kv, call)
            x = x + self.post_attention_layernorm(out)
        with jax.named_scope("mlp"):
            out = self.mlp(self.pre_feedforward_layernorm(x), call)
            if self.has_experts:
                out = self.post_feedforward_layernorm_1(out) + self._mix(x)
            x = x + self.post_feedforward_layernorm(out)
        if self.has_input:
            assert per_layer_input is not None
            gate = self.per_layer_input_gate(x, call)
            out = self.per_layer_projection(ops.geglu(gate, per_layer_input), call)
            x = x + self.post_per_layer_input_norm(out)
        if self.has_scalar:
            # It scales the residual too.
            x = x * self.layer_scalar.get_value().astype(x.dtype).reshape(1, 1, 1)
        return x, kv

    def _mix(self, x: Array) -> Array:
        """Run the experts on the residual; the router sees it raw, the experts normed."""
        rows = x.reshape(-1, x.shape[-1])
        out = self.experts(self.pre_feedforward_layernorm_2(rows), *self.router(rows))
        return self.post_feedforward_layernorm_2(out).reshape(x.shape)
