"""What gemlax saves, transformers loads with the same ids; and the other way round."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vocabularies import gguf_tokenizer, published_tokenizer

from gemlax.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_tokens.json"
TEXTS = [case["text"] for case in json.loads(GOLDEN.read_text("utf-8"))["encode"]]
TURN = "<|turn>user\nHi  <b>you</b><turn|>\n<|turn>model\n<|channel>thought\n<channel|>"


def check_same(theirs, ours: Tokenizer) -> None:
    for text in [*TEXTS, TURN]:
        expected = ours.encode(text, parse_special=True, add_bos=False)
        assert theirs(text, add_special_tokens=False).input_ids == expected, text
        bos = [ours.bos_id] if ours.add_bos else []
        assert theirs(text).input_ids == bos + expected, text
        ordinary = ours.encode(text, add_bos=False)
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == ordinary, text
        assert theirs.decode(expected, skip_special_tokens=True) == ours.decode(expected), text
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert named == (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id)
    assert set(theirs.all_special_ids) <= ours.special_ids


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4"])
def test_transformers_loads_what_was_a_sentencepiece_model(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours = published_tokenizer(model_type.removesuffix("_text"))
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_same(theirs, ours)
    assert len(theirs) == ours.num_tokens
    theirs.save_pretrained(tmp_path / "again")
    check_same(theirs, load_tokenizer(tmp_path / "again"))


def test_transformers_loads_what_was_a_gguf_vocabulary(tmp_path, gguf_path):
    ours = gguf_tokenizer(gguf_path, add_bos=False)
    ours.save(tmp_path)
    check_same(AutoTokenizer.from_pretrained(tmp_path), ours)
