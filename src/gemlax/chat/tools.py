"""Gemma 4's own notation for tools: declarations, calls and responses, written and read.

A call is call:NAME{key:value,...}; strings stand between two <|"|> tokens, keys are sorted and
bare. Writers return text whose strings must hold no control token (see prompt.py); the reader
takes text and quote tokens apart, so that no text can end a string. Nothing is evaluated.
Source: Google's Gemma 4 chat template of 2026-07-09.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemlax.chat.messages import CALL_NAME
from gemlax.errors import RequestError

__all__ = ["MAX_DEPTH", "QUOTE", "declaration", "read_call", "write_call", "write_response"]

QUOTE = '<|"|>'
MAX_DEPTH = 64  # of objects and lists in each other
# A key of other characters is put between quotes, as the template does inside enums.
BARE_KEY = re.compile(r"[^\s:,{}\[\]<>|\"\ue000-\uf8ff\U000f0000-\U0010ffff]+")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
WORD = re.compile(r"[^\s,{}\[\]]+")
WORDS = {"true": True, "false": False, "null": None}
MAX_DIGITS = 4000  # int() refuses more than 4300
STANDARD_KEYS = ("description", "type", "properties", "required", "nullable")


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write call:NAME{...}.

    Raises:
        RequestError: arguments are nested more than MAX_DEPTH deep, or a number is too long.
    """
    return f"call:{name}{_write_object(arguments, 1)}"


def write_response(name: str, response: Any) -> str:
    """Write response:NAME{...}; what is no object becomes {value:...}."""
    found = response if isinstance(response, Mapping) else {"value": response}
    return f"response:{name}{_write_object(found, 1)}"


