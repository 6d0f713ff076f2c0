"""Google's Orbax folders: written here with orbax in the layout of google-deepmind/gemma."""

import json
import logging
import random
import sys
from typing import Any

import numpy as np
import pytest
from disk import BFLOAT16, CONFIG, GEMMA4, assert_same_bits, random_weights, read_all
from orbax_trees import flat_tree, flat_tree_of_gemma4, nested_tree, write

from gemlax.checkpoints import open_checkpoint
from gemlax.errors import CheckpointError, UnsupportedError
from gemlax.names import Weight, from_orbax, resolve, text_weights
from gemlax.presets import PRESETS, preset

pytestmark = pytest.mark.deep

pytest.importorskip("orbax.checkpoint")

TEXT = CONFIG.text
D, N, K = TEXT.hidden_size, TEXT.num_attention_heads, TEXT.layers[0].num_key_value_heads
H, F = TEXT.layers[0].head_dim, TEXT.layers[0].intermediate_size
# What the class defaults and CONFIG do not share, as a row of presets.PRESETS.
ROW = {
    key: CONFIG.to_hf()[key]
    for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim",
                "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "query_pre_attn_scalar", "sliding_window", "max_position_embeddings",
                "rope_scaling")
}  # fmt: skip


def to_orbax(array: np.ndarray, weight: Weight) -> np.ndarray:
    """View a weight as its Orbax array or, where that is stacked, as its part of it."""
    return array.reshape(weight.split_shape).transpose(np.argsort(weight.orbax_axes))


@pytest.fixture
def published(monkeypatch):
    """CONFIG counts as a published size."""
    monkeypatch.setitem(PRESETS, "toy", ROW)


@pytest.mark.parametrize(("layout", "dtype"), [(flat_tree, BFLOAT16), (nested_tree, np.float32)])
def test_both_layouts_are_read(tmp_path, published, layout, dtype):
    weights = random_weights(dtype=dtype)
    with open_checkpoint(write(tmp_path / "m", layout(weights))) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == CONFIG
        assert checkpoint.stored_dtype == np.dtype(dtype).name
        assert checkpoint.generation_config == {}
        assert checkpoint.tokenizer() is None
        assert_same_bits(read_all(checkpoint, dtype), weights)
        other = BFLOAT16 if dtype == np.float32 else np.float32
        found = read_all(checkpoint, other)
    assert_same_bits(found, {name: array.astype(other) for name, array in weights.items()})


@pytest.mark.parametrize(("size", "dtype"), [("e2b", BFLOAT16), ("26b-a4b", np.float32)])
def test_gemma_4_is_read(tmp_path, size, dtype):
    config = GEMMA4[size]
    weights = random_weights(config, dtype)
    folder = write(tmp_path / "m", flat_tree_of_gemma4(weights, config))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == config
        assert_same_bits(read_all(checkpoint, dtype), weights)


def test_kv_of_layers_that_share_it_and_other_parts_are_left_aside(tmp_path, caplog):
    config = GEMMA4["e2b"]
    weights = random_weights(config, BFLOAT16)
    tree = flat_tree_of_gemma4(weights, config, stored_kv=True)
    tree["PatchInputVariablePoolingEncoder_0/_model"] = {"a": np.zeros(2)}
    tree["AudioEncoder/encoder"] = {"b": np.zeros(2)}
    tree["transformer/embedder/audio_input_projection"] = {"w": np.zeros(2)}
    folder = write(tmp_path / "m", tree)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    with caplog.at_level(logging.INFO, "gemlax"), open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert_same_bits(read_all(checkpoint, BFLOAT16), weights)
    found = [r.getMessage().split(": ")[1] for r in caplog.records if r.name.startswith("gemlax")]
    assert found == [
        "left aside 10 tensors of layers that read the K/V of another",
        "left aside 3 tensors of other parts than the text decoder",
    ]


