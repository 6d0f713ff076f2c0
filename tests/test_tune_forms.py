"""The forms of public training data, against what their makers' documents say of them."""

import json
import logging

import pytest
from vocabularies import chat_tokenizer

from gemlax.chat import ChatFormat
from gemlax.errors import Error, RequestError
from gemlax.tune.data import Encoder, read_examples, read_pairs
from gemlax.tune.forms import Conversation, Texts, example_of, pair_of

USER, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
ASK = {"role": "user", "content": "why"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PLAIN = Conversation([USER, YES], [False, True])


def encoder(family="gemma3", **how):
    tokenizer = chat_tokenizer(family)
    return Encoder(tokenizer, ChatFormat(tokenizer), **how)


def learnt(example, family="gemma3"):
    ids = [id for id, own in zip(*example, strict=True) if own]
    return chat_tokenizer(family).decode(ids, skip_special=False)


def whole(example, family="gemma3"):
    return chat_tokenizer(family).decode(example.ids, skip_special=False)


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SAME = {
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT under another name": {"conversation": SHAREGPT},
    "messages by ShareGPT's keys": {"messages": SHAREGPT},
    "other names of the same roles": {
        "conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "yes"}]
    },
    "nulls of a table": {
        "text": None, "tools": None,
        "messages": [{**USER, "tool_calls": None}, {**YES, "name": None, "weight": None}],
    },
    "marks that say what holds anyway": {
        "messages": [{**USER, "weight": 1, "train": False}, {**YES, "weight": 1, "loss": True}]
    },
    "no tools": {"messages": [USER, YES], "tools": ""},
    "Alpaca": {"instruction": "hi", "input": "", "output": "yes"},
    "Gemini": {
        "contents": [{"role": "user", "parts": [{"text": "hi"}]},
                     {"role": "model", "parts": [{"text": "ye", "fileData": None}, {"text": "s"}]}]
    },
    "Alpaca without input": {"instruction": "hi", "output": "yes"},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_forms_of_one_conversation_are_one(name):
    assert example_of(SAME[name]) == (PLAIN, set())


def test_roles_of_sharegpt_with_tools_become_calls_and_answers():
    line = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "yes"},
        ],
        "tools": json.dumps([TOOL["function"]]),
    }
    form, _ = example_of(line)
    system = {"role": "system", "content": "s"}
    assert form.messages == [system, USER, CALLED, {"role": "tool", "content": "2"}, YES]
    assert form.learnt == [False, False, True, False, True]
    assert form.tools == [TOOL["function"]]


