"""Chats with a toy model: answers, streams, a cache that is kept, and the terminal."""

import copy
import io
import json
import signal

import pytest
from adapters import build
from disk import gguf_tensors, random_weights, write_gguf
from golden.conditioned import conditioned_weights
from vocabularies import FIRST_CHAT_WORD, chat_tokenizer

import gemlax
from gemlax import CheckpointError, Message, Model, RequestError, preset, tiny
from gemlax.checkpoints import open_checkpoint
from gemlax.cli.chat import HELP, Terminal
from gemlax.engine import Event, Usage
from gemlax.names import text_weights
from gemlax.tokenizer import find_chat_template

CONFIG = tiny(preset("gemma-3-1b"), num_hidden_layers=6)
USER = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def model():
    """A model that never ends by itself: markers and bytes have a logit of 0."""
    weights = conditioned_weights("test_session", text_weights(CONFIG.text))
    weights["embed_tokens.weight"][2 + 1 : FIRST_CHAT_WORD + 1] *= 1e-3
    decoder = build(CONFIG, weights, "index")
    return Model(CONFIG, decoder, chat_tokenizer("gemma3"))


@pytest.fixture(autouse=True)
def no_prefixes(model):
    """Let no test go on from what another one has prefilled."""
    model.prefix_cache.clear()


@pytest.fixture
def gemma4(model):
    """The same weights behind the vocabulary of a Gemma 4."""
    other = copy.copy(model)
    other.__dict__.pop("chat_format", None)
    other.tokenizer = chat_tokenizer("gemma4")
    return other


def scripted(model, text):
    """A model that says `text` whatever it is asked: only its next token has a logit."""
    ids = model.tokenizer.encode(text, add_bos=False, parse_special=True)
    other = copy.copy(model)
    other._engine = lambda slots, *requests, chat: ScriptedEngine(ids)
    return other


class ScriptedEngine:
    """An engine whose one request gets tokens that are known beforehand."""

    def __init__(self, ids):
        self._left, self._usage = list(ids), Usage()

    def submit(self, request):
        self._usage = Usage(len(request.prompt))
        return 0

    def step(self, steps):
        new, self._left = self._left[:steps], self._left[steps:]
        return [Event(0, new, self._usage, None, None if self._left else "length")]

    def cancel(self, request_id):
        return True


@pytest.mark.slow
def test_a_session_with_drafts_says_the_same_and_keeps_its_cache(model):
    found = []
    for drafts in (None, 3):
        session = model.session(max_new_tokens=12, speculate=drafts)
        told = []
        for text in ("hello hello hello hello", "hello hello hello hello"):
            before = model.programs.counters.prefill_tokens
            reply = session.send(text)
            assert list(reply)
            told.append((reply.message.tokens, model.programs.counters.prefill_tokens - before))
            assert (reply.completion.accepted_per_step is None) == (drafts is None)
        found.append(told)
    assert found[0] == found[1]


def test_an_answer_is_what_generate_gives_for_the_prompt(model):
    message = model.chat(USER, max_new_tokens=8)
    prompt = model.chat_format.encode(USER)
    (done,) = model.generate([prompt], max_new_tokens=8)
    assert message == Message(done.text, None, [], done.tokens, "length")
    assert message.content


def test_a_stream_gives_the_message_piece_by_piece(model):
    reply = model.chat(USER, max_new_tokens=8, stream=True)
    assert reply.message is None
    deltas = list(reply)
    assert len(deltas) > 2
    assert "".join(delta.text for delta in deltas) == reply.message.content
    assert reply.message == model.chat(USER, max_new_tokens=8)


def test_a_message_is_appended_as_it_is(model):
    answer = model.chat(USER, max_new_tokens=8)
    again = model.chat([*USER, answer, *USER], max_new_tokens=8)
    assert again == model.chat([*USER, answer.to_dict(), *USER], max_new_tokens=8)


OUTPUT = "<|channel>thought\nhm<channel|>so <|tool_call>call:f{a:1}<tool_call|><|tool_response>"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_tool_calls_are_taken_apart(gemma4, stream):
    tool = {"name": "f", "description": "d"}
    answer = scripted(gemma4, OUTPUT).chat(USER, tools=[tool], thinking=True, stream=stream)
    if stream:
        kinds = [delta.kind for delta in answer]
        assert kinds == sorted(kinds, key=["reasoning", "content", "tool_calls"].index)
        answer = answer.message
    assert (answer.content, answer.reasoning) == ("so ", "hm")
    assert answer.tool_calls == [{"name": "f", "arguments": {"a": 1}}]
    assert answer.finish_reason == "tool_calls"
    result = {"role": "tool", "name": "f", "content": "3"}
    prompt = gemma4.chat_format.encode([*USER, answer, result], [tool], True)
    assert "call:f{a:1}" in gemma4.tokenizer.decode(prompt)


