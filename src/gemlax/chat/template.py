"""Chat templates: a checkpoint's own in a worker process, and the two of gemlax in this one.

What comes back is `Marked` text: it knows what the template itself wrote.

A checkpoint's template is bounded in time and size. jinja2's sandbox bounds `range` but neither
nested loops nor memory, so the worker is what can be killed. It starts at the first render (about
0.1 s) and is used again until something goes wrong.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemlax.chat.marked import INPUT, Marked, marks_of
from gemlax.errors import RequestError

__all__ = ["BuiltIn", "Template"]

logger = logging.getLogger(__name__)

CHAT = Path(__file__).parent
TIMEOUT_S = 5.0
START_S = 60.0  # a busy machine may take long to start Python
MAX_CHARS = 4_000_000
MEMORY_BYTES = 2**29
# JSON writes a character as at most 12 bytes, and the span of one in up to 32.
MAX_REPLY_BYTES = 44 * MAX_CHARS + 2000
ENVIRONMENT = ("TZ",)  # what `strftime_now` reads
# The worker runs isolated (-I), where jinja2 may lie in a folder that only this process knows, and
# the packages that the worker's modules lie in are empty there: nothing else of them is imported.
START = """
import runpy, sys, types
chat = sys.argv.pop()
sys.path += sys.argv[3:]
for name in ("gemlax", "gemlax.chat"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [chat] if name == "gemlax.chat" else []
runpy.run_module("gemlax.chat.worker", run_name="__main__")
"""


class BuiltIn:
    """One of gemlax's own templates, gemma3.jinja or gemma4.jinja. It is trusted: no worker."""

    def __init__(self, family: str):
        self.source = (CHAT / f"{family}.jinja").read_text("utf-8")

    def render(self, variables: dict[str, Any]) -> str:
        """Render with marks; what the template says is wrong is a RequestError."""
        import jinja2  # takes 0.05 s, and only a chat needs it

        from gemlax.chat.render import render

        try:
            return render(self.source, variables)
        except jinja2.TemplateError as error:
            raise RequestError(str(error)) from error
        except RecursionError as error:
            raise RequestError("messages or tools are nested too deeply to be written") from error


class Template:
    """Renders one Jinja source. Safe to use from several threads: one render at a time."""

    def __init__(self, source: str, *, timeout_s: float = TIMEOUT_S):
        self.source, self.timeout_s = source, timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._stop: Any = None

    def render(self, variables: dict[str, Any]) -> Marked:
        """Render with variables that JSON can write; the marks of `Marked` ones are followed."""
        try:
            line = json.dumps(
                {
                    "template": self.source,
                    "variables": variables,
                    "marks": list(_marks_in(variables, ())),
                    "max_chars": MAX_CHARS,
                }
            ).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"what the template is given is not JSON: {error}") from error
        with self._lock:
            try:
                answer = self._ask(line + b"\n")
            except BaseException:
                self._close()
                raise
        if "error" in answer:
            raise RequestError(f"the chat template failed: {answer['error']}")
        if "fault" in answer:
            logger.warning(
                "the chat template writes another text when its own words are followed (%s): no "
                "control token of this prompt is recognised; please report this",
                answer["fault"],
            )
        text, marks, done = answer["text"], [], 0
        for start, end, mark in answer["spans"]:
            marks += [INPUT * (start - done), mark * (end - start)]
            done = end
        return Marked(text, "".join([*marks, INPUT * (len(text) - done)]))

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._close()
            self._start()
        answer = self._exchange(line, self.timeout_s)
        if answer is None:
            raise RequestError(
                f"the chat template failed: it took longer than {self.timeout_s:g} s or its "
                "process died"
            )
        return answer

    def _start(self) -> None:
        specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
        folders = [str(Path(s.origin).parents[1]) for s in specs if s is not None and s.origin]
        limits = [str(MEMORY_BYTES), str(self.timeout_s + 1)]
        try:
            process = subprocess.Popen(
                [_interpreter(), "-I", "-c", START, *limits, *folders, str(CHAT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            )
        except OSError as error:
            raise RequestError(
                f"cannot start Python ({sys.executable}) for the chat template: {error}"
            ) from error
        self._process, self._stop = process, weakref.finalize(self, _end, process)
        if self._exchange(b"", START_S) is None:
            raise RequestError("cannot start the process that renders chat templates (jinja2)")

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a line and read one; None if the worker dies or is killed for taking too long."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(MAX_REPLY_BYTES)
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()
        return json.loads(answer) if answer.endswith(b"\n") else None

    def _close(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _interpreter() -> str:
    """Return the path of Python; an embedded or frozen one does not say it, or says another."""
    if not sys.executable or vars(sys).get("frozen"):
        raise RequestError(
            "a chat template is rendered in a Python process of its own, and this program does not "
            f"say where Python is (sys.executable is {sys.executable!r}): set sys.executable"
        )
    return sys.executable


def _marks_in(value: Any, path: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Yield [*keys, mark] for each marked text among variables; such a text has one mark."""
    if isinstance(value, Marked) and value:
        yield [*path, marks_of(value)[0]]
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _marks_in(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _marks_in(item, (*path, index))


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to write has no reader
                pipe.close()
    process.wait()
