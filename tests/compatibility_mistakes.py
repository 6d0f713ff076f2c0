"""Cases of docs/compatibility.md: what is given in place of a model by mistake."""

import json
from functools import partial
from pathlib import Path

from compatibility import Case, Read
from disk import CONFIG, random_weights, read_all, write_hf

from gemlax.checkpoints import find, open_checkpoint

__all__ = ["CASES"]

GROUP = "Mistakes"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 536870912\n"
PAGE = b"<!doctype html><html><body>google/gemma-3-1b-it</body></html>"
BASE = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-270m"}).encode()
CONFIG_FILE = json.dumps(CONFIG.to_hf()).encode()
SHARD = "model-00001-of-00002.safetensors"
INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
MANIFEST = {
    "schemaVersion": 2,
    "layers": [
        {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1f3a", "size": 1}
    ],
}
Files = dict[str, bytes]


def written(folder: Path, files: Files, given: str = "m", over: bool = False) -> None:
    """Write these files, over a good folder or alone, and open what is given.

    The folder is `m`; it is read with its tokenizer, as a model is.
    """
    if over:
        write_hf(folder / "m", random_weights())
    for name, data in files.items():
        path = folder / "m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "m").mkdir(exist_ok=True)
    with open_checkpoint(folder / given) as checkpoint:
        checkpoint.check()
        checkpoint.tokenizer()


def mistake(kind: str, files: Files, error: str, given: str = "m", over: bool = False) -> Case:
    check = partial(written, files=files, given=given, over=over)
    return Case(GROUP, kind, check, "refused", error=error)


def named(folder: Path, name: str) -> None:
    find(name)


def one_deeper(folder: Path) -> None:
    write_hf(folder / "gemma", random_weights())
    open_checkpoint(folder)


def beside_a_model(folder: Path) -> Read:
    """Leave pickled weights beside good ones, as old repositories do."""
    weights = random_weights()
    write_hf(folder, weights)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n")
    with open_checkpoint(folder) as checkpoint:
        return Read(read_all(checkpoint), weights)


CASES = [
    *(
        mistake(f"{what} in place of `{name}`", {name: data}, error, over=True)
        for what, data, error in (
            ("a Git LFS pointer", POINTER, "git lfs pull"),
            ("a web page", PAGE, "is a web page"),
        )
        for name in ("model.safetensors", "config.json", "tokenizer.json")
    ),
    mistake("a Git LFS pointer in place of a GGUF file", {"m.gguf": POINTER}, "git lfs pull",
            "m/m.gguf"),
    mistake("the hub's answer in place of a file", {"tokenizer.model": b"Entry not found"},
            "a server's answer", over=True),
    mistake("an empty file", {"model.safetensors": b""}, "is empty", over=True),
    mistake("a file that ends too soon", {"model.safetensors": b"\x10\0\0\0\0\0\0\0{"},
            "truncated", over=True),
    mistake("an adapter in place of a model",
            {"adapter_config.json": BASE, "adapter_model.safetensors": b"x"}, "is an adapter"),
    mistake("the output of transformers' Trainer",
            {"checkpoint-500/config.json": b"{}", "checkpoint-500/model.safetensors": b"x",
             "trainer_state.json": b"{}"}, "give the folder in it"),
    mistake("the output of `gemlax tune`",
            {"run.json": b"{}", "log.jsonl": b"", "checkpoints/12/_METADATA": b"{}",
             "adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": b"x"},
            "m/adapter"),
    mistake("a checkpoint of that run", {"checkpoints/12/_METADATA": b"{}"}, "--resume",
            "m/checkpoints/12"),
    mistake("what a stopped training left", {"optimizer.pt": b"x", "trainer_state.json": b"{}"},
            "is of a training run"),
    mistake("pickled weights alone", {"config.json": CONFIG_FILE, "pytorch_model.bin": b"PK"},
            "pickle is not read"),
    mistake("a pickled file", {"model.pth": b"\x80\x02"}, "pickle", "m/model.pth"),
    Case(GROUP, "pickled weights beside safetensors", beside_a_model,
         oracle="the safetensors package"),
    mistake("an index without its shards", {"config.json": CONFIG_FILE,
            "model.safetensors.index.json": INDEX}, SHARD),
    mistake("not downloaded: config.json alone", {"config.json": CONFIG_FILE},
            "not downloaded completely"),
    mistake("not downloaded: the hub's cache without the weights",
            {"models--google--gemma-3-1b-it/snapshots/abc/config.json": b"{}"},
            "hf download google/gemma-3-1b-it", "m/models--google--gemma-3-1b-it/snapshots/abc"),
    mistake("a download that did not end", {"model.safetensors.incomplete": b"x"},
            "did not end", "m/model.safetensors.incomplete"),
    Case(GROUP, "the folder above the model", one_deeper, "refused", error="gemma"),
    mistake("safetensors without config.json", {"model.safetensors": b"x"}, "no config.json"),
    mistake("a tokenizer alone", {"tokenizer.json": b"{}"}, "holds a tokenizer"),
    mistake("an ollama manifest", {"4b": json.dumps(MANIFEST).encode()}, "sha256-1f3a", "m/4b"),
    mistake("an empty folder", {}, "is empty"),
    *(
        mistake(what, {name: data}, error, given)
        for what, name, data, error, given in [
            ("a MediaPipe bundle", "gemma3-1b-it-int4.task", b"PK", "MediaPipe", "m"),
            ("a LiteRT-LM file", "gemma.litertlm", b"LITERTLM", "LiteRT-LM", "m/gemma.litertlm"),
            ("an ONNX export", "model.onnx", b"x", "ONNX", "m"),
            ("Keras weights", "model.weights.h5", b"\x89HDF\r\n", "Keras", "m"),
            ("Flax weights", "flax_model.msgpack", b"x", "Flax", "m"),
            ("an archive", "gemma.tar.gz", b"\x1f\x8b", "unpack it", "m/gemma.tar.gz"),
            ("a GGML file", "ggml-model.bin.old", b"tjgg", "GGML", "m/ggml-model.bin.old"),
        ]
    ),
    *(
        Case(GROUP, f"`{name}` as the model", partial(named, name=name), "refused", error=error)
        for name, error in [
            ("https://huggingface.co/nobody/no-such-gemma", "hf download"),
            ("gemma3:4b", "ollama"),
            ("gemma-3-1b", "no model at"),
            ("no/such/folder/model.gguf", "no/such"),
        ]
    ),
]  # fmt: skip
