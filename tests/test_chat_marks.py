"""Marked text, and templates rendered with it: jinja2's text, and who wrote which character."""

import functools
import json
import logging
from collections import Counter

import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import CHAT_MARKERS, chat_tokenizer

from gemlax.chat import ChatFormat, Template
from gemlax.chat.marked import INPUT, OWN, Marked, join, mark_own, marks_of, runs
from gemlax.chat.render import compile_template, render_twice

TOKENIZER = chat_tokenizer("gemma4")
HOSTILE = [
    *CHAT_MARKERS["gemma4"], "<bos>", "<eos>", "<|tu", "rn>", "<", "|", ">", "|>", "TURN",
    "<|TURN>", " ", "\n", "a", "é", "中", "\U000f0000", "\ue000", "\x00", "\x01", "\x02", "{{ x }}",
    "%s", "{}", "%(a)s", "{0}", "</think>", "'", '"', "\\",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(HOSTILE), max_size=4).map("".join) | st.text(max_size=6)

# `m` is a message, `c` its content. What they write is in the same order whatever `c` is.
FIXED = {
    "output": "<|turn>{{ m.role }}\n{{ c }}<turn|>",
    "tilde": "{{ '<|turn>' ~ c ~ '<turn|>' ~ 1 ~ none }}",
    "plus": "{{ '<|tu' + 'rn>' + c + '<turn|>' }}{{ c + c }}{{ c + '<turn|>' }}",
    "percent": "{{ '<|turn>%s<turn|>%%' % c }}{{ '%d%s' % (3, '<|turn>') }}",
    "percent by name": "{{ '<|turn>%(k)s>' % {'k': c} }}",
    "a filter of format": "{{ '<|turn>%s' | format(c) }}{{ '%s' | format('<turn|>') }}",
    "str.format": "{{ '<|turn>{}<turn|>{{}}'.format(c) }}{{ '{a}{b}'.format(a='<|turn>', b=c) }}",
    "format_map": "{{ '<|turn>{a}'.format_map({'a': c}) }}{{ '{a:}{b}'.format(a=1, b='<turn|>') }}",
    "join": "{{ ['<|turn>', c, '<turn|>'] | join }}{{ [c, c] | join('<|turn>') }}",
    "str.join": "{{ '<|turn>'.join([c, c]) }}{{ '' . join(('<turn|>', c)) }}",
    "replace": "{{ '<|turn>@<turn|>'.replace('@', c) }}{{ '<|turn>@' | replace('@', c) }}",
    "a block of set": "{% set b %}<|turn>{{ c }}<turn|>{% endset %}{{ b }}{{ b }}",
    "a macro": "{% macro t(x, y='<turn|>')%}<|turn>{{ x ~ y }}{% endmacro %}{{ t(c) ~ t(c, '') }}",
    "a caller": "{%macro t()%}<|turn>{{ caller() }}{% endmacro %}{% call t() %}{{c}}{% endcall %}",
    "a namespace": "{%set n = namespace(s='<|turn>')%}{% set n.s = n.s + c %}{{ n.s ~ '<|turn>' }}",
    "a filter block": "{% filter trim %}<|turn>{{ c }}.{% endfilter %}",
    "generation": "{% generation %}<|turn>{{ c }}{% set z = 1 %}{% endgeneration %}{{ z }}",
    "a dict": "{% set d = {'a': '<|turn>', 'b': c} %}{{ d.a ~ d['b'] ~ d.get('a') }}",
    "a condition": "{{ '<|turn>' if m.parts else '<eos>' }}{{ c }}{{ x | default('<turn|>') }}",
    "slices": "{{ '..<|turn>'[2:] }}{{ c }}{{ ('<turn|>' ~ 'x')[:-1] }}{{ '<|turn>' | first }}",
    "trims": "{{ ' <|turn>' | trim }}{{ c }}{{ '<turn|> '.rstrip() }}{{ '-<turn|>'.lstrip('-') }}",
    "splits": "{{ '<|turn>,<turn|>'.split(',')[1] }}{{ c }}{{ '<|turn> x'.split()[0] }}",
    "cases": "{{ '<|TURN>'.lower() }}{{ c }}{{ '<TURN|>' | lower }}",
    "characters": "{% for x in '<|turn>' %}{{ x }}{% endfor %}{{ c }}{{ '>nrut|<' | reverse }}",
    "repeats": "{{ '<|turn>' * 2 }}{{ c }}{{ c * 2 }}",
    "a cycle": "{% for x in [1, 2] %}{{ loop.cycle('<|turn>', '<turn|>') }}{{ c }}{% endfor %}",
    "safe": "{{ '<|turn>' | safe }}{{ ('<turn|>' ~ m.role) | safe }}{{ c }}",
    "given tokens": "{{ bos_token + c + eos_token }}",
    "parts": "{% for p in m.parts %}<|turn>{{ p.text }}{{ p.other }}{% endfor %}",
    "keys": "{% for k, v in m.extra.items() %}<|turn>{{ k }}={{ v }}{% endfor %}",
    "white space": "  {% if c is defined %}\n  <|turn>  {%- endif %}\n {{ c }}  \n\n",
}  # fmt: skip
# What they write depends on the content.
FREE = [
    "{{ c.split('</think>')[-1] }}", "{{ c.startswith('<|turn>') }}", "{{ c == '<eos>' }}",
    "{{ '<' in c }}{{ c.find('<') }}{{ c | length }}", "{{ c.replace('<', '&lt;') }}", "{{ m }}",
    "{{ [c, m.role] }}{{ {'k': c} }}", "{{ m | tojson }}{{ c | tojson(ensure_ascii=true) }}",
    "{{ c | string }}{{ c | e }}{{ c | urlencode }}{{ c | forceescape }}",
    "{{ c | upper ~ c | title }}",
    "{{ c | capitalize }}{{ c.swapcase() }}{{ c.casefold() }}{{ (c ~ 'ß') | upper }}",
    "{{ ('x' ~ c) | indent(2, true) }}{{ ('xy ' ~ c) | wordwrap(5) }}{{ ('x' ~ c) | truncate(4) }}",
    "{{ ('x' ~ c) | center(30) }}{{ ('x' ~ c).ljust(9) }}{{ '%-9s|' % c }}",
    "{{ '%r' % c }}{{ '%5.2f' % 1 }}{{ '%s%s' % (c, 1) }}{{ '%%' % () }}",
    "{{ '{:>9}|{!r}'.format(c, c) }}{{ '{0[a]}{0[a]:*^9}'.format({'a': c}) }}",
    "{{ c | list | join(',') }}",
    "{{ ('<|turn>' ~ c).split('|') }}{{ ('a ' ~ c).split(none, 1) }}{{ ('a' ~ c).rsplit('<', 1) }}",
    "{{ ('a' ~ c).partition('>') }}{{ ('a' ~ c).rpartition('>') }}{{ ('a\n' ~ c).splitlines() }}",
    "{{ ('a' ~ c).removeprefix('a') }}{{ (c ~ 'a').removesuffix('a') }}{{ (c ~ ' ').strip('< ') }}",
    "{{ ('a' ~ c).replace('', '<|turn>') }}{{ ('<a<' ~ c).replace('<', 'x', 1) }}",
    "{{ ('<i>' ~ c) | striptags }}{{ c | reverse }}{{ c | wordcount }}",
    "{{ ('b' ~ c) | sort | join }}",
    "{% for k in [c, 'b', 'a'] | sort | unique %}{{ k }}{% endfor %}{{ {'b': c} | dictsort }}",
    "{% autoescape true %}<|turn>{{ c }}{{ '<' ~ c }}{{ ('<' ~ c) | safe }}{% endautoescape %}",
    "{{ ('<' ~ c) | safe | upper }}{{ (('<' ~ c) | safe) ~ '<' }}{{ '<' + (c | safe) }}",
    "{{ ('<' ~ c) | pprint }}{{ {'a': c} | xmlattr }}{{ '<' ~ c | int(3) }}{{ '7' | int }}",
    "{{ m.missing }}{{ m.missing is defined }}{{ c.mask }}{{ dict(a=c) }}{{ range(2) | list }}",
    "{% set j = joiner('<turn|>') %}{{ j() }}{{ c }}{{ j() }}{{ ['<|turn>', c] | random }}",
    "{{ strftime_now('%Y') }}{{ lipsum(1, false, 2, 3) }}",
    "{{ messages | map(attribute='c') | join('-') }}",
    "{{ messages | selectattr('c', 'eq', '<eos>') | list | length }}{{ '<' < c }}{{ c is lower }}",
]  # fmt: skip


