"""Cases of docs/compatibility.md: checkpoints as folders, GGUF files and Orbax trees."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from compatibility import Case, Read
from disk import (
    BFLOAT16,
    CONFIG,
    GEMMA4,
    WIDE,
    gguf_tensors,
    random_weights,
    read_all,
    wide_tensors,
    write_gguf,
    write_hf,
)
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from orbax_trees import flat_tree, flat_tree_of_gemma4, nested_tree, write
from safetensors.numpy import save_file

from gemlax.checkpoints import open_checkpoint
from gemlax.config import GemmaConfig, edit
from gemlax.names import HEAD

__all__ = ["CASES"]

FOLDER, GGUF, ORBAX = "Hugging Face folders", "GGUF files", "Orbax folders"
SAFETENSORS, GGUF_PY = "the safetensors package", "the gguf package"
TABLE, INDEX = "embed_tokens.weight", "model.safetensors.index.json"
OTHERS = {"model.vision_tower.x": np.zeros(3, np.float32)}
UNTIED = edit(CONFIG, tie_word_embeddings=False)


def reads(path: Path, expected: dict[str, np.ndarray], config: GemmaConfig = CONFIG) -> Read:
    """Return the weights of a checkpoint, whose config and tensors are checked."""
    dtype = next(iter(expected.values())).dtype
    with open_checkpoint(path) as checkpoint:
        checkpoint.check()
        # A GGUF file names the family alone, not the class.
        found = dataclasses.replace(checkpoint.config.text, model_type=config.text.model_type)
        assert found == config.text
        return Read(read_all(checkpoint, dtype), expected)


# Hugging Face folders.


def folder_case(kind: str, verdict: str = "exact", log: str = "", error: str = "", **how) -> Case:
    """Return the case of a folder written by the safetensors package.

    Args:
        how: for `write_hf`; also `dtype`, and `model`: the config of the weights.
    """
    dtype, model = np.dtype(how.pop("dtype", np.float32)), how.pop("model", CONFIG)
    how.setdefault("config", model.to_hf())

    def check(folder: Path) -> Read:
        weights = random_weights(model, np.float32 if dtype == np.float64 else dtype)
        stored = {name: array.astype(dtype) for name, array in weights.items()}
        return reads(write_hf(folder, stored, **how), weights, model)

    return Case(FOLDER, kind, check, verdict, "" if error else SAFETENSORS, log, error)


def outer(prefix: str) -> dict[str, Any]:
    """Return options of a multimodal folder."""
    config = {"model_type": "gemma3", "text_config": CONFIG.to_hf(), "vision_config": {}}
    return {"prefix": prefix, "config": config, "others": OTHERS}


def sharded(folder: Path, change: Callable[[dict[str, str]], Any]) -> Read:
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
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    return reads(folder, weights)


def table_as_head(folder: Path) -> Read:
    weights = random_weights()
    rest = {name: array for name, array in weights.items() if name != TABLE}
    return reads(write_hf(folder, rest, others={HEAD: weights[TABLE]}), weights)


def given_as(folder: Path, name: str) -> Read:
    """Give a file of a folder in place of the folder."""
    weights = random_weights()
    return reads(write_hf(folder, weights) / name, weights)


def experts_apart(folder: Path, names: Callable[[str, int], str]) -> Read:
    """Write gate, up and down of experts in tensors of their own, named by half and expert."""
    weights = random_weights(EXPERTS)
    tensors = dict(weights)
    for name in [name for name in weights if ".experts." in name]:
        base, array = name.partition("experts.")[0] + "experts.", tensors.pop(name)
        halves = ("gate", "up") if "gate_up" in name else ("down",)
        for half, part in zip(halves, np.split(array, len(halves), axis=1), strict=True):
            for expert, own in enumerate(part):
                tensors.setdefault(base + names(half, expert), []).append(own)
    stored = {
        name: np.stack(array)
        if "switch" in name
        else array[0]
        if isinstance(array, list)
        else array
        for name, array in tensors.items()
    }
    return reads(write_hf(folder, stored, config=EXPERTS.to_hf()), weights, EXPERTS)


def diverged(folder: Path) -> None:
    weights = random_weights()
    weights[TABLE][7, 7] = np.nan
    reads(write_hf(folder, weights), weights)


def lacking(folder: Path) -> None:
    weights = random_weights()
    weights.pop("layers.6.mlp.up_proj.weight")
    reads(write_hf(folder, weights), weights)


EXPERTS = GEMMA4["26b-a4b"]
SHARD_2 = "model-00002-of-00002.safetensors"
FOLDERS = [
    folder_case("float32"),
    folder_case("bfloat16", dtype=BFLOAT16),
    folder_case("float16", dtype=np.float16),
    folder_case("float64", dtype=np.float64),
    *(folder_case(f"Gemma 4 {size.upper()}'s layers", model=GEMMA4[size]) for size in GEMMA4),
    *(
        folder_case(f"multimodal, text under `{prefix}`", log="left aside 1 tensors",
                    **outer(prefix))
        for prefix in ("model.language_model.", "language_model.model.")
    ),
    folder_case("a tied head that is stored too", others={HEAD: random_weights()[TABLE]}),
    folder_case("a head of its own", model=UNTIED),
    Case(FOLDER, "a tied head stored in place of the table", table_as_head, oracle=SAFETENSORS,
         log="lm_head.weight is the table"),
    folder_case("buffers of older versions (`rotary_emb.inv_freq`)",
                log="left aside 1 tensors of buffers",
                others={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}),
    *(
        folder_case(f"names under `{prefix}` ({who})", "refused", error=who,
                    prefix=f"{prefix}model.")
        for prefix, who in (("_orig_mod.", "torch.compile"), ("module.", "DataParallel"),
                            ("base_model.model.", "peft"))
    ),
    Case(FOLDER, "shards and their index", partial(sharded, change=len), oracle=SAFETENSORS),
    Case(FOLDER, "an index that leaves out a tensor that a shard holds",
         partial(sharded, change=lambda where: where.pop("model.vision_tower.x")),
         oracle=SAFETENSORS),
    Case(FOLDER, "an index that lists a head that no shard holds",
         partial(sharded, change=lambda where: where.update({HEAD: SHARD_2})), oracle=SAFETENSORS),
    *(
        Case(FOLDER, f"`{name}` given in place of the folder", partial(given_as, name=name),
             oracle=SAFETENSORS)
        for name in ("model.safetensors", "config.json")
    ),
    Case(FOLDER, "experts one by one", oracle=SAFETENSORS,
         check=partial(experts_apart, names="{1}.{0}_proj.weight".format)),
    Case(FOLDER, "experts stacked, gate and up apart (mlx-lm)", oracle=SAFETENSORS,
         check=partial(experts_apart, names="switch_glu.{0}_proj.weight".format)),
    Case(FOLDER, "weights that are not numbers", diverged, "refused", error="NaN"),
    folder_case("a missing tensor and one of another size", "refused", error="missing",
                model=UNTIED, config=UNTIED.to_hf() | {"vocab_size": 500,
                "num_hidden_layers": 8, "layer_types": None}),
    Case(FOLDER, "a layer without one of its tensors", lacking, "refused",
         error="missing: model.layers.6.mlp.up_proj.weight"),
    folder_case("a bias that Gemma does not have", "refused", error="unexpected",
                others={"model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}),
    folder_case("integers as weights", "refused", error="types",
                others={HEAD: np.zeros((512, 64), np.int8)}),
]  # fmt: skip

# GGUF files.


def gguf_case(kind: str, log: str = "", error: str = "", config: GemmaConfig = CONFIG,
              others: Any = None, **how) -> Case:  # fmt: skip
    """Return the case of a plain GGUF file with other metadata or tensors.

    Args:
        how: for `write_gguf`; also `model`, the config it should have, and `name`, the file's.
    """
    model, name = how.pop("model", config), how.pop("name", "m.gguf")

    def check(folder: Path) -> Read:
        weights = random_weights(model)
        path = write_gguf(folder / name, gguf_tensors(weights, model) | (others or {}), config,
                          **how)  # fmt: skip
        return reads(path, stored_in_gguf(weights, model), model)

    verdict, oracle = ("refused", "") if error else ("exact", GGUF_PY)
    return Case(GGUF, kind, check, verdict, oracle, log, error)


def stored_in_gguf(weights: dict[str, np.ndarray], config: GemmaConfig) -> dict[str, np.ndarray]:
    """Return weights as a file has them: norms of Gemma 3 plus one, which rounds."""
    one = np.float32(0 if config.text.v_norm else 1)
    return {
        name: (array + one) - one if name.endswith("norm.weight") else array
        for name, array in weights.items()
    }


def quantised(folder: Path, kind: T) -> Read:
    tensors, expected = wide_tensors(kind)
    for other, name in zip(tensors, expected, strict=True):
        wrong = ~np.isfinite(expected[name]).all(axis=-1)  # a random scale may be infinite
        if wrong.any():
            for rows in (tensors[other][0], expected[name]):
                rows[wrong] = rows[np.argmin(wrong)]
    return reads(write_gguf(folder / "m.gguf", tensors, WIDE), expected, WIDE)


def mixed(folder: Path) -> Read:
    """Write what `_M` files are: some matrices in a finer type."""
    tensors, expected = wide_tensors(
        T.Q4_K, {TABLE: T.Q6_K, "layers.0.mlp.down_proj.weight": T.F16}
    )
    return reads(write_gguf(folder / "m.gguf", tensors, WIDE), expected, WIDE)


def given_folder(folder: Path) -> Read:
    weights = random_weights()
    write_gguf(folder / "m.gguf", gguf_tensors(weights), split=40)
    return reads(folder, stored_in_gguf(weights, CONFIG))


def cut_off(folder: Path) -> None:
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()))
    path.write_bytes(path.read_bytes()[:-100])
    open_checkpoint(path)


def a_part_less(folder: Path) -> None:
    first = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), split=40)
    (folder / "m-00002-of-00003.gguf").unlink()
    open_checkpoint(first)


def other_file(folder: Path, arch: str, kind: str = "model", keys: bool = False) -> None:
    """Open a file of another architecture or type."""
    writer = GGUFWriter(folder / "m.gguf", arch)
    writer.add_type(kind)
    if keys:
        writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    open_checkpoint(folder / "m.gguf")


def filled(folder: Path) -> Read:
    """Fill the vocabulary up to its rows with pieces that are not used."""
    weights = random_weights()
    pieces = [f"[PAD{i}]" if i > 500 else f"w{i}" for i in range(512)]
    pieces[:4] = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces[4:260] = [f"<0x{i:02X}>" for i in range(256)]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * 241 + [5] * 11
    extra = {"tokenizer.ggml.tokens": pieces, "tokenizer.ggml.token_type": types}
    path = write_gguf(folder / "m.gguf", gguf_tensors(weights), extra=extra)
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        assert tokenizer is not None and tokenizer.unused_ids == set(range(501, 512))
    return reads(path, stored_in_gguf(weights, CONFIG))


def experts_apart_in_gguf(folder: Path) -> Read:
    weights = random_weights(EXPERTS)
    tensors = gguf_tensors(weights, EXPERTS)
    for name in [name for name in tensors if "ffn_gate_up_exps" in name]:
        gate, up = np.split(tensors.pop(name)[0], 2, axis=1)
        tensors[name.replace("gate_up", "gate")] = (np.ascontiguousarray(gate), None)
        tensors[name.replace("gate_up", "up")] = (np.ascontiguousarray(up), None)
    return reads(write_gguf(folder / "m.gguf", tensors, EXPERTS), weights, EXPERTS)


def unscaled(folder: Path) -> Read:
    weights = random_weights(EXPERTS)
    tensors = gguf_tensors(weights, EXPERTS)
    rest = {name: array for name, array in tensors.items() if "layer_output_scale" not in name}
    expected = {
        name: np.ones_like(array) if name.endswith("layer_scalar") else array
        for name, array in weights.items()
    }
    return reads(write_gguf(folder / "m.gguf", rest, EXPERTS), expected, EXPERTS)


def more_tokens(folder: Path) -> Read:
    """Write a control token more than the table has rows, as ollama's files have."""
    weights = random_weights()
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"w{i}" for i in range(252)] + ["<image_soft_token>"]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * 252 + [3]
    extra = {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(i) for i in range(513)],
    }
    path = write_gguf(folder / "m.gguf", gguf_tensors(weights), extra=extra)
    return reads(path, stored_in_gguf(weights, CONFIG))