@pytest.mark.parametrize("size", ["gemma-3-12b", "gemma-4-12b"])
def test_sizes_as_wide_and_as_deep_are_told_apart_by_their_names(tmp_path, size):
    config = preset(size)
    names = {weight.orbax for weight in resolve(config.text).values()}
    tree: dict[str, Any] = {f"transformer/{name}": {"w": np.zeros(1)} for name in names}
    table = np.zeros((8, config.text.hidden_size), BFLOAT16)
    tree["transformer/embedder/input_embedding"] = {"w": table}
    with open_checkpoint(write(tmp_path / "m", tree)) as checkpoint:
        assert checkpoint.config == config


def test_stacked_layers_are_refused(tmp_path):
    tree = {
        "transformer/embedder": {"input_embedding": np.zeros((8, 4))},
        "transformer/stacked_layers/attention_type_0/attn/q_einsum": {"w": np.zeros((2, 4))},
    }
    with pytest.raises(UnsupportedError, match=r"holds its layers stacked"):
        open_checkpoint(write(tmp_path / "m", tree))


def test_weights_are_read_in_any_order(tmp_path, published):
    weights = random_weights()
    names = list(weights)
    random.Random(0).shuffle(names)
    # The array of a pair is kept after its first half: here another follows.
    names += ["layers.0.self_attn.k_proj.weight", "layers.0.self_attn.q_proj.weight"]
    with open_checkpoint(write(tmp_path / "m", flat_tree(weights))) as checkpoint:
        for name in names:
            out = np.empty_like(weights[name])
            checkpoint.read(name, out)
            np.testing.assert_array_equal(out, weights[name])


def test_post_trained_names_and_the_vision_tower(tmp_path, published, caplog):
    tree = {f"rlx_networks/policy_network/{k}": v for k, v in flat_tree(random_weights()).items()}
    tree["SigLiPFromPatches_0/siglip_encoder"] = {"pos_embedding": np.zeros((1, 4, 2))}
    tree["rlx_networks/policy_network/transformer/embedder/mm_input_projection"] = {
        "w": np.zeros(2)
    }
    with (
        caplog.at_level(logging.INFO, "gemlax"),
        open_checkpoint(write(tmp_path / "m", tree)) as checkpoint,
    ):
        checkpoint.check()
        assert_same_bits(read_all(checkpoint), random_weights())
    found = [record for record in caplog.records if record.name.startswith("gemlax")]
    assert ["left aside 2 tensors" in record.getMessage() for record in found] == [True]


def test_the_layouts_are_the_einsums_of_the_gemma_library():
    # Integers: exact in any order of the sums.
    rng = np.random.default_rng(0)
    weights = {n: rng.integers(-9, 9, s).astype(np.float32) for n, s in text_weights(TEXT).items()}
    rows = resolve(TEXT)

    def stored(name: str) -> np.ndarray:
        return to_orbax(weights[f"layers.0.{name}.weight"], rows[f"layers.0.{name}.weight"])

    def product(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"layers.0.{name}.weight"].T

    x = rng.integers(-9, 9, (5, D)).astype(np.float32)
    inner = rng.integers(-9, 9, (5, F)).astype(np.float32)
    heads = rng.integers(-9, 9, (5, N, H)).astype(np.float32)
    # Source: google-deepmind/gemma, gm/nn/_modules.py, Attention and FeedForward.
    for name, equation in {"q": "TD,NDH->TNH", "k": "SD,KDH->SKH", "v": "SD,KDH->SKH"}.items():
        found = np.einsum(equation, x, stored(f"self_attn.{name}_proj")).reshape(5, -1)
        np.testing.assert_array_equal(found, product(x, f"self_attn.{name}_proj"))
    found = np.einsum("TNH,NHD->TD", heads, stored("self_attn.o_proj"))
    np.testing.assert_array_equal(found, product(heads.reshape(5, -1), "self_attn.o_proj"))
    for name in ("gate", "up"):
        found = np.einsum("TD,FD->TF", x, stored(f"mlp.{name}_proj"))
        np.testing.assert_array_equal(found, product(x, f"mlp.{name}_proj"))
    found = np.einsum("TF,FD->TD", inner, stored("mlp.down_proj"))
    np.testing.assert_array_equal(found, product(inner, "mlp.down_proj"))


