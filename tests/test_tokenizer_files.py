"""Tokenizers from files and to files; damaged, foreign and inconsistent ones are refused."""

import json
import random

import pytest
import tokenizers
from vocabularies import (
    TOY_IDS,
    TOY_MERGES,
    TOY_PIECES,
    TOY_SCORES,
    TOY_TYPES,
    sentencepiece_model,
    toy,
)

from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.tokenizer import find_chat_template, find_tokenizer, load_tokenizer
from gemlax.tokenizer.spm import read_model, write_model
from gemlax.tokenizer.vocabulary import Vocabulary

TEXT = "<bos>hello world<end_of_turn>\n\n<b>éß  中"


def toy_model() -> bytes:
    """The toy as a tokenizer.model."""
    return write_model(
        Vocabulary.create(TOY_PIECES, TOY_TYPES, **TOY_IDS, add_bos=True), TOY_SCORES
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with the toy's tokenizer.json and its settings."""
    toy().save(tmp_path / "toy")
    return tmp_path / "toy"


def edit(path, change) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def check_like_toy(tokenizer) -> None:
    for parse_special in (False, True):
        expected = toy().encode(TEXT, parse_special=parse_special)
        assert tokenizer.encode(TEXT, parse_special=parse_special) == expected
    named = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
    assert named == (2, 1, 0, 3)
    assert tokenizer.special_ids == toy().special_ids


def test_the_names_that_settings_give_to_tokens_are_kept(folder, tmp_path):
    edit(folder / "tokenizer_config.json", lambda settings: settings.update(
        boi_token="<b>", sot_token={"content": "<start_of_turn>"}, add_bos_token=True,
        extra_special_tokens={"eot_token": "<end_of_turn>", "think": "<t>"}, none_token=None,
    ))  # fmt: skip
    (folder / "special_tokens_map.json").write_text('{"boi_token": "<x>", "mask_token": "<m>"}')
    load_tokenizer(folder).save(tmp_path / "copy")
    for tokenizer in (load_tokenizer(folder), load_tokenizer(tmp_path / "copy")):
        named = {name: piece for name, piece in tokenizer.named_pieces.items()
                 if name not in ("bos_token", "eos_token", "pad_token", "unk_token")}  # fmt: skip
        assert named == {
            "boi_token": "<b>", "sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>",
            "think": "<t>", "mask_token": "<m>",
        }  # fmt: skip


# Where it looks.


def test_every_form_loads_the_same_tokenizer(folder, tmp_path):
    model = tmp_path / "any name.model"
    model.write_bytes(toy_model())
    (tmp_path / "tokenizer.model").write_bytes(toy_model())
    for path in (folder, str(folder), folder / "tokenizer.json", model, tmp_path):
        check_like_toy(load_tokenizer(path))
    check_like_toy(find_tokenizer(folder))


def test_json_is_preferred_to_model(folder):
    (folder / "tokenizer.model").write_bytes(b"damaged")
    check_like_toy(load_tokenizer(folder))


def test_a_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_other_files_are_refused(tmp_path):
    for name, message in {
        "a.gguf": r"gemlax\.load_tokenizer",
        "a.txt": r"a \*\.model file",
    }.items():
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnsupportedError, match=message):
            load_tokenizer(tmp_path / name)


# What save writes.


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("merges", [None, TOY_MERGES], ids=["scores", "merges"])
def test_a_saved_tokenizer_is_the_same(tmp_path, merges, add_bos):
    toy(merges=merges, add_bos=add_bos).save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    check_like_toy(loaded)
    assert loaded.add_bos == add_bos
    settings = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] == add_bos
    # What the tokenizers package itself makes of the file, as transformers does.
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    expected = toy().encode("hello<end_of_turn> ▁▁ß", add_bos=add_bos, parse_special=True)
    assert backend.encode("hello<end_of_turn> ▁▁ß").ids == expected
    assert backend.decode(expected) == "hello   ß"


def test_files_are_copied_byte_for_byte(folder, tmp_path):
    contents = {
        "tokenizer.json": (folder / "tokenizer.json").read_bytes() + b"\r\n",
        "tokenizer_config.json": b'{"bos_token": {"content": "<bos>"},  "extra": 1}',
        "tokenizer.model": b"\x00anything",
        "special_tokens_map.json": b"{ }",
        "added_tokens.json": b"{}",
        "chat_template.jinja": b"{{ bos_token }}\r\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text("{}")
    load_tokenizer(folder).save(tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()} == contents
    load_tokenizer(folder).save(folder)
    assert all((folder / name).read_bytes() == content for name, content in contents.items())


def test_a_model_file_is_copied_and_gets_a_tokenizer_json(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(toy_model())
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(source)
    assert not tokenizer.add_bos
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == toy_model()
    assert (tmp_path / "copy" / "tokenizer_config.json").read_text() == '{"add_bos_token": false}'
    loaded = load_tokenizer(tmp_path / "copy")
    check_like_toy(loaded)
    assert not loaded.add_bos


def test_what_is_written_as_a_sentencepiece_model_is_read_back():
    pieces, scores, types, ids = read_model(toy_model(), "toy")
    vocabulary = Vocabulary.create(TOY_PIECES, TOY_TYPES, **TOY_IDS, add_bos=True)
    assert (pieces, scores, types) == (TOY_PIECES, TOY_SCORES, vocabulary.kinds)
    assert ids == TOY_IDS


# tokenizer.json as others write it.


def test_the_names_of_the_settings_count(folder):
    settings = folder / "tokenizer_config.json"
    edit(settings, lambda c: c.update(eos_token={"content": "<end_of_turn>"}, pad_token="<eos>"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.piece(tokenizer.eos_id) == "<end_of_turn>"
    assert tokenizer.piece(tokenizer.pad_id) == "<eos>"
    settings.unlink()
    check_like_toy(load_tokenizer(folder))


def test_a_marker_that_the_file_does_not_call_special_is_one_all_the_same(folder):
    def change(content):
        for token in content["added_tokens"]:
            token["special"] = False

    edit(folder / "tokenizer.json", change)
    check_like_toy(load_tokenizer(folder))


def test_what_the_file_calls_special_is_special(folder):
    (id,) = (i for i, piece in enumerate(TOY_PIECES) if piece == "[multimodal]")

    def change(content):
        (token,) = (token for token in content["added_tokens"] if token["id"] == id)
        token["special"] = True

    edit(folder / "tokenizer.json", change)
    assert load_tokenizer(folder).special_ids == toy().special_ids | {id}


def test_truncation_and_padding_of_the_file_are_ignored(folder):
    truncation = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit(folder / "tokenizer.json", lambda c: c.update(truncation=truncation, padding=padding))
    check_like_toy(load_tokenizer(folder))


def test_a_marker_that_is_no_added_token_is_one_all_the_same(folder, caplog):
    names = ("<start_of_turn>", "<end_of_turn>", "<unused0>")

    def change(content):
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in names]

    edit(folder / "tokenizer.json", change)
    check_like_toy(load_tokenizer(folder))
    (record,) = caplog.records
    assert "3 markers" in record.getMessage() and "<start_of_turn>" in record.getMessage()


# Tokens that other files add.

MORE = len(TOY_PIECES)
HOMES = {
    "added_tokens.json": {"<tool>": MORE, "<image_soft_token>": MORE + 1, "plus": MORE + 2},
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            str(MORE + 2): {"content": "plus", "special": False},
            str(MORE): {"content": "<tool>", "special": True},
            str(MORE + 1): {"content": "<image_soft_token>", "special": False},
            "0": {"content": "<pad>", "special": True},
        }
    },
}


def vocabulary_folder(path, kind: str):
    """A folder with the toy's tokenizer.model or tokenizer.json alone."""
    path.mkdir()
    if kind == "tokenizer.json":
        toy().save(path)
        (path / "tokenizer_config.json").unlink()
    else:
        (path / kind).write_bytes(toy_model())
    return path


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("home", HOMES)
def test_tokens_that_other_files_add_are_read_and_saved(tmp_path, kind, home):
    folder = vocabulary_folder(tmp_path / "folder", kind)
    (folder / home).write_text(json.dumps(HOMES[home]))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["<tool>"], "pad_token": {"content": "<tool>"}})
    )
    load_tokenizer(folder).save(tmp_path / "copy")
    for tokenizer in (load_tokenizer(folder), load_tokenizer(tmp_path / "copy")):
        assert (tokenizer.num_tokens, tokenizer.id_of("plus")) == (MORE + 3, MORE + 2)
        assert tokenizer.special_ids == toy().special_ids | {MORE, MORE + 1}
        assert tokenizer.pad_id == MORE
        text = "hello<tool>plus"
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        assert ids == [tokenizer.id_of("hello"), MORE, MORE + 2]
        assert tokenizer.decode(ids) == "helloplus"
        ordinary = tokenizer.encode(text, add_bos=False)
        assert ordinary[-1] == MORE + 2 and MORE not in ordinary
        assert tokenizer.decode(ordinary) == text


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": {"<tool>": MORE + 1}}, f"'<tool>' has id {MORE + 1}.*{MORE}$"),
        ({"added_tokens.json": {"<tool>": 6}}, "id 6 is '<tool>', in the vocabulary.*<unused0>"),
        ({"added_tokens.json": {"<tool>": "7"}}, "the id of '<tool>' is '7'"),
        ({"added_tokens.json": {"<tool>": True}}, "the id of '<tool>' is True"),
        ({"added_tokens.json": {"": MORE}}, "the id of ''"),
        ({"added_tokens.json": {"a1": MORE, "a2": MORE}}, "id 298 is 'a2'.*'a1'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": []}}, None),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "must be an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "'x'"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": "a"}}}, "not a token"),
        ({"added_tokens.json": {"<tool>": MORE}, "tokenizer_config.json":
          {"added_tokens_decoder": {str(MORE): {"content": "other"}}}}, "in tokenizer_config.json"),
        ({"added_tokens.json": {"<tool>": MORE}, "tokenizer_config.json":
          {"added_tokens_decoder": {str(MORE + 1): {"content": "<tool>"}}}}, "is added twice"),
    ],
    ids=str,
)  # fmt: skip
def test_added_tokens_that_do_not_fit_are_named(tmp_path, kind, files, message):
    folder = vocabulary_folder(tmp_path / "folder", kind)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if message is None:
        check_like_toy(load_tokenizer(folder))
        return
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("flags", [["lstrip"], ["rstrip"], ["lstrip", "rstrip"]], ids="+".join)
def test_a_marker_takes_in_the_blanks_beside_it_where_the_file_says_so(tmp_path, kind, flags):
    folder = vocabulary_folder(tmp_path / "folder", kind)
    said = {"content": "<s e p>", "special": True} | dict.fromkeys(flags, True)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(MORE): said}})
    )
    tokenizer = load_tokenizer(folder)
    bare = vocabulary_folder(tmp_path / "bare", "tokenizer.json") / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(bare))
    backend.add_special_tokens([tokenizers.AddedToken("<s e p>", **dict.fromkeys(flags, True))])
    text = "he \n<s e p>  <s e p>\n hello  <bos> he"
    expected = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, add_bos=False, parse_special=True) == expected
    plain = tokenizer.encode(text, add_bos=False)
    assert tokenizer.decode(plain) == text and MORE not in plain
    assert tokenizer.decode([MORE], skip_special=False) == "<s e p>"


