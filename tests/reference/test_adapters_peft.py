"""Adapters against peft on transformers: folders both ways, logits, loss and gradients."""

import logging

import adapters as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from golden import hf
from lora import trained
from reference.toys import toy
from safetensors.numpy import load_file

import gemlax
from gemlax import adapters

peft = pytest.importorskip("peft")
# Of peft 0.21.2 itself, with transformers 5.23.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.optimised,
]

SIZES = ("gemma-3-270m", "gemma-4-e2b", "gemma-4-12b", "gemma-4-26b-a4b", "gemma-4-31b")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Times the norm of each gradient, and the loss.
RELATIVE = 1e-5
TOKENS = 40  # of each prompt: more than the window of 32


def made(size):
    """Return transformers' toy with peft's adapter, whose A and B are what training might make."""
    case = toy(size)
    model = hf.build(case.hf_config, case.weights)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM",
        rank_pattern={"o_proj": 2}, alpha_pattern={r"layers.1.mlp.up_proj": 12},
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.3 * parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


def ids_of(case):
    lengths = np.minimum(case.lengths, TOKENS)
    valid = np.arange(TOKENS) < lengths[:, None]
    return case.tokens[:, :TOKENS] * valid, valid


def reference(model, size):
    """Return logits, loss and the gradients of A and B by module, from torch."""
    tokens, valid = ids_of(toy(size))
    ids = torch.from_numpy(tokens).long()
    out = model(ids, attention_mask=torch.from_numpy(valid.astype(np.int64)), use_cache=False)
    logits = out.logits
    targets = torch.where(torch.from_numpy(valid[:, 1:]), ids[:, 1:], -100)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), targets.reshape(-1)
    )
    loss.backward()
    slopes = {
        name.removeprefix("base_model.model.model.").replace(".default.weight", ""): p.grad.numpy()
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    return logits.detach().numpy(), loss.item(), slopes


def ours(decoder, size):
    tokens, valid = ids_of(toy(size))
    positions = np.where(valid, np.arange(TOKENS), -1).astype(np.int32)
    graphdef, trained, rest = nnx.split(decoder, nnx.LoRAParam, ...)

    def loss(trained, rest):
        model = nnx.merge(graphdef, trained, rest)
        logits = model.logits(model(jnp.asarray(tokens), jnp.asarray(positions))[0])
        logp = jax.nn.log_softmax(logits[:, :-1])
        own = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
        kept = jnp.asarray(valid[:, 1:])
        return -jnp.where(kept, own, 0.0).sum() / valid[:, 1:].sum().astype(np.float32), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, logits), slopes = step(trained, rest)
    nnx.update(decoder, slopes)
    found = {}
    for module, a, b in adapters.read(decoder):
        found[f"{module.name}.lora_A"], found[f"{module.name}.lora_B"] = a, b
    return np.asarray(logits), float(value), found


# 26B-A4B has routers: of its own float32 gradients torch is no surer.
GRADIENT = dict.fromkeys(SIZES, RELATIVE) | {"gemma-4-26b-a4b": 1e-4}


@pytest.mark.parametrize(
    "size",
    [size if i < 2 else pytest.param(size, marks=pytest.mark.slow) for i, size in enumerate(SIZES)],
)
def test_logits_loss_and_gradients_of_an_adapter_from_peft_equal_peft(size, tmp_path):
    case, model = toy(size), made(size)
    model.save_pretrained(tmp_path)
    expected = reference(model, size)
    decoder = helpers.build(case.config, case.weights, "index")
    adapters.restore(decoder, tmp_path)
    found = ours(decoder, size)
    valid = ids_of(case)[1]
    error = np.abs(found[0] - expected[0])[valid].max() / expected[0][valid].std()
    assert set(found[2]) == set(expected[2])
    worst = {
        name: float(np.linalg.norm(found[2][name] - slope) / np.linalg.norm(slope))
        for name, slope in expected[2].items()
    }
    name = max(worst, key=lambda name: worst[name])
    print(f"{size}: logits {error:.1e} std, loss {abs(found[1] / expected[1] - 1):.1e}, "
          f"gradients {worst[name]:.1e} ({name})")  # fmt: skip
    assert error <= helpers.LOGITS
    assert abs(found[1] / expected[1] - 1) <= RELATIVE
    assert worst[name] <= GRADIENT[size]