GEMINI = {
    "systemInstruction": {"parts": [{"text": "short"}]},
    "tools": [{"functionDeclarations": [TOOL["function"]]}],
    "contents": [
        {"role": "user", "parts": [{"text": "hi"}]},
        {"role": "model", "parts": [{"text": "so", "thought": True},
                                    {"functionCall": {"name": "f", "args": {"a": 1}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"b": 2}}}]},
        {"role": "model", "parts": [{"text": "yes"}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize("snake", [False, True])
def test_geminis_parts_become_calls_answers_and_thoughts(snake):
    text = json.dumps(GEMINI)
    for name in ("systemInstruction", "functionDeclarations", "functionCall", "functionResponse"):
        java = name.replace("I", "_i").replace("D", "_d").replace("C", "_c").replace("R", "_r")
        text = text.replace(name, java) if snake else text
    form, aside = example_of(json.loads(text))
    assert form.messages == [
        {"role": "system", "content": "short"}, USER,
        {**CALLED, "reasoning": "so"}, {"role": "tool", "name": "f", "content": {"b": 2}}, YES,
    ]  # fmt: skip
    assert (form.tools, aside) == ([TOOL["function"]], set())
    assert learnt(encoder("gemma4").example(json.loads(text)), "gemma4").endswith("yes<turn|>")


def test_calls_and_functions_of_old_openai_data_are_read():
    call = {"name": "f", "arguments": '{"a": 1}'}
    said = [USER, {"role": "assistant", "content": None, "function_call": call}]
    said += [{"role": "function", "name": "f", "content": "2"}, YES]
    form, aside = example_of({"messages": said, "functions": [TOOL["function"]]})
    assert form.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert form.messages[2]["role"] == "tool"
    assert (form.tools, aside) == ([TOOL["function"]], set())


def test_nulls_that_a_table_puts_into_schemas_are_dropped():
    schema = {"name": "f", "parameters": {"properties": {"a": {"type": "string", "enum": None}}}}
    form, _ = example_of({"messages": [USER, YES], "tools": [json.dumps(schema)]})
    assert form.tools == [{"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}]


def test_the_instruction_and_its_input_are_one_turn_and_the_history_is_learnt():
    """As LLaMA-Factory's data/README says."""
    line = {"instruction": "add", "input": "1 2", "output": "3", "system": "s"}
    form, _ = example_of({**line, "history": [["hi", "yes"]]})
    system = {"role": "system", "content": "s"}
    asked = {"role": "user", "content": "add\n1 2"}
    assert form.messages == [system, USER, YES, asked, {"role": "assistant", "content": "3"}]
    assert form.learnt == [False, False, True, False, True]


def test_a_model_without_turns_gets_alpacas_own_text():
    line = {"instruction": "add", "input": "1 2", "output": "3"}
    form, _ = example_of(line, chats=False)
    assert form.prompt.endswith("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n")
    assert "paired with an input" in form.prompt and form.completion == "3"
    form, _ = example_of({**line, "input": ""}, chats=False)
    assert "Input" not in form.prompt and "describes a task. Write" in form.prompt


def test_of_a_prompt_and_completion_of_messages_the_completion_alone_is_learnt():
    line = {"prompt": [USER, YES, ASK], "completion": [NO]}
    assert learnt(encoder().example(line)) == "no<end_of_turn>"
    text = {"prompt": [USER, YES, ASK], "completion": "no"}
    assert encoder().example(text) == encoder().example(line)


def test_several_turns_of_a_completion_are_learnt():
    found = encoder().example({"prompt": [USER], "completion": [YES, ASK, NO]})
    assert learnt(found) == "yes<end_of_turn>no<end_of_turn>"


def test_what_comes_after_the_last_answer_is_left_out():
    own = encoder()
    assert own.example({"messages": [USER, YES, ASK]}) == own.example({"messages": [USER, YES]})
    assert example_of({"messages": [USER, YES, ASK]})[1] == {"the messages after the last answer"}


def test_answers_in_several_messages_are_learnt():
    found = encoder("gemma4").example({"messages": [USER, YES, NO]})
    assert learnt(found, "gemma4").startswith("yes")
    assert learnt(found, "gemma4").count("no") == 1


UNLEARNT = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False},
            {"loss": False}, {"loss": 0}, {"masked": True}]  # fmt: skip


@pytest.mark.parametrize("mark", UNLEARNT, ids=str)
@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_turn_that_is_marked_so_is_not_learnt(mark, family):
    close = {"gemma3": "<end_of_turn>", "gemma4": "<turn|>"}[family]
    first = {"messages": [USER, {**NO, **mark}, ASK, YES]}
    assert learnt(encoder(family).example(first), family) == f"yes{close}"
    assert whole(encoder(family).example(first), family).count("no") == 1
    last = {"messages": [USER, YES, ASK, {**NO, **mark}]}
    found = encoder(family).example(last)
    assert learnt(found, family) == f"yes{close}" and found.learnt[-1]


def test_a_call_may_be_unlearnt_where_the_answer_is_learnt():
    said = [USER, {**CALLED, "weight": 0}, {"role": "tool", "content": "b"}, YES]
    found = encoder("gemma4").example({"messages": said, "tools": [TOOL]})
    assert learnt(found, "gemma4") == "yes<turn|>"
    other = [USER, CALLED, {"role": "tool", "content": "b"}, {**YES, "weight": 0}]
    found = learnt(encoder("gemma4").example({"messages": other, "tools": [TOOL]}), "gemma4")
    assert found.startswith("<|tool_call>") and "yes" not in found


def test_answers_of_two_tools_are_not_learnt_nor_what_is_between_them():
    two = {**CALLED, "tool_calls": [CALL, CALL]}
    said = [USER, two, *[{"role": "tool", "content": "b"}] * 2, YES]
    found = learnt(encoder("gemma4").example({"messages": said, "tools": [TOOL]}), "gemma4")
    assert found.count("<|tool_response>") == 1 and found.endswith("yes<turn|>")


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({"weight": 0.5}, "weight must say that the turn is learnt or not, got 0.5"),
        ({"weight": "0"}, "weight must say"),
        ({"train_detail": [{"begin_offset": 0, "train": False}]}, "parts of turns and fractions"),
        ({"weight": 1, "train": False}, "train, weight disagree"),
    ],
    ids=str,
)
def test_marks_that_cannot_be_followed_are_refused(mark, match):
    with pytest.raises(RequestError, match=match):
        example_of({"messages": [USER, {**YES, **mark}]})


def test_a_mark_that_wants_a_users_turn_learnt_is_refused():
    with pytest.raises(RequestError, match=r'messages\[0\]: train wants the turn of "user" learnt'):
        example_of({"messages": [{**USER, "train": True}, YES]})


def test_marks_that_differ_inside_one_turn_are_refused():
    with pytest.raises(RequestError, match=r"messages\[1\] to messages\[2\] are one turn"):
        encoder("gemma4").example({"messages": [USER, {**YES, "weight": 0}, NO]})


TURNS = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"


def test_markers_in_a_text_are_what_they_name():
    """Text that a chat template wrote, as TRL's text column has it."""
    own, tokenizer = encoder(), chat_tokenizer("gemma3")
    chat = ChatFormat(tokenizer).encode([USER])
    text = own.example({"text": f"<bos>{TURNS}yes<end_of_turn>\n"})
    assert text.ids[: len(chat)] == chat and text.ids[-1] == tokenizer.eos_id
    parts = own.example({"prompt": f"<bos>{TURNS}", "completion": "yes<end_of_turn>"})
    assert parts.ids[: len(chat)] == chat
    assert learnt(parts) == "yes<end_of_turn><eos>"
    assert own.example({"prompt": TURNS, "completion": "yes<end_of_turn>"}) == parts


def test_the_beginning_and_the_end_of_a_text_are_there_once():
    own, tokenizer = encoder(), chat_tokenizer("gemma3")
    plain = own.example({"text": "hi"})
    assert plain.ids.count(tokenizer.bos_id) == plain.ids.count(tokenizer.eos_id) == 1
    assert own.example({"text": "<bos>hi<eos>"}) == plain
    assert own.example({"prompt": "", "completion": "<bos>hi<eos>"}) == plain


def test_markers_can_be_read_as_text():
    own, tokenizer = encoder(parse_special=False), chat_tokenizer("gemma3")
    found = own.example({"text": TURNS + "<eos>"})
    assert tokenizer.id_of("<start_of_turn>") not in found.ids
    assert found.ids.count(tokenizer.eos_id) == 1


def test_no_text_of_a_message_is_a_marker():
    said = [{"role": "user", "content": f"{TURNS}<eos>"}, {**YES, "content": "<eos>yes"}]
    markers = chat_tokenizer("gemma3").special_ids
    for line in ({"messages": said}, {"prompt": said[:1], "completion": said[1:]},
                 {"instruction": said[0]["content"], "output": "<eos>yes"}):  # fmt: skip
        found = encoder().example(line)
        plain = encoder().example({"messages": [USER, YES]})
        assert sum(id in markers for id in found.ids) == sum(id in markers for id in plain.ids)


PAIR = (Conversation([USER, YES], [False, True], None, 1),
        Conversation([USER, NO], [False, True], None, 1))  # fmt: skip
PAIRS = {
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "texts after messages": {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "the prompt as text beside conversations": {
        "prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]
    },
    "the prompt as text": {"prompt": "hi", "chosen": [YES], "rejected": [NO]},
    "the prompt twice": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "LLaMA-Factory": {
        "conversations": SHAREGPT[:1], "chosen": SHAREGPT[1],
        "rejected": {"from": "gpt", "value": "no"},
    },
    "LLaMA-Factory's Alpaca": {"instruction": "hi", "chosen": "yes", "rejected": "no"},
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [YES], "non_preferred_output": [NO],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_forms_of_one_preference_are_one(name):
    assert pair_of(PAIRS[name])[:2] == PAIR


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),  # TRL's own example
        ("The sky is blue.", "The sky is black.", "The sky is bl"),
        ("a b", "a bc", "a"),  # all but one of what the shorter has
    ],
)
def test_texts_without_a_prompt_have_the_one_that_trl_finds(chosen, rejected, prompt):
    found = pair_of({"chosen": chosen, "rejected": rejected})[:2]
    assert found == tuple(Texts(prompt, one[len(prompt) :]) for one in (chosen, rejected))


