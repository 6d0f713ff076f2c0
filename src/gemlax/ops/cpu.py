"""The native CPU kernels of csrc/: products with stored weights, and attention over caches.

They are called through XLA's foreign-function interface and read a layer of a stack, or of a cache,
where it lies. There is a reference in plain JAX for each; what a kernel takes `ops.backend` knows,
and it is not checked here. No derivative and no vmap: those go through the reference.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemlax.formats import Format
from gemlax.qtensor import At, Mixed, Weight, shape_of

__all__ = [
    "MAX_ROWS", "arg_max", "attend", "decode", "formats", "library", "multiply", "parts_of",
    "spent", "use",
]  # fmt: skip

_TARGETS = ("multiply", "decode", "attention", "arg_max")
# As csrc/meter.h numbers them, behind the products, which go by the format of their first weight.
_OTHER_METERS = ("decoding", "attention", "arg_max")
# Queries of one call of attention, and rows that float weights are multiplied with by a kernel.
MAX_ROWS = 16


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return the formats that the kernels read, in the order of their numbers (csrc/formats.h)."""
    library = _open()
    library.gemlax_formats.restype = ctypes.c_char_p
    return tuple(library.gemlax_formats().decode().split())


def spent() -> dict[str, tuple[int, float]]:
    """Return calls and seconds of each kind of kernel since the process began.

    Products go by the format of their first weight. Empty where there are no kernels.
    """
    if library()[0] is None:
        return {}
    meters = (*formats(), *_OTHER_METERS)
    numbers = (ctypes.c_int64 * (2 * len(meters)))()
    _open().gemlax_totals(numbers)
    return {
        name: (numbers[2 * i], numbers[2 * i + 1] / 1e9)
        for i, name in enumerate(meters)
        if numbers[2 * i]
    }


def use(name: str | None) -> bool:
    """Choose the instruction set of all kernels; return False where this CPU does not have it.

    None: the environment's GEMLAX_KERNELS, or the fastest. For tests and benchmarks: a function
    that is traced already keeps what was decided for the old set.
    """
    if library()[0] is None:
        return False
    choose = _open().gemlax_use
    choose.restype = ctypes.c_bool
    chosen: bool = choose((name or "").encode())
    library.cache_clear()
    return chosen


def _open() -> ctypes.CDLL:
    spec = importlib.util.find_spec("gemlax._native")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("gemlax._native")
    return ctypes.CDLL(spec.origin)


@functools.cache
def library() -> tuple[str | None, str | None]:
    """Register the kernels; return the name of their instruction set, or why there are none."""
    try:
        library = _open()
        for name in _TARGETS:
            target = f"gemlax_{name}"
            handler = jax.ffi.pycapsule(library[target])
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except FileNotFoundError:
        return None, "they were not built when gemlax was installed"
    except Exception as error:  # OSError, AttributeError, or what jaxlib says of the version
        return None, f"they cannot be used: {error}"
    library.gemlax_kernels.restype = ctypes.c_char_p
    return library.gemlax_kernels().decode(), None


def _call(name: str, out: jax.ShapeDtypeStruct) -> Callable[..., Array]:
    if reason := library()[1]:
        raise NotImplementedError(f"there are no native kernels: {reason}")
    return jax.ffi.ffi_call(f"gemlax_{name}", out)


def multiply(x: Float[Array, "R D"], *weights: Weight) -> tuple[Float[Array, "R _"], ...]:
    """Return float32 x @ weight.T for each weight, read from where it lies.

    Activations are rounded to 16 bits of their row's largest where codes are integers: an error of
    about 1e-4 of the result's size. Several weights in one call cost less than a call for each.
    """
    arguments = [_arguments(weight) for weight in weights]
    where = jnp.stack([place for place, _, _ in arguments])
    leaves = [leaf for _, weight_leaves, _ in arguments for leaf in weight_leaves]
    numbers = np.array([number for *_, codes in arguments for number in codes], np.int64)
    counts = np.array([len(codes) for *_, codes in arguments], np.int64)
    sizes = [shape_of(weight)[0] for weight in weights]
    call = _call("multiply", jax.ShapeDtypeStruct((x.shape[0], sum(sizes)), jnp.float32))
    out = call(x.astype(jnp.float32), where, *leaves, formats=numbers, counts=counts)
    return tuple(jnp.split(out, np.cumsum(sizes)[:-1].tolist(), axis=1))


def decode(weight: Weight) -> Float[Array, "F D"]:
    """Return the weight as float32."""
    where, leaves, numbers = _arguments(weight)
    call = _call("decode", jax.ShapeDtypeStruct(shape_of(weight), jnp.float32))
    return call(where[None], *leaves, formats=np.array(numbers, np.int64))


def _arguments(weight: Weight) -> tuple[Array, list[Array], list[int]]:
    """Return [part, row], the codes and scales of each part, and the numbers of their formats."""
    layer: Any = (
        weight if isinstance(weight, At) else At(jax.tree.map(lambda a: a[None], weight), 0)
    )
    part, row = jnp.int32(0), jnp.asarray(layer.index, jnp.int32)
    if isinstance(layer.stack, Mixed):
        part, row = layer.stack.which[row], layer.stack.row[row]
    none = jnp.zeros((1, 1, 0), jnp.uint16)
    leaves = []
    for codes in parts_of(layer):
        leaves += [codes.codes, none if codes.scales is None else codes.scales]
    numbers = [formats().index(codes.format) for codes in parts_of(layer)]
    return jnp.stack([part, row]), leaves, numbers


def arg_max(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return `jnp.argmax(x, axis=-1)` of float32 rows."""
    return _call("arg_max", jax.ShapeDtypeStruct((x.shape[0],), jnp.int32))(x)


def parts_of(weight: Weight) -> tuple[Any, ...]:
    """Return the arrays or stacks that a weight's layers lie in."""
    stack: Any = weight.stack if isinstance(weight, At) else weight
    return stack.parts if isinstance(stack, Mixed) else (stack,)


def attend(
    q: Float[Array, "b T N H"],
    k: Any,
    v: Any,
    key_positions: Int[Array, "B S"],
    layer: Any,
    positions: Int[Array, "b T"],
    rows: Int[Array, "b"] | None = None,
    *,
    ring: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "b T N H"]:
    """Attend to a layer of a stacked cache [n, B, S, K, H] of float32 or bits of bfloat16.

    `rows` [b]: which rows of the cache the queries' are; None: all, in order.
    """
    if rows is None:
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    out = _call("attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))(
        q.astype(jnp.float32), k, v, key_positions, jnp.asarray(layer, jnp.int32), positions, rows,
        ring=ring, window=np.int32(window or 0), scale=np.float32(scale),
    )  # fmt: skip
    return out.astype(q.dtype)
