"""Gemma 4's own notation for tools, written: declarations, calls and responses.

A call is call:NAME{key:value,...}; strings stand between two <|"|> tokens, keys are sorted and
bare. The tokens are marked as our own (marked.py), so that no text can end a string. calls.py
reads calls.
Source: Google's Gemma 4 chat template of 2026-07-09.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from gemlax.chat.marked import own
from gemlax.errors import RequestError

__all__ = ["MAX_DEPTH", "QUOTE", "declaration", "write_call", "write_response"]

QUOTE = '<|"|>'
MAX_DEPTH = 64  # of objects and lists in each other
# A key of other characters is put between quotes, as the template does inside enums.
BARE_KEY = re.compile(r"[^\s:=,{}()\[\]<>|\"'`\\]+")
STANDARD_KEYS = ("description", "type", "properties", "required", "nullable")


def write_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Write call:NAME{...}.

    Raises:
        RequestError: arguments are nested more than MAX_DEPTH deep, or a number is too long.
    """
    return f"call:{name}" + _write_object(arguments, 1)


def write_response(name: str, response: Any) -> str:
    """Write response:NAME{...}; what is no object becomes {value:...}."""
    found = response if isinstance(response, Mapping) else {"value": response}
    return f"response:{name}" + _write_object(found, 1)


def _write(value: Any, depth: int, quote_keys: bool = False) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, (int, float)):
        try:
            return str(value)
        except ValueError as error:
            raise RequestError(f"a number of a tool call is too long: {error}") from error
    if depth >= MAX_DEPTH:
        raise RequestError(f"a tool call is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return _write_object(value, depth + 1, quote_keys)
    return _listed(_write(item, depth + 1, quote_keys) for item in value)


def _write_object(value: Mapping[str, Any], depth: int, quote_keys: bool = False) -> str:
    pairs = []
    for key, item in _sorted(value):
        bare = BARE_KEY.fullmatch(key) and not quote_keys
        written = key if bare else _quoted(key)
        pairs.append(written + ":" + _write(item, depth, quote_keys))
    return _braced("", pairs)


def _sorted(value: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Sort as jinja's dictsort does: without regard to case."""
    return sorted(value.items(), key=lambda item: item[0].lower())


def _quoted(value: Any) -> str:
    return own(QUOTE) + str(value) + own(QUOTE)


def _text(value: Any) -> str:
    return _quoted("" if value is None else value)


def _braced(name: str, parts: Iterable[str]) -> str:
    return name + own("{") + own(",").join(parts) + own("}")


def _listed(parts: Iterable[str]) -> str:
    return own("[") + own(",").join(parts) + own("]")


def declaration(function: Mapping[str, Any]) -> str:
    """Write declaration:NAME{...} from a JSON schema, in the template's order.

    What the template does not know (defaults, ranges, anyOf) is left out, as it does. A type
    ["string", "null"] becomes a nullable string.
    """
    parts = ["description:" + _text(function.get("description"))]
    parameters = function.get("parameters")
    if parameters:
        inner = []
        if parameters.get("properties"):
            inner.append(_braced("properties:", _properties(parameters["properties"])))
        if parameters.get("required"):
            inner.append("required:" + _names(parameters["required"]))
        inner.append("type:" + _text(_type(parameters) or "OBJECT"))
        parts.append(_braced("parameters:", inner))
    response = function.get("response")
    if isinstance(response, Mapping):
        inner = []
        if response.get("description"):
            inner.append("description:" + _text(response["description"]))
        inner.append("type:" + _text(_type(response) or "OBJECT"))
        parts.append(_braced("response:", inner))
    return _braced(f"declaration:{function['name']}", parts)


def _properties(properties: Any, schema_keys: bool = True, depth: int = 1) -> list[str]:
    """Write the properties of an object; without `schema_keys` a schema's own keys are none."""
    if depth > MAX_DEPTH:
        raise RequestError(f"a tool's parameters are nested more than {MAX_DEPTH} deep")
    if not isinstance(properties, Mapping):
        return []
    return [
        _braced(f"{key}:", _property(value if isinstance(value, Mapping) else {}, depth))
        for key, value in _sorted(properties)
        if schema_keys or key not in STANDARD_KEYS
    ]


def _property(value: Mapping[str, Any], depth: int) -> list[str]:
    parts = []
    kind = _type(value)
    if value.get("description"):
        parts.append("description:" + _text(value["description"]))
    if kind == "STRING" and value.get("enum"):
        parts.append("enum:" + _write(value["enum"], 1, quote_keys=True))
    if kind == "ARRAY" and isinstance(value.get("items"), Mapping) and value["items"]:
        parts.append(_braced("items:", _items(value["items"], depth)))
    if value.get("nullable") or _is_nullable(value):
        parts.append("nullable:true")
    if kind == "OBJECT":
        nested = value.get("properties")
        is_schema = isinstance(nested, Mapping)
        inner = _properties(nested if is_schema else value, is_schema, depth + 1)
        parts.append(_braced("properties:", inner))
        if value.get("required"):
            parts.append("required:" + _names(value["required"]))
    parts.append("type:" + _text(kind))
    return parts


def _items(items: Mapping[str, Any], depth: int) -> list[str]:
    parts = []
    for key, value in _sorted(items):
        if value is None:
            continue
        if key == "properties":
            parts.append(_braced("properties:", _properties(value, depth=depth + 1)))
        elif key == "required":
            parts.append("required:" + _names(value))
        elif key == "type":
            parts.append("type:" + _text(_type(items)))
        else:
            parts.append(f"{key}:" + _write(value, 1, quote_keys=True))
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
    return _listed(_text(name) for name in (names if isinstance(names, list) else []))
