"""Grammars: what is refused, what a mask allows, and what a call to a tool may look like."""

import json
import sys
import threading
import time

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import objects, values
from vocabularies import chat_tokenizer, published_tokenizer

from gemlax import RequestError
from gemlax.chat.calls import read_calls
from gemlax.grammar import (
    ChatGrammar,
    Choice,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
    compiler_of,
    read_response_format,
    read_tool_choice,
)
from gemlax.grammar.constraint import ThinkingBudget, mask_width
from gemlax.grammar.toolcalls import Markers

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
CHANNEL, END_CHANNEL, END_TURN = "<|channel>", "<channel|>", "<turn|>"
MARKERS = (OPEN, CLOSE, QUOTE, CHANNEL, END_CHANNEL)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
    },
}


class Toy:
    """The toy vocabulary of Gemma 4."""

    tokenizer = chat_tokenizer("gemma4")
    compiler = compiler_of(tokenizer)
    markers = Markers(*map(tokenizer.id_of, MARKERS))
    stops = (tokenizer.eos_id, tokenizer.id_of(END_TURN))

    @classmethod
    def constraint(cls, grammar, **more):
        return cls.compiler.constraint(grammar, cls.stops, **more)

    @classmethod
    def ids(cls, *parts):
        """Return ids of texts and of markers that stand alone."""
        whole = (
            [cls.tokenizer.id_of(part)]
            if part in (*MARKERS, END_TURN)
            else cls.tokenizer.encode(part, add_bos=False)
            for part in parts
        )
        return [id for some in whole for id in some]


def allowed(constraint, tokenizer=Toy.tokenizer):
    """Return the ids that may come next, by NumPy's own reading of the bits."""
    row = np.zeros((1, mask_width(tokenizer.num_tokens)), np.uint32)
    constraint.fill(row)
    bits = np.unpackbits(row[0].view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[: tokenizer.num_tokens]).tolist())


def accepts(grammar, *parts):
    """Whether an answer is whole, with a stop id after it or without need of one."""
    constraint = Toy.constraint(grammar)
    ids = Toy.ids(*parts)
    if constraint.check(ids) < len(ids):
        return False
    constraint.advance(ids)
    assert constraint.error is None
    return constraint.is_finished or bool(allowed(constraint) & set(Toy.stops))


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (JsonSchema(PERSON), '{"name": "a", "age": 3}', '{"name": "a"}'),
        (JsonSchema(json.dumps(PERSON)), '{"name": "", "age": 0}', '{"age": 0, "name": ""}'),
        (JsonSchema(PERSON, whitespace=True), '{"name":"a"  ,\n "age":3}', '{"name": a}'),
        (JsonSchema(True), '[1, {"a": null}]', "[1,]"),
        (JsonObject(), '{"a": [1, true]}', "[1]"),
        (Regex(r"^[a-c]+/\d$"), "abc/7", "abc/"),
        (Regex(r"a\$"), "a$", "a"),
        (Regex("a\nb"), "a\nb", "anb"),
        (Choice(["yes", 'no "é"\n']), 'no "é"\n', "no"),
        (Lark('start: "a" | b+\nb: "c"'), "cc", "ac"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_whole_answer_matches_and_nothing_else_does(grammar, right, wrong):
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)