def _write(value: Any, depth: int, quote_keys: bool = False) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, (int, float)):
        try:
            return str(value)
        except ValueError as error:
            raise RequestError(f"a number of a tool call is too long: {error}") from error
    if depth >= MAX_DEPTH:
        raise RequestError(f"a tool call is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return _write_object(value, depth + 1, quote_keys)
    return "[" + ",".join(_write(item, depth + 1, quote_keys) for item in value) + "]"


def _write_object(value: Mapping[str, Any], depth: int, quote_keys: bool = False) -> str:
    pairs = []
    for key, item in _sorted(value):
        bare = BARE_KEY.fullmatch(key) and not quote_keys
        written = key if bare else f"{QUOTE}{key}{QUOTE}"
        pairs.append(f"{written}:{_write(item, depth, quote_keys)}")
    return "{" + ",".join(pairs) + "}"


def _sorted(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sort as jinja's dictsort does: without regard to case."""
    return sorted(value.items(), key=lambda item: item[0].lower())


# --- declarations ------------------------------------------------------------------------------


def declaration(function: Mapping[str, Any]) -> str:
    """Write declaration:NAME{...} from a JSON schema, in the template's order.

    What the template does not know (defaults, ranges, anyOf) is left out, as it does. A type
    ["string", "null"] becomes a nullable string.
    """
    parts = [f"description:{_text(function.get('description'))}"]
    parameters = function.get("parameters")
    if parameters:
        inner = []
        if parameters.get("properties"):
            inner.append(f"properties:{{{_properties(parameters['properties'])}}}")
        if parameters.get("required"):
            inner.append(f"required:{_names(parameters['required'])}")
        inner.append(f"type:{_text(_type(parameters) or 'OBJECT')}")
        parts.append(f"parameters:{{{','.join(inner)}}}")
    response = function.get("response")
    if isinstance(response, Mapping):
        inner = []
        if response.get("description"):
            inner.append(f"description:{_text(response['description'])}")
        inner.append(f"type:{_text(_type(response) or 'OBJECT')}")
        parts.append(f"response:{{{','.join(inner)}}}")
    return f"declaration:{function['name']}{{{','.join(parts)}}}"


def _properties(properties: Any, schema_keys: bool = True, depth: int = 1) -> str:
    """Write the properties of an object; without `schema_keys` a schema's own keys are none."""
    if depth > MAX_DEPTH:
        raise RequestError(f"a tool's parameters are nested more than {MAX_DEPTH} deep")
    if not isinstance(properties, Mapping):
        return ""
    return ",".join(
        f"{key}:{{{','.join(_property(value if isinstance(value, Mapping) else {}, depth))}}}"
        for key, value in _sorted(properties)
        if schema_keys or key not in STANDARD_KEYS
    )


def _property(value: Mapping[str, Any], depth: int) -> list[str]:
    parts = []
    kind = _type(value)
    if value.get("description"):
        parts.append(f"description:{_text(value['description'])}")
    if kind == "STRING" and value.get("enum"):
        parts.append(f"enum:{_write(value['enum'], 1, quote_keys=True)}")
    if kind == "ARRAY" and isinstance(value.get("items"), Mapping) and value["items"]:
        parts.append(f"items:{{{','.join(_items(value['items'], depth))}}}")
    if value.get("nullable") or _is_nullable(value):
        parts.append("nullable:true")
    if kind == "OBJECT":
        nested = value.get("properties")
        own = isinstance(nested, Mapping)
        parts.append(f"properties:{{{_properties(nested if own else value, own, depth + 1)}}}")
        if value.get("required"):
            parts.append(f"required:{_names(value['required'])}")
    parts.append(f"type:{_text(kind)}")
    return parts


def _items(items: Mapping[str, Any], depth: int) -> list[str]:
    parts = []
    for key, value in _sorted(items):
        if value is None:
            continue
        if key == "properties":
            parts.append(f"properties:{{{_properties(value, depth=depth + 1)}}}")
        elif key == "required":
            parts.append(f"required:{_names(value)}")
        elif key == "type":
            parts.append(f"type:{_text(_type(items))}")
        else:
            parts.append(f"{key}:{_write(value, 1, quote_keys=True)}")
    return parts


def _type(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((name for name in kind if name != "null"), "null")
    return kind.upper() if isinstance(kind, str) else ""


def _is_nullable(schema: Mapping[str, Any]) -> bool:
    kind = schema.get("type")
    return isinstance(kind, list) and "null" in kind and len(kind) > 1


def _names(names: Any) -> str:
    listed = names if isinstance(names, list) else []
    return "[" + ",".join(_text(name) for name in listed) + "]"


def _text(value: Any) -> str:
    return f"{QUOTE}{'' if value is None else value}{QUOTE}"


# --- reading -----------------------------------------------------------------------------------


def read_call(parts: Sequence[str | None]) -> dict[str, Any] | None:
    """Read what stood between the call's two tokens; None if it is no call.

    Args:
        parts: text, and None for each quote token.
    """
    text = "".join(part or "" for part in parts)
    # A character that the text does not hold stands for the quote token.
    quote = next(chr(c) for c in range(0xE000, 0xE000 + len(text) + 1) if chr(c) not in text)
    reader = _Reader("".join(quote if part is None else part for part in parts).strip(), quote)
    try:
        return reader.call()
    except _Malformed:
        return None


class _Malformed(ValueError):
    """The text is no call."""


class _Reader:
    """Recursive descent over one call; at most MAX_DEPTH deep, never back."""

    def __init__(self, text: str, quote: str):
        self.text, self.quote, self.at = text, quote, 0

    def call(self) -> dict[str, Any]:
        self.expect("call:")
        start, self.at = self.at, self.text.find("{", self.at)
        name = self.text[start : self.at].strip() if self.at >= 0 else ""
        if not CALL_NAME.fullmatch(name):
            raise _Malformed
        arguments = self.object(1)
        if self.at != len(self.text):
            raise _Malformed
        return {"name": name, "arguments": arguments}

    def object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self.expect("{")
        while not self.ends("}", first=not found):
            key = self.key()
            self.expect(":")
            if key in found:
                raise _Malformed
            found[key] = self.value(depth)
        return found

    def value(self, depth: int) -> Any:
        self.skip()
        char = self.text[self.at : self.at + 1]
        if char == self.quote:
            return self.string()
        if char and char in "{[":
            if depth >= MAX_DEPTH:
                raise _Malformed
            return self.object(depth + 1) if char == "{" else self.list(depth + 1)
        return self.literal()

    def list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self.expect("[")
        while not self.ends("]", first=not found):
            found.append(self.value(depth))
        return found

    def ends(self, char: str, first: bool) -> bool:
        """Step over the end, or over the comma before the next item."""
        self.skip()
        if self.text.startswith(char, self.at):
            self.at += 1
            return True
        if not first:
            self.expect(",")
        return False

    def key(self) -> str:
        self.skip()
        if self.text.startswith(self.quote, self.at):
            return self.string()
        start, self.at = self.at, self.text.find(":", self.at)
        key = self.text[start : self.at].strip() if self.at >= 0 else ""
        if not key or self.quote in key or any(c in "{}[]," for c in key):
            raise _Malformed
        return key

    def string(self) -> str:
        start = self.at + 1
        end = self.text.find(self.quote, start)
        if end < 0:
            raise _Malformed
        self.at = end + 1
        return self.text[start:end]

    def literal(self) -> Any:
        found = WORD.match(self.text, self.at)
        word = found[0] if found else ""
        self.at += len(word)
        if word in WORDS:
            return WORDS[word]
        number = NUMBER.fullmatch(word)
        if number is None or len(word) > MAX_DIGITS:
            raise _Malformed
        value = float(word) if number[2] or number[3] else int(word)
        if not math.isfinite(value):
            raise _Malformed
        return value

    def expect(self, text: str) -> None:
        self.skip()
        if not self.text.startswith(text, self.at):
            raise _Malformed
        self.at += len(text)

    def skip(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
