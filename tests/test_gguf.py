"""GGUF files: config, vocabulary, every quantised type, hostile headers. The oracle is gguf."""

import contextlib
import json
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from disk import (
    BFLOAT16,
    CONFIG,
    SCALES,
    WIDE,
    assert_same_bits,
    gguf_tensors,
    gguf_vocabulary,
    random_weights,
    read_all,
    wide_tensors,
    write_gguf,
)
from gguf import GGMLQuantizationType as T

from gemlax.checkpoints import open_checkpoint
from gemlax.checkpoints.gguf import KEPT, QUANTISED, load_tokenizer, parse_header
from gemlax.errors import CheckpointError, Error, UnsupportedError
from gemlax.names import text_weights

GOLDEN = Path(__file__).resolve().parent / "golden" / "gemma-3-270m-gguf.json"
TABLE, NORM = "embed_tokens.weight", "norm.weight"
# All that gguf itself decodes; a release of it that decodes more adds a case that fails.
TYPES = [T.F32, T.F16, T.F64, *gguf.quants._type_traits]


def write_plain(path: Path, weights=None, **options) -> Path:
    weights = random_weights() if weights is None else weights
    return write_gguf(path, gguf_tensors(weights), **options)


def test_a_file_of_llama_cpps_layout_is_read(tmp_path):
    weights = random_weights()
    with open_checkpoint(write_plain(tmp_path / "m.gguf", weights)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == CONFIG.text
        assert checkpoint.stored_dtype == "gguf"
        assert checkpoint.generation_config == {}
        found = read_all(checkpoint)
    one = np.float32(1)
    expected = {
        name: (array + one) - one if name.endswith("norm.weight") else array
        for name, array in weights.items()
    }
    assert_same_bits(found, expected)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_gguf_does(tmp_path, kind):
    tensors, expected = wide_tensors(kind)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == WIDE.text
        assert_same_bits(read_all(checkpoint), expected)
        found = read_all(checkpoint, BFLOAT16)
    assert_same_bits(found, {name: array.astype(BFLOAT16) for name, array in expected.items()})


@pytest.mark.parametrize("kind", ["Q4_K", *sorted(QUANTISED - KEPT.keys())])
def test_blocks_full_of_ones_are_what_gguf_makes_of_them_or_refused_where_that_is_nan(
    tmp_path, kind
):
    kind = T[kind]
    # Each scale is NaN, where a scale can be.
    tensors, _ = wide_tensors(kind)
    blocks, _ = tensors["blk.0.attn_k.weight"]
    blocks[...] = 0xFF
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, kind)
    found = np.empty(expected.shape, np.float32)
    finite = np.isfinite(expected).all()
    refused = contextlib.nullcontext() if finite else pytest.raises(CheckpointError, match=r"NaN")
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint, refused:
        checkpoint.read("layers.0.self_attn.k_proj.weight", found)
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_codes_with_a_scale_that_is_not_finite_are_refused(tmp_path, kind, value):
    tensors, _ = wide_tensors(T[kind])
    name, at = "layers.0.self_attn.k_proj.weight", SCALES[T[kind]][-1]
    tensors["blk.0.attn_k.weight"][0][3, at : at + 2] = np.float16([value]).view(np.uint8)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint:
        assert checkpoint.stored(name.replace("k_proj", "q_proj")) is not None
        with pytest.raises(CheckpointError, match=r"attn_k.weight holds NaN or infinity"):
            checkpoint.stored(name)


