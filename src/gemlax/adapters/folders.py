"""From what a user gave to a folder of an adapter, and what is no such folder by what it is."""

import logging
from collections.abc import Mapping
from pathlib import Path

from gemlax import checkpoints
from gemlax.adapters.rules import Base
from gemlax.checkpoints.base import read_json
from gemlax.checkpoints.gguf import MAGIC
from gemlax.config import GemmaConfig
from gemlax.errors import UnsupportedError

__all__ = ["CONFIG", "WEIGHTS", "base_of", "beside", "find_folder"]

_log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE, _MLX = "adapter_model.bin", "adapters.safetensors"
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; save_file({{k: v.clone() '
    "for k, v in torch.load('{bin}', weights_only=True, map_location='cpu').items()}}, '{out}')\""
)
# What the demo model was quantised from, by the name that other programs load it by.
_DEMO_BASE = "google/gemma-3-270m"
# What vLLM and LLaVA read beside the weights: rows of embeddings, and weights that are no LoRA.
_MORE = ("new_embeddings.safetensors", "new_embeddings.bin", "non_lora_trainables.bin")
_SHOWN = 3


def base_of(given: str | Path, source: Path, config: GemmaConfig) -> Base:
    """Return what adapters call a checkpoint: as it was given, and by the layout of its config.

    transformers goes by the config alone. GGUF and Orbax have none: there a table with rows for
    images or audio tells.
    """
    if (source / "config.json").is_file():
        multimodal = isinstance(read_json(source / "config.json").get("text_config"), Mapping)
    else:
        multimodal = bool(config.placeholder_ids)
    return Base(_DEMO_BASE if given == checkpoints.DEMO else str(given), multimodal)


def find_folder(given: str | Path) -> Path:
    """Return the folder of an adapter that peft or `save` wrote, given by path or hub name."""
    folder = checkpoints.find_adapter(given)
    if folder.is_file():
        _refuse_file(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing and folder.is_dir():
        _refuse_others(folder)
    if missing:
        raise FileNotFoundError(
            f"no adapter at {folder}: {' and '.join(missing)} missing; expected a folder that peft "
            f"or gemlax wrote{_nearby(folder)}"
        )
    if "lora_parameters" in read_json(folder / CONFIG):
        raise _foreign(folder, "mlx-lm")
    for name in _MORE:
        if (folder / name).exists():
            raise UnsupportedError(
                f"{folder / name}: weights that were trained beside LoRA, which gemlax does not "
                "apply; merge them into the base with what trained them, and load the result"
            )
    return folder


def beside(folder: Path) -> Path | None:
    """Return the folder of a model in which an adapter lies beside the weights; else None."""
    if not (folder / CONFIG).is_file() or not (folder / "config.json").is_file():
        return None
    if (folder / WEIGHTS).is_file():
        return folder
    if (folder / _PICKLE).is_file():
        _refuse_others(folder)
    _log.warning("%s: %s is not read: there are no weights of an adapter", folder, CONFIG)
    return None


def _refuse_file(path: Path) -> None:
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if is_gguf or path.suffix == ".gguf":
        raise UnsupportedError(
            f"{path} is a GGUF file: gemlax reads adapters as peft writes them; give the folder "
            "that llama.cpp's convert_lora_to_gguf.py made it of"
        )
    raise FileNotFoundError(f"{path} is a file: give the folder of the adapter")


def _refuse_others(folder: Path) -> None:
    """Refuse what other programs leave in a folder."""
    if (folder / _MLX).is_file():
        raise _foreign(folder, "mlx-lm")
    if (folder / _PICKLE).is_file():
        command = _CONVERT.format(bin=folder / _PICKLE, out=folder / WEIGHTS)
        raise UnsupportedError(
            f"{folder / _PICKLE} is a pickle, which could run any program: it is not read; "
            f"write it as safetensors with: {command}"
        )
    if any(folder.glob("*.gguf")):
        _refuse_file(next(folder.glob("*.gguf")))


def _foreign(folder: Path, program: str) -> UnsupportedError:
    return UnsupportedError(
        f"{folder} is an adapter of {program}: gemlax reads adapters as peft writes them "
        f"({CONFIG} with r and lora_alpha, and {WEIGHTS})"
    )


def _nearby(folder: Path) -> str:
    """Name the adapters inside a folder: the output of a run is often given in their place."""
    if not folder.is_dir():
        return ""
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    shown = ", ".join(map(str, inside[:_SHOWN]))
    return f"; did you mean {shown}?" if inside else ""
