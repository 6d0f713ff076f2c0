"""Adapters on a decoder: put there, switched off, merged into its weights, taken off.

The trainable parameters are the `nnx.LoRAParam` variables, lora_a and lora_b of the `Linear`s that
are adapted; everything else stays as it is. Of scanned layers they are stacked. Layers of one stack
with smaller ranks, or with no adapter, are filled up with zeros, whose gradients are zero.
"""

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from gemlax import sharding
from gemlax.adapters.rules import Adapter, Module, Rules, resolve
from gemlax.decoder import Decoder, Layers, weight_path
from gemlax.errors import RequestError
from gemlax.layers import Linear
from gemlax.qtensor import At, QTensor, dense, pack_bfloat16

__all__ = [
    "Kept",
    "LoRAScale",
    "Place",
    "adapted",
    "adapter_of",
    "attach",
    "detach",
    "dropout",
    "hold",
    "lora_enabled",
    "merge",
    "places",
    "put",
    "read",
    "unmerge",
]

_DTYPES = ("float32", "bfloat16")


class LoRAScale(nnx.Variable):
    """What the update of a layer is multiplied with; not trained."""


class LoRAChoice(nnx.Variable):
    """What is put there for one call: the rows of a table, or a key for dropout."""


class Place(NamedTuple):
    """A `Linear` of a decoder, and the modules that it stands for by row of its stack."""

    linear: Linear
    path: tuple[str | int, ...]
    layers: int | None  # in the stack; None: no stack
    modules: tuple[tuple[int | None, Module], ...]


def attach(decoder: Decoder, rules: Rules, *, key: jax.Array, dtype: Any = jnp.float32) -> Adapter:
    """Put an adapter on a decoder, which changes nothing until B is trained; say what it changes.

    A is drawn as peft draws it, uniformly within 1 / sqrt(in), B is zero. The base may be floats
    or codes; it is frozen if layers are scanned and read by index, or held as codes.

    Args:
        decoder: it is changed in place.
        rules: a rank or a `Rule` for every projection of attention and MLP, or one by pattern.
        key: the same key gives the same A, scanned or unrolled.
        dtype: of A and B, float32 or bfloat16.

    Raises:
        RequestError: the decoder has an adapter, a rule that fits nothing, or a rank of 0.
        UnsupportedError: rules for experts.
    """
    adapter = resolve(rules, decoder.config)

    def draw(module: Module) -> tuple[jax.Array, jax.Array]:
        own = jax.random.fold_in(key, zlib.crc32(module.name.encode()))
        out, width = module.shape
        bound = width**-0.5
        shape = (module.rank, width)
        a = jax.random.uniform(own, shape, jnp.float32, minval=-bound, maxval=bound)
        return a, jnp.zeros((out, module.rank), jnp.float32)

    put(decoder, adapter, {module.name: draw(module) for module in adapter}, dtype=dtype)
    return adapter


def put(decoder: Decoder, adapter: Adapter, values: Any, *, dtype: Any = jnp.float32) -> None:
    """Put an adapter with given values on a decoder: (A, B) by name of module."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise RequestError(f"an adapter is {' or '.join(_DTYPES)}, got {dtype.name}")
    if decoder.adapter is not None or any(adapted(decoder)):
        raise RequestError("the decoder has an adapter; detach or merge it first")
    for place in places(decoder, adapter):
        rank = max(module.rank for _, module in place.modules)
        modules = [module for _, module in place.modules]
        parts = [_filled(adapter, module, values[module.name], rank) for module in modules]
        if place.layers is None:
            a, b, scale = parts[0]
        else:
            rows = np.asarray([row for row, _ in place.modules])
            stacked = (jnp.stack(part) for part in zip(*parts, strict=True))
            a, b, scale = (
                jnp.zeros((place.layers, *part.shape[1:]), part.dtype).at[rows].set(part)
                for part in stacked
            )
        set_parts(decoder, place, a.astype(dtype), b.astype(dtype), scale)
    decoder.adapter = adapter


def _filled(
    adapter: Adapter, module: Module, pair: tuple[Any, Any], rank: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return A, B and the scale of a module, with zeros up to the rank of its stack."""
    more = rank - module.rank
    a, b = (jnp.asarray(part, jnp.float32) for part in pair)
    return (
        jnp.pad(a, ((0, more), (0, 0))),
        jnp.pad(b, ((0, 0), (0, more))),
        jnp.float32(adapter.scale(module)),
    )


