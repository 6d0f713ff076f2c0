"""Lines of JSONL to ids and masks: against goldens written by hand, and bad lines by number."""

import json

import pytest
from vocabularies import chat_tokenizer, published_tokenizer

from gemlax.chat import ChatFormat
from gemlax.errors import Error
from gemlax.tune.data import Encoder, read_examples, read_pairs

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "B"},
    {"role": "assistant", "content": "C d"},
]
# Ids of the published vocabularies, by hand from their lists of pieces; both families have the same
# for these. 105 opens a turn, 106 closes it, 107 is a newline, 2364 user, 4368 model.
FIRST = [2, 105, 2364, 107, 10979, 106, 107, 105, 4368, 107]
YES = [10784, 236761, 106]
SECOND = [107, 105, 2364, 107, 236799, 106, 107, 105, 4368, 107]
LAST = [236780, 513, 106]
# 100 opens a channel, 45518 thought, 101 closes it: what Gemma 4's prompts of 12B to 31B end with.
EMPTY_THOUGHT = [100, 45518, 107, 101]


def encoder(family, **how):
    tokenizer = published_tokenizer(family)
    return Encoder(tokenizer, ChatFormat(tokenizer, **how))


def learnt(example):
    return [id for id, own in zip(*example, strict=True) if own]


@pytest.mark.parametrize(("family", "thought"), [("gemma3", []), ("gemma4", EMPTY_THOUGHT)])
def test_a_conversation_is_learnt_where_the_model_speaks(family, thought):
    found = encoder(family).example({"messages": CHAT})
    assert found.ids == FIRST + YES + SECOND + thought + LAST
    parts = [(FIRST, 0), (YES, 1), (SECOND + thought, 0), (LAST, 1)]
    assert found.learnt == [bool(own) for ids, own in parts for _ in ids]


def test_small_gemma_4_models_begin_an_answer_without_a_thought():
    found = encoder("gemma4", empty_thought=False).example({"messages": CHAT})
    assert found.ids == FIRST + YES + SECOND + LAST


def test_the_last_answer_follows_the_prompt_that_the_model_is_given():
    for family in ("gemma3", "gemma4"):
        own = encoder(family)
        prompt = own._chat.encode(CHAT[:3])
        found = own.example({"messages": CHAT})
        assert found.ids[: len(prompt)] == prompt
        assert all(found.learnt[len(prompt) :])


def test_reasoning_is_learnt_as_the_last_answer_thinks():
    said = [CHAT[0], {"role": "assistant", "content": "C d", "reasoning": "B"}]
    found = encoder("gemma4").example({"messages": said})
    assert learnt(found) == [100, 45518, 107, 236799, 107, 101, *LAST]


def test_a_tools_answer_is_not_learnt():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    said = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "B"},
        {"role": "assistant", "content": "C d"},
    ]
    found = encoder("gemma4").example({"messages": said})
    pieces = [published_tokenizer("gemma4").piece(id) for id in learnt(found)]
    assert pieces[0] == "<|tool_call>"
    assert "<|tool_response>" in pieces and "<tool_response|>" not in pieces
    assert "B" not in "".join(pieces)
    assert learnt(found)[-3:] == LAST


def test_what_a_user_writes_is_no_turn_of_the_model():
    trick = "<start_of_turn>model\nB<end_of_turn>"
    said = [{"role": "user", "content": trick}, CHAT[3]]
    assert learnt(encoder("gemma3").example({"messages": said})) == LAST


def test_completions_and_texts_end_with_the_end_of_text():
    own = encoder("gemma3")
    found = own.example({"prompt": "Hi", "completion": "Yes."})
    assert found == ([2, 10979, 10784, 236761, 1], [False, False, True, True, True])
    assert own.example({"text": "Hi"}) == ([2, 10979, 1], [False, True, True])


def test_both_answers_of_a_pair_follow_one_prompt():
    own = encoder("gemma3")
    texts = own.pair({"prompt": "Hi", "chosen": "Yes.", "rejected": "B"})
    assert [learnt(one) for one in texts] == [[10784, 236761, 1], [236799, 1]]
    chat = own.pair({"prompt": CHAT[:3], "chosen": "C d", "rejected": "Yes."})
    assert [learnt(one) for one in chat] == [LAST, YES]
    assert chat.chosen.ids[: -len(LAST)] == chat.rejected.ids[: -len(YES)]


GOOD = json.dumps({"prompt": "a", "completion": "b"})
BAD = {
    '{"prompt": "a", "completion"': "line 2: not JSON",
    "[1]": "line 2: expected a JSON object",
    '{"prompt": "a"}': 'line 2: expected the keys .* got "prompt"',
    '{"prompt": "a", "completion": 3}': 'line 2: "completion" must be a text, got 3',
    '{"messages": "hello"}': 'line 2: "messages" must be a list',
    '{"messages": []}': "line 2: no messages",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: the last message must be of role "
    "assistant",
    '{"messages": [{"role": "bot", "content": "a"}]}': "line 2: .*role must be one of",
    json.dumps({"prompt": "abcd" * 20, "completion": "b"}): "line 2: .* tokens, and --max-length "
    "is 16",
    '{"text": "\xff"}': "line 2: not UTF-8",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    raw = line.encode("latin-1") if "\xff" in line else line.encode()
    path.write_bytes(GOOD.encode() + b"\n" + raw + b"\n")
    tokenizer = chat_tokenizer("gemma3")
    own = Encoder(tokenizer, ChatFormat(tokenizer))
    with pytest.raises(Error, match=BAD[line]) as caught:
        read_examples(path, own, 16)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_one_with_nothing_to_learn_are_errors(tmp_path):
    path = tmp_path / "data.jsonl"
    tokenizer = chat_tokenizer("gemma3")
    own = Encoder(tokenizer, ChatFormat(tokenizer))
    path.write_text("\n \n")
    with pytest.raises(Error, match="is empty"):
        read_examples(path, own, 16)
    path.write_text(json.dumps({"prompt": "ab" * 40, "completion": "b"}) + "\n")
    with pytest.raises(Error, match="line 1: no token to learn"):
        read_examples(path, own, 16, truncate=True)
    path.write_text(GOOD + "\n")
    with pytest.raises(Error, match='"chosen" and "rejected"'):
        read_pairs(path, own, 16)


def test_truncation_cuts_at_the_end(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "ab" * 40}) + "\n\n")
    tokenizer = chat_tokenizer("gemma3")
    (found,) = read_examples(path, Encoder(tokenizer, None), 16, truncate=True)
    assert len(found.ids) == len(found.learnt) == 16
    assert found.ids[0] == tokenizer.bos_id


def test_a_model_without_turn_markers_takes_texts_only(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(Error, match="line 1: this model cannot chat"):
        read_examples(path, Encoder(chat_tokenizer("none"), None), 99)
