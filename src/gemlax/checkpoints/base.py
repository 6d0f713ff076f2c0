"""What every checkpoint format offers: a config, and float weights by canonical name.

A format says which tensors it expects, which it found, and how to give a range of one weight;
here the two lists are compared, all at once, and the ranges are cast into the caller's array.
"""

import abc
import difflib
import functools
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemlax.checkpoints.stand_ins import refuse_stand_in
from gemlax.config import GemmaConfig, edit
from gemlax.errors import CheckpointError, Error, UnsupportedError
from gemlax.formats import Coded
from gemlax.names import Weight, resolve
from gemlax.tokenizer import Tokenizer, find_chat_template

__all__ = [
    "BFLOAT16",
    "NOT_FINITE",
    "READABLE",
    "Checkpoint",
    "cast",
    "compare",
    "fill",
    "fit_vocab",
    "grouped",
    "log_left_aside",
    "read_json",
    "refuse_drafter",
    "resolve_config",
    "same_bytes",
    "same_rounded",
    "show",
]

Shape = tuple[int, ...]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
READABLE = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
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

    def check(self) -> None:
        """Check names, shapes and types of all tensors; no weight is read.

        Raises:
            CheckpointError: every missing, unexpected and misshapen tensor, in one error.
            UnsupportedError: some are in a type that cannot be read.
        """
        self._check_types()
        problems = compare(self._expected(), self._found()) + self._other_problems()
        if not problems:
            return
        differences = self._differences()
        if differences:
            rest = len(problems) - MAX_EXAMPLES
            problems = [*problems[:MAX_EXAMPLES], *([f"and {rest} more"] if rest > 0 else [])]
            told = f"is of another model than its config: {'; '.join(differences)}"
        else:
            told = (
                f"does not hold the {self.config.text.num_hidden_layers}-layer model of its config"
            )
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{self.source} {told}:\n  {lines}")

    def _differences(self) -> list[str]:
        """Return what all tensors say otherwise than the config: how many layers, how wide."""
        found, text, told = self._found(), self.config.text, []
        numbers = [int(match[1]) for name in found if (match := _LAYER.search(name))]
        layers = max(numbers, default=-1) + 1
        if layers != text.num_hidden_layers and len(set(numbers)) == layers:
            told.append(
                f"the tensors are of {layers} layers, the config says {text.num_hidden_layers}"
            )
        for key, (name, axis) in _SIZES.items():
            weight = self._weights.get(name)
            shape = found.get(self._stored_name(weight), ()) if weight else ()
            if weight and len(shape) == len(weight.shape) and shape[axis] != weight.shape[axis]:
                told.append(
                    f"{key} is {shape[axis]} in the tensors, {weight.shape[axis]} in the config"
                )
        return told

    def _stored_name(self, weight: Weight) -> str:
        """Return what the checkpoint calls a weight."""
        return weight.name

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
        if out.dtype not in READABLE:
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
        return True

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that comes with the checkpoint, or None."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja chat template that comes with the checkpoint, several by name, or None."""
        return find_chat_template(self.source) if self.source.is_dir() else None

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files. Arrays that were read stay valid."""

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abc.abstractmethod
    def _expected(self) -> Mapping[str, Shape]:
        """Return what the format should hold, by its own names."""

    @abc.abstractmethod
    def _found(self) -> Mapping[str, Shape]:
        """Return what it holds, without what is left aside on purpose."""

    def _other_problems(self) -> list[str]:
        """Return what is wrong beyond names and shapes."""
        return []

    @abc.abstractmethod
    def _check_types(self) -> None:
        """Raise UnsupportedError if a text tensor is in a type that cannot be read."""

    @abc.abstractmethod
    def _fill(self, weight: Weight, out: np.ndarray) -> None:
        """Read `weight` into `out`, which has been checked."""

    @functools.cached_property
    def _weights(self) -> dict[str, Weight]:
        return resolve(self.config.text)


# --- comparing ---------------------------------------------------------------------------------


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


# --- configs -----------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: it is not JSON, or not an object.
    """
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


# --- casting -----------------------------------------------------------------------------------


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


def same_bytes(
    x: mmap.mmap, x_start: int, y: mmap.mmap, y_start: int, nbytes: int, step: int = 2**22
) -> bool:
    """Compare two ranges of bytes, a few at a time."""
    return all(
        x[x_start + i : x_start + min(i + step, nbytes)]
        == y[y_start + i : y_start + min(i + step, nbytes)]
        for i in range(0, nbytes, step)
    )


def same_rounded(rounded: np.ndarray, values: np.ndarray) -> bool:
    """Tell whether floats are other floats, rounded to their type; a block at a time."""
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.array_equal(
                rounded[i : i + BLOCK],
                values[i : i + BLOCK].astype(np.float32).astype(rounded.dtype),
            )
            for i in range(0, len(rounded), BLOCK)
        )


def log_left_aside(logger: logging.Logger, source: Path, names: list[str], what: str) -> None:
    """Say in one line that tensors were left aside."""
    if names:
        logger.info("%s: left aside %d tensors of %s", source, len(names), what)