def test_a_type_that_is_slow_to_decode_needs_little_memory(tmp_path):
    tensors, _ = wide_tensors(T.IQ2_XXS)
    table = np.zeros((2**17, 66), np.uint8)
    extra = {"gemma3.vocab_size": 2**17, "tokenizer.ggml.model": "none"}
    tensors["token_embd.weight"] = (table, T.IQ2_XXS)
    path = write_gguf(tmp_path / "m.gguf", tensors, WIDE, vocabulary=False, extra=extra)
    out = np.zeros((2**17, 256), np.float32)
    with open_checkpoint(path) as checkpoint:
        tracemalloc.start()
        checkpoint.read(TABLE, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 32 * 2**20  # decoded at once it takes more than 128 MiB


@pytest.mark.parametrize("kind", [T.I8, T.I32, T.I64], ids=lambda kind: kind.name)
def test_integers_beside_the_weights_are_left_aside_and_as_weights_refused(tmp_path, kind, caplog):
    tensors = gguf_tensors(random_weights())
    array = np.zeros(64, {T.I8: np.int8, T.I32: np.int32, T.I64: np.int64}[kind])
    tensors["other.counts"] = (array, None)
    with (
        caplog.at_level("INFO", "gemlax"),
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint,
    ):
        checkpoint.check()
    assert "left aside 1 tensors of integers" in caplog.text
    tensors["output_norm.weight"] = (array, None)
    with (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint,
        pytest.raises(UnsupportedError, match=rf"{kind.name} \(1, such as output_norm.weight\)"),
    ):
        checkpoint.check()


def test_a_weight_is_multiplied_by_the_scale_beside_it(tmp_path):
    # llama.cpp's NVFP4 has a second scale for each matrix; those of inputs say nothing of weights.
    tensors, expected = wide_tensors(T.NVFP4, {"layers.0.mlp.up_proj.weight": T.Q8_0})
    factors = {"attn_q": ("self_attn.q_proj", 0.25), "ffn_up": ("mlp.up_proj", 3.0)}
    for theirs, (ours, factor) in factors.items():
        tensors[f"blk.0.{theirs}.scale"] = (np.full(1, factor, np.float32), None)
        tensors[f"blk.0.{theirs}.input_scale"] = (np.full(1, 7, np.float32), None)
        expected[f"layers.0.{ours}.weight"] *= np.float32(factor)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), expected)
        assert checkpoint.stored("layers.0.mlp.up_proj.weight") is None  # not its codes alone
    tensors["blk.0.ffn_up.scale"] = (np.ones(2, np.float32), None)
    with (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint,
        pytest.raises(CheckpointError, match=r"ffn_up.scale is F32 \[2\]; expected F32, one num"),
    ):
        checkpoint.read("layers.0.mlp.up_proj.weight", np.empty((512, 256), np.float32))


def test_names_are_those_of_the_gguf_package():
    # `gguf_tensors` asks the package; None would mean a name it does not know.
    assert None not in gguf_tensors(random_weights())


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_the_alignment_is_honoured(tmp_path, alignment):
    # A short name moves the end of the header.
    path = write_plain(tmp_path / "m.gguf", alignment=alignment, extra={"general.x": "y"})
    with open_checkpoint(path) as checkpoint:
        found = np.empty((512, 64), np.float32)
        checkpoint.read(TABLE, found)
    np.testing.assert_array_equal(found, random_weights()[TABLE])


def test_version_2_is_read_and_others_are_not(tmp_path):
    path = write_plain(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
    for version, message in [(1, "GGUF version 1;"), (4, "GGUF version 4;")]:
        path.write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
        with pytest.raises(UnsupportedError, match=message):
            open_checkpoint(path)
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_checkpoint(path)


def test_a_tied_head_is_accepted_and_rope_frequencies_are_left_aside(tmp_path):
    weights = random_weights()
    tensors = gguf_tensors(weights)
    tensors["output.weight"] = (weights[TABLE].copy(), None)
    tensors["rope_freqs.weight"] = (np.full(16, 3, np.float32), None)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == CONFIG.text


def test_a_type_that_is_not_read_is_named(tmp_path):
    tensors, _ = wide_tensors(T.Q8_K)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, WIDE)) as checkpoint:
        with pytest.raises(UnsupportedError) as caught:
            checkpoint.check()
        with pytest.raises(UnsupportedError, match=r"token_embd.weight is Q8_K"):
            checkpoint.read(TABLE, np.empty((1300, 256), np.float32))
    assert str(caught.value).endswith("not read: Q8_K (8, such as token_embd.weight)")