HOSTILE = {
    "patterns": JsonSchema(
        {"allOf": [{"type": "string", "pattern": f"a{{{i},}}b*"} for i in range(22)]}
    ),
    "patterns of one's own": Lark(
        "start: %json "
        + json.dumps({"allOf": [{"type": "string", "pattern": f"a{{{i},}}b*"} for i in range(22)]})
    ),
    "parentheses": Lark("start: " + "(" * 20000 + '"a"' + ")" * 20000),
    "size": JsonSchema({"enum": [f"value {i}" for i in range(30_000)]}),
    "depth": JsonSchema(json.loads('{"items":' * 300 + "{}" + "}" * 300)),
    "a loop": JsonSchema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "look-around": Regex("(?=a)b"),
    "a keyword": JsonSchema({"not": {"type": "string"}}),
    "a surrogate": JsonSchema({"enum": ["\ud800"]}),
    "a number": JsonSchema({"const": float("nan")}),
    "no JSON": JsonSchema("{"),
    "no schema": JsonSchema([1]),
    "no choice": Choice([]),
    "an empty choice": Choice(["a", ""]),
    "no rule": Lark("start: nothing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_within_three_seconds(name):
    Toy.constraint(Choice(["warm"]))  # the worker and the vocabulary are there
    begin = time.perf_counter()
    with pytest.raises(RequestError) as error:
        Toy.constraint(HOSTILE[name])
    assert time.perf_counter() - begin < 3
    assert len(str(error.value)) < 700
    assert accepts(Choice(["a", "b"]), "b"), "the next grammar works"


def test_keywords_that_cannot_be_held_to_are_left_out_where_asked(caplog):
    assert accepts(JsonSchema({"type": "integer", "not": {"const": 3}}, strict=False), "3")
    assert "not" in caplog.text


def test_without_llguidance_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"gemlax\[serve\]"):
        compiler_of(Toy.tokenizer).matcher(Regex("not compiled before"))


def test_threads_share_one_vocabulary_and_get_matchers_of_their_own():
    tokenizer = chat_tokenizer("gemma4", 500)
    made = []

    def make(text):
        made.append(compiler_of(tokenizer).constraint(Choice(["ab", text]), (1,)))

    threads = [threading.Thread(target=make, args=("x" * (i % 3 + 1),)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 12
    made[0].advance(Toy.ids("ab"))
    assert made[0].is_finished
    assert [other.check(Toy.ids("ab")) for other in made[1:]] == [len(Toy.ids("ab"))] * 11


def test_a_mask_allows_what_a_check_allows():
    constraint = Toy.constraint(JsonSchema(PERSON))
    for id in Toy.ids('{"name": "é'):
        here = allowed(constraint)
        # Of several ways to write a forced text, the mask allows one.
        checked = {i for i in range(512) if constraint.check([i])}
        assert here == checked if len(here) > 1 else here < checked
        constraint.advance([id])
    assert Toy.ids('"')[0] in allowed(constraint)


def test_masks_after_drafts_are_those_of_each_step():
    text = '{"name": "ab", "age": 12'
    ids = Toy.ids(text)
    whole = Toy.constraint(JsonSchema(PERSON))
    rows = np.zeros((len(ids) + 1, 16), np.uint32)
    whole.fill(rows, ids)
    stepwise = Toy.constraint(JsonSchema(PERSON))
    for place, id in enumerate([*ids, None]):
        row = np.zeros((1, 16), np.uint32)
        stepwise.fill(row)
        np.testing.assert_array_equal(rows[place], row[0])
        if id is not None:
            stepwise.advance([id])
    assert allowed(whole) == allowed(Toy.constraint(JsonSchema(PERSON))), "it did not move"
    with_end = [*ids, *Toy.ids("}")]
    whole.fill(np.zeros((len(with_end) + 1, 16), np.uint32), with_end)
    assert whole.error is None and whole.check(ids) == len(ids)


def test_forced_ids_are_the_only_ones_that_may_come():
    constraint = Toy.constraint(JsonSchema(PERSON))
    forced = constraint.forced()
    assert Toy.tokenizer.decode(forced).startswith('{"name')
    for id in forced:
        assert allowed(constraint) == {id}
        constraint.advance([id])


def test_a_stop_id_may_come_where_the_grammar_may_end_and_ends_it():
    constraint = Toy.constraint(Regex("[ab]+"))
    assert not allowed(constraint) & set(Toy.stops)
    constraint.advance(Toy.ids("ab"))
    assert set(Toy.stops) <= allowed(constraint)
    assert constraint.check([Toy.stops[1], *Toy.ids("a")]) == 0
    alone = Toy.compiler.constraint(Regex("[ab]+"), Toy.stops[1:])
    alone.advance(Toy.ids("ab"))
    assert Toy.stops[1] in allowed(alone) and Toy.stops[0] not in allowed(alone)
    constraint.advance([Toy.stops[1]])
    assert constraint.is_finished and constraint.error is None


def test_an_id_that_does_not_fit_is_an_error_that_stays():
    constraint = Toy.constraint(Regex("[ab]+"))
    constraint.advance(Toy.ids("z"))
    assert constraint.error is not None and "\n" not in constraint.error
    constraint.advance(Toy.ids("a"))
    assert constraint.error is not None and not constraint.is_finished


def test_allowed_ids_and_a_grammar_hold_together():
    letters = Toy.ids("ab")
    constraint = Toy.constraint(None, allowed_ids=[*letters, 511])
    assert allowed(constraint) == {*letters, 511}
    assert constraint.check([511, 300]) == 1
    both = Toy.constraint(Regex("[a-z]+"), allowed_ids=letters)
    assert allowed(both) == set(letters)


@pytest.mark.parametrize("grammar", [None, ChatGrammar(Toy.markers)], ids=["text", "chat"])
def test_when_the_budget_of_thought_is_used_up_only_its_end_may_come(grammar):
    markers = Toy.markers
    budget = ThinkingBudget(6, markers.open_channel, markers.close_channel)
    constraint = Toy.constraint(grammar, budget=budget)
    thought = Toy.tokenizer.encode("thought\n", add_bos=False)
    constraint.advance([markers.open_channel, *thought[:3]])
    assert len(allowed(constraint)) > 0
    constraint.advance(thought[3:])
    ids = Toy.ids("ab") * 5
    count = constraint.check(ids)
    constraint.advance(ids[:count])
    assert allowed(constraint) == {markers.close_channel}
    assert constraint.check(Toy.ids("a")) == 0
    constraint.advance([markers.close_channel])
    assert len(allowed(constraint)) > 100
    assert allowed(constraint.copy()) == allowed(constraint)


def tools(*functions):
    return [{"function": function} for function in functions]


def chat(*functions, **more):
    return ChatGrammar(Toy.markers, tools(*(functions or (WEATHER, {"name": "now"}))), **more)


CITY = (OPEN, "call:get_weather{city:", QUOTE, "b <|turn> {,}", QUOTE, ",days:3}", CLOSE)
NOW = (OPEN, "call:now{}", CLOSE)
THOUGHT = (CHANNEL, "thought\nhm", END_CHANNEL)


@pytest.mark.parametrize(
    ("grammar", "parts", "right"),
    [
        (chat(), ("some text",), True),
        (chat(), (*THOUGHT, "text", *THOUGHT, *CITY, *NOW), True),
        (chat(parallel=False), NOW, True),
        (chat(parallel=False), (*NOW, *NOW), False),
        (chat(tool_choice="required"), (*THOUGHT, *CITY, *NOW), True),
        (chat(tool_choice="required"), ("text",), False),
        (chat(tool_choice="required"), THOUGHT, False),
        (chat(tool_choice="now"), NOW, True),
        (chat(tool_choice="now"), CITY, False),
        (chat(tool_choice="now"), (*NOW, *NOW), False),
        (chat(tool_choice="none"), ("text",), True),
        (chat(tool_choice="none"), NOW, False),
        (chat(body=JsonObject()), ('{"a": 1}',), True),
        (chat(body=JsonObject()), NOW, True),
        (chat(body=JsonObject()), ("text",), False),
        (chat(is_thinking=True), ("hm", END_CHANNEL, "text"), True),
        (chat(is_thinking=True), ("hm",), False),
        (chat(), (OPEN, "call:other{}", CLOSE), False),
        (chat(), (OPEN, "call:get_weather{days:3}", CLOSE), False),
        (chat(), (OPEN, "call:get_weather{city:", QUOTE, "a", QUOTE, ",days:10}", CLOSE), False),
        (chat(), (OPEN, "call:get_weather{city:", QUOTE, "a", OPEN, QUOTE, "}", CLOSE), False),
        (chat(), (OPEN, "call:get_weather{city:", QUOTE, "a", QUOTE, ",x:1}", CLOSE), False),
        (chat(), (OPEN, "call:now{a:1}", CLOSE), False),
        (chat(), ("text", QUOTE), False),
        (chat(), ("text", END_CHANNEL), False),
    ],
)
def test_an_answer_of_a_chat_is_thoughts_text_and_calls_as_chosen(grammar, parts, right):
    assert accepts(grammar, *parts) == right


def test_keys_come_in_their_order_or_in_any():
    unit_first = (OPEN, "call:get_weather{unit:", QUOTE, "celsius", QUOTE, ",city:", QUOTE, QUOTE)
    assert not accepts(chat(), *unit_first, "}", CLOSE)
    assert accepts(chat(any_order=True), *unit_first, "}", CLOSE)
    twice = (*unit_first, ",unit:", QUOTE, "celsius", QUOTE, "}", CLOSE)
    assert not accepts(chat(any_order=True), *twice)
    without = (OPEN, "call:get_weather{unit:", QUOTE, "celsius", QUOTE, "}", CLOSE)
    assert not accepts(chat(any_order=True), *without)


def written(value):
    """Write a value in Gemma 4's notation: texts and quote tokens."""
    if isinstance(value, str):
        return [QUOTE, value, QUOTE] if value else [QUOTE, QUOTE]
    if isinstance(value, list):
        items = [part for item in value for part in [",", *written(item)]][1:]
        return ["[", *items, "]"]
    if isinstance(value, dict):
        pairs = []
        for key in sorted(value, key=str.lower):
            bare = key.isalpha() and key.isascii()
            pairs += [",", *([key] if bare else written(key)), ":", *written(value[key])]
        return ["{", *pairs[1:], "}"]
    return [json.dumps(value)]


SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": ["integer", "null"]}, "b c": {}}},
    {
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            "pair": {"prefixItems": [{"type": "integer"}, {"enum": ["x", 1.5, None, {"k": []}]}],
                     "items": False, "type": "array", "minItems": 1},
        },
        "required": ["pair"],
        "additionalProperties": False,
    },
    {
        "$defs": {"node": {"type": "object", "required": ["v"], "additionalProperties": False,
                           "properties": {"v": {"type": "number"}, "next": {"anyOf": [
                               {"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
        "type": "object", "properties": {"node": {"$ref": "#/$defs/node"}}, "required": ["node"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[ab]{2}$"},
                                      "any": {"type": "string", "pattern": "b"},
                                      "short": {"type": "string", "maxLength": 2}},
     "additionalProperties": {"type": "integer"}},
    {"allOf": [{"properties": {"p": {"const": "q"}}, "required": ["p"]},
               {"properties": {"r": {"type": "integer", "multipleOf": 3}}}], "type": "object"},
    {"type": "object"},
]  # fmt: skip


def arguments_of(grammar, arguments):
    parts = (OPEN, "call:f", *written(arguments), CLOSE)
    return accepts(grammar, *(part for part in parts if part))


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (0, [{}, {"a": None}, {"b c": [{"x": "y"}], "a": 3}], [{"a": "x"}, {"z": 1}]),
        (1, [{"pair": [1]}, {"list": [True], "pair": [1, {"k": []}]}],
         [{}, {"pair": []}, {"pair": [1, "y"]}, {"pair": [1, 1.5, 2]}, {"list": [], "pair": [1]}]),
        (2, [{"node": {"v": 1}}, {"node": {"v": 1.5, "next": {"v": 2, "next": None}}}],
         [{"node": {}}, {"node": {"v": 1, "next": {}}}]),
        (3, [{"id": "ab", "any": "xbx", "short": ""}, {"z": 3, "y": 4}],
         [{"id": "abc"}, {"any": "x"}, {"short": "abc"}, {"z": "a"}, {"ids": "x"}]),
        (4, [{"p": "q", "r": 9}, {"p": "q"}], [{"r": 9}, {"p": "q", "r": 4}]),
        (5, [{}, {"k": "x", "v": [1, 2.5e3]}], []),
    ],
)  # fmt: skip
def test_a_call_is_accepted_if_its_arguments_are_valid(schema, right, wrong):
    schema = SCHEMAS[schema]
    grammar = chat({"name": "f", "parameters": schema}, tool_choice="f")
    for arguments in right:
        jsonschema.validate(arguments, schema)
        assert arguments_of(grammar, arguments), arguments
    for arguments in wrong:
        assert not arguments_of(grammar, arguments), arguments


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_valid_arguments_of_any_schema_are_accepted_and_a_missing_one_is_not(data):
    schema = data.draw(objects())
    grammar = chat({"name": "f", "parameters": schema}, tool_choice="f")
    arguments = data.draw(values(schema))
    jsonschema.validate(arguments, schema)
    assert arguments_of(grammar, arguments)
    for name in schema["required"]:
        assert not arguments_of(grammar, {k: v for k, v in arguments.items() if k != name})


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 1), (1, 1), (0, 2), (2, 2)])
def test_arrays_have_as_many_items_as_they_may(least, most):
    array = {"type": "array", "items": {"type": "integer"}, "minItems": least, "maxItems": most}
    schema = {"type": "object", "properties": {"a": array}, "required": ["a"]}
    grammar = chat({"name": "f", "parameters": schema}, tool_choice="f")
    for count in range(4):
        assert arguments_of(grammar, {"a": [7] * count}) == (least <= count <= most), count


def test_a_call_that_was_accepted_is_read_as_it_was_meant():
    arguments = {"days": 3, "city": 'the "old", {town}: call:now{}'}
    parts = [OPEN, "call:get_weather", *written(arguments), CLOSE]
    assert accepts(chat(), *parts)
    read = read_calls([None if part == QUOTE else part for part in parts[1:-1]])
    assert read == [{"name": "get_weather", "arguments": arguments}]


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a": {"type": "text"}}}, "text"),
        ({"properties": {"a": {"$ref": "other.json"}}}, "other.json"),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}}, "not there"),
        ({"properties": {"a": {"$ref": "#/properties/a"}}}, "itself"),
        ({"properties": {"a": {"enum": []}}}, "enum"),
        ({"properties": {"a": {"minItems": 99999, "type": "array"}}}, "rules"),
        ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 2}}}, "at most 2"),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format"),
    ],
)
def test_parameters_that_cannot_be_held_to_are_refused_by_name(schema, said):
    with pytest.raises(RequestError, match="of f ") as error:
        Toy.constraint(chat({"name": "f", "parameters": schema, "strict": True}))
    assert said in str(error.value)


