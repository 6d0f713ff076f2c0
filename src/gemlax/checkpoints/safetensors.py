"""Hugging Face folders: config.json and *.safetensors, read in place.

Matrices may lie there as codes: codes.py says how.

The header is parsed here rather than by the `safetensors` package so that a damaged file is
named with what is wrong in it, and so that a weight can be read range by range.
Source: https://github.com/huggingface/safetensors, README, "Format".
"""

import json
import logging
import math
import mmap
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemlax.checkpoints.base import (
    FLOATS,
    Checkpoint,
    Piece,
    Ranges,
    Tensor,
    fill,
    fit_vocab,
    map_file,
    read_json,
    refuse_drafter,
    resolve_config,
    show,
)
from gemlax.checkpoints.codes import CODES, KEY, SCALES, check_formats, pieces, read_formats
from gemlax.checkpoints.mistakes import explain_names, refuse_stand_in, refuse_stand_ins
from gemlax.checkpoints.shards import INDEX, choose_files
from gemlax.config import edit, from_hf
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.formats import FORMATS, Coded, check, decode
from gemlax.names import HEAD, Weight, text_weights
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
# Floats that are written, too; then with the types of codes.
DTYPES = {name: dtype for name, dtype in FLOATS.items() if name != "F64"}
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


class SafetensorsCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or its shards and their index."""

    _other_parts = OTHER_PARTS

    def __init__(self, folder: Path, file: str | None = None):
        """With `file`, that one is read, whatever else the folder holds."""
        self.source = folder
        self._file = file
        self._maps: list[mmap.mmap] = []
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
        self._prefix = self._find_prefix(text_weights(resolved.text))
        self._head, idle_heads, tied = self._find_head(resolved.text.tie_word_embeddings)
        table = self._table()
        resolved = fit_vocab(resolved, table.shape[0] if table and table.shape else None)
        self.config = edit(resolved, tie_word_embeddings=tied)
        generation = self.source / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        check_formats(self._formats, text_weights(self.config.text), path)
        self._set_aside(idle_heads, "buffers, which are not parameters")
        text = [self._tensors[name] for name in self._shapes()]
        self.stored_dtype = main_dtype((tensor.type, tensor.nbytes) for tensor in text)
        if self._formats:
            self.stored_dtype = ", ".join(sorted(set(self._formats.values())))

    def _find_prefix(self, names: Collection[str]) -> str:
        """Return what stands before the decoder's names in the files."""
        counts = {p: sum(p + name in self._tensors for name in names) for p in PREFIXES}
        prefix = max(PREFIXES, key=counts.__getitem__)
        if counts[prefix] < len(names) and not self._formats:
            front = "model."
            text = [n for n in self._tensors if not n.removeprefix(front).startswith(OTHER_PARTS)]
            reason = explain_names(text, names, PREFIXES)
            if reason is not None:
                raise CheckpointError(f"{self.source} cannot be read: {show(reason, 600)}")
        if prefix in PREFIXES[4:]:
            logger.info("%s: names begin with %r, which is read as 'model.'", self.source, prefix)
        return prefix

    def _read_headers(self) -> dict[str, Tensor]:
        files = [self._file] if self._file is not None else choose_files(self.source)
        tensors: dict[str, Tensor] = {}
        for i, file in enumerate(files):
            self._maps.append(map_file(self.source / file))
            for name, tensor in parse_header(self._maps[i], self.source / file).items():
                tensor = tensor._replace(file=i)
                other = tensors.setdefault(name, tensor)
                same = other is tensor or other[:2] == tensor[:2]
                if not same or (other is not tensor and not self._is_copy(tensor, other)):
                    raise CheckpointError(
                        f"{self.source}: {files[other.file]} and {file} both hold {show(name)}, "
                        "and they differ; keep the one that is right"
                    )
        moved = {name: name.replace(MOE, ".experts.") for name in tensors if MOE in name}
        if moved.keys() & tensors.keys() and not set(moved.values()) & tensors.keys():
            logger.info("%s: %r in names is read as '.experts.'", self.source, MOE)
            tensors = {moved.get(name, name): tensor for name, tensor in tensors.items()}
        return tensors

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the folder, or None."""
        refuse_stand_ins(self.source, FILES)
        return find_tokenizer(self.source)

    def _is_no_weight(self, name: str, tensor: Tensor) -> bool:
        return BUFFERS.fullmatch(name) is not None or tensor.type in INTEGERS

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

    def _lies_as(self, name: str) -> str:
        """Return what the file calls a weight, or a part of its codes."""
        if name.startswith(HEAD):
            return self._head + name.removeprefix(HEAD)
        return self._prefix + name

    def _table(self) -> Tensor | None:
        name = f"{self._prefix}embed_tokens.weight"
        return self._tensors.get(name) or self._tensors.get(name + CODES)

    def _stored_name(self, weight: Weight) -> str:
        return self._lies_as(weight.name)

    def _pieces(self, weight: Weight) -> list[Piece]:
        parts = None
        if weight.name not in self._formats and self._prefix + weight.name not in self._tensors:
            parts = _expert_pieces(weight, self._tensors, self._prefix)
        plain = pieces(weight.name, weight.shape, self._formats.get(weight.name))
        return parts or [piece._replace(tensor=self._lies_as(piece.tensor)) for piece in plain]

    def _other_problems(self) -> list[str]:
        problems = []
        head = self._pieces(self._weights[HEAD]) if HEAD in self._weights else []
        if head and not any(piece.tensor in self._tensors for piece in head):
            problems.append(
                "config.json says tie_word_embeddings false; where the head is the table of "
                "embeddings, set it to true"
            )
        for name, format in self._formats.items():
            stored = self._lies_as(name)
            shapes = [self._tensors[n].shape for n in (stored + CODES, stored + SCALES)
                      if n in self._tensors]  # fmt: skip
            try:
                if len(shapes) == 2 and all(shapes):  # no rows: `compare` says so
                    check(format, *shapes)
            except ValueError as error:
                problems.append(f"disagreeing: {stored}: {error}")
        return problems

    def stored(self, name: str) -> Coded | None:
        """Return the codes and scales of a matrix, or None: it lies there as floats.

        Raises:
            CheckpointError: they are not there, or do not fit the config.
        """
        if name not in self._formats:
            return None
        arrays = []
        for piece in self._pieces(self._weights[name]):
            tensor = self._find(piece)
            dtype = np.dtype(np.uint16) if tensor.type == "BF16" else READ[tensor.type]
            arrays.append(self._array(tensor, dtype).reshape(tensor.shape))
        return Coded(self._formats[name], *arrays)

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        return name not in self._formats

    def _ranges(self, piece: Piece, tensor: Tensor, weight: Weight) -> Ranges:
        floats = self._array(tensor, FLOATS[tensor.type])
        return lambda start, stop: floats[start:stop]

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        coded = self.stored(weight.name)
        if coded is None or coded.format == "bfloat16":
            super()._fill(weight, out)
            return
        form, format = FORMATS[coded.format], coded.format
        blocks = coded.codes.reshape(-1, form.elements)
        scales = None if coded.scales is None else coded.scales.reshape(-1, 1)

        def decoded(start: int, stop: int) -> np.ndarray:
            part = slice(start // form.block, stop // form.block)
            scale = None if scales is None else scales[part]
            return decode(blocks[part], scale, format).reshape(-1)

        fill(out, decoded, self._lies_as(weight.name))


def _expert_pieces(weight: Weight, tensors: Collection[str], prefix: str) -> list[Piece]:
    """Return the tensors of a folder that hold a weight of experts apart; none: they do not.

    Gate and up lie apart, or each expert does. Source: transformers 5.23.0, conversion_mapping.py;
    mlx-lm, models/switch_layers.py (`switch_glu`).
    """
    base, experts, name = weight.name.partition("experts.")
    if not experts or len(weight.shape) != 3:
        return []
    base, halves = prefix + base + experts, name.removesuffix("_proj").split("_")
    count, rows, width = weight.shape
    rows //= len(halves)
    stacked, alone = base + "switch_glu.{half}_proj.weight", base + "{expert}.{half}_proj.weight"
    if stacked.format(half=halves[0]) in tensors:
        return [
            Piece(stacked.format(half=half), (count, rows, width), row=i * rows)
            for i, half in enumerate(halves)
        ]
    # A damaged config may claim any number of experts.
    if alone.format(expert=0, half=halves[0]) not in tensors or count > len(tensors):
        return []
    return [
        Piece(alone.format(expert=e, half=half), (rows, width), row=i * rows, expert=e)
        for e in range(count)
        for i, half in enumerate(halves)
    ]


def main_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the dtype that most bytes are in, of (safetensors' name of a dtype, bytes)."""
    nbytes: dict[str, int] = {}
    for dtype, size in sizes:
        nbytes[dtype] = nbytes.get(dtype, 0) + size
    name = max(nbytes, key=lambda dtype: nbytes[dtype], default="F32")
    return FLOATS[name].name if name in FLOATS else name


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of one small file, which are float32, float16 or bfloat16."""
    refuse_stand_in(path)
    data = path.read_bytes()
    arrays = {}
    for name, tensor in parse_header(data, path).items():
        if tensor.type not in DTYPES:
            raise UnsupportedError(
                f"{path}: {show(name)} is {tensor.type}; expected {', '.join(DTYPES)}"
            )
        count = math.prod(tensor.shape)
        values = np.frombuffer(data, DTYPES[tensor.type], count, tensor.start)
        arrays[name] = values.reshape(tensor.shape)
    return arrays


def parse_header(data: mmap.mmap | bytes, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, every offset checked against its size."""
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
        raise CheckpointError(f"{path}: the header is not a JSON object")
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
    return Tensor(dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )
