"""What people have, one small file of each kind, and what becomes of it: docs/compatibility.md.

A case writes an input and names the verdict. "exact": what is read equals, bit for bit or id for
id, what another program wrote or reads. "loads": it is read, and a part that changes nothing, or
that the log names, is left out. "refused": one error, whose text the page quotes.
"""

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Case", "Outcome", "PAGE", "page", "run"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "compatibility.md"
HEAD = """# Compatibility

Written by `scripts/compatibility` from the cases of tests/compatibility_cases.py, which run in the
test suite; do not edit. Each row is a kind of file or input as people have them, made small.

- **exact**: what is read equals, bit for bit or id for id, what the named oracle has.
- **loads**: it is read; what changes nothing, or what the log names, is left out.
- **refused**: one error, quoted here.
"""
VERDICTS = ("exact", "loads", "refused")


class Case(NamedTuple):
    """One row of the page.

    `check` gets an empty folder, makes the input in it, and reads it. It returns for "exact" and
    "loads", after comparing, and lets the error pass for "refused". `oracle` is what it is compared
    with; `log` is a part of what the log must say, `error` of what the error must say.
    """

    group: str
    kind: str
    check: Callable[[Path], None]
    verdict: str = "exact"
    oracle: str = ""
    log: str = ""
    error: str = ""


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
    """Run a case in an empty folder; an AssertionError means that the comparison failed."""
    from gemlax import Error

    handler, logger = _Lines(), logging.getLogger("gemlax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        case.check(folder)
    except (Error, FileNotFoundError, FileExistsError) as error:
        return Outcome("refused", _shown(str(error), folder))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    if not case.log:
        return Outcome(case.verdict, case.oracle)
    said = next((line for line in handler.lines if case.log in line), None)
    assert said is not None, f"the log does not say {case.log!r}: {handler.lines}"
    return Outcome(case.verdict, "log: " + _shown(said, folder))


def _shown(text: str, folder: Path) -> str:
    """Return a message as a cell of a table, without the temporary folder."""
    text = re.sub(rf"{re.escape(str(folder))}/?", "", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return " / ".join(lines[:4]).replace("|", "\\|").replace("<", "&lt;")


def page(cases: list[Case], outcomes: list[Outcome]) -> str:
    """Return the whole page."""
    return HEAD + "".join(_sections(cases, outcomes))


def _sections(cases: list[Case], outcomes: list[Outcome]) -> Iterator[str]:
    group: Any = None
    for case, outcome in zip(cases, outcomes, strict=True):
        if case.group != group:
            group = case.group
            yield f"\n## {group}\n\n| what | verdict | compared with, or what is said |\n|---|---|---|\n"
        yield f"| {case.kind} | {outcome.verdict} | {outcome.remark} |\n"