def test_parameters_are_taken_as_far_as_they_can_be_held_to(caplog):
    schema = {"properties": {"day": {"type": "string", "format": "date"}}}
    grammar = chat({"name": "f", "parameters": schema}, tool_choice="f")
    assert accepts(grammar, OPEN, "call:f{day:", QUOTE, "x", QUOTE, "}", CLOSE)
    assert "format" in caplog.text


@pytest.mark.parametrize("forty", [False, True], ids=["two tools", "forty tools"])
def test_calls_of_the_real_vocabulary_cannot_hold_a_marker(forty):
    tokenizer = published_tokenizer("gemma4")
    markers = Markers(*map(tokenizer.id_of, MARKERS))
    parameter = {"type": "array", "items": {"type": "object", "properties": {"a": {}}}}
    many = [
        {"name": f"tool_{i}", "parameters": {"properties": {f"p{j}": parameter for j in range(12)}}}
        for i in range(40 if forty else 2)
    ]
    grammar = ChatGrammar(markers, tools(*many), tool_choice="required")
    constraint = compiler_of(tokenizer).constraint(grammar, (1, 106))
    constraint.advance([markers.open_call])
    constraint.advance(tokenizer.encode("call:tool_1{p0:[{a:", add_bos=False))
    constraint.advance([markers.quote, *tokenizer.encode("some text", add_bos=False)])
    here = allowed(constraint, tokenizer)
    assert here & tokenizer.special_ids == {markers.quote}
    assert len(here) > 200_000


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonObject()),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": {}}}, JsonSchema({})),
        ({"type": "json_schema", "name": "p", "schema": {}, "strict": False},
         JsonSchema({}, strict=False)),
        (Regex("a"), Regex("a")),
    ],
)  # fmt: skip
def test_a_response_format_is_read(form, grammar):
    assert read_response_format(form) == grammar


@pytest.mark.parametrize("form", [{"type": "yaml"}, {"type": "json_schema"}, "json", 3])
def test_a_response_format_that_is_none_is_refused(form):
    with pytest.raises(RequestError, match="response_format"):
        read_response_format(form)


def test_a_tool_choice_is_read_or_refused():
    declared = tools(WEATHER)
    openai = {"type": "function", "function": {"name": "get_weather"}}
    assert read_tool_choice(openai, declared) == "get_weather"
    assert read_tool_choice({"name": "get_weather"}, declared) == "get_weather"
    assert read_tool_choice(None, declared) == "auto"
    for wrong in ({"name": "other"}, "any", {"type": "function"}, 3):
        with pytest.raises(RequestError, match="tool_choice"):
            read_tool_choice(wrong, declared)
    with pytest.raises(RequestError, match="no tools"):
        read_tool_choice("required", [])
