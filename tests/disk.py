"""Small checkpoints on disk, written by other packages than ours: the readers' oracle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

from gemlax.calibration import measure, random_rows
from gemlax.checkpoints import Checkpoint
from gemlax.config import GemmaConfig, edit, from_hf
from gemlax.names import HEAD, text_weights
from gemlax.presets import PRESETS, tiny

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Two K/V heads of four: a wrong order of axes shows. Seven layers: both kinds, and a remainder.
CONFIG = from_hf(
    {
        "model_type": "gemma3_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 32,
        "max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
)

# Where a block holds its float16 scales. Random bytes there would be infinities. Types whose
# scales lie elsewhere have none.
SCALES = {
    T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2],
    T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208], T.Q2_K: [80, 82],
    T.Q3_K: [108], T.IQ1_S: [0], T.IQ1_M: [], T.IQ2_XXS: [0], T.IQ2_XS: [0], T.IQ2_S: [0],
    T.IQ3_XXS: [0], T.IQ3_S: [0], T.IQ4_NL: [0], T.IQ4_XS: [0], T.TQ1_0: [52], T.TQ2_0: [64],
    T.MXFP4: [], T.NVFP4: [], T.Q8_K: [],
}  # fmt: skip
# One layer whose rows are whole blocks of 256, and a table of several steps of `read`, the last
# one shorter.
WIDE = from_hf(
    CONFIG.to_hf()
    | {
        "vocab_size": 1300,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "layer_types": ["sliding_attention"],
        "rope_scaling": None,
    }
)


def gemma4(size: str, **changes: Any) -> GemmaConfig:
    """Return a published Gemma 4 at toy width, with some keys of its config changed."""
    return tiny(from_hf(PRESETS[f"gemma-4-{size}"] | changes))


# Shared K/V, per-layer inputs and wide MLPs; values made of keys; experts.
GEMMA4 = {
    "e2b": gemma4("e2b", num_hidden_layers=10, num_kv_shared_layers=5,
                  layer_types=PRESETS["gemma-4-e2b"]["layer_types"][:10]),
    "12b": gemma4("12b", num_hidden_layers=6),
    "26b-a4b": gemma4("26b-a4b", num_hidden_layers=6, num_experts=8, top_k_experts=2),
}  # fmt: skip


def narrow(config: GemmaConfig) -> GemmaConfig:
    """Return a toy whose widths are all made of groups of 32."""
    small = {
        "hidden_size": 64,
        "hidden_size_per_layer_input": min(config.text.hidden_size_per_layer_input, 1) * 32,
        "moe_intermediate_size": min(config.text.moe_intermediate_size, 1) * 32 or None,
    }
    return edit(config, **small)


KINDS = ["sliding_attention", "full_attention"]
# Gemma 4 that can be quantised: shared K/V and per-layer inputs, and experts.
NARROW = {
    "e2b": narrow(
        gemma4("e2b", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=KINDS * 2)
    ),
    "26b-a4b": narrow(
        gemma4("26b-a4b", num_hidden_layers=2, layer_types=KINDS, num_experts=4, top_k_experts=2)
    ),
}


def random_weights(
    config: GemmaConfig = CONFIG, dtype: Any = np.float32, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return random weights by canonical name, each different from all others."""
    rng = np.random.default_rng(seed)
    shapes = text_weights(config.text)
    return {n: rng.normal(size=s).astype(np.float32).astype(dtype) for n, s in shapes.items()}


def read_all(checkpoint: Checkpoint, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Read every weight of a checkpoint."""
    found = {}
    for name, shape in text_weights(checkpoint.config.text).items():
        found[name] = np.full(shape, np.nan, dtype)
        checkpoint.read(name, found[name])
    return found


def importance_of(weights: Mapping[str, np.ndarray], config: GemmaConfig = CONFIG) -> Any:
    """Return what the columns of matrices weigh, as int4 is made where no text is given."""

    def fill(name: str, out: np.ndarray) -> None:
        out[...] = weights[name]

    return measure(config.text, fill, random_rows(config))


def assert_same_bits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def write_hf(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    *,
    prefix: str = "model.",
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a Hugging Face folder with the safetensors package."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() if config is None else config))
    tensors = {n if n == HEAD else prefix + n: array for n, array in weights.items()}
    tensors |= others or {}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gguf_metadata(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    """Add the metadata that llama.cpp's converter writes."""
    text, spec = config.text, config.text.layers[0]
    full = text.first("full_attention")
    if text.v_norm:
        gguf_metadata_of_gemma4(writer, config)
        return
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_sliding_window(spec.window)
    writer.add_rope_freq_base(spec.rope.theta if full is None else full.rope.theta)
    if full is not None and full.rope.factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full.rope.factor)


