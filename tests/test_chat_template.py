"""The worker that renders a checkpoint's own template: its results, and what it is kept from."""

import json
import os
import threading
import time

import pytest
from vocabularies import chat_tokenizer

from gemlax import Message, RequestError
from gemlax.chat import ChatFormat, Template
from gemlax.chat.template import MAX_CHARS

BIG = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.fixture(scope="module")
def echo():
    return Template("{{ x }}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a\n{% if true %}\n  b\n    {% endif %}\nc", "a\n  b\nc"),  # trim_blocks, lstrip_blocks
        ("{{ x | tojson }}", '{"b": ["<é>", null, 1.5], "a": true}'),
        ("{{ x | tojson(indent=1, sort_keys=true) }}",
         json.dumps({"a": True, "b": ["<é>", None, 1.5]}, indent=1, ensure_ascii=False)),
        ("{{ missing }}{{ x.missing }}", ""),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}{{ 1 }}{% endgeneration %}", "1"),
        ("{% set ns = namespace(a=1, b=x.b) %}{% set ns.a = 2 %}{{ ns.a }}{{ ns.b[2] }}", "21.5"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{{ '\U0001f600' }}", "\U0001f600"),
    ],
)  # fmt: skip
def test_templates_render_as_in_transformers(source, expected):
    assert Template(source).render({"x": {"b": ["<é>", None, 1.5], "a": True}}) == expected


HOSTILE = {
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "globals": ("{{ raise_exception.__globals__['sys'] }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError"),
    "namespace": ("{% set ns = namespace(__class__=1) %}", "SecurityError"),
    "mutation": ("{{ x.append(1) }}", "SecurityError"),
    "import": ("{% include 'x.jinja' %}", "no loader"),
    "raises": ("{{ raise_exception('tools must be ' ~ x) }}", "TemplateError: tools must be [1]"),
    "syntax": ("a\n{% if %}", "got 'end of statement block' (line 2)"),
    "a block that stays open": ("a\n{% for x in y %}", "closed is 'for'. (line 2)"),
    "zero": ("a\n\n{{ 1 // 0 }}", "ZeroDivisionError: integer division or modulo by zero (line 3)"),
    "1 GB": ("{{ 'a' * 10 ** 9 }}", "memory"),
    "a long output": (
        f"{BIG}{{{{ 'a' * 9999 }}}}{{% endfor %}}{{% endfor %}}",
        "more than 4000000",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
    "loops": (f"{BIG}{{% endfor %}}{{% endfor %}}", "took longer than 1 s"),
    "a large power": ("{{ 10 ** (10 ** 10) }}", "took longer than 1 s"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_clear_error_and_the_next_render_works(name, monkeypatch):
    source, said = HOSTILE[name]
    template = Template(source, timeout_s=1.0)
    begin = time.perf_counter()
    with pytest.raises(RequestError) as error:
        template.render({"x": [1]})
    assert said in str(error.value)
    assert "the chat template failed: " in str(error.value)
    assert time.perf_counter() - begin < 30
    template.source = "{{ x }}"
    assert template.render({"x": 1}) == "1"


def test_a_worker_that_dies_is_replaced(echo):
    assert echo.render({"x": 1}) == "1"
    first = echo._worker.process
    os.kill(first.pid, 9)
    first.wait()
    assert echo.render({"x": 2}) == "2"
    assert echo.render({"x": 3}) == "3"
    assert echo._worker.process is not first


def test_a_worker_ends_with_its_template():
    template = Template("a")
    template.render({})
    process = template._worker.process
    del template
    assert process.wait(timeout=30) != 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_the_worker_is_told_nothing_of_the_environment_and_nothing_of_gemlax(monkeypatch):
    """It starts in 0.1 s because jax is not imported."""
    monkeypatch.setenv("GEMLAX_SECRET", "1")
    template = Template("a")
    template.render({})
    pid = template._worker.process.pid
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"GEMLAX_SECRET" not in file.read()
    with open(f"/proc/{pid}/maps") as file:
        assert "jaxlib" not in file.read()


def test_threads_take_turns(echo):
    found = {}

    def ask(i):
        found[i] = echo.render({"x": i})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: str(i) for i in range(8)}


def test_large_inputs_and_outputs_pass(echo):
    assert echo.render({"x": "é\U0001f600" * 10**6}) == "é\U0001f600" * 10**6
    with pytest.raises(RequestError, match="more than"):
        echo.render({"x": "a" * (MAX_CHARS + 1)})


def rendered(source, messages, **settings):
    tokenizer = chat_tokenizer("gemma4")
    ids = ChatFormat(tokenizer, source).encode(messages, **settings)
    return tokenizer.decode(ids, skip_special=False)


CONVERSATION = [
    {"role": "developer", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "model", "content": "b", "reasoning": "r",
     "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
    {"role": "tool", "content": {"t": "<é>"}},
]  # fmt: skip


def test_a_template_sees_what_transformers_gives_it():
    named = "bos_token, eos_token, add_generation_prompt, enable_thinking, tools[0].function.name"
    told = rendered(
        f"{{{{ [{named}] }}}}", [CONVERSATION[1]], tools=[{"name": "f"}], thinking=False
    )
    assert told == "<bos>['<bos>', '<eos>', True, False, 'f']"
    (answer,) = json.loads(rendered("{{ messages[2:3] | tojson }}", CONVERSATION)[5:])
    assert answer["role"] == "model"
    assert answer["reasoning"] == answer["reasoning_content"] == "r"
    assert answer["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    (last,) = json.loads(rendered("{{ messages[3:] | tojson }}", CONVERSATION)[5:])
    assert last == {"role": "tool", "name": "f", "content": {"t": "<é>"}}
    native = "{# tool_responses #}{{ messages[2].tool_responses | tojson }}"
    assert json.loads(rendered(native, CONVERSATION)[5:]) == [
        {"name": "f", "response": {"t": "<é>"}}
    ]


def test_a_template_gets_messages_of_the_model_with_their_tokens():
    tokenizer = chat_tokenizer("gemma4")
    a, b = (tokenizer.id_of(piece) for piece in "ab")
    user = {"role": "user", "content": "x"}
    source = "{% for m in messages %}{{ m.content | trim }};{% endfor %}"
    ids = ChatFormat(tokenizer, source).encode([user, Message("ab", tokens=[a, b]), user])
    assert tokenizer.decode(ids) == "x;ab;x;"
    assert [a, b] == ids[3:5]


def test_an_error_of_a_template_is_a_request_error():
    with pytest.raises(RequestError, match="TemplateError: no"):
        rendered("{{ raise_exception('no') }}", [CONVERSATION[1]])
