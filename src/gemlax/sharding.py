"""Meshes: over which devices each axis of a weight or a cache is cut.

Layers name logical axes ("heads", "mlp"); one table maps them to the axes of a mesh, and no other
file names those. Heads are never cut inside a head: where the devices do not divide a layer's
heads, the layer's attention is held whole on each of them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemlax import ops
from gemlax.config import LayerSpec, TextConfig
from gemlax.errors import RequestError

__all__ = [
    "AXES",
    "RULES",
    "Placed",
    "cache_sharding",
    "make_mesh",
    "parts",
    "put",
    "replicated",
    "rows_sharding",
    "weight_sharding",
]

# Neighbours in the last axis are nearest to each other: it has the most to say.
AXES = ("data", "fsdp", "expert", "tensor")
RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "embed": ("fsdp",),
    "batch": ("data", "fsdp"),
    "layers": (),
}


def make_mesh(axes: str | Mapping[str, int] | Mesh) -> Mesh:
    """Return a mesh over all devices from "data=2,tensor=4" or a mapping; axes not named are 1.

    A `Mesh` is checked and returned: its axes are some of `AXES`, of type Auto.

    Raises:
        RequestError: an axis that is unknown or named twice, a size that is no positive integer,
            or sizes whose product is not the number of devices.
    """
    if isinstance(axes, Mesh):
        if not set(axes.axis_names) <= set(AXES) or set(axes.axis_types) != {AxisType.Auto}:
            raise RequestError(
                f"a mesh must have Auto axes named {', '.join(AXES)}; got {axes}; "
                'make_mesh("data=2,tensor=4") makes one'
            )
        return axes
    sizes = dict.fromkeys(AXES, 1) | (_parse(axes) if isinstance(axes, str) else dict(axes))
    for name, size in sizes.items():
        if name not in AXES:
            raise RequestError(f"mesh axis {name!r} is unknown; there are {', '.join(AXES)}")
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise RequestError(f"mesh axis {name!r} must be a positive integer, got {size!r}")
    ops.backend()  # says what is wrong, if anything
    count = jax.device_count()
    if math.prod(sizes.values()) != count:
        named = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise RequestError(
            f"the mesh {named or 'without axes'} has {math.prod(sizes.values())} places, but "
            f"there {'is 1 device' if count == 1 else f'are {count} devices'}: the product of the "
            f"axes must be {count}"
        )
    shape = tuple(int(sizes[name]) for name in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _parse(text: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if name in sizes:
            raise RequestError(f"mesh axis {name!r} is given twice in {text!r}")
        sizes[name] = int(size) if size.isdecimal() else size
    return sizes


def parts(mesh: Mesh | AbstractMesh | None, axis: str) -> int:
    """Return into how many parts a mesh cuts a logical axis that it can divide."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


def weight_sharding(
    mesh: Mesh,
    config: TextConfig,
    name: str,
    axes: Sequence[str | None],
    shape: Sequence[int],
    *,
    stacked: bool = False,
) -> NamedSharding:
    """Return how a weight is cut; `stacked` puts the axis of layers before `axes` and `shape`.

    Args:
        name: canonical; the `LayerSpec` of its layer says how many heads there are.

    Raises:
        RequestError: an axis that the mesh does not divide and that is no axis of heads.
    """
    layer = name.split(".")[1]
    spec = config.layers[int(layer)] if name.startswith("layers.") else None
    cut: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is None or parts(mesh, axis) == 1:
            cut.append(None)
        elif axis in ("heads", "kv_heads"):
            assert spec is not None
            cut.append(RULES[axis] if _cuts_heads(mesh, config, spec)[axis] else None)
        elif size % parts(mesh, axis) == 0:
            cut.append(RULES[axis])
        else:
            named = " x ".join(f"{place}={mesh.shape[place]}" for place in RULES[axis])
            raise RequestError(
                f"{name} has {size} {axis!r} entries, which {named} does not divide; "
                "choose a mesh axis that does"
            )
    return NamedSharding(mesh, PartitionSpec(*((None,) if stacked else ()), *cut))


def _cuts_heads(mesh: Mesh, config: TextConfig, spec: LayerSpec) -> dict[str, bool]:
    """Say which heads of a layer are cut: K/V heads only where the query heads are, too."""
    heads = config.num_attention_heads % parts(mesh, "heads") == 0
    kv_heads = spec.num_key_value_heads % parts(mesh, "kv_heads") == 0
    return {"heads": heads, "kv_heads": heads and kv_heads}


def cache_sharding(mesh: Mesh, config: TextConfig, spec: LayerSpec, batch: int) -> NamedSharding:
    """Return how keys and values [n, B, S, K, ...] are cut: by rows and, if that goes, by heads."""
    heads = RULES["kv_heads"] if _cuts_heads(mesh, config, spec)["kv_heads"] else None
    return NamedSharding(mesh, PartitionSpec(None, _rows(mesh, batch), None, heads))


def rows_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Return how an array [B, ...] is cut by rows: not at all where the mesh does not divide B."""
    return NamedSharding(mesh, PartitionSpec(_rows(mesh, batch)))


def _rows(mesh: Mesh, batch: int) -> tuple[str, ...] | None:
    return RULES["batch"] if batch % parts(mesh, "batch") == 0 else None


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Lay out arrays of the host, which every process has alike, over the devices of a mesh."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__),
        tree,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """A stacked cache whose K/V heads stay cut as they are while layers attend to it.

    Left alone, XLA cuts heads that are repeated the way it cuts the queries: all of the cache, for
    each block that is read, and it gathers the cache when the layers are done.
    """

    cache: Any
    sharding: NamedSharding = dataclasses.field(metadata={"static": True})

    def layer(self, *args: Any) -> "PlacedView":
        """Return the view of one layer, as the cache itself does."""
        spec = PartitionSpec(*self.sharding.spec[1:])  # of a block: without the axis of layers
        hold = functools.partial(
            jax.lax.with_sharding_constraint, shardings=NamedSharding(self.sharding.mesh, spec)
        )
        return PlacedView(self.cache.layer(*args)._replace(hold=hold), self.sharding)


@dataclasses.dataclass(frozen=True)
class PlacedView:
    """The view of one layer of a `Placed` cache."""

    view: Any
    sharding: NamedSharding

    @property
    def positions(self) -> Any:
        """The positions of this step's tokens, [B, T]."""
        return self.view.positions

    @property
    def cache(self) -> Placed:
        """The cache with what was written."""
        return Placed(self.view.cache, self.sharding)

    def update(self, k: Any, v: Any) -> "PlacedView":
        """Take in this step's keys and values, [B, T, K, H]."""
        return PlacedView(self.view.update(k, v), self.sharding)

    def attend(self, q: Any, *, window: int | None, scale: float) -> Any:
        """Attend to all that was taken in, up to now."""
        return self.view.attend(q, window=window, scale=scale)
