"""Adapters on disk in peft's layout: what is written is read, and what does not fit is refused."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights
from lora import SMALL as CONFIG
from lora import trained
from safetensors.numpy import load_file, save_file

from gemlax import adapters
from gemlax.adapters import Rule
from gemlax.errors import CheckpointError, RequestError, UnsupportedError
from gemlax.names import text_weights
from gemlax.presets import preset, tiny
from gemlax.quantization import codes_by_rules
from gemlax.weights import build_decoder

RULES = {"layers.3.*": Rule(2, alpha=6.0), "*.q_proj": 4, "*.mlp.*": Rule(3, alpha=1.5)}
KEY = jax.random.key(0)
MODEL, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def weights(seed="folders"):
    return conditioned_weights(seed, text_weights(CONFIG.text))


def decoder(layers="unroll", seed="folders"):
    return build(CONFIG, weights(seed), layers)


@pytest.fixture(scope="module")
def source():
    made = decoder("index")
    trained(made, RULES)
    return made


@pytest.fixture
def folder(source, tmp_path):
    adapters.save(source, tmp_path / "lora")
    return tmp_path / "lora"


def config_of(folder, **changes):
    said = json.loads((folder / MODEL).read_text()) | changes
    (folder / MODEL).write_text(json.dumps(said))
    return said


def tensors_of(folder, change):
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS)


ROOT = "base_model.model.model."
Q = "layers.0.self_attn.q_proj"


def test_a_folder_gives_the_same_adapter_bit_for_bit(source, folder):
    other = decoder()
    adapter = adapters.restore(other, folder)
    assert adapter == source.adapter
    for (_, *ours), (_, *theirs) in zip(adapters.read(source), adapters.read(other), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_ranks_and_alphas_that_differ_are_patterns(source, folder):
    said = config_of(folder)
    assert (said["r"], said["lora_alpha"]) == (3, 1.5)
    assert said["rank_pattern"][f"model.{Q}"] == 4
    assert said["alpha_pattern"]["model.layers.3.mlp.up_proj"] == 6
    assert f"{ROOT}{Q}.lora_A.weight" in load_file(folder / WEIGHTS)


def test_short_names_are_targets_where_every_layer_has_them(tmp_path):
    made = decoder()
    adapters.attach(made, 2, key=KEY)
    adapters.save(made, tmp_path / "text")
    adapters.save(made, tmp_path / "both", multimodal=True)
    assert "q_proj" in config_of(tmp_path / "text")["target_modules"]
    # A short name would fit the layers of an encoder, too.
    both = config_of(tmp_path / "both")["target_modules"]
    assert f"model.language_model.{Q}" in both and "q_proj" not in both
    assert adapters.restore(decoder(), tmp_path / "both") == made.adapter


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_other_prefixes_of_the_same_names_are_read(prefix, source, folder):
    """Names that do not match once gave the base's output (vllm #34186)."""

    def change(found):
        for name in list(found):
            found[name.replace(ROOT, f"base_model.model.{prefix}")] = found.pop(name)

    tensors_of(folder, change)
    said = config_of(folder)
    for key in ("rank_pattern", "alpha_pattern"):
        said[key] = {n.replace("model.", prefix, 1): v for n, v in said[key].items()}
    said["target_modules"] = [n.replace("model.", prefix, 1) for n in said["target_modules"]]
    config_of(folder, **said)
    assert adapters.restore(decoder(), folder) == source.adapter


def test_rank_stabilised_scales_are_read_and_written(folder, tmp_path):
    config_of(folder, use_rslora=True)
    made = decoder()
    adapter = adapters.restore(made, folder)
    module = adapter.modules[0]
    assert adapter.scale(module) == module.alpha / module.rank**0.5
    adapters.save(made, tmp_path / "again")
    assert adapters.restore(decoder(), tmp_path / "again") == adapter


