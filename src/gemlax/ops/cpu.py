"""The native CPU kernels of csrc/: products with stored weights, and attention over caches.

They are called through XLA's foreign-function interface and read a layer of a stack, or of a cache,
where it lies. There is a reference in plain JAX for each; what no kernel serves raises
NotImplementedError. No derivative and no vmap: those go through the reference.
"""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemlax.formats import Format
from gemlax.ops.backend import backend
from gemlax.qtensor import At, Mixed, QTensor, Weight, shape_of

__all__ = [
    "MAX_ROWS",
    "Implementation",
    "Kernels",
    "arg_max",
    "attend",
    "attends",
    "bind",
    "decode",
    "implementation",
    "kernels",
    "live",
    "multiply",
    "prefers",
    "serves",
    "spent",
    "use",
]

Implementation = Literal["xla", "cpu"]

_log = logging.getLogger(__name__)
_asked: contextvars.ContextVar[Implementation | None] = contextvars.ContextVar(
    "implementation", default=None
)
_TARGETS = ("multiply", "decode", "attention", "arg_max")
# As csrc/meter.h numbers them, behind the products, which go by the format of their first weight.
_OTHER_METERS = ("decoding", "attention", "arg_max")
# Queries of one call of attention, and rows that float weights are multiplied with by a kernel.
MAX_ROWS = 16


