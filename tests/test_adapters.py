"""LoRA adapters on a decoder: what they change, what they leave, and merging."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import build
from flax import nnx
from golden.conditioned import conditioned_weights
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P
from lora import SMALL, trained

from gemlax import adapters, ops, sharding
from gemlax.adapters import Rule
from gemlax.errors import RequestError, UnsupportedError
from gemlax.names import text_weights
from gemlax.ops import matmul
from gemlax.presets import PRESETS, preset, tiny
from gemlax.qtensor import Mixed, QTensor
from gemlax.quantization import codes_by_rules
from gemlax.weights import build_decoder, named_weights

E2B = tiny(preset("gemma-4-e2b"), num_hidden_layers=20)
IDS = jnp.asarray(np.random.default_rng(1).integers(3, 512, (2, 24)), jnp.int32)
AT = np.where(np.arange(24) < np.array([[24], [9]]), np.arange(24), ops.EMPTY)
AT = jnp.asarray(AT, jnp.int32)
# Of different ranks and scales inside one stack, and with layers of a stack that have none.
RULES = {
    "layers.3.*": Rule(2, alpha=6.0, dropout=0.5),
    "*.q_proj": 4,
    "*.v_proj.weight": Rule(3, alpha=1.5, dropout=0.25),
    "*.mlp.*": 3,
}
# Times std(logits): float32 rounds at 6e-8, and a projection sums about 100 terms.
CLOSE = 1e-5
KEY = jax.random.key(0)


@functools.cache
def weights(config):
    return conditioned_weights("test_adapters", text_weights(config.text))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(use_adapter, graphdef, state):
    decoder = nnx.merge(graphdef, state)
    return decoder.logits(decoder(IDS, AT, use_adapter=use_adapter)[0])


def logits(decoder, use_adapter=True):
    """Return logits of the tokens that are no padding; decoders of one form share a program."""
    return np.asarray(_logits(use_adapter, *nnx.split(decoder)))[np.asarray(AT) >= 0]


def distance(a, b):
    return np.abs(a - b).max() / b.std()


@functools.cache
def runs(config, layers):
    """Return the logits of the base, with B zero, trained, merged, unmerged and switched off."""
    decoder = build(config, weights(config), layers)
    found = {"base": logits(decoder)}
    adapters.attach(decoder, RULES, key=KEY)
    found["zero"] = logits(decoder)
    adapters.detach(decoder)
    trained(decoder, RULES)
    found["trained"] = logits(decoder)
    kept = adapters.merge(decoder)
    found["merged"] = logits(decoder)
    adapters.unmerge(decoder, kept)
    found["unmerged"] = logits(decoder)
    found["off"] = logits(decoder, use_adapter=False)
    adapters.detach(decoder)
    found["detached"] = logits(decoder)
    return found


WAYS = pytest.mark.parametrize(
    ("config", "layers"),
    [
        *((SMALL, layers) for layers in ("index", "unroll")),
        pytest.param(SMALL, "scan", marks=pytest.mark.slow),
        *(pytest.param(E2B, layers, marks=pytest.mark.slow) for layers in ("index", "unroll")),
    ],
)


@WAYS
def test_an_adapter_whose_b_is_zero_changes_nothing(config, layers):
    found = runs(config, layers)
    for name in ("zero", "off", "detached"):
        np.testing.assert_array_equal(found[name], found["base"], err_msg=name)
    assert distance(found["trained"], found["base"]) > 0.01


@WAYS
def test_merged_weights_give_what_the_adapter_gives(config, layers):
    found = runs(config, layers)
    assert distance(found["merged"], found["trained"]) < CLOSE
    np.testing.assert_array_equal(found["unmerged"], found["trained"])


@WAYS
def test_scanned_and_unrolled_layers_take_the_same_adapter(config, layers):
    assert distance(runs(config, layers)["trained"], runs(config, "index")["trained"]) < CLOSE


def test_merged_bfloat16_weights_are_as_near_to_float32_as_the_adapter():
    """Merging rounds once more; any two ways through bfloat16 layers differ by some ulp."""
    narrow = {name: w.astype(jnp.bfloat16) for name, w in weights(SMALL).items()}
    decoder = build(SMALL, narrow, "index", dtype=jnp.bfloat16)
    twin = build(SMALL, {n: w.astype(np.float32) for n, w in narrow.items()}, "index")
    for one in (decoder, twin):
        trained(one, RULES)
    before, exact = logits(decoder), logits(twin)
    kept = adapters.merge(decoder)
    merged = logits(decoder)
    assert isinstance(kept.weights[next(iter(kept.weights))], QTensor)  # bits, on CPU
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact).max())) - 7)
    assert 0 < np.sqrt(np.square(merged - before).mean()) < 2 * ulp
    assert np.abs(merged - exact).max() < 1.5 * np.abs(before - exact).max() < 6 * ulp


def coded(rules):
    """Return a decoder whose matrices are codes, and one of the floats that they decode to."""

    def fill(name, out):
        out[...] = weights(SMALL)[name]

    decoder = build_decoder(
        SMALL.text, fill, layers="scan", codes=codes_by_rules(SMALL.text, fill, rules)
    )
    floats = dict(named_weights(decoder))
    return decoder, build(SMALL, floats, "index")


MIXED = {"layers.1.*": "int4", "layers.2.*": "nf4", "*.mlp.*": "int8"}


SINGLE = [pytest.param(rules, marks=pytest.mark.slow) for rules in ("int8", "int4", "nf4")]


@pytest.mark.parametrize("rules", [MIXED, *SINGLE], ids=str)
def test_an_adapter_on_codes_is_that_on_the_floats_they_decode_to(rules):
    decoder, twin = coded(rules)
    for one in (decoder, twin):
        trained(one, RULES)
    with ops.implementation("xla"):
        found, expected = logits(decoder), logits(twin)
    assert distance(found, expected) < CLOSE
    slopes = [gradients(one) for one in (decoder, twin)]
    for name, slope in slopes[0].items():
        assert np.abs(slope - slopes[1][name]).max() <= 1e-4 * np.abs(slope).max(), name
    before = jax.tree.leaves(nnx.state(decoder))
    kept = adapters.merge(decoder)
    held = decoder.layers[0]["sliding_attention"].mlp.up_proj.weight.get_value()
    assert isinstance(held, jax.Array)
    with ops.implementation("xla"):
        assert distance(logits(decoder), expected) < CLOSE
    adapters.unmerge(decoder, kept)
    for a, b in zip(jax.tree.leaves(nnx.state(decoder)), before, strict=True):
        np.testing.assert_array_equal(a, b)
    held = decoder.layers[0]["sliding_attention"].mlp.up_proj.weight.get_value()
    assert isinstance(held, QTensor if isinstance(rules, str) else Mixed)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graphdef, trained, rest, key):
    def loss(trained):
        decoder = nnx.merge(graphdef, trained, rest)
        hidden = decoder(IDS, AT, dropout_key=key)[0]
        return jnp.square(jnp.where(AT[..., None] < 0, 0.0, decoder.logits(hidden))).mean()

    return jax.grad(loss)(trained)


def gradients(decoder, key=None):
    """Return the gradient of every trainable parameter, by module and A or B."""
    graphdef, trained, rest = nnx.split(decoder, nnx.LoRAParam, ...)
    with ops.implementation("xla"):
        slopes = _gradients(graphdef, trained, rest, key)
    twin = nnx.merge(graphdef, slopes, rest)
    return {
        f"{module.name} {part}": array
        for module, a, b in adapters.read(twin)
        for part, array in (("A", a), ("B", b))
    }


@pytest.mark.slow
def test_dropout_draws_the_same_for_a_module_wherever_it_lies():
    found = {}
    for layers in ("index", "unroll"):
        decoder = build(SMALL, weights(SMALL), layers)
        trained(decoder, RULES)
        found[layers] = gradients(decoder, KEY)
    plain = gradients(decoder)
    for name, slope in found["unroll"].items():
        assert np.abs(slope - found["index"][name]).max() <= 1e-4 * np.abs(slope).max(), name
    name = "layers.3.self_attn.q_proj A"
    assert np.abs(plain[name] - found["unroll"][name]).max() > 0.01 * np.abs(plain[name]).max()


def scan_outputs(decoder):
    """Return the shapes of all that scans put out in a training step."""
    graphdef, trained, rest = nnx.split(decoder, nnx.LoRAParam, ...)

    def loss(trained, rest):
        return nnx.merge(graphdef, trained, rest)(IDS, AT)[0].sum()

    found = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "scan":
                found.update(v.aval.shape for v in eqn.outvars)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
                    if isinstance(inner, jex.Jaxpr):
                        visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss))(trained, rest).jaxpr)
    return found


def base_shapes(decoder):
    found = set()
    for path, weight in text_weights(decoder.config).items():
        if path.startswith("layers.") and len(weight) == 2:
            found.add(weight)
    return found


def copies(decoder):
    shapes = base_shapes(decoder)
    return sorted(s for s in scan_outputs(decoder) if len(s) > 2 and s[-2:] in shapes)


@pytest.mark.parametrize("rules", ["dense", "int8"])
def test_a_training_step_keeps_no_copy_of_a_frozen_base(rules):
    decoder = build(SMALL, weights(SMALL), "index") if rules == "dense" else coded(rules)[0]
    adapters.attach(decoder, 3, key=KEY)
    with ops.implementation("xla"):
        assert copies(decoder) == []


def test_a_training_step_keeps_no_copy_of_frozen_experts():
    config = tiny(preset("gemma-4-26b-a4b"), num_hidden_layers=6)
    decoder = build(config, weights(config), "index")
    adapters.attach(decoder, 3, key=KEY)
    experts = {w[1:] for w in text_weights(config.text).values() if len(w) == 3}
    assert len(experts) == 2
    most = config.text.layers[0].num_experts  # of one layer; blocks of pairs are at least as many
    found = [s for s in scan_outputs(decoder) if s[-2:] in experts and len(s) > 2]
    assert not [s for s in found if s[-3] >= most]


def test_twin_with_plain_products_keeps_a_copy_of_the_base(monkeypatch):
    monkeypatch.setattr(matmul, "_is_frozen", lambda weight: False)
    decoder = build(SMALL, weights(SMALL), "index")
    adapters.attach(decoder, 3, key=KEY)
    assert copies(decoder)


def test_the_gradient_of_a_base_that_is_read_by_index_is_an_error():
    graphdef, state = nnx.split(build(SMALL, weights(SMALL), "index"))
    with pytest.raises(UnsupportedError, match="read='slice'"):
        jax.eval_shape(jax.grad(lambda s: nnx.merge(graphdef, s)(IDS, AT)[0].sum()), state)


def test_the_trainable_parameters_are_a_and_b_and_nothing_else():
    decoder = build(SMALL, weights(SMALL), "unroll")
    adapter = adapters.attach(decoder, 3, key=KEY)
    state = nnx.state(decoder, nnx.LoRAParam)
    names = {path[-1] for path, _ in nnx.to_flat_state(state)}
    assert names == {"a", "b"}
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == adapter.parameters


@pytest.mark.parametrize("name", PRESETS)
def test_the_default_is_every_projection_that_a_layer_owns(name):
    config = preset(name).text
    found = {module.name for module in adapters.resolve(8, config)}
    expected = set()
    for i, spec in enumerate(config.layers):
        own = ["q_proj", "o_proj", *(["k_proj"] if spec.owns_kv else [])]
        own += ["v_proj"] if spec.owns_kv and not spec.k_eq_v else []
        expected |= {f"layers.{i}.self_attn.{part}" for part in own}
        expected |= {f"layers.{i}.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert found == expected


def test_the_report_names_every_module_with_its_size():
    adapter = adapters.resolve({"layers.0.*.q_proj": 4, "layers.1.mlp.up_proj": 2}, SMALL.text)
    q, up = adapter
    assert (q.name, q.rank, q.shape) == ("layers.0.self_attn.q_proj", 4, q.shape)
    assert q.parameters == 4 * sum(q.shape)
    assert adapter.parameters == q.parameters + up.parameters
    assert "layers.1.mlp.up_proj" in str(adapter) and "2 modules" in str(adapter)


MOE = preset("gemma-4-26b-a4b").text


@pytest.mark.parametrize(
    ("config", "rules", "error", "match"),
    [
        (SMALL.text, {"*.qkv": 4}, RequestError, "'.*qkv' fits no weight"),
        (SMALL.text, {"vision_tower.*": 4}, RequestError, "fits no weight"),
        (E2B.text, {"layers.19.self_attn.v_proj": 4}, RequestError, "only what it owns"),
        (SMALL.text, {"*.q_proj": 4, "layers.0.*.q_proj": 2}, RequestError, "no effect"),
        (SMALL.text, {"*": 0}, RequestError, "rank of an adapter must be at least 1, got 0"),
        (SMALL.text, -3, RequestError, "at least 1, got -3"),
        (SMALL.text, {}, RequestError, "no rules"),
        (SMALL.text, {"*": True}, RequestError, "at least 1, got True"),
        (MOE, {"*.experts.*": 4}, UnsupportedError, "adapters of experts are not supported"),
        (MOE, {"*.router.*": 4}, UnsupportedError, "router.proj.weight"),
        (SMALL.text, {"embed_tokens.weight": 4}, UnsupportedError, "embed_tokens.weight"),
    ],
)
def test_rules_that_make_no_sense_are_errors(config, rules, error, match):
    with pytest.raises(error, match=match):
        adapters.resolve(rules, config)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"alpha": 0.0}, "alpha"), ({"alpha": float("nan")}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_a_rule_out_of_range_is_an_error(wrong, match):
    with pytest.raises(RequestError, match=match):
        Rule(4, **wrong)


def test_a_second_adapter_needs_the_first_one_gone():
    decoder = build(SMALL, weights(SMALL), "unroll")
    with pytest.raises(RequestError, match="no adapter"):
        adapters.merge(decoder)
    adapters.attach(decoder, {"*.q_proj": 2}, key=KEY)
    with pytest.raises(RequestError, match="detach or merge it first"):
        adapters.attach(decoder, {"*.q_proj": 2}, key=KEY)
    adapters.merge(decoder)
    assert adapters.attach(decoder, {"*.o_proj": 2}, key=KEY).modules


def test_on_a_mesh_an_adapter_is_cut_as_its_weight_is():
    mesh = sharding.make_mesh("fsdp=2,tensor=4")

    def fill(name, out):
        out[...] = weights(SMALL)[name]

    decoder = build_decoder(SMALL.text, fill, layers="scan", mesh=mesh)
    trained(decoder, RULES)
    q_proj = decoder.layers[0]["sliding_attention"].self_attn.q_proj
    assert q_proj.lora.a.get_value().sharding.spec == P(None, None, None, ("fsdp",))
    assert q_proj.lora.b.get_value().sharding.spec == P(None, None, ("tensor",), None)
    expected = runs(SMALL, "index")["trained"]
    assert distance(logits(decoder), expected) < CLOSE
    adapters.merge(decoder)
    assert q_proj.weight.get_value().sharding.spec == P(None, ("tensor",), ("fsdp",))
    assert distance(logits(decoder), expected) < CLOSE