def set_parts(decoder: Decoder, place: Place, a: Any, b: Any, scale: Any) -> None:
    """Put arrays on a `Linear`; on a mesh they are cut as its weight is."""
    out_axis, in_axis = place.linear.weight.get_metadata()["axes"]
    front = a.ndim - 2 - (place.layers is not None)  # a table of several adapters
    a_axes = (*(None,) * front, None, in_axis)
    b_axes = (*(None,) * front, out_axis, None)
    held: Any = place.linear.weight.get_value()
    placed = held.sharding if isinstance(held, jax.Array) and _is_concrete(held) else None
    if isinstance(placed, NamedSharding):
        mesh: Any = placed.mesh
        name = f"{place.modules[0][1].name}.weight"
        stacked = place.layers is not None

        def cut(array: Any, axes: Any) -> Any:
            how = sharding.weight_sharding(
                mesh, decoder.config, name, axes, array.shape[stacked:], stacked=stacked
            )
            return jax.device_put(array, how)

        a, b = cut(a, a_axes), cut(b, b_axes)
        scale = jax.device_put(scale, sharding.replicated(mesh))
    hold(place.linear, a, b, scale, front=front)


def hold(linear: Any, a: Any, b: Any, scale: Any, *, front: int = 0) -> None:
    """Set the variables of a `Linear`; `front` is 1 for tables, which have an axis of entries."""
    out_axis, in_axis = linear.weight.get_metadata()["axes"]
    linear.lora_a = nnx.LoRAParam(a, axes=(*(None,) * front, None, in_axis))
    linear.lora_b = nnx.LoRAParam(b, axes=(*(None,) * front, out_axis, None))
    linear.lora_scale = LoRAScale(scale, axes=(None,) * front)


def _is_concrete(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer)


def places(decoder: Decoder, adapter: Adapter) -> list[Place]:
    """Return the `Linear`s that an adapter changes, each once."""
    layers: Layers = "scan" if decoder.scanned else "unroll"
    found: dict[tuple[str | int, ...], list[tuple[int | None, Module]]] = {}
    for module in adapter:
        path, row = weight_path(decoder.config, layers, f"{module.name}.weight")
        found.setdefault(path[:-1], []).append((row, module))
    linears = {path: linear for path, linear in nnx.iter_modules(decoder) if path in found}
    result = []
    for path, modules in found.items():
        linear: Any = linears[path]
        held: Any = linear.weight.get_value()
        stacked = modules[0][0] is not None
        result.append(Place(linear, path, held.shape[0] if stacked else None, tuple(modules)))
    return result


def adapted(decoder: Decoder) -> Iterator[Linear]:
    """Yield the `Linear`s that have an adapter."""
    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, Linear) and module.lora_a is not None:
            yield module


def adapter_of(decoder: Decoder) -> Adapter:
    """Return the record of the adapter on a decoder.

    Raises:
        RequestError: there is none.
    """
    if decoder.adapter is None:
        raise RequestError("the decoder has no adapter; attach or restore one")
    return decoder.adapter


def read(decoder: Decoder) -> Iterator[tuple[Module, np.ndarray, np.ndarray]]:
    """Yield (module, A, B) of each module that is adapted, in host memory."""
    adapter = adapter_of(decoder)
    by_name = {m.name: (p, row) for p in places(decoder, adapter) for row, m in p.modules}
    host: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
    for module in adapter:
        place, row = by_name[module.name]
        if place.path not in host:
            parts = (place.linear.lora_a, place.linear.lora_b)
            host[place.path] = tuple(np.asarray(part.get_value()) for part in parts)  # type: ignore[assignment]
        a, b = host[place.path]
        if row is not None:
            a, b = a[row], b[row]
        yield module, a[: module.rank], b[:, : module.rank]


def detach(decoder: Decoder) -> None:
    """Take the adapter off a decoder, in place."""
    for linear in adapted(decoder):
        for name in ("lora_a", "lora_b", "lora_scale", "lora_rows", "lora_dropout", "lora_off"):
            if name in vars(linear):
                delattr(linear, name)
    decoder.adapter = None


