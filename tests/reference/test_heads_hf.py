"""Heads of their own against transformers: which counts, and the logits and losses they make."""

import json

import adapters
import numpy as np
import pytest
import torch
from disk import CONFIG, random_weights, read_all, write_hf
from golden import hf
from golden.make_gemma3 import COMMON, SMALL
from golden.make_gemma4 import EDGE, pattern
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import gemlax
from gemlax.checkpoints import open_checkpoint
from gemlax.names import HEAD

TABLE = "embed_tokens.weight"
SIZES = {
    "gemma-3": COMMON | SMALL | {"num_hidden_layers": 2},
    "gemma-4": EDGE
    | pattern(1, 2)
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "num_kv_shared_layers": 2},
}


def untied_model(size: str) -> torch.nn.Module:
    make_model, make_config = hf.CLASSES[SIZES[size]["model_type"]]
    torch.manual_seed(0)
    config = make_config(**SIZES[size], tie_word_embeddings=False, attn_implementation="eager")
    model = make_model(config)
    with torch.no_grad():  # a head as wide as the table, and not 0.02 of it
        model.lm_head.weight.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_loss_of_a_head_equal_transformers(size, layers, tmp_path):
    reference = untied_model(size)
    reference.save_pretrained(tmp_path)
    model = gemlax.load(tmp_path, dtype="float32", layers=layers)
    ids = np.random.default_rng(0).integers(3, 512, (1, 80))
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), labels=torch.from_numpy(ids))
    logits, std = np.asarray(model.logits(ids)), float(expected.logits.std())
    assert np.abs(logits - expected.logits.numpy()).max() <= adapters.LOGITS * std
    (score,) = model.score(ids.tolist())
    assert -score.log_likelihood / score.num_tokens == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_saved_head_loads_in_transformers(size, tmp_path):
    reference = untied_model(size)
    reference.save_pretrained(tmp_path / "theirs")
    gemlax.save(gemlax.load(tmp_path / "theirs", dtype="float32"), tmp_path / "ours")
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("stored", ["none", "equal", "differs", "alone"])
@pytest.mark.parametrize("said", [True, False, None])
def test_the_head_is_the_one_that_transformers_takes(said, stored, tmp_path):
    """Without a head that the config announces transformers draws one; gemlax refuses it."""
    weights = random_weights()
    head = weights[TABLE] if stored == "equal" else random_weights(seed=1)[TABLE]
    others = {} if stored == "none" else {HEAD: head.copy()}
    rest = {n: w for n, w in weights.items() if stored != "alone" or n != TABLE}
    config = {k: v for k, v in CONFIG.to_hf().items() if k != "tie_word_embeddings"}
    config |= {} if said is None else {"tie_word_embeddings": said}
    write_hf(tmp_path, rest, config=config, others=others)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    with open_checkpoint(tmp_path) as checkpoint:
        if info["missing_keys"]:
            with pytest.raises(gemlax.CheckpointError, match="missing: "):
                checkpoint.check()
            return
        checkpoint.check()
        found = read_all(checkpoint)
    own = model.lm_head.weight is not model.model.embed_tokens.weight
    assert (HEAD in found) == own
    theirs = model.lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(found[HEAD if own else TABLE], theirs)
    np.testing.assert_array_equal(found[TABLE], model.model.embed_tokens.weight.detach().numpy())


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("inner", [True, False, None])
@pytest.mark.parametrize("outer", [True, False, None])
def test_the_head_beside_other_parts_is_the_one_that_transformers_takes(
    outer, inner, stored, tmp_path
):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(
        text_config=SIZES["gemma-3"], vision_config=vision, mm_tokens_per_image=4,
        tie_word_embeddings=not stored,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for part, value in ((said, outer), (said["text_config"], inner)):
        part.pop("tie_word_embeddings", None)
        part |= {} if value is None else {"tie_word_embeddings": value}
    (tmp_path / "config.json").write_text(json.dumps(said))
    model, info = Gemma3ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    own = model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.text.tie_word_embeddings == (not own)
        if info["missing_keys"]:
            with pytest.raises(gemlax.CheckpointError, match=r"missing: lm_head.weight"):
                checkpoint.check()
            return
        checkpoint.check()
        found = read_all(checkpoint)[HEAD if own else TABLE]
    np.testing.assert_array_equal(found, model.lm_head.weight.detach().numpy())
