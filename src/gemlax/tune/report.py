"""What a run leaves to read: one JSON line per step, a plot of the loss, and what it runs with."""

import importlib
import json
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from gemlax.errors import Error, write_whole, written_whole

__all__ = ["Log", "can_plot", "memory_bytes", "plot", "read_settings", "write_settings"]


class Log:
    """The lines of a run: a file to which each is added whole, as soon as it is known."""

    def __init__(self, path: Path, after: int = 0):
        """Go on after step `after`: lines of later steps, or cut off, are dropped."""
        self.path = path
        kept = [line for line in self.lines() if line["step"] <= after] if after else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line; `step` is one of its keys."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise Error(f"cannot write {self.path}: {error.strerror}") from error

    def lines(self) -> list[dict[str, Any]]:
        """Return what was written; a last line that was cut off is left out."""
        return list(_lines(self.path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            return
        yield entry


def can_plot() -> bool:
    """Tell whether what `plot` draws with is installed."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        return False
    return True


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the losses by step as a PNG, with matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label, form in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), form, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=120)


def memory_bytes() -> int:
    """Return the most memory used so far: of the first device if it counts, else of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write what a run is made with, whole or not at all."""
    write_whole(path, (json.dumps(settings, indent=2) + "\n").encode())


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a run was made with."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Error(f"{path.parent} holds no run to go on with: {path.name} is missing") from None
    except ValueError as error:
        raise Error(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise Error(f"{path} is damaged: expected a JSON object")
    return settings
