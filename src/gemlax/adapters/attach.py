"""Adapters on a decoder: a table of them put there, merged into its weights, taken off.

The trainable parameters are the `nnx.LoRAParam` variables, A and B in the `lora` of the `Linear`s
that are adapted; everything else stays as it is. Of scanned layers they are stacked. Smaller ranks,
and layers of a stack that an adapter leaves alone, are filled up with zeros, whose gradients are
zero. What a call does with the table is in its arguments; see `Decoder`.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from gemlax import sharding
from gemlax.adapters.rules import Adapter, Module, Rules, resolve
from gemlax.decoder import Decoder, weight_path
from gemlax.errors import RequestError
from gemlax.layers import Linear, LoRA
from gemlax.qtensor import At, QTensor, dense, pack_bfloat16

__all__ = ["Merged", "adapted", "adapter_of", "attach", "detach", "merge", "put", "read", "unmerge"]

_DTYPES = ("float32", "bfloat16")
# An adapter, and A [r, in] and B [out, r] by name of module.
Entry = tuple[Adapter, Mapping[str, tuple[Any, Any]]]


class Site(NamedTuple):
    """A `Linear` of a decoder that is adapted, and the modules that it stands for."""

    linear: Linear
    path: tuple[str | int, ...]
    num_layers: int | None  # in the stack; None: no stack
    layers: dict[str, int]  # the row of each module in the stack, by name; 0 without a stack


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

    def draw(module: Module) -> tuple[jax.Array, np.ndarray]:
        out, width = module.shape
        bound = width**-0.5
        module_key = jax.random.fold_in(key, _seed(module.name))
        shape = (module.rank, width)
        a = jax.random.uniform(module_key, shape, jnp.float32, minval=-bound, maxval=bound)
        return a, np.zeros((out, module.rank), np.float32)

    put(decoder, [(adapter, {module.name: draw(module) for module in adapter})], dtype=dtype)
    return adapter


def put(decoder: Decoder, table: Sequence[Entry | None], *, dtype: Any = jnp.float32) -> None:
    """Put a table of adapters on a decoder, in place; an entry that is None changes nothing.

    Only a table of one can be trained, merged and saved: the decoder has its record.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise RequestError(f"an adapter is {' or '.join(_DTYPES)}, got {dtype.name}")
    if any(adapted(decoder)):
        raise RequestError("the decoder has an adapter; detach or merge it first")
    union = {module.name: module for entry in table if entry for module in entry[0]}
    for site in _sites(decoder, union):
        parts = _parts(site, table, union)
        parts |= {"a": parts["a"].astype(dtype), "b": parts["b"].astype(dtype)}
        if site.num_layers is None:
            parts = {name: part[0] for name, part in parts.items()}
        site.linear.put_lora(**_placed(decoder, site, parts))
    decoder.adapter = table[0][0] if len(table) == 1 and table[0] else None


def _parts(
    site: Site, table: Sequence[Entry | None], union: Mapping[str, Module]
) -> dict[str, Any]:
    """Return the arrays of the `LoRA` of a site, each with a leading axis of layers."""
    by_entry = [
        (number, adapter.scale(module), module, values[module.name])
        for number, (adapter, values) in ((n, entry) for n, entry in enumerate(table) if entry)
        for module in adapter
        if module.name in site.layers
    ]
    out, width = by_entry[0][2].shape
    rank = max(module.rank for _, _, module, _ in by_entry)
    front = (site.num_layers or 1, len(table))
    a, b = np.zeros((*front, rank, width), np.float32), np.zeros((*front, out, rank), np.float32)
    scale, dropout = np.zeros(front, np.float32), np.zeros(front, np.float32)
    for number, factor, module, (a_values, b_values) in by_entry:
        row = site.layers[module.name], number
        a[row][: module.rank], b[row][:, : module.rank] = a_values, b_values
        scale[row], dropout[row] = factor, module.dropout
    parts: dict[str, Any] = {"a": a, "b": b, "scale": scale}
    if dropout.any():
        seeds = np.zeros(front[0], np.uint32)
        for name, layer in site.layers.items():
            seeds[layer] = _seed(name)
        parts |= {"dropout": dropout, "seed": seeds}
    return parts


def _seed(name: str) -> int:
    """Return what tells a module's draws from those of others, wherever the module lies."""
    return zlib.crc32(name.encode())