@contextlib.contextmanager
def lora_enabled(decoder: Decoder, enabled: bool = True) -> Iterator[None]:
    """Switch the adapter of a decoder on or off inside; programs traced before keep theirs."""
    linears: list[Any] = list(adapted(decoder))
    before = [linear.lora_off for linear in linears]
    try:
        for linear in linears:
            linear.lora_off = not enabled
        yield
    finally:
        for linear, off in zip(linears, before, strict=True):
            linear.lora_off = off


def dropout(decoder: Decoder, key: jax.Array | None) -> None:
    """Turn the dropout of an adapter on, with the key of one step; None: off.

    Called where the loss is traced, on the decoder that was put together there:

        def loss(trained, key):
            decoder = nnx.merge(graphdef, trained, rest)
            adapters.dropout(decoder, key)
    """
    for place in places(decoder, adapter_of(decoder)):
        linear: Any = place.linear
        if "lora_dropout" in vars(linear):
            del linear.lora_dropout
        if key is None or not any(module.dropout for _, module in place.modules):
            continue
        # A key is that of its module, wherever the module lies.
        named, rates = np.zeros(place.layers or 1, np.uint32), np.zeros(place.layers or 1, "f4")
        for row, module in place.modules:
            named[row or 0], rates[row or 0] = zlib.crc32(module.name.encode()), module.dropout
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(named))
        value = (keys, jnp.asarray(rates))
        if place.layers is None:
            value = jax.tree.map(lambda array: array[0], value)
        linear.lora_dropout = LoRAChoice(value)


class Kept(NamedTuple):
    """What `merge` replaced: hand it to `unmerge`."""

    adapter: Adapter
    weights: dict[tuple[str | int, ...], Any]
    parts: dict[tuple[str | int, ...], tuple[Any, Any, Any]]


def merge(decoder: Decoder) -> Kept:
    """Add the adapter to the weights of a decoder, in place; return what `unmerge` takes.

    A weight that is changed becomes floats in the dtype of the decoder, rounded once. The base is
    kept as long as the result is. Only what is put together from the decoder later is merged, so
    make a `gemlax.Model` of it afterwards.
    """
    adapter = adapter_of(decoder)
    dtype = decoder.norm.weight.get_value().dtype
    kept = Kept(adapter, {}, {})
    for place in places(decoder, adapter):
        linear: Any = place.linear
        base = linear.weight.get_value()
        a, b, scale = (
            part.get_value() for part in (linear.lora_a, linear.lora_b, linear.lora_scale)
        )
        kept.weights[place.path], kept.parts[place.path] = base, (a, b, scale)
        merged: Any = _merged(base, a, b, scale, dtype, place.layers)
        if isinstance(base, QTensor) and base.format == "bfloat16" and merged.dtype == jnp.bfloat16:
            merged = pack_bfloat16(merged)
        linear.weight.set_value(merged)
    detach(decoder)
    return kept


def _merged(base: Any, a: Any, b: Any, scale: Any, dtype: Any, layers: int | None) -> jax.Array:
    def one(weight: Any, a: Any, b: Any, scale: Any) -> jax.Array:
        update = b.astype(jnp.float32) @ a.astype(jnp.float32) * scale
        return (dense(weight).astype(jnp.float32) + update).astype(dtype)

    if layers is None:
        return jax.jit(one)(base, a, b, scale)

    def each(base: Any, *parts: Any) -> jax.Array:
        def layer(inputs: Any) -> jax.Array:
            return one(At(base, inputs[0]), *inputs[1:])

        return jax.lax.map(layer, (jnp.arange(layers, dtype=jnp.int32), *parts))

    placed = base.sharding if isinstance(base, jax.Array) else None
    return jax.jit(each, out_shardings=placed)(base, a, b, scale)


def unmerge(decoder: Decoder, kept: Kept) -> None:
    """Undo `merge`, bit for bit: the weights are those of before, and the adapter is on again."""
    if decoder.adapter is not None:
        raise RequestError("the decoder has an adapter: it is not what merge left")
    for place in places(decoder, kept.adapter):
        place.linear.weight.set_value(kept.weights[place.path])
        set_parts(decoder, place, *kept.parts[place.path])
    decoder.adapter = kept.adapter
