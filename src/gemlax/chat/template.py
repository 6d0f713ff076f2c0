"""Chat templates: a checkpoint's own in a worker process, and the two of gemlax in this one.

What comes back is `Marked` text: it knows what the template itself wrote.

A checkpoint's template is bounded in time and size. jinja2's sandbox bounds `range` but neither
nested loops nor memory, so the worker is what can be killed. It starts at the first render (about
0.1 s) and is used again until something goes wrong.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemlax.chat.marked import INPUT, Marked, marks_of
from gemlax.errors import RequestError
from gemlax.workers import Worker

__all__ = ["BuiltIn", "Template"]

logger = logging.getLogger(__name__)

CHAT = Path(__file__).parent
TIMEOUT_S = 5.0
MAX_CHARS = 4_000_000
MEMORY_BYTES = 2**29
# JSON writes a character as at most 12 bytes, and the span of one in up to 32.
MAX_REPLY_BYTES = 44 * MAX_CHARS + 2000
ENVIRONMENT = ("TZ",)  # what `strftime_now` reads


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
        self._worker = Worker(
            "gemlax.chat.render", packages=("jinja2", "markupsafe"), memory=MEMORY_BYTES,
            timeout_s=timeout_s, max_reply=MAX_REPLY_BYTES, environment=ENVIRONMENT,
        )  # fmt: skip

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
        answer = self._worker.ask(line)
        if answer is None:
            raise RequestError(
                f"the chat template failed: it took longer than {self.timeout_s:g} s or its "
                "process died"
            )
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
