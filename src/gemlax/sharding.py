"""Where arrays lie: over which devices of a mesh each axis of a weight or a cache is cut.

Layers name logical axes ("heads", "mlp"); one table maps them to the axes of a mesh, and no other
file names those. Heads are never cut inside a head: where the devices do not divide a layer's
heads, the layer's attention is held whole on each of them. On one device a sharding is None.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemlax import ops
from gemlax.config import LayerSpec, TextConfig
from gemlax.errors import RequestError

__all__ = [
    "AXES",
    "ONE_DEVICE",
    "RULES",
    "Layout",
    "constrain",
    "make_mesh",
    "parts",
    "put",
    "replicated",
    "weight_sharding",
    "without_layers",
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
        RequestError: an axis that is unknown or named twice, a size that is not a positive integer,
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
    ops.platform()  # says what is wrong, if anything
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


def parts(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Return into how many parts a mesh cuts a logical axis that it can divide."""
    return math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


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


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a model's arrays lie and what computes with them: one device, or all those of a mesh.

    On a mesh that is XLA, whatever was asked for: a native kernel would gather what the mesh cuts.
    """

    mesh: Mesh | None = None
    implementation: ops.Backend | None = None

    def __post_init__(self) -> None:
        """Choose XLA on a mesh."""
        if self.mesh is not None:
            object.__setattr__(self, "implementation", "xla")

    def parts(self, axis: str) -> int:
        """Return into how many parts a logical axis is cut that can be divided."""
        return 1 if self.mesh is None else parts(self.mesh, axis)

    @property
    def replicated(self) -> NamedSharding | None:
        """The sharding of what every device holds whole."""
        return self._sharding()

    def rows(self, batch: int, axis: int = 0) -> NamedSharding | None:
        """Return how an array is cut whose `axis` is a batch: not at all where that does not go."""
        return self._sharding(*(None,) * axis, self._rows(batch))

    def cache(self, config: TextConfig, spec: LayerSpec, batch: int) -> NamedSharding | None:
        """Return how keys and values [n, B, S, K, ...] are cut: by rows and heads, if that goes."""
        if self.mesh is None:
            return None
        heads = RULES["kv_heads"] if _cuts_heads(self.mesh, config, spec)["kv_heads"] else None
        return self._sharding(None, self._rows(batch), None, heads)

    def jit(self, function: Callable[..., Any], shardings: Any = None, **options: Any) -> Any:
        """Return `jax.jit` of a function, traced for the implementation of this layout.

        `shardings`: of its results on a mesh; None: XLA chooses.
        """
        if self.mesh is not None:
            options["out_shardings"] = shardings
        return jax.jit(ops.implementation(self.implementation)(function), **options)

    def make(
        self, function: Callable[..., Any], shardings_of: Callable[[Any], Any], *args: Any
    ) -> Any:
        """Run what makes arrays; on a mesh each device makes its own part.

        `shardings_of` gives the shardings of its results, by their shapes.
        """
        if self.mesh is None:
            return function(*args)
        shardings = shardings_of(jax.eval_shape(function, *args))
        return jax.jit(function, out_shardings=shardings)(*args)

    def _rows(self, batch: int) -> tuple[str, ...] | None:
        return RULES["batch"] if batch % self.parts("batch") == 0 else None

    def _sharding(self, *spec: tuple[str, ...] | None) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))


ONE_DEVICE = Layout()


def without_layers(sharding: NamedSharding | None) -> NamedSharding | None:
    """Return the sharding of one layer of a stack."""
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def put(tree: Any, sharding: NamedSharding | None) -> Any:
    """Lay out arrays of the host, which every process has alike, over the devices."""
    if sharding is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__),
        tree,
    )


def constrain(tree: Any, sharding: NamedSharding | None) -> Any:
    """Hold traced arrays to a sharding."""
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)
