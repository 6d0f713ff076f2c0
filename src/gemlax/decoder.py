"""The decoder: embedding, the stack of layers, final norm and head.

The stack is either scanned, as the segments of its `StackPlan` with one stacked layer per kind,
or a list of modules. This file alone decides which; layers do not know. Caches ride in the
scan's carry and every layer writes only its own new rows.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gemlax import cache as kv
from gemlax import ops
from gemlax.config import Kind, Run, Segment, StackPlan, TextConfig
from gemlax.layers import DecoderLayer, Embedder, Head, Keys, Linear, LoRACall, RMSNorm
from gemlax.qtensor import At

__all__ = ["Decoder", "Layers", "Read", "weight_path"]

Layers = Literal["scan", "unroll"]
# How a scanned layer gets its matrices: as scan inputs, or as `At(stack, index)`.
Read = Literal["slice", "index"]
# Caches by kind, or by entry of a list. Without caches: the K/V that later layers share, by kind.
KVs = dict[Any, Any]
# `jax.lax.scan`, or what has its signature.
Scan = Callable[..., Any]


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
        dtype, keys = jnp.dtype(dtype), Keys(rngs.params())
        self.config, self.read, self.layout = config, read, layers
        self.adapter: Any = None  # the record of what `adapters` put on the projections
        self.base: Any = None  # the checkpoint that it was loaded from, an `adapters.Base`
        self.embed_tokens = Embedder(
            config.vocab_size,
            config.hidden_size,
            config.hidden_size**0.5,
            dtype=dtype,
            keys=keys,
        )
        if config.hidden_size_per_layer_input:
            self._init_per_layer_inputs(dtype, keys)

        def make(spec: Any) -> Callable[[Keys], DecoderLayer]:
            return lambda keys: DecoderLayer(config, spec, dtype=dtype, keys=keys)

        self.layers: nnx.List[Any]
        if layers == "scan":
            self.layers = nnx.List(
                nnx.Dict(
                    {
                        kind: _stacked(make(spec), segment.per_period(kind) * segment.repeats, keys)
                        for kind, spec in segment.specs.items()
                    }
                )
                for segment in config.plan.segments
            )
        else:
            self.layers = nnx.List(make(spec)(keys) for spec in config.layers)
        self.norm = RMSNorm(config.hidden_size, config, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config.vocab_size, config.hidden_size, dtype=dtype, keys=keys)

    def _init_per_layer_inputs(self, dtype: jnp.dtype, keys: Keys) -> None:
        config = self.config
        width = config.hidden_size_per_layer_input
        packed = config.num_hidden_layers * width
        self.embed_tokens_per_layer = Embedder(
            config.vocab_size_per_layer_input, packed, width**0.5, dtype=dtype, keys=keys
        )
        self.per_layer_model_projection = Linear(
            config.hidden_size, packed, (None, "embed"), dtype=dtype, keys=keys
        )
        self.per_layer_projection_norm = RMSNorm(width, config, dtype=dtype)

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        positions: Int[Array, "*B T"] | None = None,
        kv_caches: Any = None,
        attention_metadata: Any = None,
        *,
        cache_rows: Int[Array, " B"] | None = None,
        adapter_rows: Int[Array, " B"] | None = None,
        dropout_key: Array | None = None,
        use_adapter: bool = True,
        segments: Int[Array, "B T"] | None = None,
        remat: bool = False,
        scan: Scan = jax.lax.scan,
    ) -> tuple[Float[Array, "*B T D"], Any]:
        """Return the hidden states after the final norm, and the caches with this step written.

        Args:
            tokens: token ids [B, T], or flat [T] for paged caches. They are not checked; an id
                out of range gives NaN.
            positions: the position of each token; `ops.EMPTY` marks padding, on either side.
                None: `attention_metadata.input_positions`.
            kv_caches: donate them.
                None: attend to these tokens alone.
                A dict by kind: stacked caches (`new_caches`) or pools (`new_pools`).
                A list: one `LayerCache`, or one array of pages in tpu-inference's layout, per
                layer that owns keys and values. Its entries are replaced and it is returned.
                A position beyond the capacity of a dense cache is dropped, so check lengths.
            attention_metadata: what paged caches need: `ops.AttentionMetadata`, or a dict of them
                by kind, or by layer ("layer.0"). Every layer gets it as it is.
            cache_rows: which rows of stacked caches those of this call are; None: all, in order.
            adapter_rows: the entry of the table of adapters that each row takes; None: entry 0.
            dropout_key: draws the dropout of adapters, in training; None: nothing is dropped.
            use_adapter: False: the base alone.
            segments: without caches, the text of its row that each token belongs to and alone
                attends to; positions begin anew in each. None: one text.
            remat: compute the inside of each layer again in the backward pass, to save memory.
            scan: the loop over layers; Linen hands in its own.

        Raises:
            TypeError: `kv_caches` of another type, or pages without `attention_metadata`.
            ValueError: caches that do not fit the layers, or tokens that do not fit the caches.
        """
        metadata = kv.metadata_by_kind(self.config, attention_metadata)
        if positions is None:
            if attention_metadata is None:
                raise TypeError("positions may be None only where attention_metadata has them")
            positions = metadata[self.config.layers[0].kind].input_positions
            positions = jnp.asarray(positions).reshape(tokens.shape)
        flat = tokens.ndim == 1
        if flat:
            tokens, positions = tokens[None], positions[None]
        x = self.embed_tokens(tokens)
        _check_call(kv_caches, segments, cache_rows)
        call = LoRACall(adapter_rows, dropout_key, use_adapter)
        inputs = self._per_layer_inputs(tokens, x, call)
        step = _Step(positions, inputs, metadata, scan, segments, remat, cache_rows, call)
        x, kv_caches = self._run(x, step, kv_caches)
        x = self.norm(x)
        return (x[0] if flat else x), kv_caches

    def _run(self, x: Array, step: "_Step", kv_caches: Any) -> tuple[Array, Any]:
        """Run the layers against what `kv_caches` is, and give it back in its own form."""
        run = self._scan if self.layout == "scan" else self._unroll
        if kv_caches is None:
            return run(x, step, _fresh(self.config, step, x.dtype))[0], None
        if isinstance(kv_caches, dict):
            kinds = {spec.kind for spec in self.config.layers if spec.owns_kv}
            if kv_caches.keys() != kinds:
                raise ValueError(
                    f"kv_caches by kind needs the keys {', '.join(sorted(kinds))}; "
                    f"got {', '.join(map(str, kv_caches)) or 'none'}"
                )
            return run(x, step, kv.record_positions(kv_caches, step.positions, step.cache_rows))
        if not isinstance(kv_caches, list):
            raise TypeError(
                "kv_caches must be a list with one entry per layer that owns keys and values, a "
                f"dict of stacked caches by kind, or None; got {type(kv_caches).__name__}"
            )
        listed = kv.LayerListCache(self.config, kv_caches, x.shape[0])
        kvs = listed.by_kind() if self.layout == "scan" else listed.by_layer()
        x, kvs = run(x, step, kv.record_positions(kvs, step.positions))
        return x, listed.write_back(kvs)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of hidden states."""
        flat = self.head.unembed(hidden.reshape(-1, hidden.shape[-1]))
        flat = ops.softcap(flat, self.config.final_logit_softcapping)
        return flat.reshape(*hidden.shape[:-1], -1)

    @property
    def head(self) -> Embedder | Head:
        """What makes logits: the table of embeddings, or a matrix of its own."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of what is not stored as codes, and of the hidden states."""
        return self.norm.weight.get_value().dtype

    def _per_layer_inputs(self, tokens: Array, x: Array, call: LoRACall) -> Array | None:
        """Return [L, B, T, P]: the token's own embedding per layer and one made from `x`.

        Source: transformers modeling_gemma4.py, Gemma4TextModel.project_per_layer_inputs.
        """
        config = self.config
        if not config.hidden_size_per_layer_input:
            return None
        shape = (*tokens.shape, config.num_hidden_layers, config.hidden_size_per_layer_input)
        embedded = self.embed_tokens_per_layer(tokens).reshape(shape)
        made = self.per_layer_model_projection(x, call)
        made = made * jnp.asarray(config.hidden_size**-0.5, x.dtype)
        made = self.per_layer_projection_norm(made.reshape(shape))
        return jnp.moveaxis((made + embedded) * jnp.asarray(2.0**-0.5, x.dtype), 2, 0)

    def _unroll(self, x: Array, step: "_Step", kvs: KVs) -> tuple[Array, KVs]:
        plan = self.config.plan
        owners = [i for i, spec in enumerate(plan.layers) if spec.owns_kv]
        by_layer = any(isinstance(key, int) for key in kvs)
        for i, layer in enumerate(self.layers):
            kind, row = plan.layers[i].kind, plan.cache_row(i)
            key = (owners.index(plan.donor(i)), 0) if by_layer else (kind, row)
            body = _remat(functools.partial(_apply, layer, step, i, *key), step, in_loop=False)
            x, kvs = body(x, kvs)
        return x, kvs

    def _scan(self, x: Array, step: "_Step", kvs: KVs) -> tuple[Array, KVs]:
        plan = self.config.plan
        for segment, stacks in zip(plan.segments, self.layers, strict=True):
            x, kvs = _scan_segment(plan, segment, stacks, self.read, x, step, kvs)
        return x, kvs


