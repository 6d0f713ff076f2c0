"""Writes the arguments of a call as JSON while the call is still being written.

It takes calls as a grammar lets them be, call:NAME{key:value,...}: no other notation, no spaces.
Every piece goes on a text that is the beginning of JSON.
"""

import json
from typing import Literal

__all__ = ["ArgumentStream", "Piece"]

Piece = tuple[Literal["call", "arguments"], str]


class ArgumentStream:
    """The state of one call."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._pending = ""  # of the name, a key, a word or a number
        self._open: list[str] = []  # objects and lists
        self._is_key = self._is_text = False

    def push(self, text: str) -> list[Piece]:
        """Take text; return what it adds."""
        pieces: list[Piece] = []
        if self._name is None:
            self._pending += text
            begun, brace, text = self._pending.partition("{")
            if not brace:
                return []
            self._name, self._pending = begun.removeprefix("call:"), ""
            pieces.append(("call", self._name))
            text = brace + text
        written = _inside(text) if self._is_text and not self._is_key else self._write(text)
        return [*pieces, ("arguments", written)] if written else pieces

    def quote(self) -> list[Piece]:
        """Take a quote token."""
        self._is_text = not self._is_text
        return [] if self._is_key else [("arguments", '"')]

    def _write(self, text: str) -> str:
        """Return the JSON of text that is no string's; keys, words and numbers come whole."""
        written = ""
        for char in text:
            is_part = char not in ":}" if self._is_key else char not in "{}[],"
            if self._is_text or is_part:
                self._pending += char
            elif self._is_key and char == ":":
                written += json.dumps(self._pending, ensure_ascii=False) + ":"
                self._pending, self._is_key = "", False
            else:
                written += self._pending + char
                self._pending = ""
                if char in "{[":
                    self._open.append(char)
                elif char in "}]" and self._open:
                    self._open.pop()
                in_object = self._open[-1:] == ["{"]
                self._is_key = in_object and char in "{,"
        return written


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