def test_dropout_of_each_module_comes_back(tmp_path):
    made = decoder()
    rules = {"*.q_proj": Rule(2, dropout=0.25), "*.o_proj": 2}
    adapter = adapters.attach(made, rules, key=KEY)
    adapters.save(made, tmp_path / "lora")
    assert adapters.restore(decoder(), tmp_path / "lora") == adapter


def test_another_base_is_an_error(folder):
    other = decoder(seed="another")
    with pytest.raises(RequestError, match="another base"):
        adapters.restore(other, folder)
    assert not any(adapters.adapted(other))
    adapters.restore(other, folder, check_base=False)


def test_a_base_that_differs_in_one_matrix_is_another(folder):
    changed = dict(weights())
    changed[f"{Q}.weight"] = changed[f"{Q}.weight"] * np.float32(1.02)
    with pytest.raises(RequestError, match="another base"):
        adapters.restore(build(CONFIG, changed, "unroll"), folder)


def test_codes_and_bfloat16_of_the_same_base_are_that_base(source, folder):
    def fill(name, out):
        out[...] = weights()[name]

    codes = codes_by_rules(CONFIG.text, fill, "int4")
    for made in (
        build_decoder(CONFIG.text, fill, layers="scan", codes=codes),
        build_decoder(CONFIG.text, fill, layers="scan", dtype="bfloat16"),
    ):
        assert adapters.restore(made, folder) == source.adapter


@pytest.mark.parametrize(
    ("wanted", "match"), [({"rank": 8}, "has rank 4, not 8"), ({"alpha": 3.0}, "has alpha 4")]
)
def test_another_rank_or_alpha_than_asked_for_is_an_error(wanted, match, folder):
    with pytest.raises(RequestError, match=match):
        adapters.restore(decoder(), folder, **wanted)


def test_an_adapter_that_is_there_must_be_the_same(folder):
    made = decoder()
    adapters.attach(made, RULES, key=KEY)
    adapters.restore(made, folder)
    adapters.detach(made)
    adapters.attach(made, {"*.q_proj": 5}, key=KEY)
    with pytest.raises(RequestError, match="not what the decoder's adapter is"):
        adapters.restore(made, folder)


def test_a_truncated_file_is_an_error(folder):
    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            adapters.restore(decoder(), folder)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS])