def test_a_marker_that_is_one_as_a_whole_word_only_is_refused_by_name(tmp_path):
    folder = vocabulary_folder(tmp_path / "folder", "tokenizer.model")
    said = {str(MORE): {"content": "<tool>", "special": True, "single_word": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": said}))
    with pytest.raises(UnsupportedError, match="'<tool>' needs a whole word"):
        load_tokenizer(folder)


def test_a_byte_piece_that_is_an_added_token_is_a_byte(folder):
    id = TOY_PIECES.index("<0x09>")
    said = {"id": id, "content": "<0x09>", "special": False, "normalized": False}
    said |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    edit(folder / "tokenizer.json", lambda c: c["added_tokens"].append(said))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([id]) == "\t" and tokenizer.encode("\t", add_bos=False) == [id]
    assert tokenizer.encode("<0x09>") == toy().encode("<0x09>")


def test_a_token_that_the_vocabulary_has_keeps_its_id(tmp_path, caplog):
    folder = vocabulary_folder(tmp_path / "folder", "tokenizer.model")
    (folder / "added_tokens.json").write_text('{"<unused0>": 9}')
    check_like_toy(load_tokenizer(folder))
    assert "other ids than the vocabulary ('<unused0>': 9)" in caplog.text


def test_names_that_no_file_gives_are_gemmas(tmp_path):
    folder = vocabulary_folder(tmp_path / "folder", "tokenizer.model")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<end_of_turn>"}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": null}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.piece(tokenizer.eos_id) == "<end_of_turn>"
    assert (tokenizer.bos_id, tokenizer.pad_id) == (2, 0)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(CheckpointError, match="'<none>', which should be its eos token"):
        load_tokenizer(folder)


# Bad files.


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {}}'])
def test_a_damaged_tokenizer_json_is_refused(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(folder)


def test_a_byte_order_mark_is_no_part_of_a_file(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": len(TOY_PIECES)}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(TEXT) == toy().encode(TEXT)
    assert tokenizer.id_of("<more>") == len(TOY_PIECES)
    assert find_chat_template(folder) == "{{ bos_token }}"


def test_a_tokenizer_json_without_merges_is_refused(folder):
    edit(folder / "tokenizer.json", lambda c: c["model"].update(merges=[]))
    with pytest.raises(CheckpointError, match="has no merges"):
        load_tokenizer(folder)


SHAPES = {
    "no type": lambda c: c["model"].pop("type"),
    "merges as strings": lambda c: c["model"].update(
        merges=[" ".join(pair) for pair in c["model"]["merges"]]
    ),
    "ignore_merges": lambda c: c["model"].update(ignore_merges=True),
    "Split": lambda c: c.update(
        pre_tokenizer={"type": "Split", "pattern": {"String": " "},
                       "behavior": "MergedWithPrevious", "invert": False}
    ),
    "Metaspace": lambda c: c.update(
        normalizer=None,
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never",
                       "split": False},
    ),
    "no decoder": lambda c: c.update(decoder=None, post_processor=None),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes_of_the_file_give_the_ids_of_the_tokenizers_package(folder, case):
    edit(folder / "tokenizer.json", SHAPES[case])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    for text in ("hello world", "<b>hell</b>  \n\n éß中", "a <bo", ""):
        expected = backend.encode(text, add_special_tokens=False).ids
        assert load_tokenizer(folder).encode(text, add_bos=False) == expected


def test_no_text_makes_a_marker_where_merges_are_ignored(folder):
    edit(folder / "tokenizer.json", SHAPES["ignore_merges"])
    tokenizer = load_tokenizer(folder)
    for text in ("<bos>", "<start_of_turn>", "<b><bos>"):
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.special_ids.isdisjoint(ids) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_settings_are_refused(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json (is not JSON|holds list)"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["<none>", {"no": "content"}, 7])
def test_a_named_token_that_is_no_piece_is_refused(folder, name):
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token=name))
    with pytest.raises(CheckpointError, match="which should be its eos token"):
        load_tokenizer(folder)


def test_an_id_without_a_piece_decodes_to_nothing_and_is_unused(folder):
    last = len(TOY_PIECES) + 1
    edit(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update(more=last))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.num_tokens == last + 1 and tokenizer.unused_ids == {last - 1}
    assert tokenizer.decode([last - 1, last]) == "more"
    assert tokenizer.encode(TEXT) == toy().encode(TEXT)


@pytest.mark.parametrize("id", [5, 2**31])
def test_ids_that_repeat_or_go_far_beyond_are_refused(folder, id):
    edit(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update(more=id))
    with pytest.raises(CheckpointError, match="repeat, or go far beyond"):
        load_tokenizer(folder)


def test_other_kinds_of_tokenizer_json_are_refused(folder):
    path = folder / "tokenizer.json"
    original = path.read_bytes()
    byte_level = tokenizers.decoders.ByteLevel().__getstate__()
    edit(path, lambda c: c.update(decoder=json.loads(byte_level)))
    with pytest.raises(UnsupportedError, match="not BPE over characters"):
        load_tokenizer(path)
    tokenizers.Tokenizer(tokenizers.models.Unigram([("<bos>", 0.0)], 0)).save(str(path))
    with pytest.raises(UnsupportedError, match="not BPE over characters"):
        load_tokenizer(path)
    path.write_bytes(original)
    edit(path, lambda c: c["added_tokens"][0].update(single_word=True))
    with pytest.raises(UnsupportedError, match="special token '<pad>' is one as a whole word"):
        load_tokenizer(path)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    whole = sentencepiece_model("gemma4").read_bytes()
    toy = toy_model()
    trainer = toy.rindex(b"\x18\x02\x98\x02") - 2  # the tag and the size of the trainer spec
    no_unk_id = toy.replace(b"\xc0\x02\x03", b"\xc2\x02\x00")  # text where a number belongs
    bad = [b"", b"text\n" * 9, b"\xff" * 99, whole[:1000], whole[: len(whole) - 70]]
    for content in [*bad, toy[:trainer], toy[trainer:], no_unk_id]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model is (damaged|cut off)"):
            load_tokenizer(path)


def test_no_flipped_byte_of_a_sentencepiece_model_raises_anything_else(tmp_path):
    path, whole = tmp_path / "tokenizer.model", toy_model()
    random.seed(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        content[random.randrange(len(whole))] = random.randrange(256)
        path.write_bytes(content)
        try:
            load_tokenizer(path)
        except (CheckpointError, UnsupportedError):
            refused += 1
    assert 50 < refused < 300


# The end of the toy's model is its trainer and normalizer specs.
SPECS = {
    "unigram": (b"\x18\x02\x98\x02", b"\x18\x01\x98\x02"),
    "a space in front": (b"identity\x18\x00", b"identity\x18\x01"),
    "runs of spaces made one": (b"\x20\x00", b"\x20\x01"),
    "spaces kept": (b"\x28\x01", b"\x28\x00"),
}


@pytest.mark.parametrize("case", SPECS)
def test_other_kinds_of_sentencepiece_model_are_refused(tmp_path, case):
    old, new = SPECS[case]
    head, tail = toy_model()[:-80], toy_model()[-80:]
    assert tail.count(old) == 1
    (tmp_path / "tokenizer.model").write_bytes(head + tail.replace(old, new))
    with pytest.raises(UnsupportedError, match=r"not a BPE model|changes text before"):
        load_tokenizer(tmp_path)


# Lists that do not fit each other.

LAST = len(TOY_PIECES) - 1
BAD_LISTS = {
    "few scores": ({"scores": TOY_SCORES[:-1]}, f"{LAST + 1} pieces but {LAST} scores"),
    "few types": ({"token_types": TOY_TYPES[:-1]}, f"{LAST + 1} pieces but {LAST} token types"),
    "no pieces": ({"pieces": [], "scores": [], "token_types": []}, "bos id 2 is outside"),
    "id too high": ({"eos_id": LAST + 1}, f"eos id {LAST + 1} is outside 0 to {LAST}"),
    "id too low": ({"pad_id": -1}, f"pad id -1 is outside 0 to {LAST}"),
    "no byte": ({"token_types": [*TOY_TYPES[:-1], 6]}, f"'中' of id {LAST} is typed as a byte"),
    "equal scores": ({"scores": [-1000.0] * (LAST + 1)}, "no merges, and all scores are equal"),
    "nothing to rank by": ({"scores": [], "merges": []}, "neither merges nor scores"),
    "no finite scores": ({"scores": [float("nan")] * (LAST + 1)}, "scores that are not finite"),
    "half a merge": ({"merges": ["he"]}, "the merge 'he' is not two pieces"),
    "three in a merge": ({"merges": ["h e l"]}, "the merge 'h e l' is not two pieces"),
    "a foreign merge": ({"merges": ["x y"]}, "tokenizers refuses the vocabulary.*`x`"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_lists_that_do_not_fit_are_refused(case):
    changes, message = BAD_LISTS[case]
    with pytest.raises(CheckpointError, match=message):
        toy(**changes)


def test_kinds_that_nobody_knows_are_refused():
    for kind in (0, 7):
        with pytest.raises(UnsupportedError, match=f"id {LAST} is of type {kind}"):
            toy(token_types=[*TOY_TYPES[:-1], kind])
