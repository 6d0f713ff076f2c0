"""What the checkpoint formats share: a config, and float weights by canonical name.

A format says which tensors there are and how to read a range of one; here they are compared with
the table of weights, all at once, and the ranges are cast into the caller's array.
"""

import abc
import contextlib
import difflib
import functools
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gemlax.checkpoints.mistakes import refuse_stand_in
from gemlax.config import GemmaConfig, edit
from gemlax.errors import CheckpointError, Error, UnsupportedError
from gemlax.formats import Coded
from gemlax.names import Weight, resolve, unused
from gemlax.tokenizer import Tokenizer, find_chat_template

__all__ = [
    "BFLOAT16",
    "FLOATS",
    "NOT_FINITE",
    "Checkpoint",
    "Piece",
    "Ranges",
    "Tensor",
    "cast",
    "compare",
    "fill",
    "fit_vocab",
    "grouped",
    "map_file",
    "read_json",
    "refuse_drafter",
    "resolve_config",
    "show",
]

Shape = tuple[int, ...]
# Gives elements [a, b) of a tensor; a is a multiple of `BLOCK`.
Ranges = Callable[[int, int], np.ndarray]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Floats by the names that safetensors and GGUF have for them.
FLOATS = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
    "F64": np.dtype(np.float64),
}  # fmt: skip
# The text vocabulary, and the same with the 64 rows that multimodal tables have on top.
# Source: transformers convert_gemma3_weights.py.
VOCAB_ROWS = {262_144, 262_208}
# Elements of one step of `read`: the source, its float32 form and the result stay in cache.
BLOCK = 2**17
MAX_THREADS = 8
# More names than this are counted, not listed: the largest Gemma has 832.
MAX_LISTED = 2000
MAX_NEAREST = 200
NOT_FINITE = "holds NaN or infinity: the file is damaged, or its training had diverged"
# Where one sentence says what the matter is, the tensors that are shown with it.
MAX_EXAMPLES = 5
# How every format writes the number of a layer.
_LAYER = re.compile(r"(?:^|[./])(?:layers\.|blk\.|layer_)(\d{1,6})[./]")
# Sizes of a model, by a weight and its axis that show them.
_SIZES = {
    "hidden_size": ("norm.weight", 0), "vocab_size": ("embed_tokens.weight", 0),
    "intermediate_size": ("layers.0.mlp.up_proj.weight", 0),
    "heads times head_dim": ("layers.0.self_attn.q_proj.weight", 0),
}  # fmt: skip

logger = logging.getLogger(__name__)


class Tensor(NamedTuple):
    """A tensor of a file: `start` and `nbytes` are in bytes, `file` counts the files of a model."""

    type: str
    shape: Shape
    start: int = 0
    nbytes: int = 0
    file: int = 0


class Piece(NamedTuple):
    """A tensor that holds a weight or, of a weight [experts, rows, width], some of its rows.

    `row` is the first of them (None: the tensor is the whole weight), of one `expert` or of all
    (None). `type` is the one that the tensor must have; None: any float, or what a format decodes.
    """

    tensor: str
    shape: Shape
    type: str | None = None
    row: int | None = None
    expert: int | None = None