def test_a_malformed_call_changes_no_finish_reason(gemma4):
    text = "<|tool_call>call:f{a}<tool_call|>"
    answer = scripted(gemma4, f"{text}<turn|>").chat(USER)
    assert (answer.content, answer.tool_calls, answer.finish_reason) == (text, [], "stop")
    answer = scripted(gemma4, text).chat(USER)
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_counts_in_the_content_alone(gemma4, stream):
    text = "<|channel>thought\nx stop<channel|>a stop b<turn|>"
    answer = scripted(gemma4, text).chat(USER, thinking=True, stop="stop", stream=stream)
    if stream:
        list(answer)
        answer = answer.message
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("x stop", "a ", "stop")
    assert gemma4.tokenizer.decode(answer.tokens).endswith("a stop")


def test_stop_ids_are_those_of_the_format_and_of_the_caller(model):
    free = model.chat(USER, max_new_tokens=8)
    stop = free.tokens[4]
    ended = model.chat(USER, max_new_tokens=8, stop_ids=[stop])
    assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert ended.finish_reason == "stop"
    with pytest.raises(RequestError, match="stop_ids must be integer token ids"):
        model.generate("a", stop_ids=["a"])
    request = model.chat(USER, stream=True)._answer.request
    assert model.tokenizer.id_of("<end_of_turn>") in request.stop_ids


def test_what_cannot_be_a_chat_is_refused(model):
    with pytest.raises(RequestError, match="gives no logprobs"):
        model.chat(USER, logprobs=1)
    with pytest.raises(TypeError, match="unknown settings"):
        model.chat(USER, temprature=1)
    with pytest.raises(RequestError, match="more than the context of 5"):
        model.chat(USER, context=5)
    mute = Model(CONFIG, model.decoder)
    with pytest.raises(RequestError, match="has no tokenizer"):
        mute.chat(USER)


def test_a_base_model_with_the_pieces_in_its_vocabulary_may_chat(model):
    assert model.chat_template is None
    assert model.chat_format.family == "gemma3"


def turn(session, text):
    """Say something; return the message and what was prefilled."""
    reply = session.send(text)
    list(reply)
    return reply.message, reply.num_prompt_tokens


def test_the_second_turn_prefills_only_what_is_new(model):
    counters = model.programs.counters
    session = model.session(system="be kind", max_new_tokens=12)
    first, size = turn(session, "hello there")
    assert session.num_tokens == size + 12
    before = counters.prefill_tokens
    second, second_size = turn(session, "and then")
    # The cache holds all but the last token of the first turn, and each prompt's last token is
    # decoded, not prefilled.
    assert counters.prefill_tokens - before == second_size - 1 - (session_cached := size + 12 - 1)
    assert second_size > session_cached + 5
    fresh = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    model.prefix_cache.clear()
    assert model.chat(fresh, max_new_tokens=12) == first
    before = counters.prefill_tokens
    fresh += [first, {"role": "user", "content": "and then"}]
    assert model.chat(fresh, max_new_tokens=12) == second
    opening = len(model.chat_format.turn_ids().opening)
    # A chat begins where the turn of the model began in the one before it.
    assert counters.prefill_tokens - before == second_size - 1 - (size - opening)
    assert session.messages == [*fresh, second]


def test_caches_grow_with_the_conversation(model):
    session = model.session(max_new_tokens=12)
    messages, sizes = [], set()
    for text in ("one", "two and a bit more of it", "three", "four", "five more words here"):
        answer, _ = turn(session, text)
        sizes.add(session._engine._capacity)
        messages += [{"role": "user", "content": text}]
        assert model.chat(messages, max_new_tokens=12) == answer
        messages += [answer]
    assert len(sizes) > 1


def test_an_edited_conversation_reuses_only_what_is_the_same(model):
    session = model.session(max_new_tokens=12)
    turn(session, "hello there")
    session.messages[0] = {"role": "user", "content": "hello again"}
    answer, _ = turn(session, "more")
    assert answer == model.chat(session.messages[:-1], max_new_tokens=12)


