"""The decoder: embedding, the stack of layers, final norm and head.

The stack is either scanned, as the segments of its `StackPlan` with one stacked layer per kind,
or a list of modules. This file alone decides which; layers do not know. Caches ride in the
scan's carry and every layer writes only its own new rows.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemlax import cache as kv
from gemlax import ops
from gemlax.cache import Caches
from gemlax.config import Kind, Run, Segment, StackPlan, TextConfig
from gemlax.layers import DecoderLayer, Embedder, Linear, RMSNorm
from gemlax.qtensor import At

__all__ = ["Decoder", "Layers", "Read", "weight_path"]

Layers = Literal["scan", "unroll"]
# How a scanned layer gets its matrices: as scan inputs, or as `At(stack, index)`.
Read = Literal["slice", "index"]
# K/V by kind: the stacked caches; or, without a cache, what later layers share.
Held = dict[Kind, Any]


class Decoder(nnx.Module):
    """The text decoder of Gemma.

    `layers="scan"` holds, for each segment, one stacked layer per kind; `layers="unroll"` a list
    of layers. The weights are the same, `weight_path` says where each lies.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        layers: Layers = "scan",
        read: Read = "slice",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(dtype)
        self.config, self.read, self.scanned = config, read, layers == "scan"
        self.embed_tokens = Embedder(
            config.vocab_size,
            config.hidden_size,
            config.hidden_size**0.5,
            dtype=dtype,
            rngs=rngs,
        )
        if config.hidden_size_per_layer_input:
            self._init_per_layer_inputs(dtype, rngs)

        def make(spec: Any) -> Callable[[nnx.Rngs], DecoderLayer]:
            return lambda rngs: DecoderLayer(config, spec, dtype=dtype, rngs=rngs)

        self.layers: nnx.List[Any]
        if self.scanned:
            self.layers = nnx.List(
                nnx.Dict(
                    {
                        kind: _stacked(make(spec), segment.per_period(kind) * segment.repeats, rngs)
                        for kind, spec in segment.specs.items()
                    }
                )
                for segment in config.plan.segments
            )
        else:
            self.layers = nnx.List(make(spec)(rngs) for spec in config.layers)
        self.norm = RMSNorm(config.hidden_size, config, dtype=dtype)

    def _init_per_layer_inputs(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        config = self.config
        width = config.hidden_size_per_layer_input
        packed = config.num_hidden_layers * width
        self.embed_tokens_per_layer = Embedder(
            config.vocab_size_per_layer_input, packed, width**0.5, dtype=dtype, rngs=rngs
        )
        self.per_layer_model_projection = Linear(
            config.hidden_size, packed, (None, "embed"), dtype=dtype, rngs=rngs
        )
        self.per_layer_projection_norm = RMSNorm(width, config, dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        kv_caches: Caches | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches | None]:
        """Return the hidden states after the final norm, and the caches with this step written.

        Args:
            tokens: token ids. They are not checked; an id out of range gives NaN.
            positions: the position of each token; `ops.EMPTY` marks padding, on either side.
            kv_caches: stacked caches (donate them), or None to attend to these tokens alone.
                A position beyond their capacity is dropped, so the caller checks lengths.
        """
        x = self.embed_tokens(tokens)
        step = _Step(positions, self._per_layer_inputs(tokens, x))
        if kv_caches is None:
            held: Any = _fresh(self.config, positions, x.dtype)
        else:
            held = kv.mark(kv_caches, positions)
        x, held = (self._scan if self.scanned else self._unroll)(x, step, held)
        return self.norm(x), None if kv_caches is None else held

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of hidden states."""
        flat = self.embed_tokens.unembed(hidden.reshape(-1, hidden.shape[-1]))
        flat = ops.softcap(flat, self.config.final_logit_softcapping)
        return flat.reshape(*hidden.shape[:-1], -1)

    def _per_layer_inputs(self, tokens: Array, x: Array) -> Array | None:
        """Return [L, B, T, P]: the token's own embedding per layer and one made from `x`.

        Source: transformers modeling_gemma4.py, Gemma4TextModel.project_per_layer_inputs.
        """
        config = self.config
        if not config.hidden_size_per_layer_input:
            return None
        shape = (*tokens.shape, config.num_hidden_layers, config.hidden_size_per_layer_input)
        own = self.embed_tokens_per_layer(tokens).reshape(shape)
        made = self.per_layer_model_projection(x) * jnp.asarray(config.hidden_size**-0.5, x.dtype)
        made = self.per_layer_projection_norm(made.reshape(shape))
        return jnp.moveaxis((made + own) * jnp.asarray(2.0**-0.5, x.dtype), 2, 0)

    def _unroll(self, x: Array, step: "_Step", held: Held) -> tuple[Array, Held]:
        plan = self.config.plan
        for i, layer in enumerate(self.layers):
            x, held = _apply(layer, x, step, i, held, plan.cache_row(i))
        return x, held

    def _scan(self, x: Array, step: "_Step", held: Held) -> tuple[Array, Held]:
        plan = self.config.plan
        for segment, stacks in zip(plan.segments, self.layers, strict=True):
            x, held = _scan_segment(plan, segment, stacks, self.read, x, step, held)
        return x, held


class _Step(NamedTuple):
    """What every layer of one call reads: positions [B, T], per-layer inputs [L, B, T, P]."""

    positions: Array
    per_layer_inputs: Array | None


def _fresh(config: TextConfig, positions: Array, dtype: jnp.dtype) -> Held:
    """Return what holds K/V without a cache: nothing, unless later layers share earlier ones'.

    Sharing is an edge of data flow: the last K/V of each kind ride along, from the layer that
    made them to those that read them. They start as zeros, which no layer reads.
    """
    if all(spec.owns_kv for spec in config.layers):
        return {}
    held: Held = {}
    for spec in config.layers:
        shape = (*positions.shape, spec.num_key_value_heads, spec.head_dim)
        held[spec.kind] = kv.Fresh(positions, jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return held


def _apply(
    layer: DecoderLayer, x: Array, step: _Step, index: Any, held: Held, row: Any
) -> tuple[Array, Held]:
    """Run layer `index` against its row of the caches, or against what is held without any."""
    kind = layer.self_attn.spec.kind
    own = None
    if step.per_layer_inputs is not None:
        own = jax.lax.dynamic_index_in_dim(step.per_layer_inputs, index, 0, keepdims=False)
    if kind not in held:
        return layer(x, kv.Fresh(step.positions), own)[0], held
    entry = held[kind]
    if isinstance(entry, kv.Fresh):
        x, entry = layer(x, entry, own)
        return x, held | {kind: entry}
    x, view = layer(x, kv.LayerView(entry, row, step.positions), own)
    return x, held | {kind: view.cache}


def _stacked(make: Callable[[nnx.Rngs], DecoderLayer], count: int, rngs: nnx.Rngs) -> DecoderLayer:
    """Make one layer whose variables have a leading axis of `count` layers."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    return nnx.merge(graphdef, state)


def _scan_segment(
    plan: StackPlan, segment: Segment, stacks: Any, read: Read, x: Array, step: _Step, held: Held
) -> tuple[Array, Held]:
    """Scan over the periods of a segment, and inside a period over each run of equal layers."""
    sources = {
        kind: _Stack(stack, read, segment.per_period(kind)) for kind, stack in stacks.items()
    }
    cache_rows = _cache_rows(plan, segment)

    def run_layers(run: Run, carry: Any, steps: Any) -> Any:
        kind = run.spec.kind
        first, moves = cache_rows[kind]

        def layer(carry: Any, inputs: Any) -> tuple[Any, None]:
            index, row, slices = inputs
            built = sources[kind].layer(row, slices)
            return _apply(built, carry[0], step, index, carry[1], first + row * moves), None

        if run.count == 1:
            return layer(carry, _first(steps))[0]
        return jax.lax.scan(layer, carry, steps)[0]

    def period(carry: Any, inputs: Any) -> tuple[Any, None]:
        number, slices = inputs
        index = segment.first + number * segment.period
        done = dict.fromkeys(sources, 0)
        for run in segment.runs:
            kind = run.spec.kind
            start, stop = done[kind], done[kind] + run.count
            rows = number * sources[kind].count + jnp.arange(start, stop, dtype=jnp.int32)
            indices = index + jnp.arange(run.count, dtype=jnp.int32)
            taken = jax.tree.map(lambda a, at=slice(start, stop): a[at], slices[kind])
            carry = run_layers(run, carry, (indices, rows, taken))
            done[kind] = stop
            index = index + run.count
        return carry, None

    inputs = {kind: source.by_period() for kind, source in sources.items()}
    steps = (jnp.arange(segment.repeats, dtype=jnp.int32), inputs)
    if segment.repeats == 1:
        return period((x, held), _first(steps))[0]
    return jax.lax.scan(period, (x, held), steps)[0]


def _cache_rows(plan: StackPlan, segment: Segment) -> dict[Kind, tuple[int, int]]:
    """Return, per kind, the cache row of its first layer and how far each next one lies on.

    Layers that share all read the row of one donor.
    """
    rows: dict[Kind, tuple[int, int]] = {}
    for offset in range(segment.period):
        layer = segment.first + offset
        spec = plan.layers[layer]
        rows.setdefault(spec.kind, (plan.cache_row(layer), int(spec.owns_kv)))
    return rows


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda a: a[0], tree)