def test_a_folder_that_lacks_a_file_is_no_adapter(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        adapters.restore(decoder(), folder)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "only LORA"),
        ({"use_dora": True}, UnsupportedError, "use_dora=True"),
        ({"bias": "all"}, UnsupportedError, "bias='all'"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save"),
        ({"target_parameters": ["experts.down_proj"]}, UnsupportedError, "target_parameters"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
        ({"use_something_new": 3}, UnsupportedError, "use_something_new=3"),
        ({"alpha_pattern": {"(?=a)b": 2}}, UnsupportedError, "look-arounds"),
        ({"alpha_pattern": {"q_proj": -1}}, CheckpointError, "not positive"),
        ({"r": 0}, CheckpointError, "r must be a positive number"),
        ({"lora_alpha": "x"}, CheckpointError, "lora_alpha must be"),
        ({"r": 5}, CheckpointError, "has rank 3, but adapter_config.json says 5"),
        ({"rank_pattern": {}}, CheckpointError, "has rank 4, but"),
        ({"target_modules": ["q_proj", "k_proj"]}, CheckpointError, "lacks 5 of the 12 modules"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_followed_is_an_error(changes, error, match, folder):
    config_of(folder, **changes)
    with pytest.raises(error, match=match):
        adapters.restore(decoder(), folder)


EXPERTS = f"{ROOT}layers.0.experts.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: t.update({EXPERTS: t[f"{ROOT}{Q}.lora_A.weight"]}), UnsupportedError, "experts"),
        (lambda t: t.update({HEAD: t[f"{ROOT}{Q}.lora_A.weight"]}), UnsupportedError, "lm_head"),
        (lambda t: t.update(more=np.zeros(2, "f4")), CheckpointError, "holds more, which"),
        (
            lambda t: t.update(
                {f"{ROOT}layers.9.mlp.up_proj.lora_A.weight": np.zeros((3, 4), "f4")}
            ),
            CheckpointError,
            "no projection of this model",
        ),
        (lambda t: t.pop(f"{ROOT}{Q}.lora_B.weight"), CheckpointError, "has only lora_A"),
        (
            lambda t: t.update({f"{ROOT}{Q}.lora_A.weight": np.zeros((4, 9), "f4")}),
            CheckpointError,
            "of another model",
        ),
        (
            lambda t: [t.pop(f"{ROOT}{Q}.lora_{part}.weight") for part in "AB"],
            CheckpointError,
            "lacks 1 of the 27",
        ),
        (
            lambda t: t.update(
                {f"{ROOT}{Q}.lora_B.weight": t[f"{ROOT}{Q}.lora_B.weight"] * np.nan}
            ),
            CheckpointError,
            "not finite",
        ),
        (lambda t: t.clear(), CheckpointError, "no tensor of an adapter"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(change, error, match, folder):
    tensors_of(folder, change)
    with pytest.raises(error, match=match):
        adapters.restore(decoder(), folder)


def renamed(folder, change):
    """Give the tensors of a folder other names."""
    tensors_of(folder, lambda found: [found.update({change(n): found.pop(n)}) for n in [*found]])


NAMES = {
    "the name of the adapter": lambda n: n.replace(".weight", ".default.weight"),
    "a name of one's own": lambda n: n.replace(".weight", ".my-lora.weight"),
    "no weight, as older versions": lambda n: n.removesuffix(".weight"),
    "torch.compile": lambda n: n.replace(ROOT, "base_model.model._orig_mod.model."),
    "torch.compile outside": lambda n: f"_orig_mod.{n}",
    "wrapped twice": lambda n: f"base_model.model.{n}",
    "DDP": lambda n: f"module.{n}",
    "FSDP": lambda n: n.replace(".layers.0.", "._fsdp_wrapped_module.layers.0."),
    "bare": lambda n: n.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_wrappers_and_versions_write_are_read(name, source, folder):
    renamed(folder, NAMES[name])
    assert adapters.read_folder(folder, CONFIG.text).adapter == source.adapter


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_in_16_bits_are_read(dtype, source, folder):
    tensors_of(folder, lambda t: t.update({n: a.astype(dtype) for n, a in t.items()}))
    stored = adapters.read_folder(folder, CONFIG.text)
    for module, *ours in adapters.read(source):
        for a, b in zip(ours, stored.values[module.name], strict=True):
            np.testing.assert_array_equal(a.astype(dtype).astype(np.float32), b)


# What peft 0.10 to 0.21, unsloth and axolotl write where nothing is set.
NEUTRAL = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": {"base_model_class": "Gemma3ForCausalLM", "parent_library": "transformers",
                     "unsloth_fixed": True},
    "base_model_name_or_path": "unsloth/gemma-3-270m-it", "bias": "none", "corda_config": None,
    "enable_lora": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_bias": False,
    "megatron_config": None, "megatron_core": "megatron.core", "merge_weights": False,
    "modules_to_save": None, "monteclora_config": None, "peft_version": "0.21.2",
    "qalora_group_size": 16, "revision": None, "runtime_config": {"ephemeral_gpu_offload": False},
    "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "unsloth_fixed": True, "use_bdlora": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False, "velora_config": {"num_groups": 64}, "something_new": [],
}  # fmt: skip


def test_keys_that_change_nothing_pass(source, folder):
    changes = {k: v for k, v in NEUTRAL.items() if k != "alpha_pattern"}
    config_of(folder, **changes)
    assert adapters.read_folder(folder, CONFIG.text).adapter == source.adapter


def modules_of(folder):
    return [module.name for module in adapters.read_folder(folder, CONFIG.text).adapter]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers_to_transform": [3]}, r"layers\.3\..*"),
        ({"layers_to_transform": 0}, r"layers\.0\..*"),
        ({"layers_to_transform": [0, 3], "layers_pattern": "layers"}, r"layers\.[03]\..*"),
        ({"exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
         r"(?!.*q_proj|layers\.1\.mlp\.up_proj).*"),
        ({"exclude_modules": r".*\.mlp\..*"}, r".*self_attn.*"),
        ({"target_modules": ["q_proj"]}, r".*q_proj"),
        ({"target_modules": r".*q_proj|.*mlp.*"}, ".*"),
    ],
)  # fmt: skip
def test_modules_that_the_config_leaves_out_are_left_aside(folder, changes, expected, caplog):
    names = modules_of(folder)
    config_of(folder, **{"target_modules": None} | changes)
    left = [name for name in names if re.fullmatch(expected, name)]
    assert modules_of(folder) == left
    assert ("left aside" in caplog.text) == (left != names)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"layers_to_transform": [9]}, "holds no module that"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "holds no module that"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must list int, got '0'"),
        ({"exclude_modules": "("}, "exclude_modules has the pattern"),
        ({"target_modules": ["k_proj", "q_proj"], "layers_to_transform": [0]}, "lacks 1 of the 2"),
    ],
)
def test_a_config_that_names_what_is_not_there_is_an_error(folder, changes, match):
    config_of(folder, **{"target_modules": None} | changes)
    with pytest.raises(CheckpointError, match=match):
        modules_of(folder)


