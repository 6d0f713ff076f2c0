"""Small checkpoints on disk, written by other packages than ours: the readers' oracle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemlax.checkpoints import Checkpoint, text_weights
from gemlax.config import GemmaConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Two K/V heads of four: a wrong order of axes shows. Seven layers: both kinds, and a remainder.
CONFIG = GemmaConfig.from_hf(
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
    tensors = {prefix + name: array for name, array in weights.items()} | dict(others or {})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gguf_metadata(writer: gguf.GGUFWriter, config: GemmaConfig) -> None:
    """Add the metadata that llama.cpp's converter writes for a Gemma 3."""
    text, spec = config.text, config.text.layers[0]
    full = text.first("full_attention")
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


def gguf_vocabulary(writer: gguf.GGUFWriter, num_tokens: int) -> None:
    """Add a SentencePiece vocabulary: the named pieces, the bytes, and made-up words."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
    words = ["a", "b", "é", "ab", "\u2581", "\u2581a"]
    words += [f"w{i}" for i in range(num_tokens - len(pieces) - len(words))]
    types = [3, 3, 3, 2] + [6] * 256 + [1] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + words)
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
) -> Path:
    """Write a GGUF file with the gguf package.

    Args:
        tensors: by GGUF name, an array, or bytes [rows, row bytes] and their quantised type.
        extra: more metadata, by key, or other values of it: str, list, or an integer (uint32).
    """
    writer = gguf.GGUFWriter(path, "gemma3")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    gguf_metadata(writer, config)
    if vocabulary:
        gguf_vocabulary(writer, config.text.vocab_size)
    for key, value in (extra or {}).items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(weights: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, None]]:
    """Return float32 tensors under the gguf package's names, norms plus 1 as llama.cpp does."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, CONFIG.text.num_hidden_layers)
    found = {}
    for name, array in weights.items():
        other = names.get_name(f"model.{name}", try_suffixes=(".weight",))
        offset = 1 if name.endswith("norm.weight") else 0
        found[other] = (array + np.float32(offset), None)
    return found
