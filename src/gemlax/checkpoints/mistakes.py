"""What people have in place of a model or of one of its files, told by name and first bytes.

Git LFS pointers, web pages, files and folders of other programs, and names of tensors that a
program wrapped around the model when it was saved. Nothing here is read further.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from gemlax.errors import CheckpointError

__all__ = [
    "FORMS",
    "explain_file",
    "explain_folder",
    "explain_names",
    "is_step",
    "refuse_stand_in",
    "refuse_stand_ins",
]

FORMS = "a Hugging Face folder, a .gguf file or an Orbax folder"
_ADAPTER = "adapter_"
_TOKENIZER = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
_RUN = {"trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
_PICKLES = re.compile(r"(pytorch_)?model.*\.(bin|pt|pth)|consolidated.*\.pth|.*\.ckpt")
_LISTED = 5
_LOOKED_AT = 200
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype", b"<html", b"<?xml")
# What the hub and proxies answer in place of a file.
_ANSWERS = (
    b"entry not found", b"repository not found", b"invalid username or password", b"not found",
    b"access to model", b"unauthorized", b"access denied", b"forbidden", b'{"error"',
)  # fmt: skip
_PYTORCH, _KERAS = "a PyTorch file (pickle)", "a Keras (HDF5) file"
_GGML, _ARCHIVE = "a GGML file, from before GGUF", "an archive; unpack it"
_PART = "a download that did not end"
# How files of others begin, and how they are named.
_STARTS = {
    b"\x89HDF\r\n": _KERAS, b"PK\x03\x04": "a zip file, as PyTorch's .bin and .pt are (pickle)",
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle", b"LITERTLM": "a LiteRT-LM file",
    b"lmgg": _GGML, b"fmgg": _GGML, b"tjgg": _GGML, b"algg": _GGML, b"GGLA": _GGML,
}  # fmt: skip
_SUFFIXES = {
    ".bin": _PYTORCH, ".pt": _PYTORCH, ".pth": _PYTORCH, ".pkl": "a pickle",
    ".ckpt": "a PyTorch or TensorFlow checkpoint", ".h5": _KERAS, ".hdf5": _KERAS,
    ".keras": "a Keras file", ".msgpack": "a Flax file (msgpack)", ".npz": "a NumPy archive",
    ".task": "a MediaPipe bundle", ".litertlm": "a LiteRT-LM file", ".tflite": "a LiteRT file",
    ".onnx": "an ONNX file", ".mlmodel": "a Core ML file", ".mlpackage": "a Core ML package",
    ".mlmodelc": "a Core ML model", ".pte": "an ExecuTorch file", ".engine": "a TensorRT engine",
    ".ggml": _GGML, ".zip": _ARCHIVE, ".gz": _ARCHIVE, ".tgz": _ARCHIVE, ".tar": _ARCHIVE,
    ".7z": _ARCHIVE, ".xz": _ARCHIVE, ".zst": _ARCHIVE,
    ".sbs": "a file of gemma.cpp",
    ".part": _PART, ".incomplete": _PART, ".crdownload": _PART, ".aria2": _PART,
}  # fmt: skip
# What may lie at the start of a name or inside it, by what writes it.
_WRAPPERS = {
    "_orig_mod.": "torch.compile", "_fsdp_wrapped_module.": "FSDP", "module.": "DataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing", "_forward_module.": "Lightning",
    "base_model.model.": "peft", "pretrained_model.": "TRL",
}  # fmt: skip
_ADAPTED = (".base_layer.", ".lora_A.", ".lora_B.", ".modules_to_save.", ".original_module.",
            ".lora_embedding_A.", ".lora_magnitude_vector.")  # fmt: skip


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
    kind = _describe_other_format(path)
    if kind is not None:
        return f"{path} is {kind}, which is not read; expected {FORMS}{_advice(kind)}"
    return f"{path} is a file that begins with {start!r}; expected {FORMS}"


def explain_folder(folder: Path, names: Collection[str]) -> str:
    """Say what a folder holds that has no model in it."""
    if f"{_ADAPTER}config.json" in names:
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
    foreign = {name: _describe_other_format(folder / name) for name in sorted(names)}
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
        said = json.loads((folder / f"{_ADAPTER}config.json").read_bytes())
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


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError if a file is empty, a Git LFS pointer, or a page in place of it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise CheckpointError(f"{path} is empty; fetch it again")
        start = file.read(256)
    if start.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run in its folder: git lfs pull"
        )
    words = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if words.startswith(_PAGE):
        raise CheckpointError(
            f"{path} is a web page that was saved in place of the file; fetch the file itself, "
            "from .../resolve/main/... and not .../blob/main/..."
        )
    if words.startswith(_ANSWERS):
        line = start.decode("utf-8", "replace").strip().partition("\n")[0][:80]
        raise CheckpointError(
            f"{path} holds a server's answer in place of the file: {line!r}; fetch it again, "
            "logged in where the model asks for it (hf auth login)"
        )


def refuse_stand_ins(folder: Path, names: Collection[str]) -> None:
    """Do the same for those files of a folder that are there; a template may be empty."""
    for name in names:
        path = folder / name
        if path.is_file() and (path.suffix != ".jinja" or path.stat().st_size):
            refuse_stand_in(path)


def _describe_other_format(path: Path) -> str | None:
    """Say what a file or folder is that gemlax does not read; None: nothing known."""
    named = _SUFFIXES.get(path.suffix.lower())
    if named is not None or path.is_dir():
        return named
    with path.open("rb") as file:
        start = file.read(16)
    if start[4:8] == b"TFL3":
        return "a LiteRT file"
    return next((what for magic, what in _STARTS.items() if start.startswith(magic)), None)


def explain_names(
    names: Collection[str], expected: Collection[str], read: Collection[str]
) -> str | None:
    """Say in one line how most names differ from those of the text decoder; None: in no such way.

    Args:
        names: those that the files hold.
        expected: canonical names, such as "layers.0.mlp.up_proj.weight".
        read: what may stand in front of them.
    """
    adapted = [name for name in names if any(part in name for part in _ADAPTED)]
    if adapted:
        return (
            f"it holds {len(adapted)} tensors of adapters that are not merged, such as "
            f"{adapted[0]}; save the model after merge_and_unload(), or the adapter by itself"
        )
    known = set(expected)
    wrapped = [name for name in names if _wrappers(name) and _canonical(name) in known]
    fronts = Counter(_front(name, known) for name in names)
    ((front, count),) = fronts.most_common(1) or [(None, 0)]
    others = front is not None and front not in read and 2 * count > len(known)
    if not wrapped and not others:
        return None
    example = wrapped[0] if wrapped else next(n for n in names if _front(n, known) == front)
    writers = ", ".join(f"{part} is {_WRAPPERS[part]}'s" for part in _wrappers(example))
    where = f"begin with the prefix {front!r}" if others else "hold a wrapper's prefix"
    return (
        f"its names {where}{f' ({writers})' if writers else ''}, such as {example}; save the model "
        "that is inside the wrapper, or rename its tensors to model.layers..."
    )


def _wrappers(name: str) -> list[str]:
    return [part for part in _WRAPPERS if f".{part}" in f".{name}"]


def _front(name: str, known: Collection[str]) -> str | None:
    """Return what is in front of a canonical name; None: it does not end with one."""
    canonical = _canonical(name)
    fits = canonical in known and name.endswith(canonical)
    return name.removesuffix(canonical) if fits else None


def _canonical(name: str) -> str:
    """Return a name without wrappers and without what is in front of the decoder."""
    for wrapper in _wrappers(name):
        name = f".{name}".replace(f".{wrapper}", ".")[1:]
    start = name.find("layers.")
    return name[start:] if start >= 0 else ".".join(name.split(".")[-2:])
