"""Gemma 4's notation of tools, and the parser that takes a model's output apart."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import FIRST_CHAT_WORD, chat_tokenizer

from gemlax import RequestError
from gemlax.chat import ChatFormat, Delta, OutputParser
from gemlax.chat.calls import MAX_DEPTH, read_calls

TOKENIZER = chat_tokenizer("gemma4")
# U+2581 is a space to the tokenizer, a lone surrogate has no UTF-8.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12)
HARD = st.sampled_from(['<|"|>', "<tool_call|>", "a:b", "}", "null", " ", "", "é", "<|turn>"])
STRINGS = TEXT | HARD
NUMBERS = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(STRINGS, inner, max_size=4),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(STRINGS, JSON, max_size=4)
IDS = st.lists(
    st.sampled_from([i for i in TOKENIZER.special_ids if "unused" not in TOKENIZER.piece(i)])
    | st.sampled_from(TOKENIZER.encode('call:f{a:[1,{b}]}thought\n é"', add_bos=False))
    | st.integers(0, TOKENIZER.num_tokens - 1),
    max_size=40,
)


def ids(text):
    return TOKENIZER.encode(text, add_bos=False, parse_special=True)


def parsed(tokens, stop=(), sizes=(), **options):
    """The parser after all ids, and its deltas, pushed in pieces of `sizes` and then the rest."""
    parser, at, deltas = OutputParser(TOKENIZER, stop, **options), 0, []
    for size in sizes:
        deltas += parser.push(tokens[at : at + size])
        at += size
    return parser, [*deltas, *parser.push(tokens[at:]), *parser.flush()]


def written(start, end, calls=(), tools=None):
    """What the built-in template writes between the first `start` and `end`."""
    messages = [{"role": "user", "content": "x"}]
    if calls:
        answer = {"role": "tool", "content": "y"}
        messages += [{"role": "assistant", "tool_calls": calls}, answer]
    prompt = ChatFormat(TOKENIZER).encode(messages, tools)
    text = TOKENIZER.decode(prompt, skip_special=False)
    return text.partition(start)[2].partition(end)[0]


def write_call(name, arguments):
    call = {"name": name, "arguments": arguments}
    return written("<|tool_call>", "<tool_call|>", [call])


def result(parser):
    return parser.content, parser.reasoning, parser.tool_calls, parser.content_ids


def test_a_call_is_written_with_sorted_keys_and_quoted_strings():
    arguments = {"b": [1, -2.5, True], "a": {"z": None, "Y": "s"}, "C": 1e20, "odd key": ""}
    assert write_call("f", arguments) == (
        'call:f{a:{Y:<|"|>s<|"|>,z:null},b:[1,-2.5,true],C:1e+20,<|"|>odd key<|"|>:<|"|><|"|>}'
    )


@given(ARGUMENTS)
def test_what_is_written_is_read_back(arguments):
    """Through messages, template guard, tokenizer and parser, whatever the strings hold."""
    call = {"name": "f", "arguments": arguments}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "y"},
    ]
    prompt = ChatFormat(TOKENIZER).encode(messages)
    opened, closed = ids("<|tool_call>")[0], ids("<tool_call|>")[0]
    written = prompt[prompt.index(opened) : prompt.index(closed) + 1]
    parser, deltas = parsed(written)
    # By their JSON, for 1 == 1.0 == True.
    found = [json.dumps(call, sort_keys=True) for call in parser.tool_calls]
    assert found == [json.dumps(call, sort_keys=True)]
    assert parser.content == parser.reasoning == ""
    assert [(delta.kind, json.loads(delta.text)) for delta in deltas] == [("tool_calls", call)]


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("call:f{}", {}),
        (" call: f { a : 1 , b : [ ] } ", {"a": 1, "b": []}),
        ('call:f{<|"|>a b<|"|>:<|"|>x}<|"|>}', {"a b": "x}"}),
        ("call:f{a:{b:{c:[[-1.5e3,null]]}}}", {"a": {"b": {"c": [[-1500.0, None]]}}}),
    ],
)
def test_calls_are_read(text, arguments):
    parser, _ = parsed(ids(f"<|tool_call>{text}<tool_call|>"))
    assert parser.tool_calls == [{"name": "f", "arguments": arguments}]
    assert parser.content == ""


NEARLY = {
    'call:f{"a":1}': {"a": 1},
    'call:f{ "a" : "b" , \'c\' : \'d\' }': {"a": "b", "c": "d"},
    "call:f{opts:{'mode':1}, refs:['x',\"y\",<|\"|>z<|\"|>]}": {"opts": {"mode": 1},
                                                           "refs": ["x", "y", "z"]},
    "call:f{a:True,b:False,c:None,d:TRUE}": {"a": True, "b": False, "c": None, "d": True},
    "call:f{city:New York,unit:celsius,day:2026-11-26,at:10:30}":
        {"city": "New York", "unit": "celsius", "day": "2026-11-26", "at": "10:30"},
    "call:f{u:https://github.com/c?d=e&f,t:Meeting at 10:30}":
        {"u": "https://github.com/c?d=e&f", "t": "Meeting at 10:30"},
    "call:f{a:1,}": {"a": 1},
    "call:f{a:[1,2,],b:{c:1,},}": {"a": [1, 2], "b": {"c": 1}},
    'call:f{a:"1",b:"true"}': {"a": "1", "b": "true"},
    'call:f{\n  a: 1\n  b: two\n}': {"a": 1, "b": "two"},
    "call:f{save_as='r.docx',n=3}": {"save_as": "r.docx", "n": 3},
    "call:f(a=1, b='x')": {"a": 1, "b": "x"},
    "call:f({a:1})": {"a": 1},
    "call:f()": {},
    "call:f: {a:1}": {"a": 1},
    'call:"f"{a:1}': {"a": 1},
    'call:f{command:<|"|>look<|"|>angle:90}': {"command": "look", "angle": 90},
    "call:f{Basic LLM Chain:{a:1},b c:[]}": {"Basic LLM Chain": {"a": 1}, "b c": []},
    'call:f{a:<|"|>say "hi", {x: 1}<|"|>,b:1}': {"a": 'say "hi", {x: 1}', "b": 1},
    r'call:f{a:"say \"hi\", {x: 1}",b:"C:\\d\n\u00e9\/\q"}':
        {"a": 'say "hi", {x: 1}', "b": "C:\\d\né/\\q"},
    r"call:f{a:'it\'s',b:'it's',c:''}": {"a": "it's", "b": "it's", "c": ""},
    'call:f{a:"say "hi" now"}': {"a": 'say "hi" now'},
    r'call:f{a:"\ud83d\ude00 \ud83d"}': {"a": "\U0001f600 \\ud83d"},
    '{"name":"f","arguments":{"a":1}}': {"a": 1},
    '{"name": "f", "parameters": {"a": [true, null]}}': {"a": [True, None]},
    '{"type":"function","function":{"name":"f","arguments":"{\\"a\\": 1}"}}': {"a": 1},
    'call:{"name":"f","arguments":{}}': {},
    "call:f{a:+5,b:.5,c:5.,d:-.5e1}": {"a": 5, "b": 0.5, "c": 5.0, "d": -5.0},
    'call:f{a:<|"|>d(<|"|><|"|><|"|>S<|"|><|"|><|"|>)<|"|>,n:1}': {"a": 'd("""S""")', "n": 1},
    'call:f{a:[<|"|>x = {<|"|>b<|"|>: 1}<|"|>]}': {"a": ['x = {"b": 1}']},
    'call:f{a:<|"|>say <|"|>hi<|"|><|"|>,n:1}': {"a": 'say "hi"', "n": 1},
    'call:f{a:<|"|>/tmp<|"|>,b:<|"|>ls ${x}}': {"a": "/tmp", "b": "ls ${x}"},
    'call:f{a:[{b:<|"|>x}]}': {"a": [{"b": "x"}]},
    """call:f{a:<|"|>*.py<|"|>,b:':\\s*\\w+'<|"|>}""": {"a": "*.py", "b": ":\\s*\\w+"},
}  # fmt: skip


