"""The decoder: embedding, the stack of layers, final norm and head.

The stack is either scanned, as the segments of its `StackPlan` with one stacked layer per kind,
or a list of modules. This file alone decides which; layers do not know. Caches ride in the
scan's carry and every layer writes only its own new rows.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemlax import cache as kv
from gemlax.cache import Caches
from gemlax.config import Kind, Run, Segment, StackPlan, TextConfig
from gemlax.layers import DecoderLayer, Embedder, RMSNorm
from gemlax.qtensor import At

__all__ = ["Decoder", "Layers", "Read", "weight_path"]

Layers = Literal["scan", "unroll"]
# How a scanned layer gets its matrices: as scan inputs, or as `At(stack, index)`.
Read = Literal["slice", "index"]


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
        self.embed_tokens = Embedder(config, dtype=dtype, rngs=rngs)

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
        if kv_caches is not None:
            kv_caches = kv.mark(kv_caches, positions)
        run = self._scan if self.scanned else self._unroll
        x, kv_caches = run(x, positions, kv_caches)
        return self.norm(x), kv_caches

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of hidden states."""
        flat = self.embed_tokens.unembed(hidden.reshape(-1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], -1)

    def _unroll(
        self, x: Array, positions: Array, caches: Caches | None
    ) -> tuple[Array, Caches | None]:
        plan = self.config.plan
        for i, layer in enumerate(self.layers):
            x, caches = _apply(layer, x, positions, caches, plan.cache_row(i))
        return x, caches

    def _scan(
        self, x: Array, positions: Array, caches: Caches | None
    ) -> tuple[Array, Caches | None]:
        plan = self.config.plan
        for segment, stacks in zip(plan.segments, self.layers, strict=True):
            x, caches = _scan_segment(plan, segment, stacks, self.read, x, positions, caches)
        return x, caches


def _apply(
    layer: DecoderLayer, x: Array, positions: Array, caches: Caches | None, row: Any
) -> tuple[Array, Caches | None]:
    """Run one layer against its row of the caches."""
    kind = layer.self_attn.spec.kind
    if caches is None:
        return layer(x, kv.Fresh(positions))[0], None
    x, view = layer(x, kv.LayerView(caches[kind], row, positions))
    return x, caches | {kind: view.cache}


def _stacked(make: Callable[[nnx.Rngs], DecoderLayer], count: int, rngs: nnx.Rngs) -> DecoderLayer:
    """Make one layer whose variables have a leading axis of `count` layers."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), count)
    state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys)
    return nnx.merge(graphdef, state)


def _scan_segment(
    plan: StackPlan,
    segment: Segment,
    stacks: Any,
    read: Read,
    x: Array,
    positions: Array,
    caches: Caches | None,
) -> tuple[Array, Caches | None]:
    """Scan over the periods of a segment, and inside a period over each run of equal layers."""
    sources = {
        kind: _Stack(stack, read, segment.per_period(kind)) for kind, stack in stacks.items()
    }
    first_rows = {run.spec.kind: plan.cache_row(segment.first + at) for at, run in _starts(segment)}

    def run_layers(run: Run, carry: Any, steps: Any) -> Any:
        kind = run.spec.kind

        def layer(carry: Any, step: Any) -> tuple[Any, None]:
            row, inputs = step
            built = sources[kind].layer(row, inputs)
            return _apply(built, carry[0], positions, carry[1], first_rows[kind] + row), None

        if run.count == 1:
            return layer(carry, _first(steps))[0]
        return jax.lax.scan(layer, carry, steps)[0]

    def period(carry: Any, inputs: Any) -> tuple[Any, None]:
        index, slices = inputs
        done = dict.fromkeys(sources, 0)
        for run in segment.runs:
            kind = run.spec.kind
            start, stop = done[kind], done[kind] + run.count
            rows = index * sources[kind].count + jnp.arange(start, stop, dtype=jnp.int32)
            taken = jax.tree.map(lambda a, at=slice(start, stop): a[at], slices[kind])
            carry = run_layers(run, carry, (rows, taken))
            done[kind] = stop
        return carry, None

    inputs = {kind: source.by_period() for kind, source in sources.items()}
    steps = (jnp.arange(segment.repeats, dtype=jnp.int32), inputs)
    if segment.repeats == 1:
        return period((x, caches), _first(steps))[0]
    return jax.lax.scan(period, (x, caches), steps)[0]


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda a: a[0], tree)


def _starts(segment: Segment) -> list[tuple[int, Run]]:
    """Return (layer offset, run) of the first run of each kind."""
    offset = 0
    seen: dict[Kind, tuple[int, Run]] = {}
    for run in segment.runs:
        seen.setdefault(run.spec.kind, (offset, run))
        offset += run.count
    return list(seen.values())


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
