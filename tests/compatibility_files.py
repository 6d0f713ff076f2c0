"""Cases of docs/compatibility.md: checkpoints as folders and files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from compatibility import Case
from disk import (
    BFLOAT16,
    CONFIG,
    GEMMA4,
    WIDE,
    assert_same_bits,
    gguf_tensors,
    random_weights,
    read_all,
    wide_tensors,
    write_gguf,
    write_hf,
)
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

from gemlax.checkpoints import open_checkpoint
from gemlax.config import GemmaConfig

__all__ = ["CASES"]

FOLDER, GGUF = "Hugging Face folders", "GGUF files"
TABLE = "embed_tokens.weight"
OTHERS = {"model.vision_tower.x": np.zeros(3, np.float32)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 536870912\n"


def reads(path: Path, expected: dict[str, np.ndarray], config: GemmaConfig = CONFIG) -> None:
    """Check that a checkpoint has the config, and the weights bit for bit."""
    dtype = next(iter(expected.values())).dtype
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == config.text
        assert_same_bits(read_all(checkpoint, dtype), expected)


def folder_case(kind: str, verdict: str = "exact", **options: Any) -> Case:
    """Return the case of a folder written by the safetensors package."""
    log, error = options.pop("log", ""), options.pop("error", "")
    dtype = np.dtype(options.pop("dtype", np.float32))

    def check(folder: Path) -> None:
        weights = random_weights(dtype=dtype)
        reads(write_hf(folder, weights, **options), weights)

    return Case(FOLDER, kind, check, verdict, "safetensors", log, error)


def multimodal(folder: Path, prefix: str) -> None:
    weights = random_weights()
    config = {"model_type": "gemma3", "text_config": CONFIG.to_hf(), "vision_config": {}}
    reads(write_hf(folder, weights, prefix=prefix, config=config, others=OTHERS), weights)


def sharded(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    weights = random_weights()
    write_hf(folder, weights, others=OTHERS)
    (folder / "model.safetensors").unlink()
    tensors = {f"model.{name}": array for name, array in weights.items()} | OTHERS
    names, where = list(tensors), {}
    for part, chosen in enumerate((names[:20], names[20:]), 1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        where |= dict.fromkeys(chosen, file)
    change(where)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    reads(folder, weights)


def written(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder of these files beside a good config, and open it."""
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    open_checkpoint(folder)


def adapter_as_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-270m"})
    )
    save_file({"x": np.zeros(1, np.float32)}, folder / "adapter_model.safetensors")
    open_checkpoint(folder)


def gguf_case(kind: str, verdict: str = "exact", **options: Any) -> Case:
    """Return the case of a plain GGUF file with other metadata or tensors."""
    log, error = options.pop("log", ""), options.pop("error", "")
    config, others = options.pop("config", CONFIG), options.pop("others", {})

    def check(folder: Path) -> None:
        weights = random_weights(config)
        tensors = gguf_tensors(weights, config) | others
        path = write_gguf(folder / "m.gguf", tensors, config, **options)
        offset = np.float32(0 if config.text.v_norm else 1)
        read = {
            name: (array + offset) - offset if name.endswith("norm.weight") else array
            for name, array in weights.items()
        }
        reads(path, read, config)

    return Case(GGUF, kind, check, verdict, "the gguf package", log, error)


def quantised(folder: Path, kind: T) -> None:
    tensors, expected = wide_tensors(kind)
    reads(write_gguf(folder / "m.gguf", tensors, WIDE), expected, WIDE)


def cut_off(folder: Path) -> None:
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()))
    path.write_bytes(path.read_bytes()[:-100])
    open_checkpoint(path)


TYPES = [
    T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K,
    T.Q6_K, T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_NL, T.IQ4_XS,
    T.TQ1_0, T.TQ2_0, T.MXFP4,
]  # fmt: skip
HEAD = {"lm_head.weight": random_weights()[TABLE]}
INDEX = "model.safetensors.index.json"

CASES = [
    folder_case("float32"),
    folder_case("bfloat16", dtype=BFLOAT16),
    folder_case("float16", dtype=np.float16),
    *(
        Case(FOLDER, f"multimodal, text under `{prefix}`", partial(multimodal, prefix=prefix),
             "loads", "safetensors", "left aside 1 tensors")
        for prefix in ("model.language_model.", "language_model.model.")
    ),
    folder_case("a tied head that is stored too", others=HEAD),
    folder_case("buffers of older versions (`rotary_emb.inv_freq`)", "loads", log="inv_freq",
                others={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}),
    folder_case("names under `_orig_mod.` (torch.compile)", prefix="_orig_mod.model."),
    Case(FOLDER, "shards and their index", partial(sharded, change=lambda where: None)),
    Case(FOLDER, "an index that leaves out a tensor that a shard holds",
         partial(sharded, change=lambda where: where.pop("model.vision_tower.x")), "loads"),
    Case(FOLDER, "an index that lists a head that no shard holds",
         partial(sharded, change=lambda where: where.update({"lm_head.weight": "model-00002-of-00002.safetensors"})),
         "loads"),
    Case(FOLDER, "a Git LFS pointer", partial(written, files={"model.safetensors": LFS}),
         "refused", error="git lfs pull"),
    Case(FOLDER, "pickled weights", partial(written, files={"pytorch_model.bin": b"PK"}),
         "refused", error="safetensors"),
    Case(FOLDER, "an index without its shards",
         partial(written, files={INDEX: b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'}),
         "refused", error="model-00001-of-00002.safetensors"),
    Case(FOLDER, "an adapter in place of a model", adapter_as_model, "refused", error="adapter"),
    gguf_case("Gemma 3"),
    *(gguf_case(f"Gemma 4 {size.upper()}'s layers", config=GEMMA4[size]) for size in GEMMA4),
    *(
        Case(GGUF, f"{kind.name}", partial(quantised, kind=kind), oracle="gguf.quants.dequantize")
        for kind in TYPES
    ),
    Case(GGUF, "a truncated file", cut_off, "refused", error="truncated"),
]  # fmt: skip
assert gguf.GGUF_VERSION == 3
