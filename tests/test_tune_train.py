"""The step of training: accumulation, memory, layouts, codes and meshes give the same losses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tuning import ONE, SMALL, decoder_of, rows, token_logprobs, trainer

from gemlax import adapters, ops, scoring
from gemlax.errors import RequestError
from gemlax.ops import crossentropy
from gemlax.sharding import make_mesh
from gemlax.tune.data import Example, Pair
from gemlax.tune.packing import Rows, pair_rows
from gemlax.tune.settings import TuneSettings
from gemlax.tune.train import Trainer, learning_rate, preference_loss

pytestmark = pytest.mark.deep

STEPS = 10
# Losses after ten steps, about 4: sums in another order, ten times.
SAME_CURVE = 1e-4


def curve(training, steps=STEPS):
    """The losses of some steps on two batches in turn."""
    batches = rows(SMALL, 8)
    halves = [Rows(*(a[i : i + 4] for a in batches)) for i in (0, 4)]
    return [training.step(i, halves[i % 2]).loss for i in range(steps)]


@functools.cache
def curve_of(format=None, layers="scan", mesh=None, steps=STEPS):
    placed = None if mesh is None else make_mesh(mesh)
    decoder = decoder_of(SMALL, layers=layers, format=format, mesh=placed)
    return curve(trainer(decoder, mesh=placed), steps)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4"])
def test_unrolled_layers_learn_as_scanned_ones(format):
    expected = curve_of(format)
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(curve_of(format, "unroll"), expected, atol=SAME_CURVE)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", slow("fsdp=8"), slow("tensor=8")])
def test_eight_devices_learn_as_one(mesh):
    """Few steps: eight devices on two cores wait for each other in each layer."""
    found, expected = (curve_of(mesh=m, steps=3) for m in (mesh, None))
    np.testing.assert_allclose(found, expected, atol=SAME_CURVE)


@pytest.mark.parametrize("mesh", ["fsdp=8", "tensor=8"])
@pytest.mark.parametrize("format", [slow("int8"), slow("int4"), slow("nf4")])
def test_eight_devices_learn_on_codes_as_one(format, mesh):
    """Kernels multiply activations of 16 bits, so one device runs without them here."""
    with ops.implementation("xla"):
        expected = curve(trainer(decoder_of(SMALL, format=format)))
    np.testing.assert_allclose(curve_of(format, "scan", mesh), expected, atol=SAME_CURVE)


def test_adapters_and_their_moments_are_cut_as_their_weights():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    training = trainer(decoder_of(SMALL, mesh=mesh), mesh=mesh)
    specs = {name: a.sharding.spec for name, a in training.values.items()}
    (gate,) = {str(s) for n, s in specs.items() if n.endswith("up_proj.lora.b")}
    assert "tensor" in gate
    (read,) = {str(s) for n, s in specs.items() if n.endswith("up_proj.lora.a")}
    assert "fsdp" in read
    moments = [a for a in jax.tree.leaves(training.optimizer_state) if a.ndim]
    assert len(moments) == 2 * len(specs)
    assert [a.sharding.spec for a in moments] == 2 * list(specs.values())


def table_gathers(mesh: str) -> list[str]:
    """Return where the compiled step brings the whole table onto each device."""
    placed = make_mesh(mesh)
    training = trainer(decoder_of(ONE, mesh=placed), mesh=placed)
    batch = training._put(Rows(*(a[None] for a in rows(ONE, 4))))
    state = training.values, training.optimizer_state, training._frozen
    text = training.program.lower(*state, jnp.int32(0), batch).compile().as_text()
    whole = re.compile(rf"{ONE.vocab_size},{ONE.hidden_size}\]\S* all-gather\(")
    return [line.strip()[:120] for line in text.splitlines() if whole.search(line)]


def test_devices_that_share_the_table_by_rows_sum_the_head_on_their_own(monkeypatch):
    monkeypatch.setattr(crossentropy, "_TABLE_ROWS", 16)
    assert table_gathers("tensor=8") == []
    monkeypatch.setattr(scoring.ops, "Head", lambda *head: crossentropy.Head(*head[:3]))
    assert table_gathers("tensor=8")


def flax_steps(decoder, batch, count):
    """Losses of steps as frameworks on flax make them: `nnx.Optimizer` of `nnx.LoRAParam`."""
    adapters.attach(decoder, adapters.Rule(rank=4), key=jax.random.key(1))
    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(decoder, optax.adamw(1e-2, weight_decay=0.0), wrt=nnx.LoRAParam)
    rows = Rows(*map(jnp.asarray, batch))

    def loss(model):
        hidden, _ = model(rows.tokens, rows.positions, segments=rows.segments)
        found = token_logprobs(model, hidden, rows.labels)
        return -(found * rows.weights).sum() / rows.weights.sum()

    @nnx.jit
    def step(model, optimizer):
        wanted = nnx.DiffState(0, nnx.LoRAParam)
        value, slopes = nnx.value_and_grad(loss, argnums=wanted)(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, slopes)
        return value

    return [float(step(decoder, optimizer)) for _ in range(count)]


@pytest.mark.parametrize("layers", ["scan", slow("unroll")])
def test_an_optimizer_of_flax_takes_the_steps_of_the_trainer(layers):
    batch = rows(SMALL)
    training = trainer(decoder_of(SMALL, layers=layers), clip=None, floor=1.0)
    expected = [training.step(i, batch).loss for i in range(3)]
    assert expected[2] < expected[0] - 0.1
    found = flax_steps(decoder_of(SMALL, layers=layers), batch, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole():
    """Weighted by tokens: the rows have different numbers of them."""
    batch = rows(ONE, 4)
    found = []
    for accumulate in (1, 2):
        training = trainer(decoder_of(ONE), accumulate=accumulate)
        found.append((training.step(0, batch), training.values))
    (one, values), (two, others) = found
    assert one.tokens == two.tokens == batch.weights.sum()
    np.testing.assert_allclose([one.loss, one.norm], [two.loss, two.norm], rtol=1e-5)
    for name in values:
        np.testing.assert_allclose(values[name], others[name], atol=2e-4 * 1e-2, err_msg=name)


def num_bytes(tree):
    return sum(a.nbytes for a in jax.tree.leaves(tree))


def test_the_optimizer_holds_two_numbers_for_each_that_is_trained():
    training = trainer(decoder_of(ONE))
    assert num_bytes(training.optimizer_state) <= 2 * num_bytes(training.values) + 1024
    base = num_bytes(training._frozen)
    assert num_bytes(training.values) < base / 4


def base_faults(training) -> list[str]:
    """The compiled step makes nothing of the shape of a stack of base weights, or of the table."""
    shapes = {",".join(map(str, shape)) for shape in base_shapes()}
    batch = Rows(*(a[None] for a in training._put(rows(SMALL, 2))))
    program = training.program.lower(
        training.values, training.optimizer_state, training._frozen, jnp.int32(0), batch
    ).compile()
    reads = {"parameter", "get-tuple-element", "bitcast", "tuple"}
    faults = []
    for line in program.as_text().splitlines():
        made = re.search(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if made and made[1] in shapes and made[2] not in reads:
            faults.append(line.strip()[:120])
    return faults


def base_shapes():
    """The shapes of matrices: as they are held, and as a scan over periods takes them."""
    state = nnx.state(decoder_of(SMALL))
    for _, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        if len(shape) == 3:
            yield list(shape)
            yield [2, shape[0] // 2, *shape[1:]]
        elif "matrix" in variable.get_metadata():
            yield list(shape)


@pytest.mark.optimised
def test_no_gradient_of_the_base_is_made(monkeypatch):
    monkeypatch.setattr(crossentropy, "_TABLE_ROWS", 128)  # a block is not the whole small table
    assert base_faults(trainer(decoder_of(SMALL))) == []
    assert base_faults(trainer(decoder_of(SMALL, read="slice"), rank=None))


def pairs(count: int) -> Rows:
    rng = np.random.default_rng(9)

    def answer(prompt):
        ids = [*prompt, *rng.integers(3, 500, int(rng.integers(2, 9))).tolist()]
        return Example(ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt)))

    prompts = [[2, *rng.integers(3, 500, 5).tolist()] for _ in range(count)]
    return pair_rows([Pair(answer(p), answer(p)) for p in prompts], 16)


def test_preferences_start_at_the_reference_and_are_learnt():
    """With B zero, policy and reference are one model: the loss is log 2."""
    training = trainer(decoder_of(ONE), beta=0.5)
    batch = pairs(3)
    batch = Rows(*(np.concatenate([a, np.zeros_like(a[:2])]) for a in batch))  # a pair of filling
    found = [training.step(i, batch) for i in range(8)]
    np.testing.assert_allclose(found[0].loss, np.log(2), rtol=1e-6)
    assert found[0].tokens == 3  # pairs
    assert found[-1].loss < 0.5 and found[-1].accuracy == 1.0


def test_preferences_have_the_gradient_of_two_models():
    """The reference is a model of its own here, without an adapter."""
    training, batch = trainer(decoder_of(ONE), beta=0.5), pairs(2)
    rng = np.random.default_rng(2)
    training.values = {
        name: jnp.asarray(0.05 * rng.normal(size=a.shape), jnp.float32)
        for name, a in training.values.items()
    }
    plain, tensors = decoder_of(ONE), training._put(batch)

    def score(decoder):
        hidden = decoder(tensors.tokens, tensors.positions)[0]
        logprobs = jax.nn.log_softmax(decoder.logits(hidden))
        own = jnp.take_along_axis(logprobs, tensors.labels[..., None], axis=-1)[..., 0]
        return (own * tensors.weights).sum(axis=1)

    def loss(values):
        gained = score(training._merge(values, training._frozen)) - score(plain)
        return -jax.nn.log_sigmoid(0.5 * (gained[0::2] - gained[1::2])).sum()

    own = jax.jit(jax.value_and_grad(lambda v: training._totals(v, training._frozen, tensors)[0]))
    (one, found), (two, expected) = (
        own(training.values),
        jax.jit(jax.value_and_grad(loss))(training.values),
    )
    np.testing.assert_allclose(one, two, rtol=1e-5)
    for name, slope in found.items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(slope / scale, expected[name] / scale, atol=1e-4, err_msg=name)


def test_dropout_is_that_of_its_step():
    decoder, batch = decoder_of(ONE), rows(ONE, 2)
    adapters.attach(decoder, adapters.Rule(rank=2, dropout=0.5), key=jax.random.key(1))
    training = Trainer(decoder, TuneSettings(steps=5, learning_rate=1e-2, warmup=0.0))
    start = {name: np.array(a) for name, a in training.values.items()}
    found = []
    for step in (0, 0, 1):
        training.values = {name: jnp.asarray(a) for name, a in start.items()}
        found.append(training.step(step, batch).norm)
    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_all_weights_learn_alike_scanned_and_unrolled():
    curves = [
        curve(trainer(decoder_of(SMALL, layers=layers), rank=None, learning_rate=1e-3), 4)
        for layers in ("scan", "unroll")
    ]
    np.testing.assert_allclose(*curves, atol=SAME_CURVE)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_the_model_that_is_given_stays_as_it_is():
    decoder = decoder_of(ONE, read="slice")
    before = [np.array(a) for a in jax.tree.leaves(nnx.state(decoder))]
    training = trainer(decoder, rank=None)
    training.step(0, rows(ONE, 4))
    after = [np.array(a) for a in jax.tree.leaves(nnx.state(decoder))]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"clip": -1.0}, "clip must be above 0, got -1.0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(RequestError, match=message):
        TuneSettings(**{"steps": 5, **settings})


def test_codes_are_not_trained_and_preferences_need_an_adapter():
    with pytest.raises(RequestError, match="codes cannot be trained"):
        trainer(decoder_of(SMALL, format="int8"), rank=None)
    with pytest.raises(RequestError, match="learnt by an adapter"):
        trainer(decoder_of(SMALL), rank=None, beta=0.1)


def test_the_learning_rate_rises_and_falls():
    settings = TuneSettings(steps=10, learning_rate=1.0, warmup=0.4, floor=0.1)
    rates = [float(learning_rate(settings, step)) for step in range(10)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    np.testing.assert_allclose(float(learning_rate(settings, 10)), 0.1, rtol=1e-5)


def test_the_preference_loss_is_that_of_its_paper():
    policy, reference = np.array([-1.0, -3.0, -2.0, -1.5]), np.array([-2.0, -2.5, -2.0, -1.0])
    margins = 0.1 * np.array([1.0 + 0.5, 0.0 + 0.5])
    arrays = (jnp.asarray(a, jnp.float32) for a in (policy, reference))
    loss, margin = preference_loss(*arrays, beta=0.1)
    np.testing.assert_allclose(margin, margins, rtol=1e-6)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margins)), rtol=1e-6)