def gguf_metadata_of_gemma4(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    """Add what conversion/gemma.py, Gemma4Model.set_gguf_parameters, writes."""
    text = config.text
    sliding, full = text.first("sliding_attention"), text.first("full_attention")
    assert sliding is not None and full is not None
    widths = [spec.intermediate_size for spec in text.layers]
    heads = [spec.num_key_value_heads for spec in text.layers]
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(widths if len(set(widths)) > 1 else widths[0])
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(heads if len(set(heads)) > 1 else heads[0])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(full.rope.theta)
    writer.add_rope_freq_base_swa(sliding.rope.theta)
    writer.add_final_logit_softcapping(text.final_logit_softcapping)
    writer.add_sliding_window(sliding.window)
    writer.add_sliding_window_pattern([spec.kind == "sliding_attention" for spec in text.layers])
    writer.add_shared_kv_layers(sum(not spec.owns_kv for spec in text.layers))
    writer.add_embedding_length_per_layer_input(text.hidden_size_per_layer_input)
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    if full.num_experts:
        writer.add_expert_count(full.num_experts)
        writer.add_expert_used_count(text.top_k_experts)
        writer.add_expert_feed_forward_length(text.moe_intermediate_size)


def gguf_vocabulary(writer: gguf.GGUFWriter, num_tokens: int, model: str = "llama") -> None:
    """Add a SentencePiece vocabulary: the named pieces, the bytes, and made-up words.

    Of kind "gemma4" it has merges, and scores that say nothing.
    """
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = ["a", "b", "é", "ab", "\u2581", "\u2581a"]
    words += [f"w{i}" for i in range(num_tokens - len(pieces) - len(words))]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * len(words)
    writer.add_tokenizer_model(model)
    writer.add_token_list(pieces + words)
    if model == "gemma4":
        writer.add_token_scores([0.0] * num_tokens)
        writer.add_token_merges(["a b", "\u2581 a"])
    else:
        writer.add_token_scores([-1000.0] * len(pieces) + [-float(i) for i in range(len(words))])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)


def write_gguf(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]],
    config: GemmaConfig = CONFIG,
    *,
    vocabulary: bool = True,
    alignment: int | None = None,
    extra: Mapping[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """Write a GGUF file with the gguf package.

    Args:
        tensors: by GGUF name, an array, or bytes [rows, row bytes] and their quantised type.
        extra: more metadata, by key, or other values of it: str, list, float, bool, or an integer
            (uint32).
        split: the most tensors in one file; the first of several is returned.
    """
    kind = "gemma4" if config.text.v_norm else "gemma3"
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=split)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    gguf_metadata(writer, config)
    if vocabulary:
        gguf_vocabulary(writer, config.text.vocab_size, "gemma4" if kind == "gemma4" else "llama")
    for key, value in (extra or {}).items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
            add.get(type(value), writer.add_uint32)(key, value)
    for name, (array, dtype) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def gguf_tensors(
    weights: Mapping[str, np.ndarray], config: GemmaConfig = CONFIG
) -> dict[str, tuple[np.ndarray, None]]:
    """Return float32 tensors under the gguf package's names.

    Norms are plus 1 for Gemma 3, as llama.cpp does; Gemma 4 has a tensor for its rope.
    """
    text = config.text
    kind = gguf.MODEL_ARCH.GEMMA4 if text.v_norm else gguf.MODEL_ARCH.GEMMA3
    names = gguf.get_tensor_name_map(kind, text.num_hidden_layers)
    found = {}
    for name, array in weights.items():
        offset = 1 if name.endswith("norm.weight") and not text.v_norm else 0
        found[_gguf_name(names, name)] = (array + np.float32(offset), None)
    full = text.first("full_attention")
    if full is not None and full.rope.rotated != 1:
        pairs = full.head_dim // 2
        divisors = np.full(pairs, 1e30, np.float32)
        divisors[: pairs // 4] = 1
        found["rope_freqs.weight"] = (divisors, None)
    return found


def _gguf_name(names: gguf.TensorNameMap, name: str) -> str | None:
    """Name a weight as conversion/gemma.py does."""
    for ours, theirs in {
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
    }.items():
        if name.endswith(ours):
            return f"blk.{name.split('.')[1]}.{theirs}"
    if name.endswith("layer_scalar") or ".experts." in name:
        name += ".weight"
    name = name if name == HEAD else f"model.{name}"
    return names.get_name(name, try_suffixes=(".weight",))


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: T) -> np.ndarray:
    """Return random quantised rows: each bit pattern is a value."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // size, nbytes), np.uint8)
    for at in SCALES[kind]:
        scale = rng.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    # The highest bit of other exponents: without it all scales are finite.
    if kind in (T.IQ1_M, T.MXFP4):
        blocks[:, 55 if kind == T.IQ1_M else 0] &= 0xBF if kind == T.IQ1_M else 0x7F
    return blocks.reshape(shape[0], -1)


def wide_tensors(
    kind: T, others: Mapping[str, T] | None = None
) -> tuple[dict[str, tuple[np.ndarray, T | None]], dict[str, np.ndarray]]:
    """Return the tensors of a WIDE file whose matrices are of one type, and what they mean.

    Args:
        others: the types of some matrices, by canonical name.
    """
    rng = np.random.default_rng(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, 1)
    tensors, expected = {}, {}
    for name, shape in text_weights(WIDE.text).items():
        array = rng.normal(size=shape).astype(np.float64 if kind == T.F64 else np.float32)
        other = _gguf_name(names, name)
        if len(shape) == 1:
            array = array.astype(np.float32)
            tensors[other], expected[name] = (array, None), array - np.float32(1)
            continue
        own = (others or {}).get(name, kind)
        if own in SCALES:
            data = random_blocks(rng, shape, own)
        else:
            data = array if own == T.F64 else gguf.quants.quantize(array, own)
        tensors[other] = (data, own)
        if own not in (T.F64, T.Q8_K):
            with np.errstate(all="ignore"):  # a random scale may be infinite
                array = gguf.quants.dequantize(data, own)
        expected[name] = array.astype(np.float32)
    return tensors, expected
