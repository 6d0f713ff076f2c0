"""Hugging Face folders: config.json and *.safetensors, read in place.

Matrices may lie there as codes: codes.py says how.

The header is parsed here rather than by the `safetensors` package so that a damaged file is
named with what is wrong in it, and so that a weight can be read range by range.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import contextlib
import json
import logging
import math
import mmap
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemlax.checkpoints.base import (
    BFLOAT16,
    Checkpoint,
    fill,
    fit_vocab,
    grouped,
    log_left_aside,
    read_json,
    refuse_drafter,
    resolve_config,
    same_bytes,
    same_rounded,
    show,
)
from gemlax.checkpoints.codes import (
    CODES,
    KEY,
    SCALES,
    Entry,
    check_formats,
    disagree,
    entries,
    read_formats,
)
from gemlax.checkpoints.experts import Part, fill_parts, huggingface_parts
from gemlax.checkpoints.shards import INDEX, choose_files
from gemlax.checkpoints.stand_ins import refuse_stand_in, refuse_stand_ins
from gemlax.checkpoints.wrappers import explain_names
from gemlax.config import edit, from_hf
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import FORMATS, Coded, decode
from gemlax.names import HEAD, Weight, text_weights, unused
from gemlax.tokenizer import Tokenizer, find_tokenizer
from gemlax.tokenizer.load import FILES

__all__ = [
    "DTYPES",
    "INDEX",
    "OTHER_PARTS",
    "READ",
    "SafetensorsCheckpoint",
    "main_dtype",
    "parse_header",
    "read_tensors",
]

logger = logging.getLogger(__name__)

# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
# Floats that are read and not written.
FLOATS = DTYPES | {"F64": np.dtype(np.float64)}
# With those of codes.
READ = DTYPES | {
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "U16": np.dtype(np.uint16),
}  # fmt: skip
# Bits of one element. Source: safetensors 0.8, tensor.rs, Dtype.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# Where the text decoder's names begin: text-only, multimodal as published, as transformers 5
# writes it, bare, as the multimodal model without a head writes it, and wrapped once more.
PREFIXES = (
    "model.", "language_model.model.", "model.language_model.", "", "language_model.",
    "model.model.", "model.language_model.model.",
)  # fmt: skip
LM_HEADS = (
    HEAD, "language_model.lm_head.weight", "model.lm_head.weight",
    "model.language_model.lm_head.weight",
)  # fmt: skip
# Encoders, what joins them to the decoder, and a drafter.
# Source: transformers 5.23.0, modeling_gemma3.py, modeling_gemma4.py, modeling_gemma4_unified.py.
OTHER_PARTS = (
    "vision_tower.", "multi_modal_projector.", "embed_vision.", "vision_embedder.",
    "audio_tower.", "embed_audio.", "assistant.",
)  # fmt: skip
# Where some trainers have the experts, in place of "experts.". Source: vllm #41206.
MOE = ".moe.experts."
# Numbers that modules make of the config, and that some versions store with the weights.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\w*\.\w+|inv_freq|embed_scale|position_ids|attention_mask|causal_mask"
    r"|masked_bias|num_batches_tracked|(k|v|q|attn)_scale|activation_post_process\..+"
    r"|(input|output|k_bmm|v_bmm|q_bmm)_quantizer\._amax)"
)
# No weight of the decoder is one; others may lie beside them. (Of bytes there may be codes.)
INTEGERS = {"BOOL", "I16", "U16", "I32", "U32", "I64", "U64"}


class Tensor(NamedTuple):
    """One tensor of a file: `start` and `nbytes` are in bytes from the file's start."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or its shards and their index."""

    def __init__(self, folder: Path, file: str | None = None):
        """With `file`, that one is read, whatever else the folder holds."""
        self.source = folder
        self._file = file
        self._maps: dict[str, mmap.mmap] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = self.source / "config.json"
        config = read_json(path)
        refuse_drafter(config.get("model_type"), self.source)
        self._formats = read_formats(config, path)
        self.keeps_codes = bool(self._formats)
        config.pop(KEY, None)
        self._tensors = self._read_headers()
        text = config.get("text_config", config)
        resolved = resolve_config(
            lambda: from_hf(config),
            layers=text.get("num_hidden_layers") if isinstance(text, dict) else None,
            tensors=len(self._tensors),
            source=path,
        )
        names = text_weights(resolved.text)
        self._prefix = self._find_prefix(names)
        self._unused = {self._prefix + weight.name for weight in unused(resolved.text)}
        idle = sorted(self._unused & self._tensors.keys())
        log_left_aside(logger, self.source, idle, "layers that read the K/V of another")
        self._head, self._idle_heads, tied = self._find_head(resolved.text.tie_word_embeddings)
        table = self._table()
        resolved = fit_vocab(resolved, table.shape[0] if table and table.shape else None)
        self.config = edit(resolved, tie_word_embeddings=tied)
        generation = self.source / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        check_formats(self._formats, text_weights(self.config.text), path)
        self._aside = self._find_aside()
        self.stored_dtype = main_dtype((t.dtype, t.nbytes) for t in self._text().values())
        if self._formats:
            self.stored_dtype = ", ".join(sorted(set(self._formats.values())))

    def _find_prefix(self, names: Collection[str]) -> str:
        """Return what stands before the decoder's names in the files."""
        counts = {p: sum(p + name in self._tensors for name in names) for p in PREFIXES}
        prefix = max(PREFIXES, key=counts.__getitem__)
        if counts[prefix] < len(names) and not self._formats:
            text = [name for name in self._tensors if not _is_other_part(name)]
            reason = explain_names(text, names, PREFIXES)
            if reason is not None:
                raise CheckpointError(f"{self.source} cannot be read: {show(reason, 600)}")
        if prefix in PREFIXES[4:]:
            logger.info("%s: names begin with %r, which is read as 'model.'", self.source, prefix)
        return prefix

    def _read_headers(self) -> dict[str, Tensor]:
        files = [self._file] if self._file is not None else choose_files(self.source)
        tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in self._read_file(file).items():
                if name in tensors and not self._are_same(tensor, tensors[name]):
                    raise CheckpointError(
                        f"{self.source}: {tensors[name].file} and {file} both hold {show(name)}, "
                        "and they differ; keep the one that is right"
                    )
                tensors.setdefault(name, tensor)
        moved = {name: name.replace(MOE, ".experts.") for name in tensors if MOE in name}
        if moved.keys() & tensors.keys() and not set(moved.values()) & tensors.keys():
            logger.info("%s: %r in names is read as '.experts.'", self.source, MOE)
            tensors = {moved.get(name, name): tensor for name, tensor in tensors.items()}
        return tensors

    def _are_same(self, a: Tensor, b: Tensor) -> bool:
        return a[1:3] == b[1:3] and same_bytes(  # dtype and shape
            self._maps[a.file], a.start, self._maps[b.file], b.start, a.nbytes
        )

    def _read_file(self, file: str) -> dict[str, Tensor]:
        path = self.source / file
        refuse_stand_in(path)
        with path.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps[file] = data
        return parse_header(data, path)

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the folder, or None."""
        refuse_stand_ins(self.source, FILES)
        return find_tokenizer(self.source)

    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""
        for data in self._maps.values():
            # A traceback may still hold a view; then the map goes when the view does.
            with contextlib.suppress(BufferError):
                data.close()
        self._maps = {}

    def _find_aside(self) -> set[str]:
        """Return the tensors that are not parameters of the text decoder."""
        expected = self._expected()
        encoders = [name for name in self._tensors if _is_other_part(name)]
        log_left_aside(logger, self.source, encoders, "other parts than the text decoder")
        aside = set(encoders)
        buffers = [
            name
            for name, tensor in self._tensors.items()
            if name not in expected.keys() | aside | self._unused
            and (BUFFERS.fullmatch(name) or tensor.dtype in INTEGERS)
        ]
        log_left_aside(logger, self.source, buffers, "buffers, which are not parameters")
        return {*encoders, *buffers}

    def _text(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in self._tensors.items()
            if name not in self._idle_heads | self._unused | self._aside
        }

    def _find_head(self, said_tied: bool) -> tuple[str, set[str], bool]:
        """Return where the head lies, what of heads is not read, and whether the table is the head.

        A head that is not the table counts, whatever the config says; and where the head alone is
        stored, it is the table. Source: transformers 5.23.0, modeling_utils.py, tie_weights.
        """
        heads = [name for name in LM_HEADS if name in self._tensors]
        table = self._table()
        if said_tied and heads and table is None:
            logger.info("%s: %s is the table, too, which is not stored", self.source, heads[0])
            table = self._tensors[f"{self._prefix}embed_tokens.weight"] = self._tensors[heads[0]]
        same = {n for n in heads if said_tied and table and self._is_copy(self._tensors[n], table)}
        others = [name for name in heads if name not in same]
        if not others:
            return HEAD, same, said_tied
        if said_tied:
            logger.info(
                "%s: config.json says that the head is the table, but %s differs from it and is "
                "used", self.source, others[0],
            )  # fmt: skip
        head = self._tensors[others[0]]
        return others[0], {n for n in others[1:] if self._is_copy(self._tensors[n], head)}, False

    def _is_copy(self, copy: Tensor, of: Tensor) -> bool:
        """Tell whether floats are those of another tensor, rounded where the type is another."""
        if copy.shape != of.shape or not {copy.dtype, of.dtype} <= FLOATS.keys():
            return False
        if copy.dtype == of.dtype:
            maps = self._maps[copy.file], self._maps[of.file]
            return same_bytes(maps[0], copy.start, maps[1], of.start, copy.nbytes)
        floats = (
            np.frombuffer(self._maps[t.file], FLOATS[t.dtype], math.prod(t.shape), t.start)
            for t in (copy, of)
        )
        return same_rounded(*floats)

    def _lies_as(self, name: str) -> str:
        """Return what the file calls a weight, or a part of its codes."""
        if name.startswith(HEAD):
            return self._head + name.removeprefix(HEAD)
        return self._prefix + name

    def _table(self) -> Tensor | None:
        name = f"{self._prefix}embed_tokens.weight"
        return self._tensors.get(name) or self._tensors.get(name + CODES)

    def _expected(self) -> dict[str, tuple[int, ...]]:
        return {
            name: shape
            for weight in self._weights.values()
            for name, shape in self._lies_in(weight)
        }

    def _stored_name(self, weight: Weight) -> str:
        return self._lies_as(weight.name)

    def _lies_in(self, weight: Weight) -> list[tuple[str, tuple[int, ...]]]:
        """Return the tensors that a weight lies in, with their shapes."""
        parts = self._parts(weight)
        if parts:
            return [(part.tensor, part.shape) for part in parts]
        return [(self._lies_as(n), entry.shape) for n, entry in self._entries(weight).items()]

    def _parts(self, weight: Weight) -> list[Part]:
        """Return the tensors that experts lie in apart; none: they do not."""
        if weight.name in self._formats or self._prefix + weight.name in self._tensors:
            return []
        return huggingface_parts(weight, self._tensors, self._prefix)

    def _entries(self, weight: Weight) -> dict[str, Entry]:
        return entries(weight.name, weight.shape, self._formats.get(weight.name))

    def _found(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._text().items()}

    def _other_problems(self) -> list[str]:
        problems = []
        head = self._entries(self._weights[HEAD]) if HEAD in self._weights else {}
        if head and not any(self._lies_as(name) in self._tensors for name in head):
            problems.append(
                "config.json says tie_word_embeddings false; where the head is the table of "
                "embeddings, set it to true"
            )
        for name in self._formats:
            problems += self._problems_of_codes(self._weights[name])
        return problems

    def _problems_of_codes(self, weight: Weight) -> list[str]:
        """Return what is wrong with the tensors of one matrix, beyond what `compare` finds."""
        found = {n: self._tensors.get(self._lies_as(n)) for n in self._entries(weight)}
        problems = [
            f"mistyped: {self._lies_as(name)} is {tensor.dtype}, expected {entry.dtype}"
            for name, entry in self._entries(weight).items()
            if (tensor := found[name]) is not None and tensor.dtype != entry.dtype
        ]
        codes, scales = found.get(weight.name + CODES), found.get(weight.name + SCALES)
        if codes is not None and scales is not None:
            error = disagree(self._formats[weight.name], codes.shape, scales.shape)
            problems += [f"disagreeing: {self._lies_as(weight.name)}: {error}"] if error else []
        return problems

    def _check_types(self) -> None:
        coded = {
            self._lies_as(n) for own in self._formats for n in self._entries(self._weights[own])
        }
        wrong: dict[str, list[str]] = {}
        for name in self._expected():
            tensor = self._tensors.get(name)
            if tensor is not None and tensor.dtype not in FLOATS and name not in coded:
                wrong.setdefault(tensor.dtype, []).append(name)
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds weights in types other than {', '.join(FLOATS)}: "
                f"{grouped(wrong)}"
            )

    def stored(self, name: str) -> Coded | None:
        """Return the codes and scales of a matrix, or None: it lies there as floats.

        Raises:
            CheckpointError: they are not there, or do not fit the config.
        """
        format = self._formats.get(name)
        if format is None:
            return None
        weight = self._weights[name]
        parts = [
            self._array(self._lies_as(own), entry) for own, entry in self._entries(weight).items()
        ]
        bits = [part.view(np.uint16) if part.dtype == BFLOAT16 else part for part in parts]
        return Coded(format, *bits)

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        return name not in self._formats

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        parts = self._parts(weight)
        if parts:
            fill_parts(out, parts, self._of_part)
            return
        coded = self.stored(weight.name)
        if coded is None or coded.format == "bfloat16":
            (entry,) = self._entries(weight).values()
            values = self._array(self._lies_as(weight.name), entry).reshape(-1)
            fill(out, lambda start, stop: values[start:stop], self._lies_as(weight.name))
            return
        form = FORMATS[coded.format]
        blocks = coded.codes.reshape(-1, form.elements)
        scales = None if coded.scales is None else coded.scales.reshape(-1, 1)

        def decoded(start: int, stop: int) -> np.ndarray:
            part = slice(start // form.block, stop // form.block)
            own = None if scales is None else scales[part]
            return decode(blocks[part], own, coded.format).reshape(-1)

        fill(out, decoded, self._lies_as(weight.name))

    def _of_part(self, part: Part) -> Callable[[int, int], np.ndarray]:
        values = self._array(part.tensor, Entry(part.shape, None)).reshape(-1)
        return lambda start, stop: values[start:stop]

    def _array(self, name: str, entry: Entry) -> np.ndarray:
        """Return a tensor where it lies in the file, once it is what is expected."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != entry.shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(f"{self.source}: {name}: expected {list(entry.shape)}, got {got}")
        expected = FLOATS.keys() if entry.dtype is None else {entry.dtype}
        if tensor.dtype not in expected:
            raise UnsupportedError(
                f"{self.source}: {name} is {tensor.dtype}; expected {', '.join(expected)}"
            )
        dtype = (READ | FLOATS)[tensor.dtype]
        values = np.frombuffer(
            self._maps[tensor.file], dtype, math.prod(tensor.shape), tensor.start
        )
        return values.reshape(tensor.shape)