def settings(folder: Path, extra: dict[str, Any], expected: Any) -> Read:
    """Compare the stops and the settings of a file."""
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    with open_checkpoint(path) as checkpoint:
        return Read((checkpoint.config.eos_token_id, checkpoint.generation_config), expected)


def settings_case(kind: str, extra: dict[str, Any], *expected: Any, log: str = "") -> Case:
    check = partial(settings, extra=extra, expected=expected)
    return Case(GGUF, kind, check, "loads", f"stops {expected[0]}, {expected[1]}", log)


TYPES = [
    T.F32, T.F16, T.BF16, T.F64, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q2_K, T.Q3_K, T.Q4_K,
    T.Q5_K, T.Q6_K, T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_NL,
    T.IQ4_XS, T.TQ1_0, T.TQ2_0, T.MXFP4, T.NVFP4,
]  # fmt: skip
PATTERN = "gemma4.attention.sliding_window_pattern"
CAPPED = edit(CONFIG, final_logit_softcapping=30.0)
TOWER = {
    "v.blk.0.attn_q.weight": (np.zeros((4, 4), np.float16), None),
    "mm.mm_input_projection.weight": (np.zeros((4, 4), np.float16), None),
}
SAMPLING, IDS = gguf.Keys.General, gguf.Keys.Tokenizer
GGUFS = [
    gguf_case("Gemma 3"),
    *(gguf_case(f"Gemma 4 {size.upper()}'s layers", config=GEMMA4[size]) for size in GEMMA4),
    *(
        Case(GGUF, f"{kind.name}", partial(quantised, kind=kind), oracle="gguf.quants.dequantize")
        for kind in TYPES
    ),
    Case(GGUF, "several types in one file", mixed, oracle="gguf.quants.dequantize"),
    gguf_case("another alignment", alignment=128),
    gguf_case("parts (llama-gguf-split)", split=40),
    Case(GGUF, "the folder of the parts", given_folder, oracle=GGUF_PY),
    gguf_case("encoders in the same file, as ollama writes them", name="sha256-1f3a",
              log="left aside 2 tensors of other parts", others=TOWER,
              extra={"gemma3.vision.block_count": 27, "gemma3.mm.tokens_per_image": 256}),
    gguf_case("ollama's names of the rope's bases", extra={"gemma3.rope.global.freq_base": 1e6,
              "gemma3.rope.local.freq_base": 1e4}),
    gguf_case("Gemma 3 with a softcap of the logits", model=CAPPED,
              extra={"gemma3.final_logit_softcapping": 30.0}),
    gguf_case("a head of its own (`output.weight`)", model=UNTIED),
    gguf_case("a copy of the table as `output.weight`",
              others={"output.weight": (random_weights()[TABLE], None)}),
    gguf_case("Gemma 4 with a number for the pattern of its layers", config=EXPERTS,
              extra={PATTERN: 6}),
    gguf_case("Gemma 4 with `rope.scaling.type` none", config=EXPERTS,
              extra={"gemma4.rope.scaling.type": "none"}),
    gguf_case("Gemma 4 with a linear rope", config=EXPERTS, error="rope.scaling.factor = 8.0",
              extra={"gemma4.rope.scaling.type": "linear", "gemma4.rope.scaling.factor": 8.0}),
    gguf_case("Gemma 3 with YaRN", extra={"gemma3.rope.scaling.type": "yarn"}, error="yarn"),
    gguf_case("a key at a neutral value", extra={"gemma3.pooling_type": 0}, log="pooling_type"),
    gguf_case("a key that changes the answer", extra={"gemma3.attention.causal": False},
              error="attention.causal = False"),
    Case(GGUF, "Gemma 4 with experts' gate and up apart", experts_apart_in_gguf, oracle=GGUF_PY),
    Case(GGUF, "Gemma 4 without the scales of its layers", unscaled, oracle=GGUF_PY,
         log="is not there and taken as 1"),
    Case(GGUF, "more tokens than the table has rows (ollama)", more_tokens, oracle=GGUF_PY,
         log="no row in the table"),
    Case(GGUF, "a vocabulary filled up with unused pieces", filled, oracle=GGUF_PY),
    settings_case("an end of turn beside the end of text", {IDS.EOT_ID: 106}, (1, 106), {}),
    settings_case("ollama's list of stops", {"tokenizer.ggml.eos_token_ids": [1, 106]},
                  (1, 106), {}),
    settings_case("sampling settings (`general.sampling.*`)",
                  {SAMPLING.SAMPLING_TEMP: 0.5, SAMPLING.SAMPLING_TOP_K: 64}, (1,),
                  {"temperature": 0.5, "top_k": 64, "do_sample": True}),
    settings_case("tokens that are never to be sampled",
                  {"tokenizer.ggml.suppress_tokens": [7, 8]}, (1,), {"suppress_tokens": [7, 8]}),
    settings_case("samplers that gemlax has not", {SAMPLING.SAMPLING_MIROSTAT: 2}, (1,), {},
                  log="mirostat"),
    Case(GGUF, "a truncated file", cut_off, "refused", error="truncated"),
    Case(GGUF, "a part that is missing", a_part_less, "refused", error="m-00002-of-00003.gguf"),
    *(
        Case(GGUF, kind, partial(other_file, **how), "refused", error=error)
        for kind, how, error in [
            ("an mmproj file", {"arch": "clip", "kind": "mmproj"}, "mmproj"),
            ("an adapter", {"arch": "gemma3", "kind": "adapter"}, "adapter"),
            ("an importance matrix", {"arch": "gemma3", "kind": "imatrix"}, "imatrix"),
            ("a drafter of Gemma 4", {"arch": "gemma4-assistant"}, "gemma4-assistant"),
            ("another architecture", {"arch": "llama"}, "'llama'"),
        ]
    ),
]  # fmt: skip

