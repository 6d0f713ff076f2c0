"""What computes: the platform that jax runs on, and XLA or a native kernel for each operation.

XLA does every operation. A kernel does some of them, for some arguments: the one table below says
which, and `fault` why not. What is asked for is known to what traces a program, and read where an
operation is traced; the layers in between know nothing of it.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from gemlax.errors import Error, RequestError
from gemlax.formats import Format
from gemlax.ops import cpu
from gemlax.qtensor import QTensor, Weight, shape_of

__all__ = [
    "Backend", "Kernels", "Operation", "check_compiles", "choose", "fault", "implementation",
    "kernels", "kernels_in_use", "platform", "tpu_paged_attention",
]  # fmt: skip

Backend = Literal["xla", "cpu", "tpu"]
# "decode": of a matrix held as codes; "multiply": with it, where that is faster than to decode it.
Operation = Literal["multiply", "decode", "attend", "arg_max", "paged_attend"]

_log = logging.getLogger(__name__)
_config: Any = jax.config  # its attributes have no types
_asked: contextvars.ContextVar[Backend | None] = contextvars.ContextVar("backend", default=None)


def platform() -> str:
    """Return what jax runs on: "cpu", "gpu" or "tpu"."""
    try:
        return jax.default_backend()
    except (AssertionError, RuntimeError) as error:
        # An AssertionError, without a word, where the platform is known and not installed.
        said = str(error).partition("\n")[0].partition(" (set ")[0] or "it finds no such device"
        asked = _config.jax_platforms
        told = f" with JAX_PLATFORMS={asked}" if asked else ""
        raise Error(
            f"jax cannot start{told}: {said}; take another JAX_PLATFORMS, such as cpu, or none, or "
            "install the jax that fits this machine's devices"
        ) from error


def check_compiles(what: str) -> None:
    """Check that jax may compile, for `what` needs programs that are compiled as a whole."""
    if _config.jax_disable_jit:
        raise RequestError(
            f"{what} needs compiled programs, and JAX_DISABLE_JIT (jax_disable_jit) is set: unset "
            "it; Model.hidden, logits and score run without"
        )


@contextlib.contextmanager
def implementation(name: Backend | None) -> Iterator[None]:
    """Choose what is traced inside: "xla", "cpu" (the kernels, or an error); None: no change.

    Where nothing is asked for, the faster one runs. A function that `jax.jit` has traced before
    keeps what it was traced with.
    """
    token = _asked.set(name or _asked.get())
    try:
        yield
    finally:
        _asked.reset(token)


class Kernels(NamedTuple):
    """The native CPU kernels of this process: instruction set and formats, or why there are none.

    `instructions` is "avx512", "avx2", "portable" or None.
    """

    instructions: str | None
    formats: tuple[Format, ...]
    reason: str | None


def kernels() -> Kernels:
    """Say which CPU kernels are used where nothing else is asked for."""
    if platform() != "cpu":
        return Kernels(None, (), f"the backend is {platform()}")
    name, reason = cpu.library()
    return Kernels(name, cpu.formats() if name else (), reason)


def kernels_in_use() -> str | None:
    """Return the instruction set of the CPU kernels that are used, or None."""
    asked = _asked.get()
    if asked not in ("cpu", None):
        return None
    present = kernels()
    if asked == "cpu" and present.instructions is None:
        raise NotImplementedError(
            "implementation='cpu' needs a CPU backend and the native kernels, which are compiled "
            f"when gemlax is installed: {present.reason}"
        )
    if present.instructions is None and platform() == "cpu":
        _warn(present.reason)
    return present.instructions


@functools.cache
def _warn(reason: str | None) -> None:
    """Say once that XLA runs in place of the kernels."""
    _log.warning("no native CPU kernels, stored weights run on XLA, more slowly: %s", reason)


def choose(operation: Operation, *arguments: Any) -> Backend:
    """Return what computes an operation on these arguments (those of its row in the table).

    That is XLA, except where the kernels that are asked for, or else those of this platform, have
    no fault.
    """
    backend: Any = _asked.get() or platform()
    if backend == "cpu" and kernels_in_use() is None:
        return "xla"
    if backend not in ("cpu", "tpu") or fault(operation, backend, *arguments):
        return "xla"
    return backend


def fault(operation: Operation, backend: Backend, *arguments: Any) -> str | None:
    """Say why a backend shall not compute an operation on these arguments, or None."""
    if backend == "xla":
        return None
    if backend == "cpu" and (reason := cpu.library()[1]):
        return reason
    find_fault = _FAULTS.get((operation, backend))
    return f"it has no kernel for {operation}" if find_fault is None else find_fault(*arguments)


def _cpu_decode(weight: Weight) -> str | None:
    for part in cpu.parts_of(weight):
        if not isinstance(part, QTensor):
            return "the weight is not held as codes"
        if part.format not in cpu.formats():
            return f"no kernel reads {part.format}"
    if len(shape_of(weight)) != 2:
        return f"a weight of {len(shape_of(weight))} axes is not a matrix"
    return None


def _cpu_multiply(weight: Weight, rows: int) -> str | None:
    if reason := _cpu_decode(weight):
        return reason
    # Integers the kernels multiply faster, whatever there are of rows (docs/performance.md).
    floats = any(part.format in ("float32", "bfloat16") for part in cpu.parts_of(weight))
    if floats and rows > cpu.MAX_ROWS:
        return f"XLA multiplies {rows} rows of floats faster"
    return None


def _cpu_attend(q: Any, k: Any) -> str | None:
    if not isinstance(k, jax.Array) or k.dtype not in (jnp.float32, jnp.uint16):
        return "the cache does not hold float32 or bfloat16"
    if q.shape[1] > cpu.MAX_ROWS and cpu.library()[0] != "avx512":
        return f"without AVX-512 a kernel takes {cpu.MAX_ROWS} tokens of a row, not {q.shape[1]}"
    return None


def tpu_paged_attention() -> Callable[..., jax.Array] | None:
    """Return jax's Pallas kernel of attention over pages, if this jax has it."""
    try:
        from jax.experimental.pallas.ops.tpu import ragged_paged_attention as module
    except ImportError:
        return None
    return module.ragged_paged_attention


def _tpu_paged_attend(q: Any, pages: Any, num_kv_heads: int) -> str | None:
    width, lanes = pages.shape[2:]
    words = width * pages.dtype.itemsize // 4  # of 32 bits, over the rows of a token
    if tpu_paged_attention() is None:
        return f"jax {jax.__version__} has no ragged_paged_attention"
    if width != 2 * num_kv_heads:
        return f"{width} rows per token, not the {2 * num_kv_heads} of {num_kv_heads} heads"
    if lanes % 128:
        return f"head_dim {lanes} is not a multiple of 128"
    if q.dtype != pages.dtype:
        return f"queries are {q.dtype}, pages {pages.dtype}"
    if words not in (1, 2, 4) and (words == 0 or words % 8):
        return f"{num_kv_heads} heads of {pages.dtype} do not fill whole tiles"
    return None


# What has a kernel, and what finds the fault of arguments that it shall not take.
_FAULTS: dict[tuple[Operation, Backend], Callable[..., str | None]] = {
    ("multiply", "cpu"): _cpu_multiply,
    ("decode", "cpu"): _cpu_decode,
    ("attend", "cpu"): _cpu_attend,
    ("arg_max", "cpu"): lambda: None,
    ("paged_attend", "tpu"): _tpu_paged_attend,
}
