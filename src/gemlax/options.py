"""What `load` is told, checked: dtype, layers, mesh, and how caches and matrices are held."""

from typing import Any

import jax.numpy as jnp

from gemlax import ops
from gemlax.errors import RequestError
from gemlax.quantization import Rules, check_rules
from gemlax.sharding import Layout, make_mesh

__all__ = ["check_options", "choose_layout", "read_dtype"]


def choose_layout(mesh: Any, quantize: Rules | None, implementation: Any) -> Layout:
    """Return where the model lies: no kernel reads what is cut over devices."""
    if mesh is None:
        return Layout(None, implementation)
    if quantize == "stored" or implementation == "cpu":
        raise RequestError(
            "a file's own codes and native kernels need one device; on a mesh quantize= takes "
            "'int8', 'int4', 'nf4' or rules, and XLA decodes them"
        )
    return Layout(make_mesh(mesh))


def check_options(layers: Any, kv_cache: Any, implementation: Any, quantize: Any) -> None:
    """Check options of `load` before anything is read."""
    ops.platform()  # says what is wrong with jax, if anything
    if layers not in (None, "scan", "unroll"):
        raise RequestError(f"layers must be 'scan', 'unroll' or None, got {layers!r}")
    if kv_cache not in (None, "int8"):
        raise RequestError(f"kv_cache must be 'int8' or None, got {kv_cache!r}")
    if implementation not in (None, "xla", "cpu"):
        raise RequestError(f"implementation must be 'xla', 'cpu' or None, got {implementation!r}")
    check_rules(quantize)


def read_dtype(given: Any) -> jnp.dtype:
    """Return a dtype given by any of its names, of NumPy, jax or torch; None and "auto": ours.

    Ours is float32 on CPU and bfloat16 elsewhere.
    """
    if given is None or (isinstance(given, str) and given == "auto"):
        return jnp.dtype(jnp.float32 if ops.platform() == "cpu" else jnp.bfloat16)
    name = str(given)
    short = name.removeprefix("torch.")
    short = {"fp32": "float32", "bf16": "bfloat16"}.get(short, short)
    expected = "dtype must be float32, bfloat16 or 'auto', got"
    try:
        dtype = jnp.dtype(given if short == name and not isinstance(given, str) else short)
    except TypeError as error:
        raise RequestError(f"{expected} {name[:40]!r}") from error
    if dtype not in (jnp.float32, jnp.bfloat16):
        why = " (Gemma's activations overflow float16)" if dtype == jnp.float16 else ""
        raise RequestError(f"{expected} {dtype.name}{why}")
    return dtype