@pytest.mark.parametrize("text", NEARLY)
def test_a_call_in_nearly_the_right_notation_is_read_as_a_person_would(text):
    parser, _ = parsed(ids(f"<|tool_call>{text}<tool_call|>"))
    assert parser.tool_calls == [{"name": "f", "arguments": NEARLY[text]}]
    assert parser.content == ""


def test_several_calls_may_stand_between_one_pair_of_tokens():
    for text in ("call:f{}call:g{a:1}", "call:f{},\ncall:g{a:1}",
                 '[{"name":"f"},{"name":"g","arguments":{"a":1}}]'):  # fmt: skip
        parser, deltas = parsed(ids(f"<|tool_call>{text}<tool_call|>"))
        assert parser.tool_calls == [
            {"name": "f", "arguments": {}},
            {"name": "g", "arguments": {"a": 1}},
        ]
        assert [delta.kind for delta in deltas] == ["tool_calls"] * 2


MALFORMED = [
    "", "f{}", "call:{}", "call:f", "call:f{", "call:f{}x", "call:f{a}", "call:f{a:}",
    "call:f{,}", "call:f{a:1 b:2}",
    "call:f{a:1,a:2}", "call:f{a:01}", "call:f{a:1e999}", "call:f{a:NaN}",
    "call:f{a:+491701234567}", "call:f{a:1.2.3}",
    'call:f{a:<|"|>x', 'call:f{a:<|"|>x<|"|>y}', 'call:f{a:<|"|>x,b:1}', 'call:f{a:[<|"|>x}',
    'call:f{a:<|"|>x}call:g{}', 'call:f{a:<|"|>x<|"|> <|"|>y<|"|>}',
    'call:f{a:<|"|>x<|"|> + <|"|>y<|"|>}', 'call:f{a:[<|"|>x<|"|><|"|>y<|"|>]}',
    'call:f{a:<|"|>p(<|"|>x<|"|>,b=<|"|>y<|"|>)<|"|>}',
    'call:f{a:<|"|><|"|><|"|>x<|"|><|"|><|"|>}', """call:f{a:'x'<|"|>y}""", "call:f(){a:1}",
    "call:f{a:٣}",
    'call:f{a:"x" b:"y"}', "call:f{a:1}}", 'call:f{a:"x', "call:f{a:'x,b:1}",
    'call:f{"a:1}',
    'call:f{a:"""x"""}', "call:f{a:(1,2)}", "call:f{a:f'x'}", "call:f{a:[1 2]}",
    "call:f{a:undefined}", 'call:f{a":1}', 'call:f{a:["x" "y"]}', 'call:f{a:"x<|"|>y"}',
    "call:f{a:b c:d}", '{"name":"f{"}',
    '{"name":"f","arguments":3}', '{"name":"f","a":1}', "[]", "{}", '{"name":"f","arguments":"x"}',
    "call:f{}call:g", "call:f{:1}", "call:f{a::1,a:2}", "call:f{a:1;b:2}{}",
    "call:f{a:__import__('os')}", f"call:f{{a:{'9' * 5000}}}", f"call:f{{a:{'[' * 5000}}}",
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:20])
def test_a_call_that_cannot_be_read_stays_in_the_content(text):
    parser, deltas = parsed(ids(f"a<|tool_call>{text}<tool_call|>b"))
    assert parser.content == f"a<|tool_call>{text}<tool_call|>b"
    assert parser.tool_calls == []
    assert {delta.kind for delta in deltas} == {"content"}