@pytest.mark.parametrize("name", ["new_embeddings.safetensors", "non_lora_trainables.bin"])
def test_weights_beside_lora_in_files_of_their_own_are_refused(folder, name):
    (folder / name).write_bytes(b"x")
    with pytest.raises(UnsupportedError, match=name):
        modules_of(folder)


def test_patterns_of_users_give_ranks_and_alphas(folder):
    said = json.loads((folder / MODEL).read_text())
    ranks = {r"layers\.[0-9]+\.self_attn\.q_proj": 4, r"layers\.(3)\..*(?:k|v|o)_proj": 2,
             r"layers\.3\.mlp.*": 2}  # fmt: skip
    fits = {name: rank for name, rank in said["rank_pattern"].items() if "layers.3" not in name}
    assert set(fits.values()) == {4}
    config_of(
        folder, rank_pattern={r"layers\.3\..*": 2, **ranks}, alpha_pattern={r".*\.\d{1,2}\..*": 9}
    )
    adapter = adapters.read_folder(folder, CONFIG.text).adapter
    assert {module.alpha for module in adapter} == {9}
    assert {m.rank for m in adapter if ".layers.3." in f".{m.name}"} == {2}


TOWER = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
AUDIO = "base_model.model.model.audio_tower.layers.0.self_attn.q_proj.linear"


def with_encoders(found):
    for module in (TOWER, AUDIO):
        found |= {f"{module}.lora_{part}.weight": np.zeros((2, 2), "f4") for part in "AB"}


def test_the_text_part_beside_encoders_is_read_and_the_rest_named(source, folder, caplog):
    caplog.set_level("INFO", "gemlax")
    tensors_of(folder, with_encoders)
    config_of(folder, modules_to_save=["multi_modal_projector"])
    assert adapters.read_folder(folder, CONFIG.text).adapter == source.adapter
    (record,) = caplog.records
    assert "left aside 4 tensors of audio_tower, vision_tower" in record.getMessage()