def _is_other_part(name: str) -> bool:
    return name.removeprefix("model.").startswith(OTHER_PARTS)


def main_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the dtype that most bytes are in, of (safetensors' name of a dtype, bytes)."""
    nbytes: dict[str, int] = {}
    for dtype, size in sizes:
        nbytes[dtype] = nbytes.get(dtype, 0) + size
    name = max(nbytes, key=lambda dtype: nbytes[dtype], default="F32")
    return FLOATS[name].name if name in FLOATS else name


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of one small file.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself.
        UnsupportedError: a tensor that is not float32, float16 or bfloat16.
    """
    refuse_stand_in(path)
    data = path.read_bytes()
    found = {}
    for name, tensor in parse_header(data, path).items():
        if tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{path}: {show(name)} is {tensor.dtype}; expected {', '.join(DTYPES)}"
            )
        count = math.prod(tensor.shape)
        values = np.frombuffer(data, DTYPES[tensor.dtype], count, tensor.start)
        found[name] = values.reshape(tensor.shape)
    return found


# --- the header --------------------------------------------------------------------------------


def parse_header(data: mmap.mmap | bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, every offset checked against its size.

    Raises:
        CheckpointError: the file is truncated, or its header contradicts itself.
    """
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: it has {size} bytes and announces "
            f"a header of {length} (at most {MAX_HEADER_BYTES})"
        )
    try:
        header = json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            fault = "overlaps the tensor before it" if tensor.start < end else "follows a gap"
            raise CheckpointError(f"{path}: {show(name)} {fault}")
        end += tensor.nbytes
    if end != size:
        fault = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{path} is {fault}: {size} bytes, expected {end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _tensor(name: str, entry: Any, path: Path, start: int) -> Tensor:
    fault = f"{path}: {show(name)}: "
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{fault}expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise UnsupportedError(f"{fault}dtype {show(str(dtype))} is not known")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{fault}shape and data_offsets must be lists of sizes")
    nbytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if rest or offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{fault}{dtype} {shape} takes {nbytes} bytes, data_offsets are {offsets}"
        )
    return Tensor(path.name, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
