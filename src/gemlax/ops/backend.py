"""What jax runs on, and one line where it runs on nothing or may not compile."""

from typing import Any

import jax

from gemlax.errors import Error, RequestError

__all__ = ["backend", "check_compiles"]

_config: Any = jax.config  # its attributes have no types


def backend() -> str:
    """Return the backend that jax runs on: "cpu", "gpu" or "tpu".

    Raises:
        Error: jax finds no device of those that it was told to take.
    """
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
    """Check that jax may compile.

    Args:
        what: needs programs that are compiled as a whole.

    Raises:
        RequestError: JAX_DISABLE_JIT is set.
    """
    if _config.jax_disable_jit:
        raise RequestError(
            f"{what} needs compiled programs, and JAX_DISABLE_JIT (jax_disable_jit) is set: unset "
            "it; Model.hidden, logits and score run without"
        )