def _placed(decoder: Decoder, site: Site, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Put arrays on devices; on a mesh, A and B are cut as the weight of their site is."""
    weight: Any = site.linear.weight.get_value()
    is_concrete = isinstance(weight, jax.Array) and not isinstance(weight, jax.core.Tracer)
    placed = weight.sharding if is_concrete else None
    if not isinstance(placed, NamedSharding):
        return {name: jnp.asarray(part) for name, part in parts.items()}
    mesh: Any = placed.mesh
    out_axis, in_axis = site.linear.weight.get_metadata()["axes"]
    axes = {"a": (None, None, in_axis), "b": (None, out_axis, None)}
    stacked = site.num_layers is not None
    name = f"{next(iter(site.layers))}.weight"
    how = {
        part: sharding.weight_sharding(
            mesh, decoder.config, name, axes[part], parts[part].shape[stacked:], stacked=stacked
        )
        for part in axes
    }
    everywhere = sharding.replicated(mesh)
    return {name: jax.device_put(part, how.get(name, everywhere)) for name, part in parts.items()}


def _sites(decoder: Decoder, names: Iterable[str]) -> list[Site]:
    """Return the `Linear`s of some modules, each once."""
    layers: dict[tuple[str | int, ...], dict[str, int]] = {}
    stacked = set()
    for name in names:
        path, row = weight_path(decoder.config, decoder.layout, f"{name}.weight")
        layers.setdefault(path[:-1], {})[name] = row or 0
        if row is not None:
            stacked.add(path[:-1])
    linears: Any = dict(nnx.iter_modules(decoder))
    return [
        Site(
            linears[path],
            path,
            linears[path].weight.get_value().shape[0] if path in stacked else None,
            rows,
        )
        for path, rows in layers.items()
    ]


def adapted(decoder: Decoder) -> Iterator[Linear]:
    """Yield the `Linear`s that have an adapter."""
    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, Linear) and module.lora is not None:
            yield module


def adapter_of(decoder: Decoder) -> Adapter:
    """Return the record of the adapter on a decoder."""
    if decoder.adapter is None:
        raise RequestError("the decoder has no adapter; attach or restore one")
    return decoder.adapter


def read(decoder: Decoder) -> Iterator[tuple[Module, np.ndarray, np.ndarray]]:
    """Yield (module, A, B) of each module that is adapted, in host memory."""
    modules = {module.name: module for module in adapter_of(decoder)}
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for site in _sites(decoder, modules):
        assert site.linear.lora is not None
        a, b = (np.asarray(part.get_value()) for part in (site.linear.lora.a, site.linear.lora.b))
        for name, layer in site.layers.items():
            row = (0,) if site.num_layers is None else (layer, 0)
            pairs[name] = a[row], b[row]
    for name, module in modules.items():
        a, b = pairs[name]
        yield module, a[: module.rank], b[:, : module.rank]


def detach(decoder: Decoder) -> None:
    """Take the adapters off a decoder, in place."""
    for linear in list(adapted(decoder)):
        del linear.lora
    decoder.adapter = None


class Merged(NamedTuple):
    """What `merge` replaced, by path of its `Linear`: hand it to `unmerge`."""

    adapter: Adapter
    weights: dict[tuple[str | int, ...], Any]
    loras: dict[tuple[str | int, ...], LoRA]


def merge(decoder: Decoder) -> Merged:
    """Add the adapter to the weights of a decoder, in place; return what `unmerge` takes.

    A weight that is changed becomes floats in the dtype of the decoder, rounded once. The base is
    kept as long as the result is. Only what is put together from the decoder later is merged, so
    make a `gemlax.Model` of it afterwards.
    """
    adapter = adapter_of(decoder)
    replaced = Merged(adapter, {}, {})
    for site in _sites(decoder, [module.name for module in adapter]):
        lora: Any = site.linear.lora
        weight: Any = site.linear.weight.get_value()
        replaced.weights[site.path], replaced.loras[site.path] = weight, lora
        parts = [part.get_value() for part in (lora.a, lora.b, lora.scale)]
        merged: Any = _merged(weight, parts, decoder.dtype, site.num_layers)
        is_bits = isinstance(weight, QTensor) and weight.format == "bfloat16"
        if is_bits and merged.dtype == jnp.bfloat16:
            merged = pack_bfloat16(merged)
        site.linear.weight.set_value(merged)
    detach(decoder)
    return replaced


def _merged(weight: Any, parts: Any, dtype: Any, num_layers: int | None) -> jax.Array:
    def one(weight: Any, parts: Any) -> jax.Array:
        a, b, scale = (part[0].astype(jnp.float32) for part in parts)
        return (dense(weight).astype(jnp.float32) + b @ a * scale).astype(dtype)

    if num_layers is None:
        return jax.jit(one)(weight, parts)

    def each(weight: Any, parts: Any) -> jax.Array:
        layers = jnp.arange(num_layers, dtype=jnp.int32)
        return jax.lax.map(lambda layer: one(At(weight, layer[0]), layer[1]), (layers, parts))

    placed = weight.sharding if isinstance(weight, jax.Array) else None
    return jax.jit(each, out_shardings=placed)(weight, parts)


def unmerge(decoder: Decoder, merged: Merged) -> None:
    """Undo `merge`, bit for bit: the weights are those of before, and the adapter is on again."""
    if any(adapted(decoder)):
        raise RequestError("the decoder has an adapter: it is not what merge left")
    for site in _sites(decoder, [module.name for module in merged.adapter]):
        site.linear.weight.set_value(merged.weights[site.path])
        site.linear.lora = merged.loras[site.path]
    decoder.adapter = merged.adapter
