"""Text as ids come: nothing is lost, nothing is shown too early, stop strings end it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import TOY_PIECES, toy

from gemlax.errors import RequestError
from gemlax.tokenizer import TextStream

TOY = toy()
ANY_IDS = st.lists(st.integers(0, len(TOY_PIECES) - 1), max_size=30)
# Ids whose bytes often meet to make a character, or nearly.
BYTES = [TOY.id_of(f"<0x{byte:02X}>") for byte in b"\xf0\x9f\x98\x80\xe4\xb8\xad\xc3\xa9\xffa"]
BYTE_IDS = st.lists(st.sampled_from([*BYTES, TOY.eos_id, TOY.id_of("he")]), max_size=30)


def ids_of(text: str) -> list[int]:
    """One byte piece for each byte, so that no text is out of reach."""
    return [TOY.id_of(f"<0x{byte:02X}>") for byte in text.encode()]


def pieces_of(stream: TextStream, ids: list[int], sizes: list[int]) -> list[str]:
    """Push ids in groups of the given sizes, then flush."""
    texts, at = [], 0
    for size in [*sizes, len(ids)]:
        texts.append(stream.push(ids[at : at + size]))
        at += size
    return [*texts, stream.flush()]


def cut(text: str, stops: list[str]) -> tuple[str, int | None]:
    """Reference: the text before the stop that is complete first, and where that one ends."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], end
    return text, None


@given(ids=ANY_IDS | BYTE_IDS, sizes=st.lists(st.integers(0, 5), max_size=12), skip=st.booleans())
def test_the_pieces_joined_are_what_decode_returns(ids, sizes, skip):
    stream = TextStream(TOY, skip_special=skip)
    joined = "".join(pieces_of(stream, ids, sizes))
    assert joined == TOY.decode(ids, skip_special=skip)
    assert (stream.num_tokens, stream.stopped) == (len(ids), False)


@given(
    text=st.text("abé", max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=5), max_size=3),
    sizes=st.lists(st.integers(0, 5), max_size=12),
)
def test_stop_strings_end_the_text_wherever_the_tokens_split(text, stops, sizes):
    ids = ids_of(text)
    stream = TextStream(TOY, stops)
    pieces = pieces_of(stream, ids, sizes)
    expected, end = cut(text, stops)
    assert "".join(pieces) == expected
    assert stream.stopped == (end is not None)
    taken = len(ids) if end is None else len(text[:end].encode())
    assert stream.num_tokens == taken


@given(text=st.text("abé中😀", max_size=20), stops=st.lists(st.text("ab", min_size=1), max_size=2))
def test_text_is_shown_as_soon_as_it_is_certain_and_never_sooner(text, stops):
    stream = TextStream(TOY, stops)
    shown, sent = "", b""
    for id in ids_of(text):
        shown += stream.push([id])
        if stream.stopped:
            break
        sent += TOY.token_bytes(id)
        known = sent.decode(errors="ignore")  # whole characters
        starts = [stop[:n] for stop in stops for n in range(1, len(stop))]
        held = max((len(start) for start in starts if known.endswith(start)), default=0)
        assert shown == known[: len(known) - held]


def test_a_character_is_shown_when_its_last_byte_comes():
    stream = TextStream(TOY)
    assert [stream.push([id]) for id in ids_of("中😀")] == ["", "", "中", "", "", "", "😀"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_replaced_at_the_end():
    stream = TextStream(TOY)
    first, second, *_ = ids_of("😀")
    assert stream.push([first, second]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_the_start_of_a_stop_string_is_held_and_comes_when_it_turns_out_to_be_none():
    stream = TextStream(TOY, ["hello world"])
    hello, _ = TOY.encode("hello world", add_bos=False)
    he = TOY.id_of("he")
    assert stream.push([hello]) == ""
    assert stream.push([he]) == "hello"
    assert stream.flush() == "he"
    assert stream.flush() == ""


def test_after_flush_matching_starts_anew():
    stream = TextStream(TOY, ["ab"])
    a, b = TOY.id_of("a"), TOY.id_of("b")
    assert stream.push([a]) + stream.flush() == "a"
    assert stream.push([b]) == "b"
    assert not stream.stopped


def test_a_stop_string_that_begins_again_within_itself_is_found():
    for stop, text in {"aab": "aaab", "abac": "ababac", "aabaaac": "aabaabaaac"}.items():
        stream = TextStream(TOY, [stop])
        assert stream.push(ids_of(text)) == text.removesuffix(stop)
        assert stream.stopped


def test_a_stop_string_inside_a_token_ends_the_text_before_it():
    stream = TextStream(TOY, ["ll"])
    hello = TOY.id_of("hello")
    assert stream.push([TOY.id_of("a"), hello, hello]) == "ahe"
    assert (stream.stopped, stream.num_tokens) == (True, 2)
    assert stream.push([hello]) == ""
    assert stream.flush() == ""
    assert stream.num_tokens == 2


def test_a_stop_string_across_skipped_pieces_counts():
    stream = TextStream(TOY, ["ab"])
    ids = [TOY.id_of("a"), TOY.id_of("<end_of_turn>"), TOY.id_of("b")]
    assert stream.push(ids) == ""
    assert (stream.stopped, stream.num_tokens) == (True, 3)


def test_a_special_piece_can_be_a_stop_string_when_it_is_shown():
    ids = [TOY.id_of("a"), TOY.id_of("<end_of_turn>"), TOY.id_of("b")]
    stream = TextStream(TOY, ["<end_of_turn>"], skip_special=False)
    assert stream.push(ids) == "a"
    assert TextStream(TOY, ["<end_of_turn>"]).push(ids) == "ab"


def test_a_stop_string_can_be_complete_only_at_the_end():
    stream = TextStream(TOY, ["a\ufffd"])
    assert stream.push([*ids_of("ba"), BYTES[0]]) == "b"
    assert stream.flush() == ""
    assert (stream.stopped, stream.num_tokens) == (True, 3)


def test_each_token_costs_the_same_however_long_the_text_is():
    tokenizer, read = toy(), []

    def token_bytes(id: int, *, skip_special: bool) -> bytes:
        read.append(id)
        return TOY.token_bytes(id, skip_special=skip_special)

    tokenizer.token_bytes = token_bytes
    stream = TextStream(tokenizer, ["aab", "aaab"])
    random.seed(0)
    ids = [TOY.id_of(random.choice("aé")) for _ in range(3000)]
    for id in ids:
        stream.push([id])
        assert len(stream._tail) <= 3
    assert read == ids


def test_wrong_stop_strings_and_ids_are_refused():
    with pytest.raises(RequestError, match="a stop string is empty"):
        TextStream(TOY, ["a", ""])
    with pytest.raises(TypeError, match="sequence of strings, got the string 'ab'"):
        TextStream(TOY, "ab")
    with pytest.raises(RequestError, match=f"token id {len(TOY_PIECES)} is outside"):
        TextStream(TOY).push([len(TOY_PIECES)])