def _check_call(kv_caches: Any, segments: Any, cache_rows: Any) -> None:
    if segments is not None and kv_caches is not None:
        raise ValueError("segments are for calls without kv_caches, which keep no segments")
    if cache_rows is not None and not isinstance(kv_caches, dict):
        raise ValueError("cache_rows are for kv_caches by kind, stacked")


class _Step(NamedTuple):
    """What every layer of one call reads, and the loop over layers."""

    positions: Array  # [B, T]
    per_layer_inputs: Array | None  # [L, B, T, P]
    metadata: dict[Kind, Any]
    scan: Scan
    segments: Array | None  # [B, T]
    remat: bool
    cache_rows: Array | None  # [B]
    lora: LoRACall

    def fresh(self) -> kv.Fresh:
        """Return what a layer attends to without caches."""
        return kv.Fresh(self.positions, segments=self.segments)


def _remat(body: Callable[..., Any], step: _Step, *, in_loop: bool) -> Callable[..., Any]:
    """Let the backward pass compute `body` again, if `step` says so.

    Inside a loop nothing can merge the second computation with the first one, and barriers
    against that would only cost; outside, they are needed.
    """
    return jax.checkpoint(body, prevent_cse=not in_loop) if step.remat else body


def _fresh(config: TextConfig, step: _Step, dtype: jnp.dtype) -> KVs:
    """Return what holds K/V without a cache: nothing, unless later layers share earlier ones'.

    Sharing is an edge of data flow: the last K/V of each kind ride along, from the layer that
    made them to those that read them. They start as zeros, which no layer reads.
    """
    if all(spec.owns_kv for spec in config.layers):
        return {}
    kvs: KVs = {}
    for spec in config.layers:
        shape = (*step.positions.shape, spec.num_key_value_heads, spec.head_dim)
        empty = jnp.zeros(shape, dtype)
        kvs[spec.kind] = step.fresh().update(empty, empty)
    return kvs