def test_a_call_that_is_cut_off_stays_in_the_content():
    parser, _ = parsed(ids("<|tool_call>call:f{a:1"))
    assert (parser.content, parser.tool_calls) == ("<|tool_call>call:f{a:1", [])
    for text in ("<|tool_call>call:f{", '<|tool_call>call:f{a:<|"|>{b}'):
        assert parsed(ids(text + "<turn|>"))[0].content == text


@pytest.mark.parametrize("end", ["", "<turn|>", "<|tool_response>", "<|tool_call>call:f{a:1}"])
def test_a_whole_call_without_its_last_token_is_a_call(end):
    parser, _ = parsed(ids("a<|tool_call>call:f{a:1}" + end))
    assert parser.content == "a"
    assert parser.tool_calls[0] == {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "text",
    ['"' + '" ' * 50000, '"' + "\\" * 100000 + '"', "[" * 100000, " " * 100000, "x " * 50000 + ":",
     '"' + ' "a:' * 50000, "1," * 50000, "x" * 100000, '"a" b' * 30000, "\ue000" * 100000,
     "".join(map(chr, range(0xE000, 0xF8FF))) * 15],
    ids=lambda text: ascii(text[:6]),
)  # fmt: skip
def test_reading_takes_time_by_length_alone(text):
    begin = time.process_time()
    for end in ("", "}"):
        read_calls([f"call:f{{a:{text}{end}"])
        read_calls(["call:f{a:", *([None, text[:9], " "] * 20000), text, end])
    assert time.process_time() - begin < 5