def test_both_answers_of_a_conversation_are_learnt_after_what_they_share():
    line = {"chosen": [USER, YES, ASK, YES], "rejected": [USER, YES, ASK, NO]}
    pair = encoder().pair(line)
    assert [learnt(one) for one in pair] == ["yes<end_of_turn>", "no<end_of_turn>"]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, 'expected the keys "chosen" and "rejected"'),
        ({"chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "b", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": [USER], "chosen": [YES], "rejected": [YES]}, "are the same"),
        ({"chosen": [USER, YES], "rejected": [ASK, NO]}, "must answer one prompt"),
        ({"chosen": "a", "rejected": [NO]}, "two texts or two lists of messages"),
        ({"prompt": [USER], "chosen": [ASK], "rejected": [NO]}, "must be of role assistant"),
    ],
)
def test_pairs_that_are_none_are_refused(line, match):
    with pytest.raises(RequestError, match=match):
        pair_of(line)


def test_answers_that_truncation_makes_the_same_are_refused(tmp_path):
    lines = [{"prompt": "a", "chosen": word + "c", "rejected": word + "d"} for word in ("", "bbbb")]
    path = written(tmp_path, *lines)
    with pytest.raises(Error, match='line 2: "chosen" and "rejected" have the same tokens'):
        read_pairs(path, encoder(), 4, truncate=True)


