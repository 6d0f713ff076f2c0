"""Weights that are not those of their config, or no numbers: one clear error."""

import numpy as np
import pytest
from disk import BFLOAT16, CONFIG, assert_same_bits, random_weights, read_all, write_hf

from gemlax.checkpoints import open_checkpoint
from gemlax.errors import CheckpointError, UnsupportedError

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
DTYPES = (F32, F16, BFLOAT16)
NORM, Q = "norm.weight", "layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 9}, "the tensors are of 7 layers, the config says 9"),
        ({"num_hidden_layers": 6}, "the tensors are of 7 layers, the config says 6"),
        ({"hidden_size": 96}, "hidden_size is 64 in the tensors, 96 in the config"),
        ({"intermediate_size": 8}, "intermediate_size is 96 in the tensors, 8 in the config"),
        ({"num_attention_heads": 8}, "heads times head_dim is 128 in the tensors, 256 in the c"),
    ],
)
def test_a_config_of_another_size_is_one_sentence_and_a_few_examples(tmp_path, changes, says):
    config = {k: v for k, v in CONFIG.to_hf().items() if k != "layer_types"} | changes
    folder = write_hf(tmp_path, random_weights(), config=config)
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.check()
    lines = str(caught.value).splitlines()
    assert says in lines[0]
    assert len(lines) <= 7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("wanted", [F32, BFLOAT16], ids=lambda dtype: dtype.name)
def test_a_weight_that_is_not_finite_is_named(tmp_path, value, stored, wanted):
    weights = random_weights(dtype=stored)
    weights[Q][-1, -1] = value
    with (
        open_checkpoint(write_hf(tmp_path, weights)) as checkpoint,
        pytest.raises(CheckpointError, match=rf"{Q} holds NaN or infinity"),
    ):
        read_all(checkpoint, wanted)


def test_large_weights_are_finite(tmp_path):
    weights = random_weights() | {NORM: np.full(64, 3e38, F32)}
    with open_checkpoint(write_hf(tmp_path, weights)) as checkpoint:
        assert_same_bits(read_all(checkpoint), weights)


@pytest.mark.parametrize("keys", [("quantization",), ("quantization", "quantization_config")])
def test_codes_of_mlx_are_refused_by_name(tmp_path, keys):
    config = CONFIG.to_hf() | {key: {"group_size": 64, "bits": 4} for key in keys}
    folder = write_hf(tmp_path, random_weights(), config=config)
    with pytest.raises(UnsupportedError, match=r"the weights are quantised by 'mlx'"):
        open_checkpoint(folder)
