"""A checkpoint's own chat template, rendered in a worker process with bounds on time and size.

jinja2's sandbox bounds `range` but neither nested loops nor memory, so the worker is what can be
killed. It starts at the first render (about 0.1 s) and is used again until something goes wrong.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemlax.errors import RequestError

__all__ = ["Template"]

TIMEOUT_S = 5.0
START_S = 60.0  # a busy machine may take long to start Python
MAX_CHARS = 4_000_000
MEMORY_BYTES = 2**29
MAX_REPLY_BYTES = 12 * MAX_CHARS + 2000  # JSON writes a character as at most 12 bytes
WORKER = Path(__file__).with_name("worker.py")
# What `strftime_now` reads, and what Windows cannot start without.
ENVIRONMENT = ("TZ", "SYSTEMROOT")
# The worker runs isolated (-I), where jinja2 may lie in a folder that only this process knows.
START = """
import runpy, sys
worker = sys.argv.pop()
sys.path += sys.argv[3:]
runpy.run_path(worker, run_name="__main__")
"""


class Template:
    """Renders one Jinja source. Safe to use from several threads: one render at a time."""

    def __init__(self, source: str, *, timeout_s: float = TIMEOUT_S):
        self.source, self.timeout_s = source, timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._stop: Any = None

    def render(self, variables: dict[str, Any]) -> str:
        """Render with variables that JSON can write.

        Raises:
            RequestError: the template raises, loops, or writes or needs too much.
        """
        request = {"template": self.source, "variables": variables, "max_chars": MAX_CHARS}
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                answer = self._ask(line)
            except BaseException:
                self._close()
                raise
        if "error" in answer:
            raise RequestError(f"the chat template failed: {answer['error']}")
        return answer["text"]

    def _ask(self, line: bytes) -> dict[str, str]:
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
        found = [find_spec(name) for name in ("jinja2", "markupsafe")]
        folders = [str(Path(s.origin).parents[1]) for s in found if s is not None and s.origin]
        limits = [str(MEMORY_BYTES), str(self.timeout_s + 1)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", START, *limits, *folders, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        self._process, self._stop = process, weakref.finalize(self, _end, process)
        if self._exchange(b"", START_S) is None:
            raise RequestError("cannot start the process that renders chat templates (jinja2)")

    def _exchange(self, line: bytes, seconds: float) -> dict[str, str] | None:
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


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to write has no reader
                pipe.close()
    process.wait()