@contextlib.contextmanager
def implementation(name: Implementation | None) -> Iterator[None]:
    """Choose what is traced inside: "xla", "cpu" (the kernels, or an error), None: the faster.

    A function that `jax.jit` has traced before keeps what it was traced with.
    """
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def bind(name: Implementation | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, traced under `implementation(name)`; None leaves what is around it."""
    if name is None:
        return function

    @functools.wraps(function)
    def bound(*args: Any) -> Any:
        with implementation(name):
            return function(*args)

    return bound


class Kernels(NamedTuple):
    """The native kernels of this process: their instruction set and formats, or why none is live.

    `instructions` is "avx512", "avx2", "portable" or None.
    """

    instructions: str | None
    formats: tuple[Format, ...]
    reason: str | None


def kernels() -> Kernels:
    """Say which kernels are used where nothing else is asked for."""
    if backend() != "cpu":
        return Kernels(None, (), f"the backend is {backend()}")
    name, reason = _library()
    return Kernels(name, _formats() if name else (), reason)


def spent() -> dict[str, tuple[int, float]]:
    """Return calls and seconds of each kind of kernel since the process began.

    Products go by the format of their first weight. Empty where there are no kernels.
    """
    if _library()[0] is None:
        return {}
    meters = (*_formats(), *_OTHER_METERS)
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
    if _library()[0] is None:
        return False
    choose = _open().gemlax_use
    choose.restype = ctypes.c_bool
    chosen: bool = choose((name or "").encode())
    _library.cache_clear()
    return chosen


def _open() -> ctypes.CDLL:
    spec = importlib.util.find_spec("gemlax._native")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("gemlax._native")
    return ctypes.CDLL(spec.origin)


@functools.cache
def _library() -> tuple[str | None, str | None]:
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


@functools.cache
def _formats() -> tuple[Format, ...]:
    """Return the formats that the kernels read, in the order of their numbers (csrc/formats.h)."""
    library = _open()
    library.gemlax_formats.restype = ctypes.c_char_p
    return tuple(library.gemlax_formats().decode().split())


@functools.cache
def _warn(reason: str | None) -> None:
    """Say once that XLA runs in place of the kernels."""
    _log.warning("no native CPU kernels, stored weights run on XLA, more slowly: %s", reason)


def live() -> str | None:
    """Return the instruction set of the kernels that are used, or None.

    Raises:
        NotImplementedError: "cpu" was asked for and cannot be had.
    """
    asked = _asked.get()
    if asked == "xla":
        return None
    found = kernels()
    if asked == "cpu" and found.instructions is None:
        raise NotImplementedError(
            "implementation='cpu' needs a CPU backend and the native kernels, which are compiled "
            f"when gemlax is installed: {found.reason}"
        )
    if found.instructions is None and backend() == "cpu":
        _warn(found.reason)
    return found.instructions


def _call(name: str, out: jax.ShapeDtypeStruct) -> Callable[..., Array]:
    with implementation("cpu"):
        live()
    return jax.ffi.ffi_call(f"gemlax_{name}", out)


def multiply(x: Float[Array, "R D"], *weights: Weight) -> tuple[Float[Array, "R _"], ...]:
    """Return float32 x @ weight.T for each weight, read from where it lies.

    Activations are rounded to 16 bits of their row's largest where codes are integers: an error of
    about 1e-4 of the result's size. Several weights in one call cost less than a call for each.

    Raises:
        NotImplementedError: another kind of weight.
    """
    taken = [_arguments(weight) for weight in weights]
    where = jnp.stack([place for place, _, _ in taken])
    leaves = [leaf for _, own, _ in taken for leaf in own]
    formats = np.array([number for _, _, own in taken for number in own], np.int64)
    counts = np.array([len(own) for _, _, own in taken], np.int64)
    sizes = [shape_of(weight)[0] for weight in weights]
    call = _call("multiply", jax.ShapeDtypeStruct((x.shape[0], sum(sizes)), jnp.float32))
    out = call(x.astype(jnp.float32), where, *leaves, formats=formats, counts=counts)
    return tuple(jnp.split(out, np.cumsum(sizes)[:-1].tolist(), axis=1))


def decode(weight: Weight) -> Float[Array, "F D"]:
    """Return the weight as float32.

    Raises:
        NotImplementedError: another kind of weight.
    """
    where, leaves, numbers = _arguments(weight)
    call = _call("decode", jax.ShapeDtypeStruct(shape_of(weight), jnp.float32))
    return call(where[None], *leaves, formats=np.array(numbers, np.int64))


def _arguments(weight: Weight) -> tuple[Array, list[Array], list[int]]:
    """Return [part, row], the codes and scales of each part, and the numbers of their formats."""
    if not serves(weight):
        raise NotImplementedError("a kernel takes matrices that are held as codes, but not nf4")
    layer: Any = (
        weight if isinstance(weight, At) else At(jax.tree.map(lambda a: a[None], weight), 0)
    )
    part, row = jnp.int32(0), jnp.asarray(layer.index, jnp.int32)
    if isinstance(layer.stack, Mixed):
        part, row = layer.stack.which[row], layer.stack.row[row]
    none = jnp.zeros((1, 1, 0), jnp.uint16)
    leaves = []
    for held in _parts(layer):
        leaves += [held.codes, none if held.scales is None else held.scales]
    return jnp.stack([part, row]), leaves, [_formats().index(held.format) for held in _parts(layer)]


def arg_max(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return `jnp.argmax(x, axis=-1)` of float32 rows."""
    return _call("arg_max", jax.ShapeDtypeStruct((x.shape[0],), jnp.int32))(x)


def prefers(weight: Weight, rows: int) -> bool:
    """Return whether a kernel reads this weight, and multiplies so many rows faster than XLA.

    XLA multiplies many rows with a decoded weight. Integers the kernels multiply faster, floats
    not (docs/performance.md).
    """
    if not serves(weight):
        return False
    floats = any(part.format in ("float32", "bfloat16") for part in _parts(weight))
    return rows <= MAX_ROWS or not floats


def serves(weight: Weight) -> bool:
    """Return whether a kernel reads this weight."""
    if _library()[0] is None:
        return False
    known = all(isinstance(p, QTensor) and p.format in _formats() for p in _parts(weight))
    return known and len(shape_of(weight)) == 2


def _parts(weight: Weight) -> tuple[Any, ...]:
    """Return the arrays or stacks that a weight's layers lie in."""
    held: Any = weight.stack if isinstance(weight, At) else weight
    return held.parts if isinstance(held, Mixed) else (held,)


def attends(q: Float[Array, "B T N H"], k: Any) -> bool:
    """Return whether the kernel serves these queries and this form of cache."""
    plain = isinstance(k, jax.Array) and k.dtype in (jnp.float32, jnp.uint16)
    return plain and (q.shape[1] <= MAX_ROWS or live() == "avx512")


def attend(
    q: Float[Array, "b T N H"],
    k: Any,
    v: Any,
    at: Int[Array, "B S"],
    row: Any,
    positions: Int[Array, "b T"],
    rows: Int[Array, "b"] | None = None,
    *,
    ring: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "b T N H"]:
    """Attend to layer `row` of a stacked cache [n, B, S, K, H] of float32 or bits of bfloat16.

    `rows` [b]: which rows of the cache the queries' are; None: all, in order.

    Raises:
        NotImplementedError: a cache in another form, or more than `MAX_ROWS` tokens a row where
            the CPU has no AVX-512.
    """
    if not attends(q, k):
        raise NotImplementedError("the kernel takes a few queries, and float32 or bfloat16 caches")
    if rows is None:
        rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    out = _call("attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))(
        q.astype(jnp.float32), k, v, at, jnp.asarray(row, jnp.int32), positions, rows,
        ring=ring, window=np.int32(window or 0), scale=np.float32(scale),
    )  # fmt: skip
    return out.astype(q.dtype)
