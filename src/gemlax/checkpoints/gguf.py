"""GGUF files, as llama.cpp writes them: config, vocabulary and dequantised weights.

A model is one file, or several parts of one. What its header says of the files is checked in
gguf_header.py and gguf_parts.py.
"""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemlax.checkpoints.base import (
    FLOATS,
    NOT_FINITE,
    Checkpoint,
    Piece,
    Ranges,
    Tensor,
    fit_vocab,
    refuse_drafter,
    resolve_config,
)
from gemlax.checkpoints.gguf_defaults import (
    find_template,
    read_sampling,
    read_stops,
    read_suppressed,
)
from gemlax.checkpoints.gguf_header import MAGIC, parse_header
from gemlax.checkpoints.gguf_parts import open_parts
from gemlax.config import GemmaConfig, edit, from_gguf
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import Coded, Format
from gemlax.names import Weight
from gemlax.tokenizer import Tokenizer
from gemlax.tokenizer.vocabulary import BYTE, Kind

__all__ = [
    "KEPT",
    "MAGIC",
    "QUANTISED",
    "GGUFCheckpoint",
    "Vocabulary",
    "load_tokenizer",
    "parse_header",
    "read_vocabulary",
]

logger = logging.getLogger(__name__)

TABLE, HEAD = "token_embd.weight", "output.weight"
# llama.cpp's Gemma 3 does not read it; Gemma 4's must say what the config says.
ROPE = "rope_freqs.weight"
# What the frequencies that stand still are divided by. Source: llama.cpp conversion/gemma.py.
STILL = 1e30
# All quantised types that gguf 0.19.0 decodes.
QUANTISED = frozenset({
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
})  # fmt: skip
# Those whose blocks `formats` decodes, and at which byte of a block each float16 scale begins.
# Source: ggml-common.h.
KEPT: dict[str, Format] = {
    "Q8_0": "q8_0", "Q4_0": "q4_0", "Q5_0": "q5_0", "Q4_K": "q4_k", "Q6_K": "q6_k",
}  # fmt: skip
_SCALES_AT = {"Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
# No weight of the decoder is one; others may lie beside them.
INTEGERS = ("I8", "I16", "I32", "I64")
# Kinds of vocabulary that are SentencePiece's. Source: llama.cpp conversion/gemma.py.
VOCABULARIES = ("llama", "gemma4")
# Encoders and what joins them to the decoder: ollama has them in the model's file, llama.cpp in
# one of their own. Source: ollama, convert/convert_gemma3.go and convert_gemma4.go.
OTHER_PARTS = ("v.", "mm.", "a.")
# What a weight is times, beside it; and what llama.cpp scales the input by before it rounds that.
SCALE, INPUT_SCALE = ".scale", ".input_scale"
# What the output of a layer is times; where it is not there, 1. Source: llama.cpp, gemma4.cpp.
OUTPUT_SCALE = ".layer_output_scale.weight"
# Types of tokens that no text is split into: control, user-defined, unused.
NO_TEXT = {3, 4, 5}
# How uint32 writes -1: no such token.
NO_ID = (-1, 2**32 - 1)


class Vocabulary(NamedTuple):
    """The arguments of `Tokenizer.from_vocabulary`."""

    pieces: list[str]
    scores: list[float]
    token_types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    add_bos: bool
    merges: list[str] | None


class GGUFCheckpoint(Checkpoint):
    """A .gguf file, or any part of a model that is split over several."""

    stored_dtype = "gguf"
    _types = QUANTISED | FLOATS.keys()
    _other_parts = OTHER_PARTS

    def __init__(self, path: Path):
        self.source = path
        self._maps, self.metadata, self._tensors = open_parts(path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        architecture = self.metadata.get("general.architecture")
        refuse_drafter(architecture, self.source)
        _refuse_encoder(self.metadata, self._tensors, self.source)
        config = resolve_config(
            lambda: from_gguf(self._fitted(f"{architecture}.vocab_size")),
            layers=self.metadata.get(f"{architecture}.block_count"),
            tensors=len(self._tensors),
            source=self.source,
        )
        self.config = config = self._corrected(config)
        self.generation_config = read_sampling(self.metadata, self.source)
        suppressed = read_suppressed(self.metadata, config.text.vocab_size, self.source)
        self.generation_config |= {"suppress_tokens": suppressed} if suppressed else {}
        self._scales = self._find_scales()
        tied = [HEAD] if config.text.tie_word_embeddings else []
        self._set_aside({ROPE, *self._scales, *tied}, "integers and scales of inputs")
        unscaled = [w.gguf for w in self._weights.values() if not self._pieces(w)]
        if unscaled:
            logger.info("%s: %s is not there and taken as 1", self.source, ", ".join(unscaled))

    def _fitted(self, key: str) -> Mapping[str, Any]:
        """Return the metadata with the table's rows, where the last tokens have none.

        ollama leaves those of images in the list. Source: llama-ollama-compat.cpp.
        """
        tokens, kinds = (self.metadata.get(f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
        rows = self._tensors[TABLE].shape[0] if TABLE in self._tensors else 0
        if not (isinstance(tokens, list) and isinstance(kinds, list)) or key in self.metadata:
            return self.metadata
        cut = kinds[rows:]
        if not 0 < rows < len(tokens) or len(kinds) != len(tokens) or not set(cut) <= NO_TEXT:
            return self.metadata
        logger.info("%s: the last %d tokens have no row in the table", self.source, len(cut))
        return self.metadata | {key: rows}

    def _find_scales(self) -> set[str]:
        """Return the names of those tensors that a weight is multiplied by."""
        expected = self._all_pieces().keys()
        scaled = {n for n in self._tensors if n.removesuffix(SCALE) + ".weight" in expected}
        return {name for name in scaled - expected if name.endswith(SCALE)}

    def _is_no_weight(self, name: str, tensor: Tensor) -> bool:
        return tensor.type in INTEGERS or name.endswith(INPUT_SCALE)

    def _corrected(self, config: GemmaConfig) -> GemmaConfig:
        """Return the config with what the tensors say and the header does not.

        Full layers without a tensor of values make these of their keys. A head in another
        quantised type than the table's is one of its own, since its numbers are others: llama.cpp
        reads it, too. Source: llama.cpp, src/models/gemma3.cpp.
        """
        table, head = self._tensors.get(TABLE), self._tensors.get(HEAD)
        config = fit_vocab(config, table.shape[0] if table else None)
        specs, changes = config.text.layers, dict[str, Any]()
        owners = [i for i, s in enumerate(specs) if s.kind == "full_attention" and s.owns_kv]
        if config.text.v_norm and not any(
            f"blk.{i}.attn_v.weight" in self._tensors for i in owners
        ):
            changes["attention_k_eq_v"] = True
        if head is not None and table is not None and not self._is_copy(head, table):
            changes["tie_word_embeddings"] = False
        if stops := read_stops(self.metadata, config.text.vocab_size, self.source):
            changes["eos_token_id"] = stops
        return edit(config, **changes)

    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer from the vocabulary in the file; None if it has none of that kind."""
        vocabulary = read_vocabulary(self.metadata, self.source)
        return Tokenizer.from_vocabulary(**vocabulary._asdict()) if vocabulary else None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template in the file's metadata, or None."""
        return find_template(self.metadata, self.source)

    def _stored_name(self, weight: Weight) -> str:
        return weight.gguf

    def _pieces(self, weight: Weight) -> list[Piece]:
        if weight.gguf not in self._tensors:
            if weight.gguf.endswith(OUTPUT_SCALE):
                return []
            # Source: llama.cpp, src/models/gemma4.cpp (`ffn_gate_exps`, `ffn_up_exps`).
            names = [weight.gguf.replace("gate_up", half) for half in ("gate", "up")]
            if "gate_up" in weight.gguf and names[0] in self._tensors:
                experts, rows, width = weight.shape
                shape = (experts, rows // 2, width)
                return [Piece(name, shape, row=i * rows // 2) for i, name in enumerate(names)]
        return [Piece(weight.gguf, weight.shape)]

    def _other_problems(self) -> list[str]:
        """Compare the divisors of the frequencies with the config, which is made without them."""
        spec = self.config.text.first("full_attention")
        if ROPE not in self._tensors or spec is None or spec.rope.rotated == 1.0:
            return []
        tensor, pairs = self._tensors[ROPE], spec.head_dim // 2
        turning = round(pairs * spec.rope.rotated)
        expected = np.repeat([1.0, STILL], [turning, pairs - turning]).astype(np.float32)
        stored = tensor.type == "F32" and tensor.shape == expected.shape
        if not stored or not np.array_equal(self._array(tensor, FLOATS["F32"]), expected):
            raise UnsupportedError(
                f"{self.source}: {ROPE} must be {turning} ones and {pairs - turning} times "
                f"{STILL}; another rope is not supported"
            )
        return []

    def _ranges(self, piece: Piece, tensor: Tensor, weight: Weight) -> Ranges:
        """Return what gives ranges of a tensor, scaled and without its offset."""
        decode, scale = self._decoder(tensor), self._scale(piece)
        offset, row = np.float32(weight.gguf_offset), math.prod(piece.shape[1:])
        if not offset and scale is None:
            return decode

        def changed(start: int, stop: int) -> np.ndarray:
            values = decode(start, stop).astype(np.float32)
            if scale is not None:
                values *= scale[np.arange(start, stop) // row] if scale.size > 1 else scale
            return values - offset

        return changed

    def _decoder(self, tensor: Tensor) -> Ranges:
        if tensor.type in FLOATS:
            floats = self._array(tensor, FLOATS[tensor.type])
            return lambda start, stop: floats[start:stop]
        kind, stored = GGMLQuantizationType[tensor.type], self._array(tensor, np.dtype(np.uint8))
        size, nbytes = GGML_QUANT_SIZES[kind]

        def decode(start: int, stop: int) -> np.ndarray:
            # One row: `dequantize` loops in Python over groups of 16 rows.
            blocks = stored[start // size * nbytes : stop // size * nbytes].reshape(1, -1)
            return dequantize(blocks, kind).reshape(-1)

        return decode

    def _scale(self, of: Piece) -> np.ndarray | None:
        """Return what a tensor is multiplied by: one number, or one for each expert.

        Source: llama.cpp, src/llama-model.cpp, "optional per-tensor/per-expert .scale tensors".
        """
        name = of.tensor.removesuffix(".weight") + SCALE
        if name not in self._scales:
            return None
        tensor = self._tensors[name]
        sizes = {(1,), of.shape[:1]} if len(of.shape) > 2 else {(1,)}
        if tensor.type != "F32" or tensor.shape not in sizes:
            raise CheckpointError(
                f"{self.source}: {name} is {tensor.type} {list(tensor.shape)}; expected F32, one "
                f"number{' or one for each expert' if len(sizes) > 1 else ''}"
            )
        return self._array(tensor, FLOATS["F32"])

    def stored(self, name: str) -> Coded | None:
        """Return the blocks of a quantised matrix, [..., out, bytes], byte for byte."""
        pieces = self._pieces(self._weights[name])
        tensors = [self._tensors.get(piece.tensor) for piece in pieces]
        kinds = {tensor.type for tensor in tensors if tensor is not None}
        if len(kinds) != 1 or not kinds <= KEPT.keys():
            return None
        (kind,) = kinds
        blocks = []
        for tensor, piece in zip(tensors, pieces, strict=True):
            if tensor is None or tensor.shape != piece.shape or self._scale(piece) is not None:
                return None
            data = self._array(tensor, np.dtype(np.uint8))
            halves = data.view(np.uint16)
            halves = halves.reshape(-1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1] // 2)
            if any((halves[:, at // 2] & 0x7C00 == 0x7C00).any() for at in _SCALES_AT[kind]):
                raise CheckpointError(f"{self.source}: {piece.tensor} {NOT_FINITE}")
            blocks.append(data.reshape(*tensor.shape[:-1], -1))
        codes = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        return Coded(KEPT[kind], codes)


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file of any size of model; no weight is touched."""
    maps, metadata, _ = open_parts(path)
    for data in maps:
        data.close()
    vocabulary = read_vocabulary(metadata, path)
    if vocabulary is None:
        raise UnsupportedError(f"{path} has no SentencePiece vocabulary")
    return Tokenizer.from_vocabulary(**vocabulary._asdict())


def _refuse_encoder(metadata: Mapping[str, Any], names: Collection[str], source: Path) -> None:
    """Raise UnsupportedError for what lies beside a model: encoders, adapters, importance."""
    kind, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    if architecture == "clip" or kind == "mmproj":
        raise UnsupportedError(
            f"{source} holds the encoders of a multimodal model (mmproj), not the model; give the "
            "model's own .gguf file"
        )
    if kind == "adapter":
        raise UnsupportedError(
            f"{source} is an adapter (LoRA) in GGUF, which is not read; give the model, with "
            "adapters= a folder as peft writes it"
        )
    if kind == "imatrix" or (names and all(n.endswith((".in_sum2", ".counts")) for n in names)):
        raise UnsupportedError(
            f"{source} is an importance matrix (imatrix), which is for making quantised files; "
            "give the model"
        )


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary | None:
    """Return the SentencePiece vocabulary of a file; None if it has none or another kind."""
    own = {k[15:]: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    model = own.get("model")
    if model not in VOCABULARIES:
        logger.warning("%s: no tokenizer: its vocabulary is of kind %r", path, model)
        return None
    for key in ("add_eos_token", "add_space_prefix"):
        if own.get(key):
            raise UnsupportedError(
                f"{path}: tokenizer.ggml.{key} is true: it adds to every text what Gemma never saw"
            )
    merges = _list(own, "merges", str, path) if "merges" in own else None
    unscored = merges is not None and "scores" not in own
    pieces = _list(own, "tokens", str, path)
    return Vocabulary(
        pieces=pieces,
        scores=[] if unscored else _list(own, "scores", float, path),
        token_types=_list(own, "token_type", int, path)
        if "token_type" in own
        else _kinds(pieces, path),
        bos_id=_id(own, "bos_token_id", 2, path),
        eos_id=_id(own, "eos_token_id", 1, path),
        unk_id=_id(own, "unknown_token_id", 3, path),
        pad_id=_id(own, "padding_token_id", 0, path),
        add_bos=bool(own.get("add_bos_token", True)),
        merges=merges,
    )


def _kinds(pieces: list[str], path: Path) -> list[int]:
    """Return types by name, where a file has none: bytes are bytes; markers the tokenizer knows."""
    logger.warning("%s: its tokens have no types; they are told by name", path)
    return [Kind.BYTE if BYTE.fullmatch(piece) else Kind.NORMAL for piece in pieces]


def _list(own: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    value = own.get(key)
    kinds = {kind, int} if kind is float else {kind}
    if not isinstance(value, list) or not kinds.issuperset(map(type, value)):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be an array of {kind.__name__}")
    return value


def _id(own: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = own.get(key, default)
    if value in NO_ID and key in ("padding_token_id", "unknown_token_id"):
        value = default  # neither is ever generated; Gemma has both
    if type(value) is not int:
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} must be an integer, got {value!r}")
    return value