def test_one_error_lists_everything_that_is_wrong(tmp_path):
    tensors = gguf_tensors(random_weights())
    del tensors["output_norm.weight"]
    tensors["blk.3.attn_qq.weight"] = tensors.pop("blk.3.attn_q.weight")
    tensors["blk.2.attn_q_norm.weight"] = (np.zeros(31, np.float32), None)
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check()
        with pytest.raises(CheckpointError, match=r"blk.3.attn_q.weight: .*got no such tensor"):
            checkpoint.read("layers.3.self_attn.q_proj.weight", np.empty((128, 64), np.float32))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == [
        "misshapen: blk.2.attn_q_norm.weight is [31], expected [32]",
        "missing: blk.3.attn_q.weight [128, 64]",
        "missing: output_norm.weight [64]",
        "unexpected: blk.3.attn_qq.weight [128, 64] (nearest: blk.3.attn_q.weight)",
    ]


def test_files_that_are_not_a_whole_gemma_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'llama'"):
        open_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        open_checkpoint(path)
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(CheckpointError, match=r"not a GGUF file: it begins with b'PK"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gemma3.attention.sliding_window": "wide"}, "sliding_window"),
        ({"gemma3.attention.head_count": "4"}, "head"),
        ({"gemma3.block_count": 2**32 - 1}, "4294967295 layers, but only 93 tensors"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "wrong type|pattern"),
    ],
)
def test_metadata_that_makes_no_sense_is_an_error_of_gemlax(tmp_path, extra, message):
    path = write_plain(tmp_path / "m.gguf", extra=extra)
    start = time.monotonic()
    with pytest.raises(Error, match=message):
        open_checkpoint(path)
    assert time.monotonic() - start < 5


# The vocabulary.


def test_the_tokenizer_comes_from_the_file(tmp_path):
    path = write_plain(tmp_path / "m.gguf")
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer.num_tokens == 512
    assert tokenizer.add_bos
    ids = tokenizer.encode("ab aé")
    assert ids[0] == tokenizer.bos_id == 2
    assert tokenizer.decode(ids) == "ab aé"
    assert load_tokenizer(path).encode("ab aé") == ids


def test_another_kind_of_vocabulary_gives_no_tokenizer(tmp_path, caplog):
    extra = {"tokenizer.ggml.model": "gpt2", "gemma3.vocab_size": 512}
    path = write_plain(tmp_path / "m.gguf", vocabulary=False, extra=extra)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer() is None
        assert checkpoint.config.text.vocab_size == 512
    assert "its vocabulary is of kind 'gpt2'" in caplog.text
    with pytest.raises(UnsupportedError, match="no SentencePiece vocabulary"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "tokens must be an array of str"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens must be an array of str"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens must be an array of str"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.scores": ["1"]}, "an array of float"),
    ],
)
def test_a_damaged_vocabulary_is_named(tmp_path, extra, message):
    extra = extra | {"tokenizer.ggml.model": "llama", "gemma3.vocab_size": 512}
    path = write_plain(tmp_path / "m.gguf", vocabulary=False, extra=extra)
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=message):
        checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("extra", "gone"),
    [
        ({}, b"tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.padding_token_id": 2**32 - 1}, None),
        ({"tokenizer.ggml.unknown_token_id": 2**32 - 1}, None),
    ],
)
def test_what_a_vocabulary_leaves_unsaid_is_gemmas_own(tmp_path, extra, gone):
    expected = load_tokenizer(write_plain(tmp_path / "a.gguf"))
    path = write_plain(tmp_path / "m.gguf", extra=extra)
    if gone:
        path.write_bytes(path.read_bytes().replace(gone, b"x" * len(gone)))
    found = load_tokenizer(path)
    text = "ab <start_of_turn>é\n"
    assert found.encode(text) == expected.encode(text)
    assert (found.pad_id, found.unk_id) == (expected.pad_id, expected.unk_id)
    assert found.special_ids == expected.special_ids