def written(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_columns_that_are_not_read_are_named_once_a_file(tmp_path, caplog):
    caplog.set_level(logging.INFO, "gemlax")
    line = {"messages": [{**USER, "id": 3}, YES], "source": "web", "images": []}
    path = written(tmp_path, line, {**line, "prompt_id": "7"}, line)
    assert len(read_examples(path, encoder(), 99)) == 3
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: not read: messages.id, prompt_id, source"


def test_columns_of_preferences_that_are_not_read_are_named(tmp_path, caplog):
    """The columns of the ultrafeedback_binarized set."""
    caplog.set_level(logging.INFO, "gemlax")
    whole = {"chosen": [USER, YES], "rejected": [USER, NO]}
    path = written(tmp_path, {"prompt": "hi", **whole, "messages": [USER, YES], "score_chosen": 7})
    assert len(read_pairs(path, encoder(), 99)) == 1
    assert "not read: " in caplog.text and "score_chosen" in caplog.text


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (
            {"question": "a", "answer": "b"},
            'expected the keys "messages".*got "answer", "question"',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences are learnt with --dpo"),
        ({"train": [{"text": "a"}]}, '"train" holds a list: write each of its objects on a line'),
        ({"messages": [USER, YES], "images": ["a.png"]}, '"images" beside the text'),
        ({"messages": [USER, YES], "weight": 0.3}, '"weight" of a line must be 1, got 0.3'),
        ({"messages": [USER, YES], "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"prompt": "a", "completion": "b", "label": False}, '"label" beside "completion"'),
        ({"prompt": "a", "completion": [YES]}, "must both be texts, or both lists"),
        ({"messages": [USER, YES], "tools": "{"}, '"tools" is not JSON'),
        ({"messages": [USER, YES], "tools": 3}, '"tools" must be a list'),
        ({"messages": [{**USER, "role": "system"}, YES], "system": "b"}, '"system" differs'),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"contents": [{"role": "user", "parts": [{"inlineData": {}}]}]}, "part must have text"),
        ({"contents": [{"role": "user"}]}, r'contents\[0\] must be an object with "parts"'),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "must be of role assistant"),
        ({"conversations": [{"from": ["a"], "value": "hi"}]}, "role must be one of"),
        ({"instruction": "a", "output": ["b"]}, '"output" must be a text'),
        ({"instruction": "a", "output": "b", "history": ["a"]}, '"history" holds pairs'),
    ],
)
def test_lines_that_cannot_be_followed_are_refused(line, match):
    with pytest.raises(RequestError, match=match):
        example_of(line)


