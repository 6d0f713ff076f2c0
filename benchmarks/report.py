"""Writes generated sections of pages; the other scripts of this folder use it."""

import re
from collections.abc import Sequence
from pathlib import Path

from cases import Case

from gemlax import bench

README = Path(__file__).resolve().parent.parent / "README.md"
PAGE = README.parent / "docs" / "performance.md"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> str:
    """Name the machine and the versions in one line."""
    found = bench.machine()
    versions = found["versions"]
    return f"{found['processor']}, Python {versions['python']}, jax {versions['jax']}"


def step(case: Case, times: bench.Times, steps: int) -> dict[str, float]:
    """Return what a decode step of a case takes: MB of caches and temporaries, ms and its range."""
    found = {
        "cache_mb": case.sizes()["cache_bytes"] / 1e6,
        "temporary_mb": case.decode_program.memory()["temporary_bytes"] / 1e6,
        **times.report("step", "ms", steps),
    }
    return {key: round(value, 1) for key, value in found.items()}


def write_section(name: str, text: str, path: Path = PAGE) -> None:
    """Replace the text between the markers of section `name` of a page."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = path.read_text("utf-8")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{path.name} has no section {name!r} (markers {begin} ... {end})")
    path.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page), "utf-8")