# Orbax.


def orbax(folder: Path, tree: Any, config: GemmaConfig, beside: bool = True) -> Read:
    weights = random_weights(config, BFLOAT16)
    path = write(folder / "m", tree(weights))
    if beside:
        (path / "config.json").write_text(json.dumps(config.to_hf()))
    return reads(path, weights, config)


def stacked(folder: Path) -> None:
    tree = {"params/layers/attn": {"w": np.zeros((7, 4, 4), np.float32)}}
    open_checkpoint(write(folder / "m", tree))


E2B = GEMMA4["e2b"]
ORBAXES = [
    Case(ORBAX, "Gemma 3, flat names", partial(orbax, tree=flat_tree, config=CONFIG),
         oracle="orbax"),
    Case(ORBAX, "Gemma 3, nested", partial(orbax, tree=nested_tree, config=CONFIG), oracle="orbax"),
    Case(ORBAX, "Gemma 4 E2B's layers, with K/V of layers that share it",
         partial(orbax, tree=partial(flat_tree_of_gemma4, config=E2B, stored_kv=True), config=E2B),
         oracle="orbax", log="left aside 10 tensors"),
    Case(ORBAX, "other arrays", stacked, "refused", error="embedd"),
]  # fmt: skip

CASES = [*FOLDERS, *GGUFS, *ORBAXES]