def test_an_adapter_of_encoders_alone_is_refused_by_name(folder):
    tensors_of(folder, lambda found: (found.clear(), with_encoders(found)))
    with pytest.raises(UnsupportedError, match="adapts audio_tower, vision_tower alone"):
        adapters.read_folder(folder, CONFIG.text)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("base_model.model.lm_head.weight", "whole tables of embeddings.*merge it into its base"),
        (f"{ROOT}embed_tokens.weight", "whole tables of embeddings"),
        (f"{ROOT}embed_tokens.lora_embedding_A", "adapters of embeddings"),
        (f"{ROOT}embed_tokens.lora_A.weight", "adapters of embeddings"),
        (f"{ROOT}{Q}.lora_magnitude_vector", "DoRA"),
        (f"{ROOT}{Q}.lora_B.bias", "biases of LoRA"),
        (f"{ROOT}norm.weight", "whole norms"),
        (f"{ROOT}{Q}.lora_a", "as mlx-lm writes them"),
    ],
)
def test_what_lora_is_not_is_refused_by_name(name, match, folder):
    tensors_of(folder, lambda found: found.update({name: np.zeros((2, 2), "f4")}))
    with pytest.raises(UnsupportedError, match=match):
        adapters.read_folder(folder, CONFIG.text)


def test_two_adapters_in_one_file_are_refused(folder):
    def change(found):
        for name in list(found):
            found[name.replace(".weight", ".default.weight")] = found[name]
            found[name.replace(".weight", ".reference.weight")] = found.pop(name)

    tensors_of(folder, change)
    with pytest.raises(CheckpointError, match="of the adapters default, reference"):
        adapters.read_folder(folder, CONFIG.text)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({MODEL: '{"r": 4}', "adapter_model.bin": ""}, "is a pickle.*weights_only=True"),
        ({MODEL: '{"lora_parameters": {}}', "adapters.safetensors": ""}, "an adapter of mlx-lm"),
        ({MODEL: '{"lora_parameters": {}}', WEIGHTS: ""}, "an adapter of mlx-lm"),
        ({"lora-f16.gguf": "GGUF"}, "is a GGUF file"),
    ],
)
def test_adapters_of_other_programs_are_told_by_what_they_are(files, match, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UnsupportedError, match=match) as caught:
        adapters.read_folder(tmp_path, CONFIG.text)
    assert "\n" not in str(caught.value)


def test_a_file_or_the_folder_above_is_told(folder):
    with pytest.raises(UnsupportedError, match="is a GGUF file"):
        (folder.parent / "x.gguf").write_text("GGUF")
        adapters.read_folder(folder.parent / "x.gguf", CONFIG.text)
    with pytest.raises(FileNotFoundError, match="is a file: give the folder"):
        adapters.read_folder(folder / WEIGHTS, CONFIG.text)
    (folder.parent / "x.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=f"did you mean {folder}"):
        adapters.read_folder(folder.parent, CONFIG.text)


def test_an_adapter_is_found_by_name_in_the_hub_cache(source, folder, monkeypatch):
    # What is looked up there, and what is said where it is not: tests/test_find.py.
    found = {"one/lora": folder}
    monkeypatch.setattr(adapters.folders.checkpoints, "find_adapter", found.__getitem__)
    assert adapters.read_folder("one/lora", CONFIG.text).adapter == source.adapter


def test_a_folder_appears_whole_or_not_at_all(source, folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        adapters.save(source, folder)
    adapters.save(source, folder, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not just an adapter"):
        adapters.save(source, tmp_path / "other", overwrite=True)
    with pytest.raises(RequestError, match="no adapter"):
        adapters.save(decoder(), tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "other"]


@pytest.mark.slow
def test_values_that_a_shared_layer_never_reads_are_left_aside(tmp_path):
    """Older transformers had k_proj and v_proj in layers that read the K/V of another."""
    config = tiny(preset("gemma-4-e2b"), num_hidden_layers=20)
    whole = build(config, conditioned_weights("shared", text_weights(config.text)), "scan")
    adapter = adapters.attach(whole, {"*.k_proj": 2}, key=KEY)
    adapters.save(whole, tmp_path / "lora")

    def change(found):
        for part in "AB":
            own = found[f"{ROOT}layers.0.self_attn.k_proj.lora_{part}.weight"]
            found[f"{ROOT}layers.19.self_attn.k_proj.lora_{part}.weight"] = own

    tensors_of(tmp_path / "lora", change)
    assert adapters.restore(whole, tmp_path / "lora") == adapter
