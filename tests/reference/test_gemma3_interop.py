"""Checkpoints to and from transformers: its folders load here, ours load there, bit for bit."""

import numpy as np
import pytest
import torch
from golden import hf
from reference.interop import (
    DTYPES,
    check_same_logits,
    check_same_weights,
    check_saved_folder_loads,
    check_three_round_trips,
    reference_copy,
)
from reference.toys import toy
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    SiglipVisionConfig,
)

import gemlax

# One pattern that ends on a full layer and one that does not; without and with a rope factor.
TEXT = ("gemma-3-270m", "gemma-3-4b")
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
        "query_pre_attn_scalar", "sliding_window", "layer_types", "rope_parameters",
        "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def multimodal(size: str) -> Gemma3ForConditionalGeneration:
    """Return transformers' multimodal model around a toy, with a vision tower of two layers."""
    case = toy(size)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=56, patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=dict(case.hf_config), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        boi_token_index=509, eoi_token_index=510, image_token_index=511,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    state = {f"model.language_model.{n}": torch.from_numpy(w) for n, w in case.weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "language_model" in name]
    model.tie_weights()
    return model


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("size", TEXT)
def test_a_folder_of_transformers_loads(size, layers, tmp_path):
    reference = reference_copy(size)
    reference.save_pretrained(tmp_path / "theirs")
    model = gemlax.load(tmp_path / "theirs", dtype="float32", layers=layers)
    check_same_weights(model, reference)
    check_same_logits(model, size)


def test_a_bfloat16_folder_of_transformers_loads_bit_for_bit(tmp_path):
    reference = reference_copy("gemma-3-4b", "bfloat16")
    reference.save_pretrained(tmp_path / "theirs")
    model = gemlax.load(tmp_path / "theirs", dtype="bfloat16")
    check_same_weights(model, reference)


def test_a_sharded_folder_of_transformers_loads(tmp_path):
    reference = reference_copy("gemma-3-4b")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    check_same_weights(gemlax.load(tmp_path / "theirs", dtype="float32"), reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", TEXT)
def test_a_saved_folder_loads_in_transformers(size, dtype, tmp_path):
    check_saved_folder_loads(size, dtype, tmp_path)


@pytest.mark.parametrize("layout", ["saved", "published", "in memory"])
def test_the_text_part_of_a_multimodal_folder_loads(layout, tmp_path):
    size, folder = "gemma-3-4b", tmp_path / "theirs"
    reference = multimodal(size)
    reference.save_pretrained(folder)
    if layout != "saved":
        state = {n: v for n, v in reference.state_dict().items() if n != "lm_head.weight"}
        if layout == "published":
            state = {published_name(name): value for name, value in state.items()}
        save_file(state, folder / "model.safetensors")
    model = gemlax.load(folder, dtype="float32")
    check_same_weights(model, reference)
    check_same_logits(model, size)


def published_name(name: str) -> str:
    """Return a name as in Google's multimodal files, from transformers' name in memory."""
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def test_a_multimodal_folder_saved_again_is_a_text_model_for_transformers(tmp_path):
    size = "gemma-3-4b"
    multimodal(size).save_pretrained(tmp_path / "theirs")
    model = gemlax.load(tmp_path / "theirs", dtype="float32")
    gemlax.save(model, tmp_path / "ours")
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(reference).__name__ == "Gemma3ForCausalLM"
    case = toy(size)
    logits = hf.run(reference.eval(), case.tokens, case.lengths).logits
    np.testing.assert_array_equal(logits, case.logits)


@pytest.mark.parametrize("size", ["gemma-3-270m", "gemma-3-27b"])
def test_a_config_survives_three_round_trips(size, tmp_path):
    check_three_round_trips(size, KEPT, tmp_path)