def test_a_turn_edited_where_the_ring_has_moved_on_is_gone_on_from(model):
    """No. 12: layers with a window force the whole prompt anew. The ring has 768 places."""
    words = "hello there again "
    words *= 430 // len(model.tokenizer.encode(words))
    said = [f"{i} {words}" for i in range(4)]
    session = model.session(max_new_tokens=4)
    sizes = [turn(session, text)[1] for text in said]
    assert sizes[1] + 768 < sizes[3]
    del session.messages[4:]
    counters = model.programs.counters
    before = counters.prefill_tokens
    answer, size = turn(session, "now something else")
    opening = len(model.chat_format.turn_ids().opening)
    # The last place before the edit that a snapshot was taken at: the end of the second turn.
    assert counters.prefill_tokens - before == size - 1 - (sizes[1] - opening)
    model.prefix_cache.clear()
    assert answer == model.chat(session.messages[:-1], max_new_tokens=4)


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(model):
    session = model.session(max_new_tokens=40)
    reply = session.send("hello there")
    next(reply)
    reply.stop()
    list(reply)
    assert 0 < len(reply.message.tokens) < 12
    before = model.programs.counters.prefill_tokens
    answer, size = turn(session, "more")
    assert model.programs.counters.prefill_tokens - before < size - 10
    assert answer == model.chat(session.messages[:-1], max_new_tokens=40)


def test_a_reply_that_is_left_alone_leaves_the_session_as_it_was(model):
    session = model.session(max_new_tokens=12)
    turn(session, "hello there")
    messages = list(session.messages)
    next(session.send("left alone"))
    assert session.messages == messages
    answer, _ = turn(session, "more")
    assert answer == model.chat(session.messages[:-1], max_new_tokens=12)


def test_a_reply_that_is_read_late_changes_nothing(model):
    session = model.session(max_new_tokens=12)
    early = session.send("hello there")
    next(early)
    answer, _ = turn(session, "more")
    messages = list(session.messages)
    list(early)
    assert early.message is not None
    assert session.messages == messages
    late = session.send("and then")
    session.reset()
    list(late)
    assert session.messages == []
    again, _ = turn(session, "more")
    assert again == answer


def test_an_answer_goes_on_from_what_was_begun(model):
    session = model.session(max_new_tokens=8)
    turn(session, "hello there")
    session.messages.append({"role": "user", "content": "more"})
    reply = session.send("well", role="assistant")
    list(reply)
    begun = [*session.messages[:-1], {"role": "assistant", "content": "well"}]
    assert reply.message == model.chat(begun, max_new_tokens=8)
    assert session.messages[-1].content == "well" + reply.message.content
    assert reply.num_prompt_tokens == len(model.chat_format.encode(begun))
    assert turn(session, "go on")[0].content


def test_variables_of_a_template_reach_it_from_a_chat_and_a_session(model):
    source = "{{ bos_token }}{{ messages[-1].content }}{{ word }}"
    other = Model(CONFIG, model.decoder, model.tokenizer, chat_template=source)
    expected = len(model.tokenizer.encode("hello there and"))
    words = {"template_args": {"word": " and"}, "max_new_tokens": 1}
    assert other.chat(USER, stream=True, **words).num_prompt_tokens == expected
    assert other.session(**words).send("hello there").num_prompt_tokens == expected


def test_a_full_context_is_said_and_reset_makes_room(model):
    session = model.session(max_new_tokens=12, context=30)
    answer, size = turn(session, "hello there")
    assert answer.finish_reason == "length"
    assert session.num_tokens <= 30
    messages = list(session.messages)
    with pytest.raises(RequestError, match="context"):
        session.send("hello there and more")
    assert session.messages == messages
    session.reset()
    assert turn(session, "hello there") == (answer, size)


def test_a_template_is_saved_and_loaded_and_used(model, tmp_path):
    own = "{{ bos_token }}{{ messages[0].content }}!"
    other = Model(CONFIG, model.decoder, model.tokenizer, chat_template=own)
    gemlax.save(other, tmp_path / "a")
    assert (tmp_path / "a" / "chat_template.jinja").read_text() == own
    loaded = gemlax.load(tmp_path / "a")
    assert loaded.chat_template == own
    assert loaded.chat_format.encode(USER) == loaded.tokenizer.encode("hello there!")
    gemlax.save(loaded, tmp_path / "b")
    assert gemlax.load(tmp_path / "b").chat_template == own


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("a", "a"),
        (
            [{"name": "rag", "template": "b"}, {"name": "default", "template": "a"}],
            {"rag": "b", "default": "a"},
        ),
        ([{"name": "tool_use", "template": "b"}], "b"),
        (None, None),
    ],
)
def test_a_template_may_be_in_the_tokenizer_config(tmp_path, found, expected):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    assert find_chat_template(tmp_path) == expected


