"""The forms in which a caller says what an answer must match.

Each spec writes itself as the source of a grammar: one of llguidance's Lark, whose rule `start` is
the whole answer. Bounds are checked here, before anything is compiled.
Source: llguidance's docs/syntax.md and docs/json_schema.md.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from gemlax.errors import RequestError, show_value

__all__ = [
    "MAX_DEPTH",
    "Choice",
    "Grammar",
    "Json",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Regex",
    "check_schema",
    "read_response_format",
    "write_regex",
    "write_schema",
]

Json: TypeAlias = Any  # a value of JSON

MAX_BYTES = 2**18  # of a schema, a pattern or a grammar
MAX_DEPTH = 64  # of a schema
# Patterns whose intersection is built; 22 short ones take 45 s, and each two more six times that.
MAX_PATTERNS = 8
MAX_CHOICES = 10_000


class Grammar(Protocol):
    """What an answer must match."""

    def source(self) -> str:
        """Return the grammar in llguidance's Lark; raise RequestError for what is out of bounds."""
        ...


@dataclass(frozen=True)
class JsonSchema:
    """JSON that a schema accepts.

    Attributes:
        schema: a JSON schema, as a dict or as its text.
        strict: refuse keywords that cannot be held to; False leaves them out with a warning.
        whitespace: allow any white space between tokens; False: one space after `:` and `,`.
    """

    schema: Mapping[str, Json] | bool | str
    strict: bool = True
    whitespace: bool = False

    def source(self) -> str:
        """Return the grammar."""
        schema: Json = self.schema
        if isinstance(schema, str):
            _check_size(schema, "the JSON schema")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"the JSON schema is not JSON: {error}") from error
        written = write_schema(schema, strict=self.strict, whitespace=self.whitespace)
        return f"start: {written}"


@dataclass(frozen=True)
class JsonObject:
    """Json JSON object. `whitespace`: as of `JsonSchema`."""

    whitespace: bool = False

    def source(self) -> str:
        """Return the grammar."""
        return JsonSchema({"type": "object"}, whitespace=self.whitespace).source()


@dataclass(frozen=True)
class Regex:
    r"""Text that a pattern matches from its beginning to its end.

    The syntax is that of Rust's regex crate, without look-around and back references.
    """

    pattern: str

    def source(self) -> str:
        """Return the grammar."""
        if not isinstance(self.pattern, str) or not self.pattern:
            raise RequestError(f"a regex must be text, got {show_value(self.pattern)}")
        _check_size(self.pattern, "the regex")
        return f"start: {write_regex(self.pattern)}"


@dataclass(frozen=True)
class Choice:
    """One of several texts."""

    options: Sequence[str]

    def source(self) -> str:
        """Return the grammar."""
        options = self.options
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise RequestError(f"a choice must be a list of texts, got {show_value(options)}")
        if not all(isinstance(option, str) and option for option in options):
            raise RequestError(f"a choice must be of texts, none empty, got {show_value(options)}")
        if len(options) > MAX_CHOICES:
            raise RequestError(f"a choice has at most {MAX_CHOICES} texts, got {len(options)}")
        _check_size("".join(options), "the choice")
        written = (json.dumps(option, ensure_ascii=False) for option in dict.fromkeys(options))
        return f"start: {' | '.join(written)}"


@dataclass(frozen=True)
class Lark:
    """Text of a grammar in llguidance's dialect of Lark; its rule `start` is the answer."""

    grammar: str

    def source(self) -> str:
        """Return the grammar."""
        if not isinstance(self.grammar, str) or not self.grammar.strip():
            raise RequestError(f"a grammar must be text, got {show_value(self.grammar)}")
        _check_size(self.grammar, "the grammar")
        return self.grammar


def read_response_format(form: Mapping[str, Json] | Grammar | None) -> Grammar | None:
    """Return what OpenAI's `response_format` asks for; None: any text. A spec is taken as it is.

    Raises:
        RequestError: it is not of type text, json_object or json_schema with a schema.
    """
    if form is None or isinstance(form, (JsonSchema, JsonObject, Regex, Choice, Lark)):
        return form
    kind = form.get("type") if isinstance(form, Mapping) else None
    if isinstance(form, Mapping) and kind == "text":
        return None
    if isinstance(form, Mapping) and kind == "json_object":
        return JsonObject()
    if isinstance(form, Mapping) and kind == "json_schema":
        # The Responses API has the fields of `json_schema` beside the type.
        inner = form.get("json_schema", form)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and isinstance(schema, (Mapping, bool)):
            return JsonSchema(schema, strict=inner.get("strict") is not False)
        raise RequestError("response_format: json_schema must have a schema (an object)")
    raise RequestError(
        "response_format must be of type text, json_object or json_schema, got "
        f"{show_value(kind if isinstance(form, Mapping) else form)}"
    )


def write_regex(pattern: str) -> str:
    """Return a pattern as a terminal of Lark. It matches a whole text, so anchors say nothing."""
    pattern = pattern.removeprefix("^")
    if pattern.endswith("$"):
        rest = pattern[:-1]
        if (len(rest) - len(rest.rstrip("\\"))) % 2 == 0:
            pattern = rest
    written, escaped = [], False
    for char in pattern:
        control = {"\n": "\\n", "\r": "\\r"}.get(char)
        if control is not None:
            written.append(control[1:] if escaped else control)
        else:
            written.append("\\/" if char == "/" and not escaped else char)
        escaped = char == "\\" and not escaped
    return f"/{''.join(written)}/" if pattern else '""'


def write_schema(schema: Json, *, strict: bool = True, whitespace: bool = False) -> str:
    """Return the rule of JSON that a schema accepts.

    Raises:
        RequestError: the schema is not one, or out of bounds.
    """
    check_schema(schema)
    how: dict[str, object] = {"lenient": not strict}
    if not whitespace:
        how |= {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    whole = {"allOf": [schema]} if isinstance(schema, bool) else dict(schema)
    return f"%json {json.dumps({**whole, 'x-guidance': how}, ensure_ascii=False)}"


def check_schema(schema: Json, what: str = "the JSON schema") -> None:
    """Raise RequestError for a schema that is not JSON, too large, too deep, or hard to build."""
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(f"{what} must be an object, got {show_value(schema)}")
    for part, depth in _parts(schema, 0):
        if depth > MAX_DEPTH:
            raise RequestError(f"{what} is nested more than {MAX_DEPTH} deep")
        together = part.get("allOf") if isinstance(part, Mapping) else None
        if isinstance(together, Sequence):
            count = sum(
                isinstance(inner, Mapping) and ("pattern" in inner or "format" in inner)
                for inner, _ in _parts(together, 0)
            )
            if count > MAX_PATTERNS:
                raise RequestError(
                    f"{what} has {count} patterns under one allOf, at most {MAX_PATTERNS} are taken"
                )
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from error
    _check_size(text, what)


def _parts(value: Json, depth: int) -> Iterator[tuple[Json, int]]:
    """Yield all objects and lists in a value with their depth, not far below the bound."""
    waiting = [(value, depth)]
    while waiting:
        part, depth = waiting.pop()
        yield part, depth
        if depth <= MAX_DEPTH:
            inner = part.values() if isinstance(part, Mapping) else part
            if isinstance(part, (Mapping, list, tuple)):
                waiting += [(x, depth + 1) for x in inner if isinstance(x, (Mapping, list, tuple))]


def _check_size(text: str, what: str) -> None:
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise RequestError(f"{what} has {size} bytes, at most {MAX_BYTES} are taken")