class Checkpoint(abc.ABC):
    """A checkpoint on disk. Use it as a context manager, or `close` it.

    Attributes:
        source: the file or folder.
        config: what it says it is; `vocab_size` is the number of rows that the table has.
        generation_config: generation_config.json, or an empty dict.
        stored_dtype: "float32", "float16", "bfloat16" (the one most bytes are in), "gguf", or the
            formats of codes.
        keeps_codes: somebody chose the formats of its codes: they are kept on any backend.
    """

    source: Path
    config: GemmaConfig
    generation_config: dict[str, Any]
    stored_dtype: str
    keeps_codes: bool = False
    # What a format sets: its tensors by their own names, the files they lie in, the types that
    # `_ranges` reads, and how names begin that are other parts than the text decoder.
    _tensors: dict[str, Tensor]
    _maps: Sequence[mmap.mmap] = ()
    _types: frozenset[str] = frozenset(FLOATS)
    _other_parts: tuple[str, ...] = ()
    _aside: frozenset[str] = frozenset()

    def check(self) -> None:
        """Check names, shapes and types of all tensors; no weight is read.

        Raises:
            CheckpointError: every missing, unexpected and misshapen tensor, in one error.
            UnsupportedError: some are in a type that cannot be read.
        """
        pieces = self._all_pieces()
        there = {n: self._tensors[n].type for n in pieces if n in self._tensors}
        typed = {name: kind for name in there if (kind := pieces[name].type) is not None}
        wrong: dict[str, list[str]] = {}
        for name, kind in there.items():
            if name not in typed and kind not in self._types:
                wrong.setdefault(kind, []).append(name)
        if wrong:
            raise UnsupportedError(
                f"{self.source} holds weights in types that are not read: {grouped(wrong)}"
            )
        problems = compare({name: piece.shape for name, piece in pieces.items()}, self._shapes())
        problems += [
            f"mistyped: {name} is {there[name]}, expected {kind}"
            for name, kind in typed.items()
            if there[name] != kind
        ]
        problems += self._other_problems()
        if not problems:
            return
        differences = self._differences()
        if differences:
            rest = len(problems) - MAX_EXAMPLES
            problems = [*problems[:MAX_EXAMPLES], *([f"and {rest} more"] if rest > 0 else [])]
            summary = f"is of another model than its config: {'; '.join(differences)}"
        else:
            layers = self.config.text.num_hidden_layers
            summary = f"does not hold the {layers}-layer model of its config"
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{self.source} {summary}:\n  {lines}")

    def _differences(self) -> list[str]:
        """Return what all tensors say otherwise than the config: how many layers, how wide."""
        shapes, text, differences = self._shapes(), self.config.text, []
        numbers = [int(match[1]) for name in shapes if (match := _LAYER.search(name))]
        layers = max(numbers, default=-1) + 1
        if layers != text.num_hidden_layers and len(set(numbers)) == layers:
            differences.append(
                f"the tensors are of {layers} layers, the config says {text.num_hidden_layers}"
            )
        for key, (name, axis) in _SIZES.items():
            weight = self._weights.get(name)
            shape = shapes.get(self._stored_name(weight), ()) if weight else ()
            if weight and len(shape) == len(weight.shape) and shape[axis] != weight.shape[axis]:
                differences.append(
                    f"{key} is {shape[axis]} in the tensors, {weight.shape[axis]} in the config"
                )
        return differences

    def read(self, name: str, out: np.ndarray) -> None:
        """Fill `out` with the weight of canonical `name`, rounded to its dtype (nearest even).

        Args:
            name: for example "layers.0.self_attn.q_proj.weight"; see `names.text_weights`.
            out: float32, float16 or bfloat16, C-contiguous, of the canonical shape.

        Raises:
            CheckpointError: the checkpoint has no such tensor or it has another shape, or a value
                is not finite, or does not fit in float16.
        """
        weight = self._weights.get(name)
        if weight is None:
            raise CheckpointError(f"{name!r} is not a weight of {self.source}")
        if out.dtype not in (np.float32, np.float16, BFLOAT16):
            raise TypeError(f"{name}: out is {out.dtype}; expected float32, float16 or bfloat16")
        if out.shape != weight.shape or not out.flags.c_contiguous:
            raise ValueError(
                f"{name}: out must be C-contiguous of shape {list(weight.shape)}, got "
                f"{list(out.shape)} with strides {out.strides}"
            )
        self._fill(weight, out)

    def stored(self, name: str) -> Coded | None:
        """Return the codes of a weight as they are in the file, or None: `read` it."""
        return None

    def is_float(self, name: str) -> bool:
        """Return whether a weight is in the file as floats."""
        pieces = self._pieces(self._weights[name])
        return all(
            self._tensors[p.tensor].type in FLOATS for p in pieces if p.tensor in self._tensors
        )

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that comes with the checkpoint, or None."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja chat template that comes with the checkpoint, several by name, or None."""
        return find_chat_template(self.source) if self.source.is_dir() else None

    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""
        for data in self._maps:
            # A traceback may still hold a view; then the map goes when the view does.
            with contextlib.suppress(BufferError):
                data.close()
        self._maps = ()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abc.abstractmethod
    def _stored_name(self, weight: Weight) -> str:
        """Return what the checkpoint calls a weight."""

    def _pieces(self, weight: Weight) -> list[Piece]:
        """Return the tensors that a weight lies in; none: all of it is 1."""
        return [Piece(self._stored_name(weight), weight.shape)]

    @abc.abstractmethod
    def _ranges(self, piece: Piece, tensor: Tensor, weight: Weight) -> Ranges:
        """Return what gives ranges of a tensor, which is there and has been checked."""

    def _is_no_weight(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor that no weight lies in may be there."""
        return False

    def _other_problems(self) -> list[str]:
        """Return what is wrong beyond names, shapes and types."""
        return []

    def _set_aside(self, silent: Set[str] = frozenset(), what: str = "") -> None:
        """Find the tensors that are not read, and say so in one line of each kind.

        Args:
            silent: those that nothing is said of.
            what: those of `_is_no_weight` are.
        """
        expected = self._all_pieces().keys() | silent
        idle = {self._stored_name(weight) for weight in unused(self.config.text)}
        kinds: dict[str, list[str]] = {
            "layers that read the K/V of another": sorted(idle & self._tensors.keys()),
            "other parts than the text decoder": [],
            what: [],
        }
        for name, tensor in self._tensors.items():
            if name.removeprefix("model.").startswith(self._other_parts):
                kinds["other parts than the text decoder"].append(name)
            elif name not in expected | idle and self._is_no_weight(name, tensor):
                kinds[what].append(name)
        for kind, names in kinds.items():
            if names:
                logger.info("%s: left aside %d tensors of %s", self.source, len(names), kind)
        self._aside = frozenset(silent).union(*kinds.values())

    def _all_pieces(self) -> dict[str, Piece]:
        """Return every tensor that holds a weight, by name."""
        return {p.tensor: p for weight in self._weights.values() for p in self._pieces(weight)}

    def _shapes(self) -> dict[str, Shape]:
        """Return the shapes of all tensors that are not left aside."""
        return {n: tensor.shape for n, tensor in self._tensors.items() if n not in self._aside}

    def _find(self, piece: Piece) -> Tensor:
        """Return the tensor of a piece, once it is what is expected."""
        tensor = self._tensors.get(piece.tensor)
        if tensor is None or tensor.shape != piece.shape:
            got = "no such tensor" if tensor is None else list(tensor.shape)
            raise CheckpointError(
                f"{self.source}: {piece.tensor}: expected {list(piece.shape)}, got {got}"
            )
        types = self._types if piece.type is None else {piece.type}
        if tensor.type not in types:
            raise UnsupportedError(
                f"{self.source}: {piece.tensor} is {tensor.type}; expected "
                f"{piece.type or 'a type that is read'}"
            )
        return tensor

    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        """Read `weight` into `out`, which has been checked."""
        pieces = self._pieces(weight)
        if not pieces:
            out[...] = 1
        for piece in pieces:
            ranges = self._ranges(piece, self._find(piece), weight)
            for part, first in _places(piece, out):
                fill(part, functools.partial(_moved, ranges, first), piece.tensor)

    def _array(self, tensor: Tensor, dtype: np.dtype) -> np.ndarray:
        """Return all numbers of a tensor where they lie in the file."""
        size = tensor.nbytes // dtype.itemsize
        return np.frombuffer(self._maps[tensor.file], dtype, size, tensor.start)

    def _is_copy(self, copy: Tensor, of: Tensor) -> bool:
        """Tell whether numbers are those of another tensor, rounded where the type is another."""
        if copy[:2] == of[:2]:  # type and shape
            maps = self._maps[copy.file], self._maps[of.file]
            return _same_bytes(maps[0], copy.start, maps[1], of.start, copy.nbytes)
        if copy.shape != of.shape or not {copy.type, of.type} <= FLOATS.keys():
            return False
        rounded, values = (self._array(tensor, FLOATS[tensor.type]) for tensor in (copy, of))
        with np.errstate(over="ignore", invalid="ignore"):
            return all(
                np.array_equal(
                    rounded[i : i + BLOCK],
                    values[i : i + BLOCK].astype(np.float32).astype(rounded.dtype),
                )
                for i in range(0, len(rounded), BLOCK)
            )

    @functools.cached_property
    def _weights(self) -> dict[str, Weight]:
        return resolve(self.config.text)


def _places(piece: Piece, out: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the parts of a weight that a piece fills, each with its first element in the piece."""
    if piece.row is None:
        yield out, 0
        return
    rows, width = piece.shape[-2:]
    experts = range(len(out)) if piece.expert is None else [piece.expert]
    for i, expert in enumerate(experts):
        yield out[expert, piece.row : piece.row + rows], i * rows * width


def _moved(ranges: Ranges, first: int, start: int, stop: int) -> np.ndarray:
    return ranges(first + start, first + stop)


def map_file(path: Path) -> mmap.mmap:
    """Map a file into memory; CheckpointError: it is empty, or another file in place of it."""
    refuse_stand_in(path)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """Return one line for every missing, unexpected and misshapen tensor."""
    missing = [f"missing: {n} {list(expected[n])}" for n in expected if n not in found]
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault(_numbers(name), []).append(name)
    extra: list[str] = []
    for name in found:
        if name not in expected:
            near = _nearest(name, groups) if len(extra) < MAX_NEAREST else ""
            extra.append(f"unexpected: {show(name)} {list(found[name])}{near}")
    misshapen = [
        f"misshapen: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    return [*_shortened(missing), *_shortened(extra), *_shortened(misshapen)]


def show(name: str, length: int = 120) -> str:
    """Return a name from a file as one short printable line."""
    return name if name.isprintable() and len(name) <= length else f"{name[:length]!r}..."


def grouped(names: Mapping[str, Sequence[str]]) -> str:
    """Return one line that says of each kind how many tensors there are, and names one.

    Args:
        names: of tensors, by kind.
    """
    return ", ".join(f"{kind} ({len(own)}, such as {show(own[0])})" for kind, own in names.items())


def _numbers(name: str) -> str:
    return ".".join(re.findall(r"\d+", name))


def _nearest(name: str, groups: Mapping[str, list[str]]) -> str:
    """Name the nearest weight of the same layer: comparing with all of them takes minutes."""
    name = name[:200]
    near = difflib.get_close_matches(name, groups.get(_numbers(name), []), n=1, cutoff=0.6)
    return f" (nearest: {near[0]})" if near else ""


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - MAX_LISTED
    return lines if rest <= 0 else [*lines[:MAX_LISTED], f"and {rest} more like the last one"]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object."""
    refuse_stand_in(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def refuse_drafter(kind: object, source: Path) -> None:
    """Raise UnsupportedError if `kind`, a model type or an architecture, is a drafter's."""
    if "assistant" in str(kind):
        raise UnsupportedError(
            f"{source} is a drafter ({show(str(kind))}): it proposes tokens to the model that it "
            "was made for and is none by itself; give that model"
        )


def resolve_config(
    make: Callable[[], GemmaConfig], *, layers: object, tensors: int, source: Path
) -> GemmaConfig:
    """Return `make()`; whatever a damaged config makes it raise becomes a CheckpointError.

    Args:
        make: reads the config.
        layers: how many layers the config claims, before it is believed.
        tensors: how many tensors there are: every layer has at least one.
        source: named in errors.
    """
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"{source}: the config has {layers} layers, but only {tensors} tensors"
        )
    try:
        return make()
    except Error:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: a config value has the wrong type: {error}") from error


def fit_vocab(config: GemmaConfig, rows: int | None) -> GemmaConfig:
    """Return `config` with the table's rows, where they differ by the 64 multimodal rows only."""
    if rows == config.text.vocab_size or {rows, config.text.vocab_size} != VOCAB_ROWS:
        return config
    return edit(config, vocab_size=rows)


def fill(out: np.ndarray, values: Callable[[int, int], np.ndarray], name: str) -> None:
    """Set `out.flat[a:b] = values(a, b)` for all ranges, in threads: numpy releases the lock.

    Ranges start at multiples of `BLOCK`.
    """
    flat = out.reshape(-1)

    def step(start: int) -> None:
        stop = min(start + BLOCK, flat.size)
        # A damaged scale gives infinities and NaN, which `cast` refuses.
        with np.errstate(all="ignore"):
            decoded = values(start, stop)
        cast(flat[start:stop], decoded, name)

    starts = range(0, flat.size, BLOCK)
    threads = min(len(starts), MAX_THREADS, os.cpu_count() or 1)
    if threads <= 1:
        for start in starts:
            step(start)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(step, starts):
            pass


def cast(out: np.ndarray, values: np.ndarray, name: str) -> None:
    """Set `out[...] = values`, rounding to nearest even; float16 must not overflow."""
    if out.dtype == np.float16 and values.dtype == BFLOAT16:
        values = values.astype(np.float32)  # ml_dtypes' own cast does not report the overflow
    try:
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            np.copyto(out, values, casting="unsafe")
    except FloatingPointError as error:
        limit = ml_dtypes.finfo(out.dtype).max
        hint = "; read it as bfloat16 or float32" if out.dtype == np.float16 else ""
        raise CheckpointError(
            f"{name} has values beyond {out.dtype}'s {float(limit):.6g}{hint}"
        ) from error
    if not _is_finite(out):
        raise CheckpointError(f"{name} {NOT_FINITE}")


def _is_finite(values: np.ndarray) -> bool:
    """Tell whether all floats are finite: a sum for float32, else the bits of the exponents."""
    if values.dtype == np.float32:
        with np.errstate(all="ignore"):
            return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
    mask = np.uint16(0x7F80 if values.dtype == BFLOAT16 else 0x7C00)
    return bool(((values.view(np.uint16) & mask) != mask).all())


def _same_bytes(
    x: mmap.mmap, x_start: int, y: mmap.mmap, y_start: int, nbytes: int, step: int = 2**22
) -> bool:
    """Compare two ranges of bytes, a few at a time."""
    return all(
        x[x_start + i : x_start + min(i + step, nbytes)]
        == y[y_start + i : y_start + min(i + step, nbytes)]
        for i in range(0, nbytes, step)
    )