@given(st.lists(TEXT | st.none() | st.sampled_from([*NEARLY, *"{}[]()\"',:=\\"]), max_size=8))
def test_reading_any_text_gives_a_call_or_none(parts):
    assert read_calls(["call:f{", *parts]) is None or parts
    found = read_calls(parts)
    assert found is None or json.dumps(found)


def test_nesting_is_bounded_where_it_is_written_and_where_it_is_read():
    deep = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    text = write_call("f", deep)
    assert read_calls([text]) == [{"name": "f", "arguments": deep}]
    with pytest.raises(RequestError, match="nested more than"):
        write_call("f", {"a": deep})
    assert read_calls([text.replace("{}", "{a:{}}")]) is None


def test_nesting_of_parameters_is_bounded():
    def declared(levels):
        schema = {"type": "string"}
        for _ in range(levels):
            schema = {"type": "object", "properties": {"a": schema}}
        return written("<|tool>", "<tool|>", tools=[{"name": "f", "parameters": schema}])

    assert declared(MAX_DEPTH).count("properties:{") == MAX_DEPTH
    with pytest.raises(RequestError, match="parameters are nested more than 64"):
        declared(MAX_DEPTH + 1)


def test_declarations_keep_what_the_template_keeps():
    schema = {
        "type": "object",
        "properties": {
            "Unit": {"type": "string", "enum": ["c", "f"]},
            "n": {"type": ["integer", "null"], "minimum": 0},
            "list": {"type": "array", "items": {"type": "object", "properties": {
                "a": {"type": "number"}}, "required": ["a"]}},
            "o": {"type": "object", "properties": {"z": {"type": "boolean"}}, "required": ["z"]},
        },
    }  # fmt: skip
    tool = {"name": "f", "parameters": schema}
    text = written("<|tool>", "<tool|>", tools=[tool]).replace('<|"|>', "'")
    assert text == (
        "declaration:f{description:'',parameters:{properties:{"
        "list:{items:{properties:{a:{type:'NUMBER'}},required:['a'],type:'OBJECT'},type:'ARRAY'},"
        "n:{nullable:true,type:'INTEGER'},"
        "o:{properties:{z:{type:'BOOLEAN'}},required:['z'],type:'OBJECT'},"
        "Unit:{enum:['c','f'],type:'STRING'}},type:'OBJECT'}}"
    )


def test_a_thought_is_split_off():
    text = "<|channel>thought\n a\nb \n<channel|>c <|tool_call>call:f{}<tool_call|>"
    parser, deltas = parsed(ids(text + "<|tool_response>"))
    assert (parser.reasoning, parser.content) == ("a\nb", "c ")
    assert parser.tool_calls == [{"name": "f", "arguments": {}}]
    assert [delta.kind for delta in deltas] == ["reasoning", "content", "tool_calls"]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel>thought\n<channel|>a", "", "a"),
        ("<|channel>thought<channel|>a", "", "a"),
        ("<|channel>other\nx<channel|>a", "other\nx", "a"),
        ("<|channel>thou", "thou", ""),
        ("<|channel>thought\nx", "x", ""),
        ("<|channel>thought\nx<|tool_call>y<tool_call|>", "x", "<|tool_call>y<tool_call|>"),
        ("<|channel>thought\nx<channel|>a<|channel>thought\ny<channel|>b", "x\n\ny", "ab"),
        ('a<channel|>b<tool_call|>c<|"|>d<turn|>', "", "abcd"),
        ("<|channel>thought\na<|channel>b", "ab", ""),
    ],
)
def test_channels_that_are_odd(text, reasoning, content):
    parser, _ = parsed(ids(text))
    assert (parser.reasoning, parser.content) == (reasoning, content)


