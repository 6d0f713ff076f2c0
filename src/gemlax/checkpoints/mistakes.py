"""What a path holds in place of a model, in the words of whoever gave it."""

import json
import re
from collections.abc import Collection
from pathlib import Path

from gemlax.checkpoints.stand_ins import describe_other_format

__all__ = ["ADAPTER", "FORMS", "explain_file", "explain_folder", "is_step"]

FORMS = "a Hugging Face folder, a .gguf file or an Orbax folder"
ADAPTER = "adapter_"
_TOKENIZER = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
_RUN = {"trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_PICKLES = re.compile(r"(pytorch_)?model.*\.(bin|pt|pth)|consolidated.*\.pth|.*\.ckpt")
_LISTED = 5
_LOOKED_AT = 200


def explain_file(path: Path, start: bytes, blob: str | None) -> str:
    """Say what a file is that is no checkpoint.

    Args:
        path: the file.
        start: its first bytes.
        blob: what it names as its model, where it is an ollama manifest.
    """
    if blob is not None:
        return (
            f"{path} is an ollama manifest; its model is the file {blob} in ollama's folder "
            "models/blobs, give that path"
        )
    kind = describe_other_format(path)
    if kind is not None:
        return f"{path} is {kind}, which is not read; expected {FORMS}{_advice(kind)}"
    return f"{path} is a file that begins with {start!r}; expected {FORMS}"


def explain_folder(folder: Path, names: Collection[str]) -> str:
    """Say what a folder holds that has no model in it."""
    if f"{ADAPTER}config.json" in names:
        return _explain_adapter(folder)
    if is_step(folder):
        return (
            f"{folder} is a checkpoint inside a tuning run, for `gemlax tune --resume`; its "
            f"results are {folder.parent.parent}/adapter or {folder.parent.parent}/model"
        )
    inside = _models_below(folder, names)
    if inside:
        return f"{folder} has no model of its own; give {_one_of(inside)}"
    others = sorted(name for name in names if _PICKLES.fullmatch(name))
    if others:
        return (
            f"{folder} has no safetensors; its weights are PyTorch's ({others[0]}), and pickle is "
            "not read; convert them with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW), which writes safetensors"
        )
    foreign = {name: describe_other_format(folder / name) for name in sorted(names)}
    for name, kind in foreign.items():
        if kind is not None and name not in _RUN:
            return (
                f"{folder} holds {name}, {kind}, which is not read; expected {FORMS}{_advice(kind)}"
            )
    if "config.json" in names or (names and _of_hub(folder)):
        return (
            f"{folder} has no weights: the model is not downloaded completely; "
            f"fetch it with: hf download {_of_hub(folder) or 'NAME'}"
        )
    if _RUN & set(names):
        return f"{folder} is of a training run and holds no weights ({_some(_RUN & set(names))})"
    if _TOKENIZER & set(names):
        return f"{folder} holds a tokenizer ({_some(_TOKENIZER & set(names))}) and no weights"
    encoders = [name for name in names if name.endswith(".gguf")]
    if encoders:
        return (
            f"{folder} holds {_some(encoders)}, which lies beside a model and is none; give the "
            "model's own .gguf file"
        )
    return (
        f"{folder} is no checkpoint: it {f'holds {_some(names)}' if names else 'is empty'}; "
        f"expected {FORMS}"
    )


def _explain_adapter(folder: Path) -> str:
    """Say what an adapter is for, and of which base."""
    try:
        said = json.loads((folder / f"{ADAPTER}config.json").read_bytes())
        base = str(said["base_model_name_or_path"] or "BASE")[:200]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        base = "BASE"
    base = base if base.isprintable() else "BASE"
    of = "" if base == "BASE" else f" of {base}"
    return (
        f"{folder} is an adapter{of}, not a model; load the base and the adapter: "
        f"gemlax.load({base!r}, adapters={str(folder)!r}), or --model {base} --adapter {folder}"
    )


def _models_below(folder: Path, names: Collection[str]) -> list[Path]:
    """Return the sub-folders that hold a model or an adapter, the last of a run first."""
    found = []
    below = [folder / name for name in sorted(names) if (folder / name).is_dir()][:_LOOKED_AT]
    # One deeper: snapshots/REVISION of the hub's cache, STEP/default of orbax.
    below += [deeper for path in below for deeper in sorted(path.iterdir()) if deeper.is_dir()]
    for path in below[:_LOOKED_AT]:
        inside = {entry.name for entry in path.iterdir() if entry.exists()}
        if is_step(path):
            continue
        weights = any(name.endswith((".safetensors", ".gguf")) for name in inside)
        if weights or {"_METADATA", "manifest.ocdbt"} & inside:
            found.append(path)
    return sorted(found, key=_step, reverse=True)


def is_step(folder: Path) -> bool:
    """Tell whether a folder is where `gemlax tune` keeps what it goes on from."""
    return folder.parent.name == "checkpoints" and folder.name.isdecimal()


def _step(path: Path) -> int:
    number = re.search(r"(\d+)$", path.name)
    return int(number[1][:18]) if number else -1


def _one_of(paths: list[Path]) -> str:
    if len(paths) == 1:
        return f"the folder in it: {paths[0]}"
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return f"one of the folders in it: {', '.join(map(str, paths[:_LISTED]))}{more}"


def _of_hub(folder: Path) -> str | None:
    """Return the name on the hub, of a folder in its cache."""
    parts = [part for part in folder.absolute().parts if part.startswith("models--")]
    return parts[-1].removeprefix("models--").replace("--", "/", 1) if parts else None


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_LISTED])


def _advice(kind: str) -> str:
    pickled = "pickle" in kind or "PyTorch" in kind
    return "; convert it with transformers' save_pretrained" if pickled else ""
