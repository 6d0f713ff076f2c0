"""The errors gemlax raises for what a user gave it, checks of numbers, and files written whole.

Error
|- CheckpointError    a file that is damaged, incomplete or of another shape (a ValueError)
|- UnsupportedError   a checkpoint or option that gemlax does not implement
'- RequestError       a prompt or a setting that cannot be served (a ValueError)
"""

import contextlib
import os
import reprlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = [
    "CheckpointError",
    "Error",
    "RequestError",
    "UnsupportedError",
    "check_int",
    "check_positive",
    "show_value",
    "write_whole",
    "written_whole",
]


class Error(Exception):
    """Base of every error of gemlax's own."""


class CheckpointError(Error, ValueError):
    """A checkpoint is damaged, incomplete, or its tensors do not fit its config."""


class UnsupportedError(Error, NotImplementedError):
    """A checkpoint or an option that gemlax does not implement."""


class RequestError(Error, ValueError):
    """A prompt or a setting that cannot be served."""


def check_int(
    name: str,
    value: object,
    least: int = 1,
    meaning: str = "",
    *,
    error: type[Error] = RequestError,
) -> int:
    """Return an integer (of Python or NumPy, no bool) of at least `least`; else raise `error`.

    `meaning`: what the smallest values mean, for the error.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    kind = "a positive integer" if least == 1 else f"an integer >= {least}"
    note = f" ({meaning})" if meaning else ""
    raise error(f"{name} must be {kind}{note}, got {show_value(value)}")


def check_positive(name: str, value: object, *, error: type[Error] = RequestError) -> float:
    """Return a value that is a positive, finite number (no bool); else raise `error`."""
    if isinstance(value, (int, float)) and value is not True and 0 < value < float("inf"):
        return value
    raise error(f"{name} must be a positive number, got {show_value(value)}")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
show_value = _SHORT.repr  # as an error shows it: not all of a long list


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` if no error comes."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    with written_whole(path) as part:
        part.write_bytes(data)
