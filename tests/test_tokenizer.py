"""Ids and text of the tokenizer against llama.cpp and sentencepiece, and what it promises."""

import json
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from vocabularies import (
    CHARS,
    TOY_IDS,
    TOY_MERGES,
    TOY_PIECES,
    TOY_SCORES,
    TOY_TYPES,
    WORDS,
    gguf_tokenizer,
    published_tokenizer,
    sentencepiece_model,
    toy,
)

from gemlax.errors import RequestError
from gemlax.tokenizer import Tokenizer, load_tokenizer, vocabulary

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_tokens.json").read_text("utf-8"))
TEXTS = [case["text"] for case in GOLDEN["encode"]]
CONTROL = ["<bos>", "<eos>", "<pad>", "<unk>"]


def random_texts(tokenizer: Tokenizer, seed: int, count: int) -> list[str]:
    """Texts of joined pieces, of repeats, and of any characters."""
    random.seed(seed)
    ids = [i for i in range(tokenizer.num_tokens) if i not in tokenizer.special_ids]
    runs = [" ", "\n", "\t", "a", "ha", "<b>", "=", "0", "中"]
    texts = []
    for _ in range(count):
        texts.append(
            "".join(tokenizer.piece(i).replace("▁", " ") for i in random.choices(ids, k=8))
        )
        texts.append("".join(random.choice(runs) * random.choice([1, 2, 31, 70]) for _ in range(5)))
        codes = [random.randrange(0x20000) for _ in range(8)]
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return texts


@pytest.fixture(scope="module")
def gguf(gguf_path) -> Tokenizer:
    return gguf_tokenizer(gguf_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Tokenizer:
    """The published Gemma 3 model after it was saved as a tokenizer.json."""
    folder = tmp_path_factory.mktemp("saved")
    published_tokenizer("gemma3").save(folder)
    (folder / "tokenizer.model").unlink()
    return load_tokenizer(folder)


def oracle(name: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model(name)))


def check_against(oracle: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer) -> None:
    compared = 0
    for text in TEXTS + random_texts(tokenizer, seed=0, count=300):
        if any(name in text for name in CONTROL):
            continue  # sentencepiece takes these, and only these, as ordinary text
        expected = oracle.encode(text)
        assert tokenizer.encode(text, add_bos=False, parse_special=True) == expected, text
        if tokenizer.special_ids.isdisjoint(expected):
            compared += 1
            assert tokenizer.encode(text, add_bos=False) == expected, text
    assert compared > 800


# Ids.


def test_ids_of_the_gguf_vocabulary_are_those_of_llama_cpp(gguf):
    for case in GOLDEN["encode"]:
        text = case["text"]
        assert gguf.encode(text, add_bos=False) == case["ordinary"], text
        assert gguf.encode(text, add_bos=False, parse_special=True) == case["parsed"], text


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_ids_of_a_sentencepiece_model_are_those_of_sentencepiece(name):
    check_against(oracle(name), published_tokenizer(name))


def test_ids_of_a_saved_tokenizer_are_those_of_sentencepiece(saved):
    check_against(oracle("gemma3"), saved)


def test_ids_of_a_saved_tokenizer_are_those_of_llama_cpp(saved):
    for case in GOLDEN["encode"]:
        text = case["text"]
        if "<unused" in text:
            continue  # from id 256001 on the file numbers them otherwise
        assert saved.encode(text, add_bos=False) == case["ordinary"], text
        assert saved.encode(text, add_bos=False, parse_special=True) == case["parsed"], text


def test_every_form_calls_the_same_ids_special(gguf, saved):
    assert gguf.special_ids == saved.special_ids == published_tokenizer("gemma3").special_ids
    markers = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
    assert gguf.special_ids >= {gguf.id_of(marker) for marker in markers}


def test_a_gemma_4_turn_has_the_published_ids():
    # Source: a token-exact capture from the E4B tokenizer.
    text = "<|turn>user\nWhat time is it?<turn|>\n<|turn>model\n"
    ids = [105, 2364, 107, 3689, 990, 563, 625, 236881, 106, 107, 105, 4368, 107]
    tokenizer = published_tokenizer("gemma4")
    assert tokenizer.encode(text, add_bos=False, parse_special=True) == ids


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_scores_and_merges_give_the_same_ids(merges):
    tokenizer = toy(merges=merges)
    spelled = {
        "hello world": ["hello", "▁world"],
        "<b>hell</b>": ["<b>", "hell", "</b>"],
        "a  b    ": ["a", "▁▁", "b", "▁▁▁", "▁"],
        "\n\n\n": ["\n\n", "\n"],
        "<bos>": ["<b", "os>"],
        "éé中ß": ["éé", "中", "<0xC3>", "<0x9F>"],
    }
    for text, pieces in spelled.items():
        ids = tokenizer.encode(text, add_bos=False)
        assert [tokenizer.piece(i) for i in ids] == pieces