@pytest.mark.parametrize("kind", [3, 4, 1])
def test_tokens_without_a_row_are_left_out_where_no_text_is_split_into_them(tmp_path, kind):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "gemma3")
    gguf_vocabulary(writer, 513)
    extra = {key: part.value for key, part in writer.kv_data[0].items() if "ggml" in key}
    extra["tokenizer.ggml.token_type"][-1] = kind
    path = write_plain(tmp_path / "m.gguf", vocabulary=False, extra=extra)
    with open_checkpoint(path) as checkpoint:
        if kind == 1:
            with pytest.raises(CheckpointError, match=r"expected \[513, "):
                checkpoint.check()
        else:
            checkpoint.check()
            assert checkpoint.config.text.vocab_size == 512


def test_a_wrong_id_is_named(tmp_path):
    path = write_plain(tmp_path / "m.gguf")
    data = path.read_bytes()
    key = b"tokenizer.ggml.bos_token_id"
    at = data.index(key) + len(key)
    path.write_bytes(data[:at] + struct.pack("<If", 6, 2.0) + data[at + 8 :])
    with pytest.raises(Error, match=r"bos_token_id"):
        load_tokenizer(path)


# Hostile headers, written byte by byte.


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def uint32(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + data


def tensor(name: str, dims=(8,), kind: int = 0, offset: int = 0, n_dims: int | None = None):
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def packed(values=(), tensors=(), data: int = 64, n_values=None, n_tensors=None) -> bytes:
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        3,
        len(tensors) if n_tensors is None else n_tensors,
        len(values) if n_values is None else n_values,
    )
    body = head + b"".join(values) + b"".join(tensors)
    return body + bytes(-len(body) % 32 + data)


