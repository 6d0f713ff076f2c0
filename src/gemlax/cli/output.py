"""What the command line writes: text and tables on stdout, notes and progress on stderr."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gemlax.errors import Error

__all__ = ["bar", "describe_error", "dim", "drop_output", "note", "on_terminal", "shows_progress",
           "status", "write", "write_table"]  # fmt: skip

_XLA_NO_MEMORY = "RESOURCE_EXHAUSTED:"  # a ValueError or a RuntimeError, as jax sees fit


def write(text: str, end: str = "\n") -> None:
    """Print on stdout, or raise Error. What the terminal cannot show becomes "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end=end)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise Error(f"cannot write the output: {error.strerror}") from error


def drop_output() -> None:
    """Keep the interpreter from failing at its last flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_table(rows: Iterable[Iterable[Any]], names: Sequence[str] = ()) -> None:
    """Print a table. With names, all columns are numbers except the model's."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=bool(names), box=None)
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [f"{x:,}" if type(x) is int else str(x) for x in row]
        table.add_row(*(cells if names else (cells[0].replace("_", " "), *cells[1:])))
    rendered = io.StringIO()
    Console(file=rendered).print(table)
    write(rendered.getvalue(), end="")


def note(text: str, end: str = "\n") -> None:
    """Print on stderr, if there is one: without, print would take stdout."""
    if sys.stderr is not None:
        print(text, end=end, file=sys.stderr, flush=True)


def dim(text: str, end: str = "\n") -> None:
    """Print on stderr in a dim colour."""
    note(f"\x1b[2m{text}\x1b[0m", end=end)


def describe_error(error: Exception) -> str | None:
    """Return an error in one line; None: it is a bug of gemlax."""
    if isinstance(error, MemoryError) or _XLA_NO_MEMORY in str(error):
        first = str(error).partition("\n")[0].removeprefix(_XLA_NO_MEMORY)
        return f"out of memory; less --context or --dtype bfloat16 may help: {first.strip()}"
    if isinstance(error, UnicodeDecodeError):
        return f"the input is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, (Error, OSError)) else None


def on_terminal() -> bool:
    """Return whether somebody reads stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


def shows_progress(args: argparse.Namespace) -> bool:
    """Return whether to show bars and spinners."""
    return on_terminal() and not args.quiet


@contextmanager
def bar(args: argparse.Namespace, text: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar of bytes on stderr; what is yielded moves it."""
    if not shows_progress(args):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def status(args: argparse.Namespace, text: str) -> Iterator[Callable[[], None]]:
    """Show a spinner on stderr; what is yielded takes it away before text is printed."""
    if not shows_progress(args):
        yield lambda: None
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as spinner:
        yield spinner.stop
