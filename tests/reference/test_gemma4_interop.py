"""Gemma 4 to and from transformers: its folders load here, ours load there, bit for bit."""

import json

import pytest
from golden.conditioned import conditioned_weights, weight_shapes
from reference.interop import (
    check_same_logits,
    check_same_weights,
    check_saved_folder_loads,
    check_three_round_trips,
    reference_copy,
)
from reference.toys import GEMMA_4, toy
from safetensors.numpy import load_file, save_file

import gemlax

EDGE = ("gemma-4-e2b", "gemma-4-e4b")
UNIFIED = "gemma-4-12b"
KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "per_layer_config",
        "max_position_embeddings", "rms_norm_eps", "sliding_window", "layer_types",
        "rope_parameters", "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp",
        "final_logit_softcapping", "use_bidirectional_attention", "bos_token_id", "eos_token_id",
        "pad_token_id")  # fmt: skip
# The unified class lacks these; and with no per-layer inputs their table has no size to keep.
KEPT_TEXT = (*KEPT, "hidden_size_per_layer_input", "enable_moe_block", "num_experts",
             "top_k_experts", "moe_intermediate_size")  # fmt: skip
KEPT_EDGE = (*KEPT_TEXT, "vocab_size_per_layer_input")


@pytest.mark.parametrize("size", GEMMA_4)
def test_a_folder_of_transformers_loads(size, tmp_path):
    reference = reference_copy(size)
    reference.save_pretrained(tmp_path / "theirs")
    model = gemlax.load(tmp_path / "theirs", dtype="float32", layers="scan")
    check_same_weights(model, reference)
    check_same_logits(model, size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", GEMMA_4)
def test_a_saved_folder_loads_in_transformers(size, dtype, tmp_path):
    check_saved_folder_loads(size, dtype, tmp_path)


@pytest.mark.parametrize("size", GEMMA_4)
def test_a_config_survives_three_round_trips(size, tmp_path):
    kept = KEPT_EDGE if size in EDGE else KEPT if size == UNIFIED else KEPT_TEXT
    check_three_round_trips(size, kept, tmp_path)


@pytest.mark.parametrize("size", EDGE)
def test_unused_keys_of_shared_layers_change_nothing(size, tmp_path):
    """Published files hold K/V weights of the layers that share; transformers saves none."""
    reference = reference_copy(size)
    reference.save_pretrained(tmp_path)
    shapes = weight_shapes({**toy(size).hf_config, "num_kv_shared_layers": 0})
    stored = load_file(tmp_path / "model.safetensors")
    more = {f"model.{n}": w for n, w in conditioned_weights(size, shapes).items()}
    assert len(more.keys() - stored.keys()) == 3 * reference.config.num_kv_shared_layers
    save_file(more | stored, tmp_path / "model.safetensors", {"format": "pt"})
    check_same_weights(gemlax.load(tmp_path, dtype="float32"), reference)


@pytest.mark.parametrize("size", GEMMA_4)
def test_both_layouts_of_the_config_are_read(size, tmp_path):
    """Published files have flat global fields, transformers writes a per-layer view."""
    reference_copy(size).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in written
    assert "global_head_dim" not in written
    assert gemlax.load(tmp_path, dtype="float32").config == toy(size).config
