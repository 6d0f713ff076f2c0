"""JSON schemas of a function's parameters as rules of Gemma 4's notation.

Numbers are written as in JSON, so llguidance's own rules of JSON take their bounds; all else is
written here. A rule is made once for each reference (`$ref`), which may be recursive.
"""

import json
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from gemlax.errors import RequestError, show_value
from gemlax.grammar.specs import Json, check_schema, write_regex

__all__ = ["Rules"]

logger = logging.getLogger(__name__)

MAX_RULES = 50_000
MAX_ANY_ORDER = 6  # keys of an object whose orders are all allowed: 2 ** 6 rules
# What a key without quotes must not hold, for it has a meaning there.
ODD = frozenset(":=,{}()[]<>|\"'`\\")
# Keywords that say nothing about which values are valid.
REMARKS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description",
    "example", "examples", "nullable", "readOnly", "strict", "title", "type", "writeOnly",
    "propertyOrdering", "x-guidance",
}  # fmt: skip
KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
KEYWORDS["integer"] = KEYWORDS["number"]
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")
COMMON = """
any: any_string | NUMBER | "true" | "false" | "null" | any_list | any_object
any_string: <[{quote}]> TEXT? <[{quote}]>
any_list: "[" (any ("," any)*)? "]"
any_object: "{{" (any_pair ("," any_pair)*)? "}}"
any_pair: (KEY | <[{quote}]> TEXT <[{quote}]>) ":" any
NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?/
KEY: /[A-Za-z_$][A-Za-z0-9_$-]*/
"""