def test_a_vocabulary_without_bytes_has_one_unknown_id_for_a_run():
    keep = [i for i, kind in enumerate(TOY_TYPES) if kind != 6]
    lists = {"pieces": TOY_PIECES, "scores": TOY_SCORES, "token_types": TOY_TYPES}
    small = {name: [values[i] for i in keep] for name, values in lists.items()}
    for merges in (None, TOY_MERGES):
        tokenizer = toy(**small, merges=merges)
        ids = tokenizer.encode("aßßb", add_bos=False)
        assert ids == [tokenizer.id_of("a"), TOY_IDS["unk_id"], tokenizer.id_of("b")]


# Special pieces.


def test_no_marker_in_ordinary_text_makes_a_special_id(gguf):
    for tokenizer in (toy(), toy(merges=TOY_MERGES), gguf):
        for id in tokenizer.special_ids:
            for text in (tokenizer.piece(id), f"a {tokenizer.piece(id)}b"):
                ids = tokenizer.encode(text, add_bos=False)
                assert tokenizer.special_ids.isdisjoint(ids), text
                assert tokenizer.decode(ids) == text


def test_markers_are_read_where_asked_and_the_longest_one_counts():
    tokenizer = toy(
        pieces=[*TOY_PIECES, "<unused00>", "<unused0", "<<eos>"],
        scores=[*TOY_SCORES, 0.0, 0.0, 0.0],
        token_types=[*TOY_TYPES, 3, 3, 3],
    )
    text = "<unused00<unused00><unused0><start_of_turn>he<<end_of_turn><<eos>"
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    spelled = ["<unused0", "<0x30>", "<unused00>", "<unused0>", "<start_of_turn>", "he", "<"]
    assert [tokenizer.piece(i) for i in ids] == [*spelled, "<end_of_turn>", "<<eos>"]


def test_there_is_exactly_one_bos():
    tokenizer = toy()
    bos, he = tokenizer.bos_id, tokenizer.id_of("he")
    assert tokenizer.encode("he") == [bos, he]
    assert tokenizer.encode("") == [bos]
    assert tokenizer.encode("<bos>he", parse_special=True) == [bos, he]
    assert tokenizer.encode("<bos>he", parse_special=True, add_bos=False) == [bos, he]
    assert tokenizer.encode("he", add_bos=False) == [he]
    assert tokenizer.encode("<bos>").count(bos) == 1


def test_named_pieces_and_stray_unknown_pieces_are_special_whatever_their_type():
    tokenizer = toy(token_types=[1, 1, 1, 1, 4, 4, 2, *TOY_TYPES[7:]])
    assert tokenizer.special_ids == toy().special_ids
    assert tokenizer.encode("<bos>", add_bos=False) == toy().encode("<bos>", add_bos=False)


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
@pytest.mark.parametrize("kind", [1, 5], ids=["normal", "unused"])
def test_markers_are_control_tokens_whatever_their_label(merges, kind, caplog):
    types = [kind if 4 <= id <= 6 else own for id, own in enumerate(TOY_TYPES)]
    tokenizer = toy(token_types=types, merges=merges)
    assert tokenizer.special_ids == toy().special_ids and not tokenizer.unused_ids
    for parse_special in (False, True):
        text = "<start_of_turn>he<end_of_turn>"
        expected = toy().encode(text, parse_special=parse_special)
        assert tokenizer.encode(text, parse_special=parse_special) == expected
    (record,) = caplog.records
    assert "3 markers ordinary text (<start_of_turn>, <end_of_turn>, " in record.getMessage()


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_no_ordinary_piece_of_a_published_vocabulary_is_taken_for_a_marker(name, caplog):
    from gemlax.tokenizer.spm import read_model

    pieces, _, types, _ = read_model(sentencepiece_model(name).read_bytes(), name)
    settled = vocabulary.settle(pieces, types)
    changed = [pieces[i] for i, kind in enumerate(types) if kind == 1 and settled[i] != 1]
    assert changed == [] and caplog.records == []


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_no_text_is_split_into_unused_pieces(merges, tmp_path):
    types = [5 if piece in ("hello", "中") else kind
             for piece, kind in zip(TOY_PIECES, TOY_TYPES, strict=True)]  # fmt: skip
    fill = [f"[PAD{len(TOY_PIECES) + i}]" for i in range(3)]
    tokenizer = toy(
        pieces=TOY_PIECES + fill, scores=[*TOY_SCORES, 0.0, -1e4, -1e4],
        token_types=[*types, 5, 1, 5], merges=merges,
    )  # fmt: skip
    size = len(TOY_PIECES)
    assert tokenizer.unused_ids == {TOY_PIECES.index("hello"), size - 1, size, size + 1, size + 2}
    ids = tokenizer.encode(f"hello中{fill[0]}", add_bos=False)
    assert [tokenizer.piece(i) for i in ids[:5]] == ["hell", "o", "<0xE4>", "<0xB8>", "<0xAD>"]
    assert tokenizer.unused_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == f"hello中{fill[0]}"
    assert tokenizer.decode([size]) == fill[0]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).unused_ids == tokenizer.unused_ids