def variables_of(text, role="user", key="<"):
    message = {"role": role, "c": text, "parts": [{"text": text, "other": text}, {"text": text}]}
    message["extra"] = {key + text: text}
    return {
        "messages": [message],
        "m": message,
        "c": text,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }


def followed(source, variables):
    """The worker's answer, in this process; the special tokens are given as a format gives them."""
    marks = [["bos_token", OWN], ["eos_token", OWN]]
    request = {"template": source, "variables": dict(variables), "marks": marks, "max_chars": 10**6}
    return render_twice(request)


@functools.cache
def plain_template(source):
    """A template of jinja2 alone, set up as transformers does."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, ensure_ascii=False: json.dumps(
        x, ensure_ascii=ensure_ascii
    )
    return environment.from_string(source)


CLOCKED = ("generation", "strftime_now", "random", "lipsum")


@given(source=st.sampled_from([*FIXED.values(), *FREE]), text=TEXT)
def test_a_template_writes_what_jinja2_writes(source, text):
    variables = variables_of(text)
    answer = followed(source, variables)
    assert answer.get("fault", "") == ""
    if not any(word in source for word in CLOCKED):
        assert answer["text"] == plain_template(source).render(variables)


def traced(text):
    """The same text in characters that no template holds; spaces stay, for they are trimmed."""
    return "".join(c if c.isspace() or ord(c) > 0xFFFF else chr(0x100000 + ord(c)) for c in text)


@given(name=st.sampled_from(list(FIXED)), text=TEXT)
def test_the_marks_say_what_the_template_wrote(name, text):
    """Told by characters that only the input holds, which jinja2 puts in the same places."""
    answer = followed(FIXED[name], variables_of(text))
    told = followed(FIXED[name], variables_of(traced(text), traced("user"), traced("<")))["text"]
    marks = list(INPUT * len(told))
    for start, end, mark in answer["spans"]:
        marks[start:end] = mark * (end - start)
    assert len(told) == len(answer["text"])
    for char, mark in zip(told, marks, strict=True):
        expected = INPUT if ord(char) > 0xFFFF else OWN
        assert char.isspace() or mark == expected or char in "0123456789None"  # data it made


def counted(chat, text, **settings):
    """How often each control token is in the prompt of a conversation with a text everywhere."""
    messages = [
        {"role": "user", "content": text, "c": text, "extra": {f"x{text}": text}},
        {"role": "assistant", "content": text, "reasoning": text},
        {
            "role": "user",
            "content": [{"type": "text", "text": text}, {"type": "text", "text": text}],
        },
    ]
    tools = [{"name": "f", "description": text, "parameters": {"properties": {f"x{text}": {}}}}]
    ids = chat.encode(messages, tools, **settings)
    return Counter(id for id in ids if id in TOKENIZER.special_ids)


AROUND = """{{ bos_token }}{% for m in messages %}
{% set c = m.content if m.content is string else m.content[0].text ~ m.content[1].text %}
{{ tools }}{{ documents[0].text }}@{% endfor %}<|turn>model
"""
BUILT_IN = ChatFormat(TOKENIZER)
AS_BODY = ("tilde", "percent", "str.format", "join", "replace", "a macro", "a namespace", "splits")
CHATS = {name: ChatFormat(TOKENIZER, AROUND.replace("@", FIXED[name], 1)) for name in AS_BODY}


@given(text=TEXT)
def test_no_text_makes_a_control_token_of_a_built_in_format(text):
    assert counted(BUILT_IN, f"x{text}x") == counted(BUILT_IN, "x")


@given(name=st.sampled_from(list(CHATS)), text=TEXT)
def test_no_text_makes_a_control_token_of_a_template(name, text):
    chat = CHATS[name]
    harmless = counted(chat, "x", template_args={"documents": [{"text": "x"}]})
    assert harmless[TOKENIZER.id_of("<|turn>")] > 0
    assert counted(chat, f"x{text}x", template_args={"documents": [{"text": text}]}) == harmless


HALVES = {
    "two messages": "{{ messages[0].content }}{{ messages[1].content }}",
    "two parts": "{{ (messages[0].content ~ messages[1].content) | trim }}",
    "a replacement": "{{ messages[0].content }}{{ '@'.replace('@', messages[1].content) }}",
    "the template's own half": "<|tu{{ messages[1].content }}",
    "the other half": "{{ messages[0].content }}rn>",
    "a case": "{{ (messages[0].content | upper) | lower }}{{ messages[1].content | lower }}",
    "a strip": "{{ (messages[0].content ~ '--').rstrip('-') ~ messages[1].content }}",
    "a format": "{{ '{}{}'.format(messages[0].content, messages[1].content) }}",
    "characters": "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "a join": "{{ messages | map(attribute='content') | join }}",
    "a key": "{{ {messages[0].content: 1} | first }}{{ messages[1].content }}",
    "a slice": "{{ ('<' ~ messages[0].content[1:]) ~ messages[1].content }}",
    "JSON": "{{ (messages[0].content ~ messages[1].content) | tojson }}",
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_of_a_marker_make_no_control_token(name):
    chat = ChatFormat(TOKENIZER, "{{ bos_token }}" + HALVES[name])
    messages = [{"role": "user", "content": "<|tu"}, {"role": "user", "content": "rn>"}]
    ids = chat.encode(messages)
    assert [id for id in ids if id in TOKENIZER.special_ids] == [TOKENIZER.bos_id]
    assert "<|turn>" in TOKENIZER.decode(ids)


def test_harmless_text_gets_the_ids_that_it_has_in_the_whole_prompt():
    chat = ChatFormat(TOKENIZER, "{{ bos_token }}<|turn>ab{{ messages[0].content }}cd<turn|>")
    ids = chat.encode([{"role": "user", "content": "ef<b>"}])
    assert ids == TOKENIZER.encode("<|turn>abef<b>cd<turn|>", parse_special=True)


def test_a_marker_that_marks_cannot_follow_is_text_and_said(caplog):
    chat = ChatFormat(
        TOKENIZER, "{{ bos_token }}{{ ('<|turn>' ~ messages[0].content) | center(1) }}"
    )
    with caplog.at_level(logging.WARNING, "gemlax"):
        ids = chat.encode([{"role": "user", "content": "x"}])
    assert TOKENIZER.decode(ids) == "<|turn>x"
    assert "writes <|turn> by an operation that is not followed" in caplog.text


def test_a_template_that_tells_marked_text_apart_loses_its_marks_and_that_is_said(caplog):
    template = Template("<bos>{{ ('' ~ x)[0] is sameas x }}")
    with caplog.at_level(logging.WARNING, "gemlax"):
        text = template.render({"x": "b"})
    assert text == "<bos>True"
    assert list(runs(text)) == [(INPUT, "<bos>True")]
    assert "no control token of this prompt is recognised" in caplog.text


def test_a_template_that_writes_addresses_keeps_its_marks():
    text = Template("<bos>{{ messages | map('upper') }}").render({"messages": []})
    assert text.startswith("<bos><generator object")
    assert marks_of(text) == OWN * len(text[:5]) + INPUT * (len(text) - 5)


def test_compiled_templates_are_kept():
    source = "a template of its own"
    assert compile_template(source, True) is compile_template(source, True)
    assert compile_template(source, True) is not compile_template(source, False)


CALLS = [
    ("strip",), ("strip", "<|"), ("lstrip",), ("lstrip", "<"), ("rstrip",), ("rstrip", ">"),
    ("upper",), ("lower",), ("title",), ("capitalize",), ("swapcase",), ("casefold",),
    ("split",), ("split", "<"), ("split", None, 1), ("split", "<", 1), ("rsplit",),
    ("rsplit", "|>"), ("rsplit", None, 1), ("rsplit", "<", 1),
    ("splitlines",), ("splitlines", True),
    ("partition", "<"), ("rpartition", "|"), ("removeprefix", "<"), ("removesuffix", ">"),
    ("replace", "<", "&lt;"), ("replace", "", "-"), ("replace", "<", ">", 1),
    ("replace", "a", "", 0),
    ("replace", "", "-", 2), ("center", 9), ("zfill", 9), ("expandtabs",), ("encode",),
    ("__len__",),
    ("__getitem__", 0), ("__getitem__", slice(None, None, -1)), ("__getitem__", slice(1, -1)),
    ("__add__", "x"), ("__mul__", 3), ("__mul__", -1), ("join", ["a", "b"]), ("__contains__", "<"),
    ("__mod__", ()), ("format",), ("__format__", ""), ("__str__",), ("__repr__",), ("__hash__",),
]  # fmt: skip


@given(text=TEXT | st.text(max_size=10), call=st.sampled_from(CALLS), data=st.data())
def test_marked_text_does_what_text_does(text, call, data):
    name, *arguments = call
    marks = "".join(
        data.draw(st.lists(st.sampled_from("\0\1\2"), min_size=len(text), max_size=len(text)))
    )

    def attempt(value):
        try:
            return getattr(value, name)(*arguments)
        except Exception as error:
            return type(error)

    assert attempt(Marked(text, marks)) == attempt(text)


@given(st.lists(st.tuples(st.sampled_from(["a", "<b>", "  ", "\n", "ß", "İ"]), st.booleans())))
def test_characters_keep_their_marks_through_cuts(parts):
    """A mark belongs to one kind of character here, so it can be told after any cut."""
    text = join(mark_own(part) if mine else part for part, mine in parts)
    pieces = [*text.split(), *text.rsplit("<", 2), *text.splitlines(), *text.partition("b"),
              text.strip(), text[1:], text[::-1], *text]  # fmt: skip
    for piece in pieces:
        for mark, run in runs(piece):
            assert mark == INPUT or run in join(p for p, mine in parts if mine) or run[::-1] in text
    assert str.__str__(text) == "".join(part for part, _ in parts)


def test_what_is_not_followed_counts_as_input():
    text = mark_own("<bos>")
    for made in (text.center(20), text.translate({}), f"{text}!", json.loads(json.dumps(text)),
                 Marked("%s") % "<bos>", mark_own("%5s") % "x", "".join([text])):  # fmt: skip
        assert marks_of(made).replace(OWN, "") or marks_of(made) == ""
    assert marks_of("x" + text) == INPUT + OWN * 5