def _apply(
    layer: DecoderLayer, step: _Step, index: Any, key: Any, row: Any, x: Array, kvs: KVs
) -> tuple[Array, KVs]:
    """Run layer `index` against row `row` of cache `key`, or against what later layers share."""
    spec = layer.self_attn.spec
    layer_input = None
    if step.per_layer_inputs is not None:
        layer_input = jax.lax.dynamic_index_in_dim(step.per_layer_inputs, index, 0, keepdims=False)
    if key not in kvs:
        return layer(x, step.fresh(), layer_input, step.lora)[0], kvs
    entry = kvs[key]
    if isinstance(entry, kv.Fresh):
        x, entry = layer(x, entry, layer_input, step.lora)
        return x, kvs | {key: entry}
    metadata = step.metadata[spec.kind]
    view = entry.layer(row, step.positions, spec, metadata, step.cache_rows)
    x, view = layer(x, view, layer_input, step.lora)
    return x, kvs | {key: view.cache}


def _stacked(make: Callable[[Keys], DecoderLayer], count: int, keys: Keys) -> DecoderLayer:
    """Make one layer whose variables have a leading axis of `count` layers."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make(Keys(jax.random.key(0)))))[0]
    each = jax.random.split(keys(), count)
    state = jax.vmap(lambda key: nnx.state(make(Keys(key))))(each)
    return nnx.merge(graphdef, state)


def _scan_segment(
    plan: StackPlan, segment: Segment, stacks: Any, read: Read, x: Array, step: _Step, kvs: KVs
) -> tuple[Array, KVs]:
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
            x, kvs = carry
            return _apply(built, step, index, kind, first + row * moves, x, kvs), None

        if run.count == 1:
            body = _remat(layer, step, in_loop=segment.repeats > 1)
            return body(carry, _first(steps))[0]
        return step.scan(_remat(layer, step, in_loop=True), carry, steps)[0]

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
        return period((x, kvs), _first(steps))[0]
    return step.scan(period, (x, kvs), steps)[0]


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
    place = config.plan.locate(int(parts[1]))
    return ("layers", place.segment, place.kind, *parts[2:]), place.row
