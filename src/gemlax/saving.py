"""Models made of models: `quantize` and `save`."""

import functools
from pathlib import Path

import jax
import numpy as np

from gemlax import adapters as lora
from gemlax import checkpoints
from gemlax.errors import RequestError, UnsupportedError
from gemlax.model import Model
from gemlax.quantization import Rules, Texts, check_rules, codes_by_rules, importance_by_rules
from gemlax.weights import build_decoder, held_formats, held_weights, named_weights, weight_reader

__all__ = ["quantize", "save"]


def quantize(model: Model, rules: Rules, *, calibration: Texts | None = None) -> Model:
    """Return a model whose matrices are codes, made of the weights of another, which stays.

    Matrices that are codes already are decoded first, so that their error and the new one add up.
    Layers stay scanned or unrolled, and everything else is the given model's.

    Args:
        rules: as `load` takes them: "int8", "int4", "nf4", or a format by pattern of names;
            "dense" decodes.
        calibration: as `load` takes it.

    Raises:
        RequestError: a format that cannot be made, a weight that is no matrix of whole groups or
            not finite, or a model on a mesh.
    """
    check_rules(rules)
    if rules == "stored":
        raise RequestError("quantize='stored' is for load: a model in memory has no file")
    if model.mesh is not None:
        raise RequestError("a model on a mesh cannot be quantised: load it with quantize=")
    if any(lora.adapted(model.decoder)):
        raise RequestError("a model with adapters cannot be quantised: load it with quantize=")
    old, read = model.decoder, weight_reader(model.decoder)

    def fill(name: str, out: np.ndarray) -> None:
        out[...] = read(name)

    importance = importance_by_rules(rules, model.config, fill, model.tokenizer, calibration)
    decoder = build_decoder(
        model.config.text, fill, dtype=model.dtype, layers=old.layout,
        codes=codes_by_rules(model.config.text, fill, rules, importance),
    )  # fmt: skip
    decoder.base = old.base
    return Model(
        model.config, decoder, model.tokenizer, model.generation_config, model.chat_template,
        kv_cache=model.kv_cache, implementation=model.implementation,
    )  # fmt: skip


def save(
    model: Model, path: str | Path, *, keep_codes: bool = False, overwrite: bool = False
) -> None:
    """Write a folder that transformers and `load` read: safetensors, config, tokenizer.

    The folder appears whole or not at all. `load(path, dtype=model.dtype)` gives the same
    weights bit for bit.

    Args:
        model: what is saved; matrices that are codes are decoded.
        path: a new or empty folder whose parent exists.
        keep_codes: write matrices that are codes as they are. Then the file is as small as the
            model in memory and `load` gives the same codes, but transformers cannot read it.
        overwrite: replace a folder that holds a model.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, unless `overwrite`.
        OSError: it cannot be written; nothing is left behind.
        RequestError: `keep_codes` of a model that has none, or a model with adapters.
        UnsupportedError: the model is spread over several processes.
    """
    if jax.process_count() > 1:
        raise UnsupportedError(
            "a model that several processes hold cannot be saved; load it in one"
        )
    if any(lora.adapted(model.decoder)):
        raise RequestError(
            "the model has adapters, which its weights do not show: gemlax.adapters.merge adds one "
            "to them, gemlax.adapters.save writes one by itself"
        )
    formats = held_formats(model.decoder) if keep_codes else {}
    if keep_codes and not formats:
        raise RequestError("keep_codes: the model holds no codes; quantize it, or leave it out")
    checkpoints.save_safetensors(
        Path(path),
        model.config,
        held_weights(model.decoder) if keep_codes else named_weights(model.decoder),
        generation_config=checkpoints.generation_ids(model.config) | model.generation_config,
        formats=formats,
        write_tokenizer=functools.partial(
            checkpoints.write_tokenizer, model.tokenizer, model.chat_template
        ),
        overwrite=overwrite,
    )