BIG = 2**63
HOSTILE = {
    "values": (packed(n_values=BIG), "do not fit in the file"),
    "tensors": (packed(n_tensors=BIG), "do not fit in the file"),
    "both": (packed(n_values=2**64 - 1, n_tensors=2**64 - 1), "do not fit in the file"),
    "more values than there are": (packed([uint32("a", 1)], n_values=4), "byte"),
    "key beyond the end": (packed([struct.pack("<Q", BIG)]), "behind the file"),
    "key length 2^64-1": (packed([struct.pack("<Q", 2**64 - 1)]), "behind the file"),
    "key not UTF-8": (packed([text(b"\xff\xfe") + bytes(8)]), "not UTF-8"),
    "value type": (packed([text("a") + struct.pack("<I", 13)]), "a: value type 13 is not known"),
    "string beyond the end": (packed([text("a") + struct.pack("<IQ", 8, BIG)]), "behind the file"),
    "array count": (packed([array("a", 4, BIG)]), f"a: {BIG} of 4 bytes"),
    "array too long": (packed([array("a", 0, 97)], data=64), "a: 97 of 1 bytes, but 79 are left"),
    "array of strings": (packed([array("a", 8, 2**40)]), "strings do not fit"),
    "array of long strings": (packed([array("a", 8, 2, text("x") + struct.pack("<Q", 2**40))]),
                              "behind the file"),
    "array type": (packed([array("a", 99, 1)]), "a: value type 99"),
    "array of arrays": (packed([array("a", 9, 1, struct.pack("<IQ", 9, 1) * 5)]), "of arrays"),
    "key twice": (packed([uint32("a", 1), uint32("a", 2)]), "key a is there twice"),
    "alignment 0": (packed([uint32("general.alignment", 0)]), "alignment 0 is not a power of two"),
    "alignment 24": (packed([uint32("general.alignment", 24)]), "alignment 24 is not a power"),
    "alignment a list": (packed([array("general.alignment", 4, 0)]), "is not a power of two"),
    "no dimensions": (packed(tensors=[tensor("t", ())]), "t has 0 dimensions"),
    "5 dimensions": (packed(tensors=[tensor("t", (1,) * 5)]), "t has 5 dimensions"),
    "2^32-1 dimensions": (packed(tensors=[tensor("t", n_dims=2**32 - 1)]), "dimensions"),
    "zero": (packed(tensors=[tensor("t", (8, 0))]), r"\[0, 8\] is not made of F32"),
    "overflow": (packed(tensors=[tensor("t", (2**32, 2**32))]), "truncated"),
    "overflow to zero": (packed(tensors=[tensor("t", (BIG, BIG, 4, 4))]), "truncated"),
    "half a block": (packed(tensors=[tensor("t", (33,), 8)]), r"\[33\] is not made of Q8_0 blocks"),
    "type": (packed(tensors=[tensor("t", kind=4)]), r"not known: 4 \(1, such as t\)"),
    "type 2^31": (packed(tensors=[tensor("t", kind=2**31)]), "not known: 2147483648"),
    "two types": (packed(tensors=[tensor("t", kind=139), tensor("u", kind=5),
                                  tensor("v", kind=139)]),
                  r"not known: 139 \(2, such as t\), 5 \(1, such as u\)"),
    "not aligned": (packed(tensors=[tensor("t", offset=8)]), "starts at 8, not a multiple of 32"),
    "beyond the end": (packed(tensors=[tensor("t", offset=96)]), "truncated: t ends at byte"),
    "far beyond the end": (packed(tensors=[tensor("t", offset=2**64 - 32)]), "truncated"),
    "too long": (packed(tensors=[tensor("t", (17,))]), "truncated: t ends at byte"),
    "name twice": (packed(tensors=[tensor("t"), tensor("t", offset=32)]), "t is there twice"),
    "overlap": (packed(tensors=[tensor("t", (9,)), tensor("u", offset=32)]), "u overlaps t"),
    "same place": (packed(tensors=[tensor("t"), tensor("u")]), "u overlaps t"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_an_error_of_gemlax(tmp_path, case):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(Error, match=message) as caught:
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_the_builder_of_hostile_headers_makes_good_ones_too():
    data = packed(
        [uint32("a", 7), array("b", 8, 2, text("x") + text("é")), array("c", 7, 2, b"\0\1")],
        [tensor("t", (4, 2)), tensor("u", offset=32)],
    )
    metadata, tensors = parse_header(data, Path("x"))
    assert metadata == {"a": 7, "b": ["x", "é"], "c": [False, True]}
    end = len(data)
    assert [(n, t.shape, t.start, t.nbytes) for n, t in tensors.items()] == [
        ("t", (2, 4), end - 64, 32),
        ("u", (8,), end - 32, 32),
    ]


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    whole = write_plain(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    sizes = [*range(0, 3000, 61), *range(3000, len(whole), 5003), len(whole) - 1]
    for size in sizes:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_flipped_bytes_never_raise_anything_but_errors_of_gemlax(tmp_path):
    path = write_plain(tmp_path / "m.gguf")
    whole = path.read_bytes()
    length = len(whole) - sum(w.nbytes for w in random_weights().values())
    vocabulary = whole.index(b"tokenizer.ggml.tokens") - 8, whole.index(b"tokenizer.ggml.bos_token")
    rng = random.Random(0)
    refused, start = 0, time.monotonic()
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(length)
            while vocabulary[0] + 100 < at < vocabulary[1] and rng.random() < 0.9:
                at = rng.randrange(length)  # the pieces are most of the header
            data[at] = rng.choice([data[at] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)])
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as checkpoint:
                checkpoint.check()
                checkpoint.tokenizer()
                read_all(checkpoint)
        except Error:
            refused += 1
    assert 200 < refused < 600
    assert time.monotonic() - start < 60


# The real file.


def test_the_real_file_is_read_as_gguf_reads_it(gguf_path):
    golden = json.loads(GOLDEN.read_text())
    with open_checkpoint(gguf_path) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text.num_hidden_layers == 18
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 18)
        seen = {}
        for name, shape in text_weights(checkpoint.config.text).items():
            out = np.empty(shape, np.float32)
            checkpoint.read(name, out)
            other = names.get_name(f"model.{name}", try_suffixes=(".weight",))
            seen[other] = [list(shape), zlib.crc32(out)]
        assert seen == {name: row[1:] for name, row in golden.items()}
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer.num_tokens == 262_144


def test_the_real_file_needs_no_more_memory_than_the_weights(gguf_path):
    with open_checkpoint(gguf_path) as checkpoint:
        out = np.zeros((262_144, 640), np.float32)
        tracemalloc.start()
        checkpoint.read(TABLE, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * 2**20
