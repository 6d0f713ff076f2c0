"""Random JSON schemas and values that they accept, for hypothesis."""

import re

from hypothesis import strategies as st

NAMES = ["a", "b", "name", "age", "Zed"]
PATTERNS = ["^[ab]{2}$", "^x+-[0-9]$", "^(yes|no)$"]


def schemas(depth=2):
    """Return a strategy of schemas; objects are closed, so that a call can be held to them."""
    numbers = st.builds(
        lambda kind, low, size: {"type": kind, "minimum": low, "maximum": low + size},
        st.sampled_from(["integer", "number"]), st.integers(-5, 50), st.integers(0, 99),
    )  # fmt: skip
    strings = st.one_of(
        st.just({"type": "string"}),
        st.builds(lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m},
                  st.integers(0, 2), st.integers(0, 4)),
        st.builds(lambda p: {"type": "string", "pattern": p}, st.sampled_from(PATTERNS)),
    )  # fmt: skip
    constants = st.lists(
        st.sampled_from(["red", "blue", "a b", 1, 2.5, True, None]), min_size=1, max_size=3,
        unique_by=repr,
    )  # fmt: skip
    simple = st.one_of(
        st.sampled_from([{"type": "integer"}, {"type": "boolean"}, {"type": "null"}]),
        numbers, strings, constants.map(lambda values: {"enum": values}),
        st.just({"type": ["integer", "null"]}),
    )  # fmt: skip
    if not depth:
        return simple
    inner = schemas(depth - 1)
    arrays = st.builds(
        lambda items, n, m: {"type": "array", "items": items, "minItems": n, "maxItems": n + m},
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    ways = st.lists(inner, min_size=1, max_size=2).map(lambda listed: {"anyOf": listed})
    return st.one_of(simple, arrays, ways, objects(inner))


def objects(inner=None):
    """Return a strategy of schemas of closed objects."""

    def closed(properties, required):
        names = sorted(name for name in properties if name in required)
        return {"type": "object", "properties": properties, "required": names,
                "additionalProperties": False}  # fmt: skip

    properties = st.dictionaries(
        st.sampled_from(NAMES), schemas(1) if inner is None else inner, min_size=1, max_size=3
    )
    return st.builds(closed, properties, st.sets(st.sampled_from(NAMES)))


def values(schema):
    """Return a strategy of values that a schema accepts."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of(*map(values, schema["anyOf"]))
    kind = schema["type"]
    if isinstance(kind, list):
        return st.one_of(*(values({**schema, "type": one}) for one in kind))
    if kind == "object":
        properties = {name: values(inner) for name, inner in schema["properties"].items()}
        needed = {name: properties.pop(name) for name in schema["required"]}
        return st.fixed_dictionaries(needed, optional=properties)
    if kind == "array":
        return st.lists(
            values(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"]
        )
    if kind == "string" and "pattern" in schema:
        return st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True).map(str.strip)
    if kind == "string":
        sizes = {"min_size": schema.get("minLength", 0), "max_size": schema.get("maxLength", 6)}
        return st.text('ab{"}\n,é', **sizes)
    low, high = schema.get("minimum", -9), schema.get("maximum", 99)
    halves = st.integers(2 * low, 2 * high).map(lambda x: x / 2)
    if low == high:  # llguidance spells the only number of a range without a point
        halves = st.nothing()
    return {
        "integer": st.integers(low, high), "boolean": st.booleans(), "null": st.none(),
        "number": st.integers(low, high) | halves,
    }[kind]  # fmt: skip
