"""GGUF files, as llama.cpp writes them: config, vocabulary and dequantised weights.

A model is one file, or several parts of one. What its header says of the files is checked in
gguf_header.py and gguf_parts.py.
"""

import contextlib
import logging
import math
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.checkpoints.base import (
    NOT_FINITE,
    Checkpoint,
    fill,
    fit_vocab,
    grouped,
    log_left_aside,
    refuse_drafter,
    resolve_config,
    same_bytes,
    same_rounded,
)
from gemlax.checkpoints.experts import Part, fill_parts, gguf_parts
from gemlax.checkpoints.gguf_defaults import (
    find_template,
    read_sampling,
    read_stops,
    read_suppressed,
)
from gemlax.checkpoints.gguf_header import MAGIC, Tensor, parse_header
from gemlax.checkpoints.gguf_parts import open_parts
from gemlax.checkpoints.gguf_types import (
    FLOATS,
    INTEGERS,
    KEPT,
    QUANTISED,
    T,
    decoder,
    has_finite_scales,
)
from gemlax.config import GemmaConfig, edit, from_gguf
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import Coded
from gemlax.names import Weight, unused
from gemlax.tokenizer import Tokenizer
from gemlax.tokenizer.vocabulary import BYTE, Kind

__all__ = [
    "MAGIC",
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
        self._aside = self._find_aside()
        self._unused = {weight.gguf for weight in unused(self.config.text)}
        idle = sorted(self._unused & self._tensors.keys())
        log_left_aside(logger, self.source, idle, "layers that read the K/V of another")
        unscaled = [w.gguf for w in self._weights.values() if not self._lies_in(w)]
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

    def _find_aside(self) -> set[str]:
        """Return the tensors that are not the text decoder's."""
        expected = self._expected()
        encoders = [name for name in self._tensors if name.startswith(OTHER_PARTS)]
        log_left_aside(logger, self.source, encoders, "other parts than the text decoder")
        others = [
            name
            for name, tensor in self._tensors.items()
            if name not in expected
            and (tensor.type in INTEGERS or name.endswith(INPUT_SCALE))
            and name not in encoders
        ]
        log_left_aside(logger, self.source, others, "integers and scales of inputs")
        return {*encoders, *others, *self._scales(expected)}

    def _scales(self, expected: Mapping[str, Any]) -> list[str]:
        """Return the names of those tensors that a weight is multiplied by."""
        own = (n.removesuffix(SCALE) + ".weight" for n in self._tensors if n.endswith(SCALE))
        scales = (name.removesuffix(".weight") + SCALE for name in own if name in expected)
        return [name for name in scales if name not in expected]

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
        if head is not None and table is not None and not self._is_table(head, table):
            changes["tie_word_embeddings"] = False
        if stops := read_stops(self.metadata, config.text.vocab_size, self.source):
            changes["eos_token_id"] = stops
        return edit(config, **changes)

    def _is_table(self, head: Tensor, table: Tensor) -> bool:
        """Tell whether a head is the table, rounded to the head's type where that is another."""
        if head[:2] == table[:2]:  # type and shape
            maps = self._map(head), self._map(table)
            return same_bytes(maps[0], head.start, maps[1], table.start, head.nbytes)
        if head.shape != table.shape or not {head.type, table.type} <= FLOATS.keys():
            return False
        floats = (
            np.frombuffer(self._map(t), FLOATS[t.type], math.prod(t.shape), t.start)
            for t in (head, table)
        )
        return same_rounded(*floats)

    def tokenizer(self) -> Tokenizer | None:
        """Build the tokenizer from the vocabulary in the file; None if it has none of that kind."""
        vocabulary = read_vocabulary(self.metadata, self.source)
        return Tokenizer.from_vocabulary(**vocabulary._asdict()) if vocabulary else None

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template in the file's metadata, or None."""
        return find_template(self.metadata, self.source)

    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""
        for data in self._maps:
            # A traceback may still hold a view; then the map goes when the view does.
            with contextlib.suppress(BufferError):
                data.close()

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {n: s for w in self._weights.values() for n, s in self._lies_in(w).items()}

    def _stored_name(self, weight: Weight) -> str:
        return weight.gguf

    def _lies_in(self, weight: Weight) -> dict[str, tuple[int, ...]]:
        """Return the tensors that a weight lies in; none: it is 1."""
        if weight.gguf in self._tensors:
            return {weight.gguf: weight.shape}
        if weight.gguf.endswith(OUTPUT_SCALE):
            return {}
        parts = gguf_parts(weight, self._tensors)
        return {part.tensor: part.shape for part in parts} or {weight.gguf: weight.shape}

    def _found(self) -> dict[str, tuple[int, ...]]:
        tied = [HEAD] if self.config.text.tie_word_embeddings else []
        aside = {ROPE, *self._unused, *self._aside, *tied}
        return {n: tensor.shape for n, tensor in self._tensors.items() if n not in aside}

    def _check_types(self) -> None:
        wrong: dict[str, list[str]] = {}
        for name in self._expected():
            tensor = self._tensors.get(name)
            if tensor is not None and tensor.type not in FLOATS.keys() | QUANTISED:
                wrong.setdefault(tensor.type.name, []).append(name)
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds weights in types that are not read: {grouped(wrong)}"
            )
        self._check_rope()

    def _check_rope(self) -> None:
        """Compare the divisors of the frequencies with the config, which is made without them."""
        spec = self.config.text.first("full_attention")
        if ROPE not in self._tensors or spec is None or spec.rope.rotated == 1.0:
            return
        tensor, pairs = self._tensors[ROPE], spec.head_dim // 2
        turning = round(pairs * spec.rope.rotated)
        expected = np.repeat([1.0, STILL], [turning, pairs - turning]).astype(np.float32)
        stored = tensor.type == T.F32 and tensor.shape == expected.shape
        if not stored or not np.array_equal(self._decoder(ROPE, tensor)(0, pairs), expected):
            raise UnsupportedError(
                f"{self.source}: {ROPE} must be {turning} ones and {pairs - turning} times "
                f"{STILL}; another rope is not supported"
            )

    def _map(self, tensor: Tensor) -> mmap.mmap:
        return self._maps[tensor.part]

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        lies = self._lies_in(weight)
        if not lies:
            out[...] = 1
        elif weight.gguf in lies:
            values = self._values(weight.gguf, weight.shape, weight.gguf_offset)
            fill(out, values, weight.gguf)
        else:

            def of_part(part: Part) -> Callable[[int, int], np.ndarray]:
                return self._values(part.tensor, part.shape)

            fill_parts(out, gguf_parts(weight, self._tensors), of_part)

    def _values(
        self, name: str, shape: tuple[int, ...], offset: float = 0.0
    ) -> Callable[[int, int], np.ndarray]:
        """Return what gives elements [a, b) of a tensor, scaled and without its offset."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(f"{self.source}: {name}: expected {list(shape)}, got {got}")
        decode, scale = self._decoder(name, tensor), self._scale(name, shape)
        if not offset and scale is None:
            return decode
        row = int(np.prod(shape[1:]))

        def changed(start: int, stop: int) -> np.ndarray:
            values = decode(start, stop).astype(np.float32)
            if scale is not None:
                values = values * (
                    scale[np.arange(start, stop) // row] if scale.size > 1 else scale
                )
            return values - np.float32(offset)

        return changed

    def _scale(self, of: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return what a tensor is multiplied by: one number, or one for each expert.

        Source: llama.cpp, src/llama-model.cpp, "optional per-tensor/per-expert .scale tensors".
        """
        name = of.removesuffix(".weight") + SCALE
        if name not in self._aside:
            return None
        tensor = self._tensors[name]
        sizes: set[tuple[int, ...]] = {(1,)}
        if len(shape) > 2:
            sizes.add(shape[:1])
        if tensor.type != T.F32 or tensor.shape not in sizes:
            raise CheckpointError(
                f"{self.source}: {name} is {tensor.type.name} {list(tensor.shape)}; expected F32, "
                f"one number{' or one for each expert' if len(sizes) > 1 else ''}"
            )
        return self._decoder(name, tensor)(0, tensor.shape[0])

    def stored(self, name: str) -> Coded | None:
        """Return the blocks of a quantised matrix, [..., out, bytes], byte for byte."""
        lies = self._lies_in(self._weights[name])
        tensors = [self._tensors.get(own) for own in lies]
        kinds = {tensor.type for tensor in tensors if tensor is not None}
        if len(kinds) != 1 or not kinds <= KEPT.keys():
            return None
        blocks = []
        for tensor, (own, shape) in zip(tensors, lies.items(), strict=True):
            if tensor is None or tensor.shape != shape or self._scale(own, shape) is not None:
                return None
            data = np.frombuffer(self._map(tensor), np.uint8, tensor.nbytes, tensor.start)
            if not has_finite_scales(data, tensor.type):
                raise CheckpointError(f"{self.source}: {own} {NOT_FINITE}")
            blocks.append(data.reshape(*tensor.shape[:-1], -1))
        codes = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        return Coded(KEPT[kinds.pop()], codes)

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        tensors = (self._tensors.get(own) for own in self._lies_in(self._weights[name]))
        return all(tensor is None or tensor.type in FLOATS for tensor in tensors)

    def _decoder(self, name: str, tensor: Tensor) -> Callable[[int, int], np.ndarray]:
        """Return a function that gives elements [a, b) of a tensor; a is a block's first."""
        if tensor.type not in FLOATS.keys() | QUANTISED:
            raise UnsupportedError(
                f"{self.source}: {name} is {tensor.type.name}, which is not read"
            )
        return decoder(self._map(tensor), tensor)


def load_tokenizer(path: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file of any size of model; no weight is touched.

    Raises:
        CheckpointError: the file or its vocabulary is damaged.
        UnsupportedError: it has no SentencePiece vocabulary.
    """
    maps, metadata, _ = open_parts(path)
    for data in maps:
        data.close()
    vocabulary = read_vocabulary(metadata, path)
    if vocabulary is None:
        raise UnsupportedError(f"{path} has no SentencePiece vocabulary")
    return Tokenizer.from_vocabulary(**vocabulary._asdict())


def _refuse_encoder(metadata: Mapping[str, Any], names: Mapping[str, Any], source: Path) -> None:
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


# --- the vocabulary ----------------------------------------------------------------------------


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary | None:
    """Return the SentencePiece vocabulary of a file; None if it has none or another kind.

    Raises:
        CheckpointError: a part of it is missing or of the wrong type.
    """
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