TWICE = {"pieces": [*TOY_PIECES, "hello", "", "<bos>"], "scores": [*TOY_SCORES, 0.0, 0.0, 0.0],
         "token_types": [*TOY_TYPES, 1, 1, 3]}  # fmt: skip


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_of_a_piece_with_two_ids_the_last_or_the_named_one_is_written_and_all_are_read(
    merges, tmp_path, caplog
):
    tokenizer = toy(**TWICE, merges=merges)
    size = len(TOY_PIECES)
    ids = tokenizer.encode("<bos>hello", add_bos=False, parse_special=True)
    assert ids == [TOY_IDS["bos_id"], size]
    assert tokenizer.decode([TOY_PIECES.index("hello"), size, size + 1]) == "hellohello"
    assert tokenizer.unused_ids == {size + 1} and tokenizer.id_of("") is None
    (record,) = caplog.records
    assert f"2 pieces have several ids ('hello': {size} counts)" in record.getMessage()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("<bos>hello", add_bos=False, parse_special=True) == ids
    assert loaded.unused_ids == {TOY_PIECES.index("hello"), size + 1, size + 2}
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("<bos>hello", add_special_tokens=False).ids == ids


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
@pytest.mark.parametrize("kind", [1, 4], ids=["normal", "user-defined"])
def test_pieces_named_as_bytes_are_bytes_whatever_their_label(kind, merges):
    types = [kind if own == 6 else own for own in TOY_TYPES]
    tokenizer = toy(token_types=types, merges=merges)
    text = "ß\t<0x0A>"
    assert tokenizer.encode(text) == toy(merges=merges).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    few = toy(pieces=[*TOY_PIECES[:-1], "<0x0A"], merges=merges)
    assert few.decode(few.encode("<0x0A")) == "<0x0A"


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_a_byte_without_a_piece_is_its_raw_piece_or_unknown(merges):
    place = TOY_PIECES.index("<0x09>")
    tokenizer = toy(pieces=[*TOY_PIECES[:place], "tab", *TOY_PIECES[place + 1 :]],
                    token_types=[*TOY_TYPES[:place], 1, *TOY_TYPES[place + 1 :]],
                    merges=merges)  # fmt: skip
    ids = tokenizer.encode("h\n\u00df\t", add_bos=False)
    assert tokenizer.decode(ids) == "h\nß" and ids[-1] == tokenizer.unk_id


def test_functiongemma_markers_are_control_tokens():
    markers = ["<start_function_call>", "<end_function_response>", "<escape>"]
    tokenizer = toy(pieces=TOY_PIECES + markers, scores=[*TOY_SCORES, 0.0, 0.0, 0.0],
                    token_types=[*TOY_TYPES, 4, 1, 4])  # fmt: skip
    ids = list(range(len(TOY_PIECES), len(TOY_PIECES) + 3))
    assert tokenizer.encode("".join(markers), add_bos=False, parse_special=True) == ids
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("".join(markers), add_bos=False))


def test_empty_merges_leave_it_to_the_scores():
    assert toy(merges=[]).encode("hello world") == toy().encode("hello world")


