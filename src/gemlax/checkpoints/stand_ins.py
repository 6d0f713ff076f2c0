"""What people have in place of a file: Git LFS pointers, web pages, files of other programs.

Only the first bytes are looked at, and only to say what the matter is.
"""

import os
from collections.abc import Collection
from pathlib import Path

from gemlax.errors import CheckpointError

__all__ = ["describe_other_format", "refuse_stand_in", "refuse_stand_ins"]

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


def refuse_stand_in(path: Path) -> None:
    """Raise CheckpointError if a file is empty, a Git LFS pointer, or a page in place of it.

    Raises:
        CheckpointError: it is; the message says what to do.
        OSError: it cannot be read.
    """
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


def describe_other_format(path: Path) -> str | None:
    """Say what a file or folder is that gemlax does not read; None: nothing known."""
    named = _SUFFIXES.get(path.suffix.lower())
    if named is not None or path.is_dir():
        return named
    with path.open("rb") as file:
        start = file.read(16)
    if start[4:8] == b"TFL3":
        return "a LiteRT file"
    return next((what for magic, what in _STARTS.items() if start.startswith(magic)), None)