def test_a_prompt_that_ends_in_a_thought_is_gone_on_with():
    chat = ChatFormat(TOKENIZER)
    messages = [{"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
                {"role": "tool", "content": "y"}]  # fmt: skip
    parser = chat.parser(chat.encode(messages, thinking=True))
    parser.push(ids("hm<channel|>a"))
    assert (parser.reasoning, parser.content) == ("hm", "a")
    parser = chat.parser(chat.encode(messages))
    parser.push(ids("a"))
    assert (parser.reasoning, parser.content) == ("", "a")


def test_text_that_spells_a_control_token_is_text():
    text = "<|tool_call>call:f{}<tool_call|><|channel>"
    parser, deltas = parsed(TOKENIZER.encode(text, add_bos=False))
    assert parser.content == text
    assert deltas == [Delta("content", text)]


@given(IDS, st.lists(st.integers(0, 5)), st.booleans())
def test_every_split_of_any_output_gives_the_same_result(tokens, sizes, in_thought):
    whole, _ = parsed(tokens, in_thought=in_thought)
    parts, deltas = parsed(tokens, sizes=sizes, in_thought=in_thought)
    assert result(parts) == result(whole)
    for kind in ("content", "reasoning"):
        text = "".join(delta.text for delta in deltas if delta.kind == kind)
        assert text == {"content": whole.content, "reasoning": whole.reasoning}[kind]
    calls = [json.loads(delta.text) for delta in deltas if delta.kind == "tool_calls"]
    assert calls == whole.tool_calls


@given(IDS, st.lists(st.integers(0, 5)))
def test_stop_strings_end_the_content_wherever_the_stream_splits(tokens, sizes):
    whole, _ = parsed(tokens, ["a", "}é"])
    parts, _ = parsed(tokens, ["a", "}é"], sizes)
    assert result(parts)[:3] == result(whole)[:3]
    assert parts.stopped == whole.stopped
    assert not whole.stopped or parts.num_tokens == whole.num_tokens <= len(tokens)


def test_a_stop_string_in_a_thought_does_not_stop():
    text = "<|channel>thought\nstop<channel|>a stop b"
    parser, _ = parsed(ids(text), ["stop"])
    assert (parser.reasoning, parser.content, parser.stopped) == ("stop", "a ", True)


def test_content_ids_are_those_of_one_run_of_text():
    tokens = ids("abc é")
    assert parsed([*ids("<|channel>thought\nx<channel|>"), *tokens])[0].content_ids == tokens
    assert min(tokens) < FIRST_CHAT_WORD  # é is bytes
    assert parsed([*tokens, *ids("<|tool_call>call:f{}<tool_call|>")])[0].content_ids is None


CALLS = [
    ({}, "{}"),
    (
        {"a": 1, "b": [True, None, {"c": -2.5}], "d": {}},
        '{"a":1,"b":[true,null,{"c":-2.5}],"d":{}}',
    ),
    ({"a": 'x"y\n\\', "b": ["", "é"]}, '{"a":"x\\"y\\n\\\\","b":["","é"]}'),
    ({"a b": {"{": "}:,"}}, '{"a b":{"{":"}:,"}}'),
    ({"a:}": 1}, '{"a:}":1}'),
]


def completed(text):
    """Close what is open in the beginning of a JSON text, as clients do that show it."""
    ends, is_text, escaped = [], False, False
    for char in text:
        if is_text:
            is_text, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            is_text = True
        elif char in "{[":
            ends.append("}" if char == "{" else "]")
        elif char in "}]":
            ends.pop()
    text += '"' if is_text else ""
    text = text.rstrip(",") + ("null" if text.endswith(":") else "")
    return text + "".join(reversed(ends))


def whole_call(name, arguments):
    return f"<|tool_call>{write_call(name, arguments)}<tool_call|>"


@pytest.mark.parametrize(("arguments", "text"), CALLS, ids=range(len(CALLS)))
def test_arguments_are_streamed_as_beginnings_of_json(arguments, text):
    tokens = ids("".join(whole_call(name, arguments) for name in ("f.g", "h")))
    parser = OutputParser(TOKENIZER, streams_arguments=True)
    deltas = [delta for id in tokens for delta in parser.push([id])] + parser.flush()
    names = [i for i, delta in enumerate(deltas) if delta.kind == "call"]
    assert [deltas[i].text for i in names] == ["f.g", "h"]
    assert {delta.kind for delta in deltas} <= {"call", "arguments"}
    written = ""
    for delta in deltas[1 : names[1]]:
        written += delta.text
        json.loads(completed(written))
    assert written == text and json.loads(written) == arguments
    assert [call["arguments"] for call in parser.tool_calls] == [arguments] * 2
    whole = OutputParser(TOKENIZER, streams_arguments=True)
    assert [d.kind for d in whole.push(tokens)] == ["call", "arguments"] * 2


def test_a_streamed_call_that_is_cut_off_is_no_content():
    tokens = ids("a" + whole_call("f", {"city": "Bern"}))
    parser = OutputParser(TOKENIZER, streams_arguments=True)
    deltas = parser.push(tokens[:-3]) + parser.flush()
    assert "".join(d.text for d in deltas if d.kind == "arguments").startswith('{"city":"')
    assert parser.content == "a" and parser.tool_calls == []
