"""Any checkpoint into a Hugging Face folder: one weight at a time, from disk to disk.

No decoder is built. Matrices may be quantised on the way. The text decoder, its config, tokenizer
and chat template are written.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from gemlax.checkpoints.base import BFLOAT16, Checkpoint
from gemlax.checkpoints.codes import Formats, check_formats, count_bytes
from gemlax.checkpoints.save import save_safetensors
from gemlax.config import GemmaConfig
from gemlax.errors import CheckpointError, RequestError
from gemlax.formats import Coded, encode
from gemlax.names import text_weights
from gemlax.tokenizer import Tokenizer, find_chat_template, write_chat_template

__all__ = ["Converted", "convert", "generation_ids", "write_tokenizer"]

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}

Progress = Callable[[int, int], None]
Change = Callable[[str], np.ndarray | None]


class Converted(NamedTuple):
    """What was written: `dtype` is that of weights which are floats; `nbytes` of all weights."""

    dtype: str
    tensors: int
    parameters: int
    nbytes: int
    tokenizer: bool


def convert(
    source: Checkpoint,
    target: str | Path,
    *,
    dtype: str | None = None,
    formats: Formats | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    change: Change | None = None,
    importance: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Converted:
    """Write `source` as a folder that transformers and gemlax read; all of it or nothing.

    With `formats`, gemlax alone reads it. One weight is held at a time, in float32 and as codes.

    Args:
        source: an open checkpoint; it may be the one at `target`.
        target: a new or empty folder whose parent exists.
        dtype: "float32" or "bfloat16". None keeps the one that most of the source is in, and makes
            float16 and quantised weights float32, which holds them exactly.
        formats: of those matrices that are quantised, by canonical name (`quantization`).
        overwrite: replace a folder that holds a model.
        progress: told (bytes written, bytes in all) after each weight.
        change: gives what is added to a weight, in float32, by canonical name; None: nothing.
        importance: of the columns of matrices, by canonical name (`calibration`).

    Raises:
        CheckpointError: the tensors of `source` do not fit its config, or `formats` its weights;
            a weight that is quantised is not finite.
        FileExistsError: `target` is there and not empty, or is no folder that may be replaced.
        RequestError: another dtype.
        OSError: the disk is full, or `target` cannot be written.
    """
    name = dtype or (source.stored_dtype if source.stored_dtype in DTYPES else "float32")
    if name not in DTYPES:
        raise RequestError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    source.check()
    tokenizer, template = source.tokenizer(), source.chat_template
    config, shapes = source.config, text_weights(source.config.text)
    own = formats or {}
    check_formats(own, shapes, source.source)
    count = sum(math.prod(shape) for shape in shapes.values())
    nbytes = sum(
        count_bytes(shape, own[weight])
        if weight in own
        else math.prod(shape) * DTYPES[name].itemsize
        for weight, shape in shapes.items()
    )
    save_safetensors(
        target,
        config,
        _weights(source, DTYPES[name], own, nbytes, progress, change, importance),
        generation_config=generation_ids(config) | source.generation_config,
        formats=own,
        write_tokenizer=functools.partial(write_tokenizer, tokenizer, template),
        overwrite=overwrite,
    )
    return Converted(name, len(shapes), count, nbytes, tokenizer is not None)


def generation_ids(config: GemmaConfig) -> dict[str, Any]:
    """Return the ids that a generation_config.json says at least."""
    eos = config.eos_token_id
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) != 1 else eos[0],
        "pad_token_id": config.pad_token_id,
    }


def write_tokenizer(
    tokenizer: Tokenizer | None, template: str | Mapping[str, str] | None, folder: Path
) -> None:
    """Write the tokenizer's files and the chat templates, where there are such."""
    if tokenizer is not None:
        tokenizer.save(folder)
    # A GGUF file has its template inside, and a folder may have it where no tokenizer reads it.
    if template is not None and find_chat_template(folder) != template:
        write_chat_template(template, folder)


def _weights(
    source: Checkpoint,
    dtype: np.dtype,
    formats: Formats,
    nbytes: int,
    progress: Progress | None,
    change: Change | None,
    importance: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, np.ndarray | Coded]]:
    done = 0
    for name, shape in text_weights(source.config.text).items():
        added = None if change is None else change(name)
        wide = name in formats or added is not None
        array = np.empty(shape, np.float32 if wide else dtype)
        source.read(name, array)
        if added is not None:
            array += added
            array = array if name in formats else array.astype(dtype)
        if name in formats:
            try:
                codes = encode(array, formats[name], importance.get(name))
                coded = Coded(formats[name], *codes)
            except ValueError as error:
                raise CheckpointError(f"{source.source}: {name}: {error}") from error
            done += count_bytes(shape, formats[name])
            del array, codes  # before they are written
            yield name, coded
            del coded
        else:
            done += array.nbytes
            yield name, array
            del array  # before the next one is made
        if progress is not None:
            progress(done, nbytes)
