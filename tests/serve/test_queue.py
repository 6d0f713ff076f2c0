"""Places, order, pace and outboxes: what the server decides without a model."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemlax.errors import Error, RequestError
from gemlax.serve.admission import Admission, Waiting
from gemlax.serve.command import find_adapters, make_gate, served_name
from gemlax.serve.options import ServeOptions
from gemlax.serve.outbox import Outbox, joined
from gemlax.serve.pace import Pace
from gemlax.serve.seating import seated
from gemlax.serve.security import hostname_of, read_keys
from gemlax.serve.work import Delta, ServeError, Update


def admission(**options):
    made = Admission(ServeOptions(slots=2, max_queue=4, **options))
    made.state = "ready"
    return made


class Waiter:
    def __init__(self, key="", priority=0, arrival=0.0):
        self.key, self.priority, self.arrival = key, priority, arrival


def test_as_many_places_are_given_as_there_are_and_no_more():
    door, places, refused = admission(), [], []

    def flood():
        for _ in range(250):
            try:
                places.append(door.enter("", 1))
            except ServeError as error:
                refused.append(error)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 6 and len(refused) == 994
    assert {error.status for error in refused} == {429}
    assert all(error.retry_after >= 1 for error in refused)
    for place in places:
        place.leave()
        place.leave()
    assert door.num_places == 0


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
def test_nobody_comes_in_unless_the_server_is_ready(state):
    door = admission()
    door.state = state
    with pytest.raises(ServeError) as caught:
        door.enter("", 1)
    assert (caught.value.status, caught.value.code) == (503, state)


def test_a_key_gets_half_of_the_places_while_others_have_some():
    door = admission()
    for _ in range(5):
        door.enter("greedy", 1)
    door.enter("other", 1)
    with pytest.raises(ServeError, match="busy"):
        door.enter("other", 1)
    door = admission()
    door.enter("other", 1)
    for _ in range(3):
        door.enter("greedy", 1)
    with pytest.raises(ServeError) as caught:
        door.enter("greedy", 1)
    assert caught.value.code == "key_limit"
    door.enter("other", 2)


def test_waiting_tokens_are_bounded_but_one_prompt_may_always_wait():
    door = admission(max_queue_tokens=100)
    first, second = door.enter("", 1), door.enter("", 1)
    first.wait_with(1000)
    with pytest.raises(ServeError, match="tokens wait"):
        second.wait_with(1)
    first.started(1000)
    second.wait_with(60)
    third = door.enter("", 1)
    with pytest.raises(ServeError):
        third.wait_with(60)
    second.leave()
    third.wait_with(60)


def test_the_next_one_is_chosen_by_priority_then_by_arrival_and_waiting_helps():
    waiting = Waiting()
    for waiter in (Waiter("a", 0, 5), Waiter("b", -1, 6), Waiter("c", 0, 4), Waiter("d", 3, 0)):
        waiting.add(waiter)
    order = [waiting.take(7.0, {}, 4).key for _ in range(4)]
    assert order == ["b", "c", "a", "d"]
    old, new = Waiter("old", 3, 0), Waiter("new", 0, 49)
    waiting.add(old)
    waiting.add(new)
    assert waiting.take(50.0, {}, 4) is old


def test_a_key_with_half_of_the_slots_lets_others_go_first():
    waiting = Waiting()
    first, second = Waiter("greedy", -5, 0), Waiter("other", 0, 1)
    waiting.add(first)
    waiting.add(second)
    assert waiting.take(2.0, {"greedy": 2}, 4) is second
    assert waiting.take(2.0, {"greedy": 2}, 4) is first


def test_chunks_are_as_large_as_the_time_between_tokens_allows():
    pace = Pace(target=0.1)
    assert pace.chunk(4) == 32  # nothing is known
    for _ in range(50):
        pace.note_step(1, 0.02)
        pace.note_step(8, 0.07)
        pace.note_prefill(64, 64 * 0.0004)
    assert pace.chunk(1) == 128  # 0.02 + 128 * 0.0004 = 0.0712
    assert pace.chunk(8) == 64  # 0.07 + 64 * 0.0004 = 0.0956
    pace.note_prefill(1, 10.0)  # almost all padding
    assert pace.chunk(1) == 128
    pace.target = 0.001
    assert pace.chunk(1) == 32


UPDATES = st.lists(
    st.builds(
        lambda index, deltas, tokens: Update(index, [Delta(*one) for one in deltas], tokens),
        st.integers(0, 2),
        st.lists(
            st.tuples(st.sampled_from(["content", "reasoning", "call", "arguments"]), st.text()),
            max_size=3,
        ),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    max_size=120,
)


def said(updates, index):
    """What the updates of an answer say: calls apart, runs of one kind together."""
    runs = []
    for update in updates:
        for kind, text in update.deltas if update.index == index else ():
            if runs and runs[-1][0] == kind != "call":
                runs[-1][1] += text
            else:
                runs.append([kind, text])
    return runs


@given(UPDATES, st.integers(1, 60))
def test_an_outbox_loses_nothing_however_slowly_it_is_read(updates, each):
    outbox, read = Outbox(), []
    for count, update in enumerate(updates):
        outbox.put(update)
        if count % each == 0:
            read += outbox.take()
    read += outbox.take()
    for index in range(3):
        assert said(read, index) == said(updates, index)
        tokens = [token for one in read if one.index == index for token in one.tokens]
        assert tokens == [t for one in updates if one.index == index for t in one.tokens]


def test_an_outbox_that_nobody_reads_holds_few_updates():
    outbox = Outbox()
    for count in range(5000):
        outbox.put(Update(count % 4, [Delta("content", "x")], [1]))
    assert len(outbox._updates) <= 4 + 40
    assert sum(len(update.deltas[0].text) for update in joined(outbox.take())) == 5000


def test_system_messages_come_first_and_later_ones_are_the_users():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": []},
    ]
    apart = seated(messages, "gemma4")
    assert [m["role"] for m in apart] == ["system", "user", "user", "user", "assistant", "user"]
    assert apart[4]["content"] == [{"type": "text", "text": "no"}]
    assert apart[5]["content"] == ""
    together = seated(messages, "gemma3")
    assert [m["role"] for m in together] == ["system", "user", "assistant", "user"]
    text = "".join(part["text"] for part in together[1]["content"])
    assert text == "a\n\nD\n\nb"


def test_a_host_that_others_reach_needs_a_key_or_a_word():
    with pytest.raises(Error, match="--no-auth"):
        make_gate("0.0.0.0", [], [])
    make_gate("0.0.0.0", ["key"], [])
    make_gate("0.0.0.0", [], [], no_auth=True)
    make_gate("127.0.0.1", [], [])
    with pytest.raises(Error, match="cors-origin"):
        make_gate("127.0.0.1", [], ["example.org"])


@pytest.mark.parametrize(
    ("header", "name"),
    [("LocalHost:80", "localhost"), ("[::1]:80", "::1"), ("a.b", "a.b"), ("", ""), ("::1", "::1")],
)
def test_the_name_in_a_host_header(header, name):
    assert hostname_of(header) == name


def test_keys_come_from_the_option_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\none\n\n two \n")
    assert read_keys(None, file, {}) == ["one", "two"]
    assert read_keys("x", None, {"GEMLAX_API_KEY": "y"}) == ["x"]
    assert read_keys(None, None, {"GEMLAX_API_KEY": "y"}) == ["y"]
    file.write_text("\n")
    with pytest.raises(RequestError, match="no API key"):
        read_keys(None, file, {})
    with pytest.raises(RequestError, match="printable"):
        read_keys("é", None, {})


def test_adapters_are_found_by_the_names_of_their_folders(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text("{}")
    (tmp_path / "two").mkdir()
    assert find_adapters(tmp_path) == {"one": tmp_path / "one"}
    assert find_adapters(None) == {}
    with pytest.raises(Error, match="not a folder"):
        find_adapters(tmp_path / "none")
    assert served_name("models/gemma-3.gguf") == "gemma-3"
    assert served_name("models/gemma/") == "gemma"
