"""Processes for work that strangers set: held to some memory, killed when they take too long.

A worker calls one function, `answer` of a module, isolated (-I): besides the modules of that room
it can import only the packages that are named. One JSON object goes in per line, one comes back. It
starts at the first question (about 0.1 s) and is used again until something goes wrong.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gemlax.errors import RequestError

__all__ = ["Worker"]

START_S = 60.0  # a busy machine may take long to start Python
GEMLAX = Path(__file__).parents[1]
# Packages may lie in a folder that only this process knows. The rooms of gemlax are empty packages
# there: nothing of them is imported but the two modules.
START = """
import runpy, sys, types
gemlax, room = sys.argv[4:6]
sys.path += sys.argv[6:]
for name in ("", ".workers", "." + room):
    sys.modules["gemlax" + name] = package = types.ModuleType("gemlax" + name)
    package.__path__ = [gemlax + name.replace(".", "/")] if name else []
runpy.run_module("gemlax.workers.child", run_name="__main__")
"""


class Worker:
    """A process that answers one question at a time. Safe to use from several threads."""

    def __init__(
        self,
        module: str,
        *,
        packages: Sequence[str],
        memory: int,
        timeout_s: float,
        max_reply: int,
        environment: Sequence[str] = (),
    ):
        """Start nothing yet.

        Args:
            module: has `answer`, from a dict to a dict, as "gemlax.chat.render".
            packages: what else it imports.
            memory: bytes of address space.
            timeout_s: seconds after which it is killed.
            max_reply: bytes of an answer.
            environment: names of variables that it gets; no others.
        """
        self._module, self._packages, self._memory = module, packages, memory
        self._timeout_s, self._max_reply, self._environment = timeout_s, max_reply, environment
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None

    def ask(self, question: bytes) -> dict[str, Any] | None:
        """Return the answer to a JSON object; None if the process took too long or died.

        Raises:
            RequestError: the process cannot be started.
        """
        with self._lock:
            try:
                if self.process is None or self.process.poll() is not None:
                    self._close()
                    self._start()
                answer = self._exchange(question + b"\n", self._timeout_s)
                if answer is None:
                    self._close()
                return answer
            except BaseException:
                self._close()
                raise

    def _start(self) -> None:
        specs = [find_spec(name) for name in self._packages]
        folders = [str(Path(s.origin).parents[1]) for s in specs if s is not None and s.origin]
        limits = [str(self._memory), str(self._timeout_s + 1), self._module]
        room = self._module.split(".")[1]
        try:
            process = subprocess.Popen(
                [_interpreter(), "-I", "-c", START, *limits, str(GEMLAX), room, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in self._environment if name in os.environ},
            )
        except OSError as error:
            raise RequestError(
                f"cannot start Python ({sys.executable}) for {self._module}: {error}"
            ) from error
        self.process, self._stop = process, weakref.finalize(self, _end, process)
        if self._exchange(b"", START_S) is None:
            needs = " and ".join(self._packages)
            raise RequestError(f"cannot start the process of {self._module}, which needs {needs}")

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a line and read one; None if the worker dies or is killed for taking too long."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(self._max_reply)
        except BrokenPipeError:
            return None
        finally:
            timer.cancel()
        return json.loads(answer) if answer.endswith(b"\n") else None

    def _close(self) -> None:
        if self._stop is not None:
            self._stop()
        self.process = self._stop = None


def _interpreter() -> str:
    """Return the path of Python; an embedded or frozen one does not say it, or says another."""
    if not sys.executable or vars(sys).get("frozen"):
        raise RequestError(
            "what strangers send is read in a Python process of its own, and this program does not "
            f"say where Python is (sys.executable is {sys.executable!r}): set sys.executable"
        )
    return sys.executable


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to write has no reader
                pipe.close()
    process.wait()