class _Stack:
    """The stacked layer of one kind, split into what the scan slices and what it indexes."""

    def __init__(self, stack: DecoderLayer, read: Read, count: int):
        self.count = count
        by_index = read == "index"
        parts: Any = nnx.split(stack, lambda _, v: by_index and "matrix" in v.get_metadata(), ...)
        self.graphdef: Any = parts[0]
        self.whole: Any = parts[1]
        self.sliced: Any = parts[2]

    def by_period(self) -> Any:
        """Return the scan's inputs: [layers, ...] as [periods, layers in a period, ...]."""
        return jax.tree.map(lambda a: a.reshape(-1, self.count, *a.shape[1:]), self.sliced)

    def layer(self, row: Array, inputs: Any) -> DecoderLayer:
        """Put together the layer of `row` while tracing the scan's body."""
        is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
        whole = jax.tree.map(
            lambda v: v.replace(At(v.get_value(), row)), self.whole, is_leaf=is_variable
        )
        return nnx.merge(self.graphdef, whole, inputs)


def weight_path(
    config: TextConfig, layers: Layers, name: str
) -> tuple[tuple[str | int, ...], int | None]:
    """Return where a canonical weight lies: the path of its variable, and its row in a stack.

    `layers.7.mlp.up_proj.weight` lies at ("layers", 7, "mlp", ...), row None, when unrolled, and
    at ("layers", segment, kind, "mlp", ...), row r, when scanned.
    """
    parts: list[str | int] = [int(part) if part.isdigit() else part for part in name.split(".")]
    if parts[0] != "layers" or layers == "unroll":
        return tuple(parts), None
    at = config.plan.locate(int(parts[1]))
    return ("layers", at.segment, at.kind, *parts[2:]), at.row
