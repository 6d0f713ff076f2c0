"""Gemma 4 checkpoints to and from transformers, of every model type, bit for bit."""

import numpy as np
import pytest
import torch
from disk import BFLOAT16, GEMMA4, assert_same_bits, random_weights, read_all
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from gemlax.checkpoints import open_checkpoint, save_safetensors

DTYPES = {np.dtype(np.float32): torch.float32, BFLOAT16: torch.bfloat16}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
}  # fmt: skip
UNIFIED_VISION = {"mm_embed_dim": 80, "mm_posemb_size": 16, "output_proj_dims": 80}


def saved(folder, size: str, dtype: np.dtype) -> dict[str, np.ndarray]:
    weights = random_weights(GEMMA4[size], dtype)
    save_safetensors(folder, GEMMA4[size], weights.items(), generation_config={})
    return weights


def same(found: torch.Tensor, expected: np.ndarray) -> bool:
    return found.contiguous().view(torch.uint8).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", GEMMA4)
def test_a_saved_folder_loads_in_transformers(size, dtype, tmp_path):
    weights = saved(tmp_path / "ours", size, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=DTYPES[dtype], output_loading_info=True
    )
    assert not any(info.values()), info
    state = model.state_dict()  # `layer_scalar` is a buffer
    assert [n for n, w in weights.items() if not same(state[f"model.{n}"], w)] == []
    model.save_pretrained(tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == GEMMA4[size].text
        assert_same_bits(read_all(checkpoint, dtype), weights)


@pytest.mark.parametrize("size", GEMMA4)
def test_a_multimodal_folder_of_transformers_is_read(size, tmp_path):
    weights = saved(tmp_path / "ours", size, np.dtype(np.float32))
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    if text.config.model_type == "gemma4_unified_text":
        config = Gemma4UnifiedConfig(text_config=text.config, vision_config=UNIFIED_VISION)
        model = Gemma4UnifiedForConditionalGeneration(config)
    else:
        config = Gemma4Config(text_config=text.config, vision_config=VISION, audio_config=None)
        model = Gemma4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path / "theirs")
    with open_checkpoint(tmp_path / "theirs") as checkpoint:
        checkpoint.check()
        assert checkpoint.config.text == GEMMA4[size].text
        assert_same_bits(read_all(checkpoint), weights)