def test_skipping_special_pieces_is_a_choice():
    tokenizer = toy()
    ids = tokenizer.encode("<start_of_turn>he<end_of_turn>\n\n<b>", parse_special=True)
    assert tokenizer.decode(ids) == "he\n\n<b>"
    shown = "<bos><start_of_turn>he<end_of_turn>\n\n<b>"
    assert tokenizer.decode(ids, skip_special=False) == shown
    assert tokenizer.decode([tokenizer.unk_id, tokenizer.pad_id]) == ""


# Text.


def test_bytes_of_ids_are_those_of_llama_cpp(gguf):
    for case in GOLDEN["decode"]:
        data = bytes.fromhex(case["bytes"])
        assert b"".join(map(gguf.token_bytes, case["ids"])) == data
        assert gguf.decode(case["ids"]) == data.decode(errors="replace")


def test_every_text_comes_back(gguf, saved):
    for text in TEXTS + random_texts(gguf, seed=1, count=50):
        text = text.replace("▁", " ")
        for each in (published_tokenizer("gemma4"), saved, gguf):
            assert each.decode(each.encode(text)) == text
            ids = each.encode(text, parse_special=True, add_bos=False)
            assert each.decode(ids, skip_special=False) == text


@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_u2581_is_read_as_a_space_and_nul_is_kept(merges):
    tokenizer = toy(merges=merges)
    assert tokenizer.encode("a▁ ▁b") == tokenizer.encode("a   b")
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"
    assert tokenizer.decode(tokenizer.encode("a\0b\0")) == "a\0b\0"


def test_byte_pieces_are_joined_and_bad_utf8_is_replaced():
    tokenizer = toy()
    ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in b"\xe4\xb8\xad\xe4\xb8\xff"]
    assert tokenizer.decode(ids) == "中\ufffd\ufffd"
    assert tokenizer.decode([*ids[:2], tokenizer.eos_id, *ids[2:3]]) == "中"


def test_ids_outside_the_vocabulary_are_refused():
    tokenizer = toy()
    last = len(TOY_PIECES) - 1
    for id in (-1, last + 1):
        for call in (tokenizer.piece, tokenizer.token_bytes, lambda i: tokenizer.decode([1, i])):
            with pytest.raises(RequestError, match=rf"token id {id} is outside 0 to {last}"):
                call(id)
    assert tokenizer.decode(np.array([last], np.int32)) == CHARS[-1]
    with pytest.raises(TypeError):
        tokenizer.decode([1.0])


def test_a_lone_surrogate_is_refused():
    for text in ("a\ud83d", "\udc80", "<bos>\ud83d\ude00"):
        for parse_special in (False, True):
            with pytest.raises(RequestError, match=r"lone surrogate, '\\ud"):
                toy().encode(text, parse_special=parse_special)


def test_pieces_and_named_ids():
    tokenizer = toy()
    named = (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id)
    assert named == (0, 1, 2, 3)
    assert tokenizer.num_tokens == len(TOY_PIECES)
    assert [tokenizer.id_of(piece) for piece in TOY_PIECES] == list(range(len(TOY_PIECES)))
    assert [tokenizer.piece(i) for i in range(tokenizer.num_tokens)] == TOY_PIECES
    assert tokenizer.id_of("no such piece") is None
    assert tokenizer.special_ids == set(range(7))


def test_spaces_in_gguf_pieces_are_u2581():
    tokenizer = toy(pieces=[piece.replace("▁", " ") for piece in TOY_PIECES])
    assert tokenizer.id_of("▁▁") == TOY_PIECES.index("▁▁")
    assert tokenizer.encode("a  hello world") == toy().encode("a  hello world")


def test_threads_share_a_tokenizer():
    tokenizer = toy(merges=TOY_MERGES)
    texts = [word * 50 + "<bos>" for word in WORDS]
    expected = [tokenizer.encode(text, parse_special=i % 2 == 0) for i, text in enumerate(texts)]
    wrong = []

    def work() -> None:
        for _ in range(20):
            for i, text in enumerate(texts):
                if tokenizer.encode(text, parse_special=i % 2 == 0) != expected[i]:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "merges"), [("sentencepiece", None), ("tokenizers", TOY_MERGES)]
)
def test_a_missing_package_is_named(monkeypatch, package, merges):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        toy(merges=merges)