class Rules:
    """Collects rules; every method returns the expression of what it was asked for."""

    def __init__(self, quote: int, *, any_order: bool = False):
        """`quote`: the id of the quote token."""
        self._quote, self._any_order = f"<[{quote}]>", any_order
        self._lines: list[str] = COMMON.format(quote=quote).strip().split("\n")
        self._names: dict[Hashable, str] = {}
        self._root: Mapping[str, Json] = {}
        self._where, self._strict = "", False

    def lines(self) -> list[str]:
        """Return all rules."""
        return self._lines

    def arguments(self, schema: Json, name: str, strict: bool) -> str:
        """Return the rule of a function's arguments; `strict`: refuse what cannot be held to."""
        self._where, self._strict = f"the parameters of {name}", strict
        check_schema(schema, self._where)
        self._root = schema if isinstance(schema, Mapping) else {}
        self._names = {}
        whole = self._resolved(schema)
        if isinstance(whole, Mapping) and not {"anyOf", "oneOf"} & whole.keys():
            whole = {**whole, "type": "object"}
        return self._value(whole)

    def _add(self, body: str) -> str:
        if len(self._lines) >= MAX_RULES:
            raise RequestError(f"{self._where} make more than {MAX_RULES} rules")
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def _later(self, key: Hashable, make: Callable[[], str]) -> str:
        """Return a rule that is made once; inside of itself it is known by its name."""
        if key not in self._names:
            name = self._names[key] = self._add("")
            place = len(self._lines) - 1
            self._lines[place] = f"{name}: {make()}"
        return self._names[key]

    def _resolved(self, schema: Json, seen: tuple[str, ...] = ()) -> Json:
        """Return the schema that a reference leads to."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if reference is None:
            return schema
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise self._wrong(f"has $ref {show_value(reference)}, and only #/... is looked up")
        if reference in seen:
            raise self._wrong(f"has $ref {reference}, which leads to itself")
        target: Json = self._root
        for part in [part for part in reference[1:].split("/") if part]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Sequence) and part.isdigit() and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, Mapping) and part in target:
                target = target[part]
            else:
                raise self._wrong(f"has $ref {reference}, which is not there")
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        target = self._resolved(target, (*seen, reference))
        return {**target, **rest} if isinstance(target, Mapping) and rest else target

    def _value(self, schema: Json) -> str:
        """Return the rule of a value."""
        if isinstance(schema, Mapping) and "$ref" in schema:
            key = json.dumps(schema, sort_keys=True)
            return self._later(key, lambda: self._value_body(self._resolved(schema)))
        return self._add(self._value_body(schema))

    def _value_body(self, schema: Json) -> str:
        if schema is True or schema == {} or schema is None:
            return "any"
        if not isinstance(schema, Mapping):
            raise self._wrong(f"allows no value: {show_value(schema)}")
        if "allOf" in schema:
            schema = self._merged(schema)
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise self._wrong(f"has enum {show_value(values)}, which is not a list of values")
            return self._alternatives(map(self._literal, values), schema)
        for several in ("anyOf", "oneOf"):
            if schema.get(several):
                rest = {k: v for k, v in schema.items() if k not in (several, *REMARKS)}
                ways = [
                    {**rest, **way} if isinstance(way, Mapping) and rest else way
                    for way in schema[several]
                ]
                return self._alternatives(map(self._value, ways), schema)
        said = schema.get("type")
        types = said if isinstance(said, (list, tuple)) else [said or self._guessed(schema)]
        if types == [None]:
            self._leave_out(schema, set())
            return "any"
        kinds = [str(kind).lower() for kind in types]  # Gemini's are in capitals
        if unknown := [kind for kind in kinds if kind not in TYPES]:
            raise self._wrong(f"has type {unknown[0]!r}, which JSON has not")
        used = set().union(*(KEYWORDS.get(kind, set()) for kind in kinds))
        self._leave_out(schema, used)
        return self._alternatives((self._typed(kind, schema) for kind in kinds), schema)

    def _alternatives(self, ways: Iterable[str], schema: Mapping[str, Json]) -> str:
        listed = list(dict.fromkeys(ways))
        if schema.get("nullable") is True and '"null"' not in listed:
            listed.append('"null"')
        return " | ".join(listed)

    def _merged(self, schema: Mapping[str, Json]) -> dict[str, Json]:
        """Return the parts of an allOf as one schema, where they do not speak of the same."""
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            part = self._resolved(part)
            if part is True:
                continue
            if not isinstance(part, Mapping):
                raise self._wrong(f"has {show_value(part)} under allOf")
            for key, value in (self._merged(part) if "allOf" in part else part).items():
                if key == "properties" and key in merged:
                    merged[key] = {**merged[key], **value}
                elif key == "required" and key in merged:
                    merged[key] = [*merged[key], *value]
                elif key not in REMARKS - {"type"} and merged.get(key, value) != value:
                    raise self._wrong(f"has two values of {key} under allOf")
                else:
                    merged[key] = value
        return merged

    def _guessed(self, schema: Mapping[str, Json]) -> str | None:
        """Return the type that the keywords of a schema without one are about."""
        kinds = ("object", "array", "string", "number")
        return next((kind for kind in kinds if KEYWORDS[kind] & schema.keys()), None)

    def _leave_out(self, schema: Mapping[str, Json], used: set[str]) -> None:
        """Refuse, or name in the log, the keywords that nothing here holds an answer to."""
        left = sorted(schema.keys() - used - REMARKS - {"allOf"})
        if left and self._strict:
            raise self._wrong(f"has {', '.join(left)}, which cannot be held to with strict: true")
        if left:
            logger.warning("%s: not held to: %s", self._where, ", ".join(left))

    def _typed(self, kind: str, schema: Mapping[str, Json]) -> str:
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            bounds = {key: schema[key] for key in KEYWORDS[kind] if key in schema}
            return self._add(f"%json {json.dumps({'type': kind, **bounds})}")
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        return '"null"' if kind == "null" else '("true" | "false")'

    def _string(self, schema: Mapping[str, Json]) -> str:
        pattern = schema.get("pattern")
        min_count, max_count = schema.get("minLength", 0), schema.get("maxLength")
        if pattern is not None:
            if not isinstance(pattern, str):
                raise self._wrong(f"has pattern {show_value(pattern)}")
            if min_count or max_count is not None:
                self._leave_out({"minLength": min_count, "maxLength": max_count}, set())
            # A pattern of JSON schema may match anywhere.
            begin = "" if pattern.startswith("^") else "(.|\\n)*"
            end = "" if re.search(r"(?<!\\)(\\\\)*\$$", pattern) else "(.|\\n)*"
            inner = write_regex(pattern)[1:-1]
            return f"{self._quote} /{begin}({inner}){end}/ {self._quote}"
        if not min_count and max_count is None:
            return "any_string"
        self._check_counts(min_count, max_count)
        if max_count == 0:
            return f"{self._quote} {self._quote}"
        text = f"/(.|\\n){{{max(min_count, 1)},{'' if max_count is None else max_count}}}/"
        return f"{self._quote} {text}{'' if min_count else '?'} {self._quote}"

    def _check_counts(self, min_count: Json, max_count: Json) -> None:
        for count in (min_count, max_count):
            if count is not None and (not isinstance(count, int) or count < 0):
                raise self._wrong(f"has a length of {show_value(count)}")
        if max_count is not None and min_count > max_count:
            raise self._wrong(f"wants at least {min_count} and at most {max_count}")

    def _array(self, schema: Mapping[str, Json]) -> str:
        first = [self._value(item) for item in schema.get("prefixItems", ())]
        min_count, max_count = schema.get("minItems", 0), schema.get("maxItems")
        self._check_counts(min_count, max_count)
        if max_count is not None:
            first = first[:max_count]
        items = schema.get("items", True)
        rest = None if items is False else self._value(items)
        # What follows item i, from the end: either the list ends or one more comes.
        fixed = max(len(first), min_count)
        if rest is None:
            tail = '"]"'
        elif max_count is None:
            tail = f'("," {rest})* "]"' if fixed else ""
        else:
            room = max_count - fixed
            tail = f'("," {rest}){{0,{room}}} "]"' if room else '"]"'
        if not fixed:
            if rest is None or max_count == 0:
                return '"[" "]"'
            bound = f"{{0,{max_count - 1}}}" if max_count is not None else "*"
            more = f'("," {rest}){bound}' if max_count != 1 else ""  # llguidance refuses {0,0}
            return f'"[" ({rest} {more})? "]"'
        kinds = [first[i] if i < len(first) else rest or "any" for i in range(fixed)]
        after = tail
        for index in range(fixed - 1, -1, -1):
            comma = '"," ' if index else ""
            item = f"{comma}{kinds[index]} {after}"
            after = self._add(item if index < min_count else f'{item} | "]"')
        return f'"[" {after}'

    def _object(self, schema: Mapping[str, Json]) -> str:
        properties = schema.get("properties") or {}
        required = schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, (list, tuple)):
            raise self._wrong("has properties or required of the wrong type")
        more = schema.get("additionalProperties", "properties" not in schema)
        properties = {**properties, **{k: True for k in required if k not in properties}}
        if not properties:
            value = None if more is False else self._value(more)
            if value is None:
                return '"{" "}"'
            pair = self._pair(value)
            return f'"{{" ({pair} ("," {pair})*)? "}}"'
        keys = sorted(properties, key=str.lower)
        members = {key: f"{self._key(key)} {self._value(properties[key])}" for key in keys}
        others = None if more is False else self._pair(self._value(more), keys)
        if self._any_order and len(keys) <= MAX_ANY_ORDER:
            return f'"{{" {self._unordered(members, set(required), others)}'
        return f'"{{" {self._ordered(members, set(required), others)}'

    def _pair(self, value: str, except_for: Sequence[str] = ()) -> str:
        """Return a key, none of some, and a value."""
        if not except_for:
            return self._add(f'(KEY | {self._quote} TEXT {self._quote}) ":" {value}')
        never = "|".join(re.escape(key).replace("/", "\\/") for key in except_for)
        name = f"KEY_{len(self._lines)}"
        self._lines.append(f"{name}: KEY & ~/{never}/")
        return self._add(f'{name} ":" {value}')

    def _ordered(self, members: Mapping[str, str], required: set[str], others: str | None) -> str:
        """Return what follows the brace: members in their order, then others."""
        tail = '"}"' if others is None else f'("," {others})* "}}"'
        first = '"}"' if others is None else f'({others} ("," {others})*)? "}}"'
        begun, fresh = self._add(tail), self._add(first)
        for key in reversed(list(members)):
            skip = "" if key in required else " | {}"
            fresh = self._add(f"{members[key]} {begun}" + skip.format(fresh))
            begun = self._add(f'"," {members[key]} {begun}' + skip.format(begun))
        return fresh

    def _unordered(self, members: Mapping[str, str], required: set[str], others: str | None) -> str:
        """Return what follows the brace: a rule for each set of keys that came."""
        made: dict[frozenset[str], str] = {}

        def rest(used: frozenset[str]) -> str:
            if used not in made:
                comma = '"," ' if used else ""
                ways = [f"{comma}{members[k]} {rest(used | {k})}" for k in members if k not in used]
                if required <= used:
                    ways.append('"}"' if others is None else _tail(others, bool(used)))
                made[used] = self._add(" | ".join(ways))
            return made[used]

        return rest(frozenset())

    def _key(self, key: str) -> str:
        text = json.dumps(key, ensure_ascii=False)
        if ODD & set(key) or key.split() != [key]:
            return (
                f'{self._quote} {text} {self._quote} ":"'
                if key
                else f'{self._quote} {self._quote} ":"'
            )
        return json.dumps(f"{key}:", ensure_ascii=False)

    def _literal(self, value: Json) -> str:
        """Return the one way in which a value is written."""
        if isinstance(value, str):
            inner = json.dumps(value, ensure_ascii=False) if value else ""
            return f"{self._quote} {inner} {self._quote}"
        if isinstance(value, Mapping):
            pairs = [
                f"{self._key(key)} {self._literal(value[key])}"
                for key in sorted(value, key=str.lower)
            ]
            return '"{" ' + ' "," '.join(pairs) + ' "}"'
        if isinstance(value, (list, tuple)):
            return '"[" ' + ' "," '.join(map(self._literal, value)) + ' "]"'
        return json.dumps(json.dumps(value))

    def _wrong(self, what: str) -> RequestError:
        return RequestError(f"tools: a schema in {self._where} {what}")


def _tail(others: str, is_begun: bool) -> str:
    return f'("," {others})* "}}"' if is_begun else f'({others} ("," {others})*)? "}}"'