def test_a_damaged_template_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(CheckpointError, match="chat_template must be a string"):
        find_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        find_chat_template(tmp_path)


def test_a_template_may_be_in_the_metadata_of_a_gguf_file(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, gguf_tensors(random_weights()), extra={"tokenizer.chat_template": "x"})
    with open_checkpoint(path) as source:
        assert source.chat_template == "x"
    write_gguf(path, gguf_tensors(random_weights()))
    with open_checkpoint(path) as source:
        assert source.chat_template is None


def chat_in_terminal(model, lines, **settings):
    out, notes = io.StringIO(), io.StringIO()

    def printer(file):
        return lambda text, end="\n": print(text, end=end, file=file)

    terminal = Terminal(model.session(**settings), printer(out), printer(notes))
    read = iter(lines)

    def next_line():
        try:
            line = next(read)
        except StopIteration:
            raise EOFError from None
        return line() if callable(line) else line

    terminal.run(next_line)
    return terminal, out.getvalue(), notes.getvalue()


def test_a_terminal_chat_streams_and_says_what_each_turn_cost(model):
    lines = ["hello there", "", "and then", "/help", "/reset", "hello there", "/exit", "x"]
    terminal, out, notes = chat_in_terminal(model, lines, max_new_tokens=12)
    first, second, third = terminal.turns
    assert out == "".join(f"{turn['content']}\n" for turn in terminal.turns)
    assert first["content"] == third["content"]
    assert first["prefill_tokens"] == first["prompt_tokens"] - 1
    assert third["prefill_tokens"] < first["prefill_tokens"]  # its beginning is still in the cache
    assert second["prefill_tokens"] == second["prompt_tokens"] - first["context_used"]
    assert notes.count("tok/s; prefilled ") == 3
    assert f"context {second['context_used']}/32768" in notes
    assert HELP in notes
    assert not terminal.failed


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("/a/b", "/a/b"),
        ("/no_think", "/no_think"),
        ("//exit", "/exit"),
        ("//", "/"),
        (" /reset it ", "/reset it"),
    ],
)
def test_a_line_that_is_no_command_is_sent(line, sent):
    texts = []

    class Unable:
        def send(self, text):
            texts.append(text)
            raise RequestError("unable")

    lines = iter([line, "/exit"])
    Terminal(Unable(), print, print).run(lambda: next(lines))
    assert texts == [sent]


def test_a_terminal_chat_says_that_the_context_is_full(model):
    lines = ["hello there", "hello there and more", "/reset", "hello there"]
    terminal, _, notes = chat_in_terminal(model, lines, max_new_tokens=40, context=30)
    assert notes.count("the context is full: /reset starts anew]") == 2
    assert "more than the context of 30" in notes
    assert "; /reset starts anew\n" in notes
    assert len(terminal.turns) == 2
    assert terminal.failed


def test_ctrl_c_stops_the_answer_only(model, monkeypatch):
    session_send = type(model.session()).send

    def send(self, text):
        reply = session_send(self, text)
        if text == "stop me":
            deltas = reply._deltas

            def interrupted():
                yield next(deltas)
                signal.raise_signal(signal.SIGINT)
                yield from deltas

            reply._deltas = interrupted()
        return reply

    monkeypatch.setattr(type(model.session()), "send", send)
    old = signal.getsignal(signal.SIGINT)
    terminal, _, notes = chat_in_terminal(model, ["stop me", "hello"], max_new_tokens=40)
    assert signal.getsignal(signal.SIGINT) is old
    assert terminal.turns[0]["tokens"] < 12
    assert "; stopped]" in notes
    assert terminal.turns[1]["tokens"] == 40


def test_reasoning_goes_where_notes_go(gemma4):
    terminal, out, notes = chat_in_terminal(scripted(gemma4, OUTPUT), ["hi"], thinking=True)
    assert out == "so \n"
    assert notes.startswith('hm\n{"name": "f", "arguments": {"a": 1}}\n[')
    assert terminal.turns[0]["tool_calls"]