def test_peft_reads_an_adapter_that_gemlax_wrote(tmp_path):
    size = "gemma-3-270m"
    case = toy(size)
    decoder = helpers.build(case.config, case.weights, "index")
    rules = {"layers.3.*": adapters.Rule(2, alpha=6.0), "*.q_proj": 4, "*.mlp.*": 3}
    trained(decoder, rules)
    adapters.save(decoder, tmp_path / "ours")
    base = hf.build(case.hf_config, case.weights)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    found = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(found) == len(decoder.adapter.modules)
    tokens, valid = ids_of(case)
    mask = torch.from_numpy(valid.astype(np.int64))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), attention_mask=mask).logits.numpy()
    lengths = valid.sum(axis=1)
    logits = helpers.logits(decoder, tokens, lengths)
    assert np.abs(logits - theirs)[valid].max() <= helpers.LOGITS * theirs[valid].std()
    model.save_pretrained(tmp_path / "theirs")
    again = helpers.build(case.config, case.weights, "unroll")
    assert adapters.restore(again, tmp_path / "theirs") == decoder.adapter
    for (_, *a), (_, *b) in zip(adapters.read(decoder), adapters.read(again), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


TEXT = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
}  # fmt: skip
GEMMA3 = {**TEXT, "query_pre_attn_scalar": 16, "model_type": "gemma3_text"}
GEMMA4 = {
    **TEXT, "model_type": "gemma4_text", "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128, "global_head_dim": 16, "num_kv_shared_layers": 0,
}  # fmt: skip
VISION3 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
VISION4 = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def base_of(layout):
    """Return transformers' model of a layout, both kinds of layer, with random weights."""
    torch.manual_seed(0)
    config = {
        "gemma3 text": lambda: transformers.Gemma3TextConfig(**GEMMA3),
        "gemma4 text": lambda: transformers.Gemma4TextConfig(**GEMMA4),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config=GEMMA3, vision_config=VISION3, mm_tokens_per_image=1
        ),
        "gemma4": lambda: transformers.Gemma4Config(text_config=GEMMA4, vision_config=VISION4),
    }[layout]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data *= 8 if "embed" not in name else 1
    return model.eval()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.float().numpy()


IDS = np.arange(5, 45, dtype=np.int32)[None]


@pytest.mark.parametrize("layout", ["gemma3 text", "gemma3", "gemma4 text", "gemma4"])
def test_an_adapter_moves_peft_as_it_moves_gemlax_in_every_layout(layout, tmp_path, monkeypatch):
    """In a multimodal folder peft applied nothing of the names of a text-only one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = base_of(layout)
    base.save_pretrained(tmp_path / "base")
    decoder = gemlax.load(str(tmp_path / "base"), layers="unroll").decoder
    lengths = np.asarray([IDS.shape[1]])
    before = helpers.logits(decoder, IDS, lengths)
    trained(decoder, 4, size=0.3)
    adapters.save(decoder, tmp_path / "lora")
    expected = helpers.logits(decoder, IDS, lengths) - before
    assert expected.std() > 0.1 * before.std()
    plain = torch_logits(base)
    # The base is the one that the adapter names.
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert tuned.base_model.model.config.model_type == base.config.model_type
    for found in (tuned, peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()):
        moved = torch_logits(found) - plain
        assert np.abs(moved - expected).max() <= 10 * helpers.LOGITS * plain.std()


def test_the_text_part_of_an_adapter_of_a_vision_model_is_applied(tmp_path, caplog):
    """A short name fits both: peft #3129, unsloth #4807, transformers #45388."""
    base = base_of("gemma3")
    base.save_pretrained(tmp_path / "base")
    plain = torch_logits(base)
    config = peft.LoraConfig(
        target_modules=["q_proj", "up_proj", "fc1"], rank_pattern={r"layers\.[0-9]+\.mlp.*": 3}
    )
    both = peft.get_peft_model(base, config)
    for name, parameter in both.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    both.save_pretrained(tmp_path / "both")
    expected = torch_logits(both) - plain
    caplog.set_level(logging.INFO, "gemlax")
    model = gemlax.load(str(tmp_path / "base"), layers="unroll", adapters=str(tmp_path / "both"))
    stored = load_file(tmp_path / "both" / "adapter_model.safetensors")
    encoders = sum("vision_tower" in name for name in stored)
    assert f"left aside {encoders} tensors of vision_tower" in caplog.text
    assert 0 < encoders < len(stored)
    moved = model.logits(IDS) - model.logits(IDS, adapter=None)
    assert np.abs(moved - expected).max() <= 10 * helpers.LOGITS * plain.std()
    assert {module.rank for module in model.adapters["default"].adapter} == {3, 8}
