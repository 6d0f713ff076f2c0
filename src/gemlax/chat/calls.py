"""Reads the tool calls that a model writes, in Gemma 4's notation or nearly so.

The notation is call:NAME{key:value,...} with strings between two <|"|> tokens (tools.py). Models
drift from it to JSON and Python, and then a call is read as a person would: strings in " or ',
keys in quotes, True and None, bare words, = for :, parentheses for braces, a comma too many, a
quote token too many or too few, and {"name": ..., "arguments": ...}. What can be meant in two ways
is not a call. Text and quote tokens come apart, so no text can end a string that a token began.
Nothing is evaluated, no step goes back, and depth is bounded.
Source: reports of what models write, among them vllm #48678, #51284 and #51307, ollama #15306,
#15315, #17882 and #18390, omlx #1854 and #1886, yzma #243.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from gemlax.chat.messages import CALL_NAME

__all__ = ["read_calls"]

ARGUMENTS = ("arguments", "parameters")
NAMED = {"name", "type", "id", *ARGUMENTS}
MAX_DEPTH = 64  # of objects and lists in each other; gemma4.jinja writes no deeper either
NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(\.[0-9]*)?|(\.[0-9]+))([eE][+-]?[0-9]+)?")
MAX_DIGITS = 4000  # int() refuses more than 4300
MAX_SIGNED = 7  # a longer one that begins with + may be a telephone number
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
WORDS |= {"TRUE": True, "FALSE": False, "NULL": None}
# A word that is no text: a number in no notation of JSON, or what JSON has no value for.
NO_TEXT = re.compile(r"[+-]?(\.?\d[\d._\s]*([eE][+-]?\d*)?|inf|infinity|nan)|undefined", re.I)
# What a bare word may be made of.
BARE = re.compile(r"[^,{}\[\]()\"'`\n\r]+")
LAST_NAME = re.compile(r"[\s\"']([^\W\d]\w*)$")
KEY = re.compile(r"[^:=,{}\[\]()\"'`\\\n\r]+")
OPENING = re.compile(r"[{(]")
# The next key, where a comma is missing before it.
NEXT_KEY = re.compile(r"[\"']?[^\W\d][\w.-]*[\"']?\s*[:=]")
# What a string may hold for which the next argument, or call, is another reading.
NEXT = re.compile(r",\s*[\"']?[^\W\d]\w*[\"']?\s*[:=]|[})]\s*,?\s*call:")
# Quotes of a text that were written as quote tokens (q): one or three, in pairs.
INNER = r"[^q]+(?:(?<![\wq])(q|qqq)[^q]+\1(?![\wq])[^q]*)+"
SPACE = re.compile(r"\s*")
# \uXXXX, of which two may be one character, or \ and a character.
ESCAPE = re.compile(
    r"\\(?:u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|u([0-9a-f]{4})|(.))", re.S | re.I
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
ESCAPES |= {char: char for char in "\"'\\/"}


def read_calls(
    parts: Sequence[str | None], *, closed: bool = True
) -> list[dict[str, object]] | None:
    """Read what stood between the call's two tokens; None if it is not one call or several.

    Args:
        parts: text, and None for each quote token.
        closed: the second token came. Without it, a string that nothing ends may be cut off.
    """
    text = "".join(part or "" for part in parts)
    # A character that the text does not hold stands for the quote token.
    used = set(text)
    quote = next(chr(c) for c in range(0xE000, 0xE001 + len(used)) if chr(c) not in used)
    text = "".join(quote if part is None else part for part in parts).strip()
    reader = _Reader(text, quote, closed)
    try:
        return reader.calls()
    except _Malformed:
        return None


class _Malformed(ValueError):
    """The text is not a call."""


class _Reader:
    """Recursive descent, at most MAX_DEPTH deep, never back."""

    def __init__(self, text: str, quote: str, closed: bool = False):
        self.text, self.quote, self.closed, self.pos = text, quote, closed, 0
        self.ends: list[str] = []  # of the objects and lists that are open

    def calls(self) -> list[dict[str, object]]:
        if self.text[:1] in ("{", "["):
            read = self.value(1)
            calls = [self.said(one) for one in (read if isinstance(read, list) else [read])]
        else:
            calls = [self.call()]
            while self.pos < len(self.text):
                self.takes(",")
                calls.append(self.call())
        if self.pos != len(self.text) or not calls:
            raise _Malformed
        return calls

    def call(self) -> dict[str, object]:
        self.expect("call:")
        opening = OPENING.search(self.text, self.pos)
        if opening is None:
            raise _Malformed
        name, self.pos = self.text[self.pos : opening.start()].strip(), opening.start()
        if not name:
            call = self.said(self.object(1))
            self.skip()
            return call
        if name[0] in "\"'" and name[-1] == name[0]:
            name = name[1:-1]
        name = name.removesuffix(":").rstrip()  # call:f: {...}
        if not CALL_NAME.fullmatch(name):
            raise _Malformed
        arguments = self.object(1) if self.next() == "{" else self.in_parentheses()
        self.skip()
        return {"name": name, "arguments": arguments}

    def said(self, value: object) -> dict[str, object]:
        """Return the call that {"name", "arguments"} says, also inside {"function": ...}."""
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            if set(value) - {"function", "type", "id"}:
                raise _Malformed
            value = value["function"]
        if not isinstance(value, dict) or set(value) - NAMED:
            raise _Malformed
        name, given = value.get("name"), [value[key] for key in ARGUMENTS if key in value]
        if not isinstance(name, str) or not CALL_NAME.fullmatch(name) or len(given) > 1:
            raise _Malformed
        arguments = given[0] if given else {}
        if isinstance(arguments, str):
            inner = _Reader(arguments.strip(), self.quote)
            arguments = inner.object(1)
            if inner.pos != len(inner.text):
                raise _Malformed
        if not isinstance(arguments, dict):
            raise _Malformed
        return {"name": name, "arguments": arguments}

    def in_parentheses(self) -> dict[str, object]:
        """Read (key=value, ...) or ({...})."""
        self.expect("(")
        if self.next() != "{":
            return self.pairs(")", 1)
        arguments = self.object(1)
        self.expect(")")
        return arguments

    def object(self, depth: int) -> dict[str, object]:
        self.expect("{")
        return self.pairs("}", depth)

    def pairs(self, end: str, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        comma = True
        self.ends.append(end)
        while not self.takes(end):
            if not comma:
                raise _Malformed
            key = self.key()
            if not self.takes(":"):
                self.expect("=")
            if key in pairs:
                raise _Malformed
            closes = self.next() in (self.quote, "{", "[")
            pairs[key] = self.value(depth)
            # After what closes itself, and on a new line, the next key needs no comma.
            ended = self.pos
            comma = self.takes(",") or closes or "\n" in self.text[ended : self.pos]
        self.ends.pop()
        return pairs

    def list(self, depth: int) -> list[Any]:
        items: list[Any] = []
        comma = True
        self.expect("[")
        self.ends.append("]")
        while not self.takes("]"):
            if not comma:
                raise _Malformed
            items.append(self.value(depth))
            comma = self.takes(",")
        self.ends.pop()
        return items

    def value(self, depth: int) -> Any:
        char = self.next()
        if char == self.quote:
            return self.marked_string("," + self.ends[-1])
        if char in ('"', "'"):
            return self.string(char)
        if char in ("{", "["):
            if depth >= MAX_DEPTH:
                raise _Malformed
            return self.object(depth + 1) if char == "{" else self.list(depth + 1)
        return self.word()

    def key(self) -> str:
        char = self.next()
        if char == self.quote:
            return self.marked_string(":=")
        if char in ('"', "'"):
            return self.string(char)
        key = self.bare(KEY)
        if not key:
            raise _Malformed
        return key

    def marked_string(self, ends: str) -> str:
        """Read to a quote token that one of `ends` or a key follows; there are no escapes."""
        start = end = self.pos + 1
        while True:
            end = self.text.find(self.quote, end) + 1
            if not end:
                return self.unended_string(start)
            follows = self.after(end)
            if self.text[follows : follows + 1] in ends or NEXT_KEY.match(self.text, follows):
                break
        self.pos, inside = end, self.text[start : end - 1]
        if self.quote in inside and not re.fullmatch(INNER.replace("q", self.quote), inside):
            raise _Malformed
        return inside.replace(self.quote, '"')

    def unended_string(self, start: int) -> str:
        """Read a string up to the braces that end the call: its quote token was forgotten."""
        end = "".join(reversed(self.ends))
        inside = self.text[start:].removesuffix(end)
        whole = self.closed and self.text.endswith(end)
        if not whole or self.quote in inside or NEXT.search(inside):
            raise _Malformed
        self.pos = start + len(inside)
        return inside

    def string(self, mark: str) -> str:
        """Read a string of JSON or Python; a quote that ends nothing is a part of it."""
        start = close = self.pos + 1
        inner = False
        while True:
            close = self.text.find(mark, close)
            if close < 0:
                raise _Malformed
            slashes = close
            while slashes > start and self.text[slashes - 1] == "\\":
                slashes -= 1
            escaped = (close - slashes) % 2
            close += 1
            end, follows = close, self.after(close)
            if self.text.startswith(self.quote, follows):  # a quote token too many
                end, follows = follows + 1, self.after(follows + 1)
            rest = self.text[follows : follows + 1]
            if not escaped and (not rest or rest in ",:=)]}"):
                break
            if not escaped and rest == mark:  # two strings, or three quotes
                raise _Malformed
            inner = inner or not escaped
        self.pos = end
        inside = self.text[start : close - 1]
        if self.quote in inside or (inner and _holds_pair(inside)):
            raise _Malformed
        return _unescaped(inside)

    def word(self) -> Any:
        word = self.bare(BARE)
        if word in WORDS:
            return WORDS[word]
        number = NUMBER.fullmatch(word)
        if number is None:
            if not word or NO_TEXT.fullmatch(word) or _holds_pair(word):
                raise _Malformed
            return word
        if len(word) > (MAX_SIGNED if word[0] == "+" else MAX_DIGITS):
            raise _Malformed
        value = float(word) if any(number.groups()) else int(word)
        if not math.isfinite(value):
            raise _Malformed
        return value

    def bare(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.pos)
        if match is None or self.quote in match[0]:
            raise _Malformed
        self.pos = match.end()
        return match[0].strip()

    def takes(self, char: str) -> bool:
        """Step over a character if it comes next."""
        if self.next() != char:
            return False
        self.pos += 1
        return True

    def expect(self, text: str) -> None:
        self.skip()
        if not self.text.startswith(text, self.pos):
            raise _Malformed
        self.pos += len(text)

    def next(self) -> str:
        """Return the next character that is not a space, "" at the end."""
        self.skip()
        return self.text[self.pos : self.pos + 1]

    def skip(self) -> None:
        self.pos = self.after(self.pos)

    def after(self, pos: int) -> int:
        """Return where the next character is that is not a space."""
        match = SPACE.match(self.text, pos)
        return match.end() if match else pos


def _holds_pair(text: str) -> bool:
    """Whether a text looks as if the next key and value were in it, their comma forgotten."""
    pieces = re.split("[:=]", text)
    return any(
        LAST_NAME.search(before.rstrip()) and not after.startswith("//")
        for before, after in itertools.pairwise(pieces)
    )


def _unescaped(text: str) -> str:
    """Return what a string of JSON or Python means; an escape that neither has stays as it is."""

    def one(escape: re.Match[str]) -> str:
        if escape[1]:
            return bytes.fromhex(escape[1] + escape[2]).decode("utf-16-be")
        if escape[3]:
            code = int(escape[3], 16)
            return escape[0] if 0xD800 <= code < 0xE000 else chr(code)
        return ESCAPES.get(escape[4], escape[0])

    return ESCAPE.sub(one, text)