def test_every_transform_has_its_inverse():
    weights = random_weights()
    for name, row in resolve(TEXT).items():
        stored = to_orbax(weights[name], row)
        whole = stored if row.part is None else np.stack([stored, stored])
        assert whole.shape == row.orbax_shape
        np.testing.assert_array_equal(from_orbax(whole, row).reshape(row.shape), weights[name])


def test_a_config_beside_the_arrays_decides(tmp_path):
    folder = write(tmp_path / "m", flat_tree(random_weights()))
    with pytest.raises(UnsupportedError, match=r"7 layers over a table of \[512, 64\] are no pub"):
        open_checkpoint(folder)
    (folder / "config.json").write_text('{"model_type": "gemma3_text", "num_hidden_layers": 99999}')
    with pytest.raises(CheckpointError, match=r"99999 layers, but only 79 tensors"):
        open_checkpoint(folder)
    untied = CONFIG.to_hf() | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(untied))
    with pytest.raises(UnsupportedError, match="tie_word_embeddings false, but Google's layout"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert checkpoint.config == CONFIG


def test_one_error_lists_everything_that_is_wrong(tmp_path, published):
    tree = flat_tree(random_weights())
    del tree["transformer/final_norm"]
    tree["transformer/layer_3/attn/qkv_einsum"] = tree.pop("transformer/layer_3/attn/q_einsum")
    tree["transformer/layer_2/mlp/linear"]["w"] = np.zeros((D, F), np.float32)
    with open_checkpoint(write(tmp_path / "m", tree)) as checkpoint:
        with pytest.raises(CheckpointError) as caught:
            checkpoint.check()
        with pytest.raises(CheckpointError, match=r"got no such tensor"):
            checkpoint.read("layers.3.self_attn.q_proj.weight", np.empty((N * H, D), np.float32))
        with pytest.raises(CheckpointError, match=r"layer_2/mlp/linear: expected \[96, 64\]"):
            checkpoint.read("layers.2.mlp.down_proj.weight", np.empty((D, F), np.float32))
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == [
        "misshapen: layer_2/mlp/linear is [64, 96], expected [96, 64]",
        "missing: final_norm/scale [64]",
        "missing: layer_3/attn/q_einsum [4, 64, 32]",
        "unexpected: layer_3/attn/qkv_einsum [4, 64, 32] (nearest: layer_3/attn/kv_einsum)",
    ]


def test_a_type_that_is_not_read_is_named(tmp_path, published):
    tree = flat_tree(random_weights())
    tree["transformer/final_norm"]["scale"] = np.zeros(D, np.int32)
    with open_checkpoint(write(tmp_path / "m", tree)) as checkpoint:
        with pytest.raises(UnsupportedError, match=r"int32 \(1, such as final_norm/scale\)"):
            checkpoint.check()
        with pytest.raises(UnsupportedError, match=r"final_norm/scale is int32"):
            checkpoint.read("norm.weight", np.empty(D, np.float32))


def test_a_damaged_folder_is_an_error_of_gemlax(tmp_path, published):
    folder = write(tmp_path / "m", flat_tree(random_weights()))
    with open_checkpoint(folder) as checkpoint:
        for path in folder.rglob("d/*"):
            path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=r"orbax cannot read"):
            read_all(checkpoint)
    (folder / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"orbax cannot read it"):
        open_checkpoint(folder)


def test_a_folder_of_other_arrays_is_refused(tmp_path):
    folder = write(tmp_path / "m", {"step": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"has no .* embedder/input_embedding; it holds step"):
        open_checkpoint(folder)


def test_without_orbax_the_error_says_what_to_install(tmp_path, monkeypatch):
    folder = write(tmp_path / "m", flat_tree(random_weights()))
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'gemlax\[orbax\]'"):
        open_checkpoint(folder)
