"""What people have, one small file of each kind, and what becomes of it: docs/compatibility.md.

A case writes an input, reads it and names the verdict. "exact": what is read equals, bit for bit
or id for id, what another program wrote or reads. "loads": it is read, and a part that changes
nothing, or that the log names, is left out. "refused": one error, whose text the page quotes.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from disk import assert_same_bits

from gemlax.errors import Error

__all__ = ["PAGE", "Case", "Outcome", "Read", "page", "run"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
INTRODUCTION = """# Compatibility

Written by `scripts/compatibility` from the cases of `tests/compatibility_*.py`, which are tests of
the suite; do not edit. Each row is a kind of file or input as people have them, made small.

- **exact**: what is read equals, bit for bit or id for id, what the named program has.
- **loads**: it is read; what changes nothing, or what the log names, is left out.
- **refused**: one error, quoted here.
"""
LONGEST = 320


class Read(NamedTuple):
    """What gemlax read, and what it should have: arrays by name, or anything else."""

    found: Any
    expected: Any


class Case(NamedTuple):
    """One row of the page.

    `check` gets an empty folder, makes the input in it and reads it; it returns what the frame
    compares, and lets the error pass for "refused". `oracle` is what made `expected`; `log` is a
    part of what the log must say, `error` of what the error must say.
    """

    group: str
    kind: str
    check: Callable[[Path], Read | None]
    verdict: str = "exact"
    oracle: str = ""
    log: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """What it is called among the tests."""
        return f"{self.group}: {self.kind}"


class Outcome(NamedTuple):
    """What a case did: its verdict, and what the page says about it."""

    verdict: str
    remark: str


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in an empty folder.

    Raises:
        AssertionError: it is not as the case says: the verdict, a value, or what is said.
    """
    handler, logger = _Lines(), logging.getLogger("gemlax")
    level, logger.propagate = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        read = case.check(folder)
    except (Error, FileNotFoundError, FileExistsError) as error:
        assert case.verdict == "refused", f"{case.verdict} is said, but: {error}"
        assert case.error and case.error in str(error), f"{case.error!r} is not in: {error}"
        return Outcome("refused", _shown(str(error), folder))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
    assert case.verdict in ("exact", "loads"), f"{case.verdict} is said, but there is no error"
    assert case.verdict == "loads" or (read and case.oracle), "exact, but compared with nothing"
    if read is not None:
        _assert_same(read)
    oracle = _shown(case.oracle, folder)
    if not case.log:
        return Outcome(case.verdict, oracle)
    said = next((line for line in handler.lines if case.log in line), None)
    assert said is not None, f"the log does not say {case.log!r}: {handler.lines}"
    parts = (oracle, f"log: {_shown(said, folder)}")
    return Outcome(case.verdict, "; ".join(part for part in parts if part))


def _assert_same(read: Read) -> None:
    found, expected = read
    assert expected or expected in (0, False), "compared with nothing"
    arrays = isinstance(expected, Mapping) and all(hasattr(v, "dtype") for v in expected.values())
    if arrays:
        assert_same_bits(found, expected)
    else:
        assert found == expected


def _shown(text: str, folder: Path) -> str:
    """Return a message as a cell of a table, without the temporary folder."""
    text = text.replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    text = " / ".join(lines[:4])
    if len(text) > LONGEST:
        text = text[:LONGEST].rstrip() + " ..."
    return re.sub(r"([|*\\])", r"\\\1", text).replace("<", "&lt;")


def page(cases: Iterable[Case], outcomes: Iterable[Outcome]) -> str:
    """Return the whole page."""
    return INTRODUCTION + "".join(_sections(cases, outcomes))


def _sections(cases: Iterable[Case], outcomes: Iterable[Outcome]) -> Iterator[str]:
    group = None
    for case, outcome in zip(cases, outcomes, strict=True):
        if case.group != group:
            group = case.group
            yield f"\n## {group}\n\n| what | verdict | compared with, or what is said |\n"
            yield "|---|---|---|\n"
        yield f"| {case.kind} | {outcome.verdict} | {outcome.remark} |\n"