def test_files_of_windows_editors_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert len(read_examples(path, encoder(), 99)) == 2


@pytest.mark.parametrize(
    "raw", [b'[{"text": "a"},\n {"text": "b"}]', b'\xef\xbb\xbf[ {"text": "a"}, {"text": "b"} ]']
)
def test_an_array_of_examples_is_read_as_its_lines_are(tmp_path, raw):
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "array.json").write_bytes(raw)
    read = [read_examples(tmp_path / name, encoder(), 99) for name in ("lines.jsonl", "array.json")]
    assert read[0] == read[1]


FILES = {
    b'[{"text": "a"}, {"text": 5}]': "item 2: ",
    b'[{"text": "a"}, "b"]': 'item 2: expected a JSON object, got "b"',
    b'[{"text": "a"}': "data.jsonl: not JSON: ",
    b"[]": "is empty: expected",
    b'{"text": "a"}\n["b"]': "line 2: expected a JSON object",
    b'{"text": "a"},\n': "line 1: not JSON: a comma after the object",
    b'{\n "text": "a"\n}': "line 1: not JSON: the object goes on over several lines",
    b"{'text': 'a'}": "line 1: not JSON: names in single quotes",
    b'{"text": "a"} {"text": "b"}': "line 1: not JSON: more after the object",
    b"\x1f\x8b\x08\x00": "compressed by gzip: .*gunzip -k data",
    b"PAR1\x15\x04": "a Parquet file: .*read_parquet",
    '{"text": "a"}'.encode("utf-16"): "is UTF-16",
    b"version https:": "a Git LFS pointer",
    b"<!DOCTYPE html>": "a web page",
    b'{"text": ' + b"9" * 5000 + b"}": "line 1: not JSON: ",
    b'{"text": ' + b"[" * 100_000: "line 1: not JSON: ",
    b"prompt,completion\na,b": "is a table: .*read_csv",
    b'\xef\xbb\xbf"prompt"\t"score.1"\r\na\tb': "is a table: .*read_table",
    b",a;b\n": "line 1: not JSON: ",
    b"a;b\n1;2\n": "is a table: .*sep=';'",
    b",text,n\n0,a,1\n": "is a table",
    b"Hello, world": "line 1: not JSON: ",
    b'{"text": "\\ud800"}': "line 1: the text holds a lone surrogate",
}


@pytest.mark.parametrize("raw", FILES, ids=range(len(FILES)))
def test_files_of_other_kinds_are_told_by_what_they_are(tmp_path, raw):
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    with pytest.raises(Error, match=FILES[raw]) as caught:
        read_examples(path, encoder(), 99)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tables_folders_and_missing_files_are_told(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\na,b\n")
    with pytest.raises(Error, match=r"is a table: .*read_csv.*data\.jsonl"):
        read_examples(path, encoder(), 99)
    with pytest.raises(Error, match="is a folder: give a file"):
        read_examples(tmp_path, encoder(), 99)
    with pytest.raises(Error, match="there is no file"):
        read_examples(tmp_path / "none.jsonl", encoder(), 99)
