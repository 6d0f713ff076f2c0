"""Which weights become codes, by rules or as a file has them, and that the model is the same.

The oracle is the decoder of the floats that the codes stand for.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from disk import (
    CONFIG,
    NARROW,
    WIDE,
    assert_same_bits,
    importance_of,
    random_weights,
    wide_tensors,
    write_gguf,
    write_hf,
)
from flax import nnx
from gguf import GGMLQuantizationType as T
from golden.conditioned import conditioned_weights

import gemlax
from gemlax import linen, ops
from gemlax.config import edit
from gemlax.errors import CheckpointError, RequestError
from gemlax.formats import MADE, decode, encode
from gemlax.names import text_weights
from gemlax.qtensor import Mixed, QTensor
from gemlax.quantization import check_rules
from gemlax.weights import named_weights

pytestmark = pytest.mark.deep

UP = "layers.0.mlp.up_proj.weight"
BY_NAME = {UP: "dense", "layers.1.mlp.*": "int4", "*.k_proj.weight": "nf4", "*": "int8"}
TOKENS = np.random.default_rng(0).integers(0, 512, (2, 12)).astype(np.int32)
POSITIONS = np.tile(np.arange(12, dtype=np.int32), (2, 1))
# Times std(logits): sums in another order, and activations of 16 bits in the kernels. 3e-6 and
# 8e-4 were measured.
NOISE = {"xla": 1e-5, "cpu": 2e-3}


def format_by_rules(name: str, shape: tuple[int, ...], rules: object) -> str:
    """Say what rules mean, written down once more."""
    if len(shape) < 2 or (isinstance(rules, str) and ".router." in name):
        return "dense"
    if isinstance(rules, str):
        return "int8" if (rules, name) == ("int4", "embed_tokens.weight") else rules
    assert rules is BY_NAME
    if name.startswith("layers.1.mlp."):
        return "int4"
    return "dense" if name == UP else "nf4" if name.endswith("k_proj.weight") else "int8"


def expected_weights(weights, rules) -> dict[str, np.ndarray]:
    """Return the floats that the codes of weights stand for."""
    importance = importance_of(weights) if "int4" in str(rules) else {}

    def rounded(name: str, weight: np.ndarray) -> np.ndarray:
        format = format_by_rules(name, weight.shape, rules)
        if format == "dense":
            return weight
        codes = encode(weight, format, importance.get(name))
        return np.asarray(decode(*map(jnp.asarray, codes), format))

    return {name: rounded(name, weight) for name, weight in weights.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return conditioned_weights("test_quantization", text_weights(CONFIG.text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    return write_hf(tmp_path_factory.mktemp("quantization") / "m", weights)


def nnx_logits(decoder, implementation) -> np.ndarray:
    graphdef, state = nnx.split(decoder)

    def forward(state, tokens, positions):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, positions)[0])

    with ops.implementation(implementation):
        return np.asarray(jax.jit(forward)(state, TOKENS, POSITIONS))


def linen_logits(decoder, implementation) -> np.ndarray:
    layers = decoder.layout
    module = linen.Decoder(decoder.config, layers=layers, read="index")

    def forward(variables, tokens, positions):
        hidden, _ = module.apply(variables, tokens, positions)
        return module.apply(variables, hidden, method="logits")

    with ops.implementation(implementation):
        return np.asarray(jax.jit(forward)(linen.to_linen(decoder), TOKENS, POSITIONS))


def assert_near(found: np.ndarray, expected: np.ndarray, implementation: str) -> None:
    error = np.abs(found - expected).max() / expected.std()
    assert error < NOISE[implementation], error


# What rules say.


@pytest.mark.parametrize(
    ("rules", "wrong"),
    [("int5", "'int5'"), ("q4_k", "'q4_k'"), ({"*": "stored"}, "'stored'"),
     ({"*.mlp.*": "int4", "*": "int"}, "'int'"), ({"*": None}, "None")],
)  # fmt: skip
def test_a_format_that_cannot_be_made_is_an_error(folder, rules, wrong):
    message = f"quantised to int8, int4, nf4, got {wrong}; .* 'stored', 'dense', or rules"
    with pytest.raises(RequestError, match=message):
        check_rules(rules)
    with pytest.raises(RequestError, match=message):
        gemlax.load(folder, quantize=rules)


@pytest.mark.parametrize("rules", [None, "stored", "dense", *MADE, BY_NAME, {}])
def test_rules_that_can_be_followed_pass(rules):
    assert check_rules(rules) is None


def test_a_width_of_no_whole_groups_is_named_and_a_rule_helps(tmp_path):
    config = edit(CONFIG, intermediate_size=80)
    folder = write_hf(tmp_path / "m", random_weights(config), config=config.to_hf())
    name = "layers.0.mlp.down_proj.weight"
    with pytest.raises(RequestError, match=rf"{name} has rows of 80 .* multiple of 32.*'{name}'"):
        gemlax.load(folder, quantize="int4")
    model = gemlax.load(folder, quantize={"*.down_proj.*": "dense", "*": "int4"}, layers="unroll")
    mlp = model.decoder.layers[0].mlp
    assert mlp.up_proj.weight.get_value().format == "int4"
    assert isinstance(mlp.down_proj.weight.get_value(), jax.Array)


def test_weights_that_are_not_finite_are_named(tmp_path, weights):
    folder = write_hf(tmp_path / "m", weights | {UP: np.full_like(weights[UP], np.nan)})
    with pytest.raises(CheckpointError, match=rf"{UP} holds NaN or infinity"):
        gemlax.load(folder, quantize="int8")


@pytest.mark.parametrize("rules", ["int4", pytest.param(BY_NAME, marks=pytest.mark.slow)])
def test_codes_on_a_mesh_give_the_logits_of_one_device(folder, rules):
    """Codes and scales are cut alike; the stack of the rules by name is `Mixed`."""
    ids = [[2, 5, 9, 14, 200]]
    how = {"quantize": rules, "layers": "scan", "implementation": "xla"}
    expected = gemlax.load(folder, **how).logits(ids)
    placed = gemlax.load(folder, mesh="fsdp=2,tensor=4", **how)
    np.testing.assert_allclose(placed.logits(ids), expected, atol=1e-4)
    mlp = placed.decoder.layers[0]["sliding_attention"].mlp.gate_proj.weight.get_value()
    held = mlp.parts[-1] if isinstance(mlp, Mixed) else mlp
    assert {str(a.sharding.spec) for a in (held.codes, held.scales)} == {
        "P(None, 'tensor', 'fsdp')"
    }


def test_a_mesh_takes_neither_a_files_codes_nor_kernels(folder):
    for how in ({"quantize": "stored"}, {"quantize": "int8", "implementation": "cpu"}):
        with pytest.raises(RequestError, match="need one device; on a mesh quantize= takes"):
            gemlax.load(folder, mesh="data=8", **how)


def test_rules_by_name_make_a_mixed_stack(folder, weights):
    decoder = gemlax.load(folder, quantize=BY_NAME, layers="scan").decoder
    stack = decoder.layers[0]["sliding_attention"].mlp.up_proj.weight.get_value()
    assert isinstance(stack, Mixed)
    assert [part.format for part in stack.parts] == ["float32", "int4", "int8"]
    assert [part.shape for part in stack.parts] == [(1, 96, 64), (1, 96, 64), (4, 96, 64)]
    assert stack.which.tolist() == [0, 1, 2, 2, 2, 2]
    assert stack.row.tolist() == [0, 0, 0, 1, 2, 3]
    uniform = decoder.layers[0]["sliding_attention"].self_attn.k_proj.weight.get_value()
    assert isinstance(uniform, QTensor)
    assert uniform.format == "nf4"
    assert uniform.shape == (6, 64, 64)


# The same weights, and the same model.


@pytest.mark.parametrize(
    ("rules", "layers"), [("int8", "scan"), (BY_NAME, "scan"), (BY_NAME, "unroll")], ids=str
)
def test_named_weights_are_what_the_codes_stand_for(folder, weights, rules, layers):
    decoder = gemlax.load(folder, quantize=rules, layers=layers).decoder
    assert_same_bits(dict(named_weights(decoder)), expected_weights(weights, rules))


def test_codes_decode_to_the_dtype_of_the_model(folder, weights):
    decoder = gemlax.load(folder, quantize=BY_NAME, dtype="bfloat16").decoder
    narrowed = {n: w.astype(jnp.bfloat16) for n, w in expected_weights(weights, BY_NAME).items()}
    assert_same_bits(dict(named_weights(decoder)), narrowed)


@functools.cache
def reference(layers: str) -> np.ndarray:
    weights = conditioned_weights("test_quantization", text_weights(CONFIG.text))
    return nnx_logits(build(CONFIG, expected_weights(weights, BY_NAME), layers), "xla")


@pytest.mark.parametrize(
    ("layers", "front", "implementation"),
    [("scan", nnx_logits, "xla"), ("scan", linen_logits, "cpu"),
     pytest.param("unroll", nnx_logits, "cpu", marks=pytest.mark.slow),
     pytest.param("unroll", linen_logits, "xla", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_model_is_that_of_the_decoded_floats(folder, implementation, front, layers):
    decoder = gemlax.load(folder, quantize=BY_NAME, layers=layers).decoder
    assert_near(front(decoder, implementation), reference(layers), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("size", NARROW)
def test_per_layer_tables_and_experts_are_quantised_and_routers_are_not(tmp_path, size):
    config = NARROW[size]
    weights = conditioned_weights("test_quantization", text_weights(config.text))
    folder = write_hf(tmp_path / "m", weights, config=config.to_hf())
    decoder = gemlax.load(folder, quantize="int8", layers="scan").decoder
    expected = expected_weights(weights, "int8")
    assert_same_bits(dict(named_weights(decoder)), expected)
    dense = {
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(nnx.state(decoder))
        if "matrix" in variable.get_metadata() and not isinstance(variable.get_value(), QTensor)
    }
    routers = {"layers.0.sliding_attention.router.proj", "layers.0.full_attention.router.proj"}
    assert dense == ({f"{name}.weight" for name in routers} if size == "26b-a4b" else set())
    assert_near(nnx_logits(decoder, "xla"), nnx_logits(build(config, expected), "xla"), "xla")


# As a file has them.


def test_types_without_a_kernel_are_held_as_bfloat16_and_named_once(tmp_path, caplog):
    others = {"layers.0.mlp.down_proj.weight": T.Q5_K, "layers.0.self_attn.q_proj.weight": T.Q5_1,
              "embed_tokens.weight": T.Q5_K, "layers.0.self_attn.o_proj.weight": T.F32}  # fmt: skip
    tensors, expected = wide_tensors(T.Q4_K, others)
    path = write_gguf(tmp_path / "m.gguf", tensors, WIDE)
    caplog.set_level(logging.INFO, "gemlax.quantization")
    decoder = gemlax.load(path, quantize="stored", layers="unroll").decoder
    layer = decoder.layers[0]
    for held in (layer.mlp.down_proj, layer.self_attn.q_proj, decoder.embed_tokens):
        assert held.weight.get_value().format == "bfloat16"
    assert layer.mlp.up_proj.weight.get_value().format == "q4_k"
    assert isinstance(layer.self_attn.o_proj.weight.get_value(), jax.Array)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"{path}: 3 matrices are held as bfloat16" in said[0]
    for name, kind in others.items():
        if kind != T.F32:
            expected[name] = expected[name].astype(jnp.bfloat16).astype(np.float32)
    assert_same_bits(dict(named_weights(decoder)), expected)
    # The model stays float32: a table of another dtype would set that of all activations.
    hidden = jax.eval_shape(lambda d, t: d(t, t)[0], decoder, jnp.zeros((1, 4), jnp.int32))
    assert hidden.dtype == jnp.float32


def test_floats_of_a_file_stay_floats(tmp_path, caplog):
    tensors, expected = wide_tensors(T.BF16)
    path = write_gguf(tmp_path / "m.gguf", tensors, WIDE)
    decoder = gemlax.load(path, quantize="stored", layers="unroll").decoder
    assert not any(isinstance(v.get_value(), QTensor) for v in
                   dict(nnx.to_flat_state(nnx.state(decoder))).values())  # fmt: skip
    assert_same_bits(dict(named_weights(decoder)), expected)
