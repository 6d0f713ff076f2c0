"""Meshes: what lies where, the same tokens as on one device, and programs that move no weight.

A gate on a program is a function that returns a list of faults, and a bad twin must fail it.
"""

import dataclasses
import functools
import itertools
import math
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import logits
from flax import nnx
from golden.conditioned import conditioned_weights
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemlax import cache, model, sharding
from gemlax.config import GemmaConfig, TextConfig
from gemlax.decoder import Decoder
from gemlax.engine import Engine, Programs, Request
from gemlax.errors import RequestError
from gemlax.names import text_weights
from gemlax.ops import moe
from gemlax.presets import PRESETS, preset, tiny
from gemlax.qtensor import Split
from gemlax.sampling import make_sampling
from gemlax.sharding import Layout, make_mesh
from gemlax.weights import build_decoder, default_layers, named_weights, place


def few_layers(name: str, indices) -> TextConfig:
    """A toy with these layers of a size: eight devices on two cores wait for each other in each."""
    text = tiny(preset(name), num_hidden_layers=6).text
    return dataclasses.replace(text, layers=tuple(text.layers[i] for i in indices))


# (3 sliding, 1 full) twice, so that there is a scan in a scan; no stack has as many as rows.
TINY = few_layers("gemma-3-4b", (2, 3, 4, 5, 2, 3, 4, 5))
MOE = few_layers("gemma-4-26b-a4b", (4, 5))
MESHES = ("tensor=8", "data=2,tensor=4", "fsdp=8")
# One size of each pattern; the others are slow.
USUAL = ("gemma-3-270m", "gemma-3-4b", "gemma-4-e2b", "gemma-4-26b-a4b")
NEW_TOKENS = 4
# Room for so many tokens makes the sliding layers' caches rings.
ROOM = 1500


def random_weights(config, seed=0):
    return conditioned_weights(f"sharding {seed}", text_weights(config))


def decoder_on(config, weights, mesh, layers="scan", dtype=jnp.float32):
    def fill(name, out):
        out[...] = weights[name]

    return build_decoder(config, fill, layers=layers, dtype=dtype, mesh=mesh)


def programs_on(config, weights, mesh, **options) -> Programs:
    decoder = decoder_on(config, weights, mesh, **options)
    return Programs(decoder, num_tokens=config.vocab_size, dtype=decoder.dtype, mesh=mesh)


def prompts(config):
    rng = np.random.default_rng(11)
    # All that are prefilled, by one program; the window is 32.
    return [rng.integers(3, config.vocab_size, n).tolist() for n in (65, 41, 38, 34, 1)]


def started(of: Programs, asked=None, num_tokens=1) -> tuple[Engine, np.ndarray]:
    """An engine after the first `num_tokens` tokens, and its rows: see `rows_of`."""
    engine = Engine(of, len(prompts(of.config)), 2048)
    return engine, rows_of(engine, asked or prompts(of.config), num_tokens)


def rows_of(engine: Engine, asked, num_tokens) -> np.ndarray:
    """Prompts and what follows them, filled up with the vocabulary size."""
    size = engine._programs.config.vocab_size
    settings = make_sampling(size, [0], temperature=0.0)
    ids = [engine.submit(Request(tuple(p), len(p) + ROOM, settings, (1,))) for p in asked]
    rows = np.full((len(asked), max(map(len, asked)) + num_tokens), size)
    for event in engine.step(num_tokens):
        row = ids.index(event.request_id)
        said = [*asked[row], *event.tokens]
        rows[row, : len(said)] = said
    return rows


def generated(of: Programs) -> np.ndarray:
    return started(of, num_tokens=NEW_TOKENS)[1]


@pytest.fixture(scope="module")
def weights():
    return random_weights(TINY)


@pytest.fixture(scope="module")
def alone(weights):
    return programs_on(TINY, weights, None)


@pytest.fixture(scope="module")
def expected(alone):
    return generated(alone)


@pytest.fixture(scope="module")
def engines(weights):
    """An engine per mesh, made once; its programs are kept."""
    return functools.cache(lambda axes: programs_on(TINY, weights, make_mesh(axes)))


@pytest.fixture(scope="module")
def moe_weights():
    return random_weights(MOE)


@pytest.fixture(scope="module")
def moe_engines(moe_weights):
    """The same for experts; None: one device."""
    return functools.cache(lambda axes: programs_on(MOE, moe_weights, axes and make_mesh(axes)))


@pytest.mark.parametrize(
    "axes", ["data=2,tensor=4", " data = 2 , tensor=4", {"tensor": 4, "data": 2}]
)
def test_a_mesh_is_made_from_text_or_a_mapping(axes):
    mesh = make_mesh(axes)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(mesh) is mesh


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("model=8", "'model' is unknown; there are data, fsdp, expert, tensor"),
        ("tensor=4", "tensor=4 has 4 places, but there are 8 devices"),
        ({}, "without axes has 1 places"),
        ("tensor=two", "'tensor' must be a positive integer, got 'two'"),
        ("tensor", "'tensor' must be a positive integer, got ''"),
        ("data=-8", "'data' must be a positive integer, got '-8'"),
        ({"tensor": 8.0}, "'tensor' must be a positive integer, got 8.0"),
        ({"tensor": True}, "'tensor' must be a positive integer, got True"),
        ("data=2,data=4", "'data' is given twice"),
        ("", "'' is unknown"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_clear_error(axes, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        make_mesh(axes)


@pytest.mark.parametrize("kind", ["name", "type"])
def test_a_mesh_with_other_axes_is_refused(kind):
    name, axis_type = ("x", AxisType.Auto) if kind == "name" else ("data", AxisType.Explicit)
    mesh = Mesh(np.asarray(jax.devices()), (name,), axis_types=(axis_type,))
    with pytest.raises(RequestError, match="must have Auto axes named data, fsdp, expert, tensor"):
        make_mesh(mesh)


def variables(config):
    decoder = nnx.eval_shape(lambda: Decoder(config, layers="scan", rngs=nnx.Rngs(0)))
    return dict(nnx.to_flat_state(nnx.state(decoder)))


def test_every_weight_of_every_size_has_axes_and_every_rule_is_used():
    used = {"batch", "layers"}  # of caches, and of stacks
    for name in PRESETS:
        for path, variable in variables(tiny(preset(name)).text).items():
            axes = variable.get_metadata()["axes"]
            assert len(axes) + (path[0] == "layers") == variable.get_value().ndim, path
            used |= set(axes) - {None}
    assert used == set(sharding.RULES)
    assert set(itertools.chain(*sharding.RULES.values())) == set(sharding.AXES)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in PRESETS]
)
@pytest.mark.parametrize("axes", ["tensor=8", "data=2,fsdp=2,tensor=2", "fsdp=8"])
def test_every_published_size_fits_the_usual_meshes(name, axes):
    config = preset(name).text
    found = place(config, "scan", make_mesh(axes))
    assert found.shardings.keys() == variables(config).keys()


def test_where_tensor_does_not_divide_the_query_heads_attention_is_repeated():
    """Four query heads and eight devices: only attention and norms are held by each."""
    assert TINY.num_attention_heads == 4
    found = place(TINY, "scan", make_mesh("tensor=8"))
    matrices = {name for name in found.repeated if "norm" not in name}
    kept = {f"layers.{i}.self_attn.{p}_proj.weight" for i in range(8) for p in "qkvo"}
    assert matrices == kept
    spec = found.shardings["layers", 0, "sliding_attention", "mlp", "down_proj", "weight"].spec
    assert spec == PartitionSpec(None, None, "tensor")


def test_where_tensor_divides_only_the_query_heads_keys_and_values_are_repeated():
    found = place(TINY, "unroll", make_mesh("data=2,tensor=4"))
    matrices = {name for name in found.repeated if "norm" not in name}
    assert matrices == {f"layers.{i}.self_attn.{p}_proj.weight" for i in range(8) for p in "kv"}
    attention = ("layers", 3, "self_attn")
    assert found.shardings[*attention, "q_proj", "weight"].spec[0] == "tensor"
    assert found.shardings[*attention, "o_proj", "weight"].spec[1] == "tensor"


@pytest.mark.parametrize(
    ("change", "axes", "said"),
    [
        (
            {"vocab_size": 511},
            "tensor=8",
            "embed_tokens.weight has 511 'vocab' entries, which tensor=8",
        ),
        ({"hidden_size": 84}, "fsdp=8", "embed_tokens.weight has 84 'embed' entries, which fsdp=8"),
    ],
)
def test_a_weight_that_the_mesh_does_not_divide_is_named(change, axes, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        place(dataclasses.replace(TINY, **change), "scan", make_mesh(axes))


def test_an_mlp_or_experts_that_the_mesh_does_not_divide_are_named():
    odd = tuple(dataclasses.replace(spec, intermediate_size=100) for spec in TINY.layers)
    with pytest.raises(RequestError, match=r"mlp\.gate_proj\.weight has 100 'mlp' entries"):
        place(dataclasses.replace(TINY, layers=odd), "scan", make_mesh("tensor=8"))
    odd = tuple(dataclasses.replace(spec, num_experts=20) for spec in MOE.layers)
    with pytest.raises(RequestError, match="has 20 'experts' entries, which expert=8 does not"):
        place(dataclasses.replace(MOE, layers=odd), "scan", make_mesh("expert=8"))


def device_bytes(tree) -> int:
    """Bytes that one device holds; every device holds as much."""
    arrays = jax.tree.leaves(tree)
    sizes = {sum(a.addressable_shards[i].data.nbytes for a in arrays) for i in range(8)}
    (size,) = sizes
    return size


@pytest.mark.parametrize("axes", MESHES)
def test_a_device_holds_its_share_of_the_weights_and_what_is_named(engines, weights, axes):
    engine = engines(axes)
    cuts = engine.layout.mesh.size // engine.layout.mesh.shape["data"]
    repeated = place(TINY, "scan", engine.layout.mesh).repeated
    kept = sum(weights[name].nbytes for name in repeated)
    total = sum(w.nbytes for w in weights.values())
    assert kept < 0.6 * total
    assert device_bytes(engine._weights) <= 1.15 / cuts * total + kept


def test_a_device_holds_its_share_of_the_experts_and_what_is_named(moe_engines, moe_weights):
    engine = moe_engines("expert=8")
    kept = sum(moe_weights[name].nbytes for name in place(MOE, "scan", engine.layout.mesh).repeated)
    total = sum(w.nbytes for w in moe_weights.values())
    assert not any("experts" in name for name in place(MOE, "scan", engine.layout.mesh).repeated)
    assert device_bytes(engine._weights) <= 1.15 / 8 * total + kept


@pytest.mark.deep
def test_a_device_holds_its_share_of_the_caches(weights):
    engine = programs_on(TINY, weights, make_mesh("data=4,tensor=2"))
    caches = started(engine, [[5]] * 5)[0]._state.caches  # nothing to prefill
    whole = sum(a.nbytes for c in caches.values() for a in (c.k, c.v))
    assert {cache.is_ring for cache in caches.values()} == {True, False}
    held = device_bytes([(c.k, c.v) for c in caches.values()])
    assert held <= 1.05 / 8 * whole


def test_a_bucket_of_rows_is_a_multiple_of_what_cuts_them(engines, alone):
    meshes = [alone, *map(engines, MESHES)]
    assert [[engine.num_slots(n) for n in (1, 3, 9)] for engine in meshes] == [
        [1, 4, 16], [1, 4, 16], [2, 4, 16], [8, 8, 16],
    ]  # fmt: skip


def test_a_batch_that_the_mesh_does_not_divide_is_repeated():
    layout, spec = Layout(make_mesh("data=4,tensor=2")), TINY.layers[0]
    rows = [layout.cache(TINY, spec, batch).spec[1] for batch in (8, 6)]
    assert rows == [("data", "fsdp"), None]
    assert layout.rows(6).spec == PartitionSpec(None)


def numpy_bytes() -> int:
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    found = tracemalloc.take_snapshot().filter_traces([domain])
    return sum(trace.size for trace in found.traces)


def peak_of(build) -> int:
    """The most bytes that NumPy holds while `build(fill)` is filled."""
    sizes = []

    def fill(name, out):
        out[...] = 0.5
        sizes.append(numpy_bytes())

    tracemalloc.start()
    try:
        build(fill)
        sizes.append(numpy_bytes())
    finally:
        tracemalloc.stop()
    return max(sizes)


@pytest.mark.deep
def test_the_host_holds_the_parts_and_one_weight_more():
    config = dataclasses.replace(TINY, vocab_size=4096, layers=TINY.layers[:4])
    sizes = [math.prod(w.shape) * 4 for w in random_weights(config).values()]
    limit = 1.02 * sum(sizes) + max(sizes)
    mesh = make_mesh("data=2,tensor=4")
    assert peak_of(lambda fill: build_decoder(config, fill, layers="scan", mesh=mesh)) <= limit

    def twin(fill):
        """Load whole, then cut: the host holds the model twice."""
        decoder = build_decoder(config, fill, layers="scan")
        placed = place(config, "scan", mesh).shardings
        for path, variable in nnx.to_flat_state(nnx.state(decoder)):
            np.array(jax.device_put(variable.get_value(), placed[path]))
        kept = [np.array(v.get_value()) for _, v in nnx.to_flat_state(nnx.state(decoder))]
        fill("", np.zeros(1))
        return kept

    assert peak_of(twin) > limit


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("axes", ["data=2,tensor=4", "fsdp=2,tensor=4"])
def test_weights_come_back_from_a_mesh_bit_for_bit(weights, axes, layers):
    found = dict(named_weights(decoder_on(TINY, weights, make_mesh(axes), layers)))
    assert found.keys() == weights.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def test_bfloat16_experts_come_back_from_a_mesh_bit_for_bit():
    weights = random_weights(MOE)
    decoder = decoder_on(MOE, weights, make_mesh("expert=8"), dtype=jnp.bfloat16)
    for name, array in named_weights(decoder):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, weights[name].astype(jnp.bfloat16), err_msg=name)


def near_ties(found, expected, reference, other) -> int:
    """Count rows that leave the reference at a near tie; assert that no row does elsewhere."""
    lengths = np.asarray([len(prompt) for prompt in prompts(reference.config)])
    ties = 0
    for row in range(len(lengths)):
        differs = np.flatnonzero(found[row] != expected[row])
        if not differs.size:
            continue
        at = int(differs[0])
        assert at >= lengths[row]
        both = [
            logits(decoder, expected[row : row + 1, :at], np.array([at]))
            for decoder in (reference, other)
        ]
        noise = np.abs(both[0] - both[1]).max()
        candidates = both[0][0, -1, [expected[row, at], found[row, at]]]
        assert abs(candidates[0] - candidates[1]) < 4 * noise
        ties += 1
    return ties


def merged(engine) -> Decoder:
    decoder = nnx.eval_shape(lambda: Decoder(engine.config, layers="scan", rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(decoder)[0], engine._weights)


@pytest.mark.parametrize("axes", MESHES)
def test_a_mesh_gives_the_tokens_of_one_device(engines, alone, expected, axes):
    found = generated(engines(axes))
    assert found.shape == expected.shape
    assert len(np.unique(found)) > 25  # no row repeats one token
    if not np.array_equal(found, expected):
        assert near_ties(found, expected, merged(alone), merged(engines(axes))) <= 1


@pytest.mark.slow
def test_drafts_change_no_token_on_a_mesh(weights):
    config = GemmaConfig(text=TINY)
    some = [[2, *range(30, 40)] * 3, [2, 5, 6] * 5, [2, 9, 9, 9, 9]]
    found = []
    for mesh in (None, make_mesh("data=2,tensor=4")):
        one = model.Model(config, decoder_on(TINY, weights, mesh), mesh=mesh)
        for settings in ({}, {"temperature": 1.0, "top_k": 20}):
            plain = one.generate(some, max_new_tokens=12, **settings)
            drafted = one.generate(some, max_new_tokens=12, speculate=3, **settings)
            assert [row.tokens for row in drafted] == [row.tokens for row in plain]
            found.append([row.tokens for row in drafted])
    assert found[:2] == found[2:]


@pytest.mark.slow
def test_an_unrolled_decoder_gives_the_same_tokens_on_a_mesh(weights, expected):
    found = generated(programs_on(TINY, weights, make_mesh("data=2,tensor=4"), layers="unroll"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.deep
def test_kept_slots_go_on_on_a_mesh_as_on_one_device(engines, alone):
    """A second turn prefills only what is new, and both say the same."""
    found = []
    for of in (alone, engines("data=2,tensor=4")):
        engine, first = started(of, num_tokens=NEW_TOKENS)
        for request_id in range(len(first)):
            engine.cancel(request_id)
        told = [[*row[row < TINY.vocab_size].tolist(), 7, 8, 9] for row in first]
        before = of.counters.prefill_tokens
        found.append(rows_of(engine, told, NEW_TOKENS))
        # A row's last token was not prefilled yet, and its new last one is not.
        assert of.counters.prefill_tokens - before == 3 * len(told)
    np.testing.assert_array_equal(*found)


@pytest.mark.deep
@pytest.mark.parametrize(
    "axes", ["expert=8", pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.slow)]
)
def test_experts_on_a_mesh_give_the_tokens_of_one_device(moe_engines, axes):
    found = [generated(moe_engines(mesh)) for mesh in (None, axes)]
    np.testing.assert_array_equal(*found)


def test_a_model_scores_the_same_on_a_mesh(weights):
    config = dataclasses.replace(preset("gemma-3-4b"), text=TINY)
    scores = []
    for mesh in (None, make_mesh("fsdp=2,tensor=4")):
        one = model.Model(config, decoder_on(TINY, weights, mesh), mesh=mesh)
        scores.append(one.score([prompts(TINY)[0]])[0].log_likelihood)
    assert abs(scores[0] - scores[1]) < 1e-4 * abs(scores[0])


COLLECTIVE = re.compile(
    r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
Shape = tuple[int, ...]


def gather_faults(hlo_text: str, shapes: list[tuple[Shape, Shape]]) -> list[str]:
    """Name every collective whose result is a part, at least a device's, of something held.

    `shapes` are pairs of the whole and of what one device holds of it.
    """
    faults = []
    for line in hlo_text.splitlines():
        found = COLLECTIVE.search(line)
        results = re.findall(r"\w+\[([\d,]+)\]", found[1]) if found else []
        for result in results:
            sizes = tuple(int(n) for n in result.split(","))
            if any(_is_part(sizes, *pair) for pair in shapes):
                faults.append(line.strip()[:120])
    return faults


def _is_part(sizes: Shape, whole: Shape, own: Shape) -> bool:
    while len(sizes) > len(whole) and sizes[0] == 1:
        sizes = sizes[1:]
    fits = (a <= n <= b and n % a == 0 for n, a, b in zip(sizes, own, whole, strict=False))
    return len(sizes) == len(whole) and all(fits)


def held_shapes(engine, caches) -> list[tuple[Shape, Shape]]:
    """Caches, stacks of weights, one layer of each, and one expert."""
    arrays = jax.tree.leaves((engine._weights, [(c.k, c.v) for c in caches.values()]))
    pairs = [(a.shape, a.sharding.shard_shape(a.shape)) for a in arrays if a.ndim > 1]
    for whole, own in list(pairs):
        pairs += [(whole[i:], own[i:]) for i in range(1, len(whole) - 1) if len(whole) > 2]
    return pairs


def decode_program(of: Programs):
    """The compiled decode program, and the state of an engine that ran it."""
    asked = [[5]] * len(prompts(of.config))  # nothing to prefill: one program less
    engine, _ = started(of, asked)
    (program,) = (one for key, one in of.compiled.items() if key[0] == "decode")
    return program, engine._state


def decode_faults(of: Programs) -> list[str]:
    program, state = decode_program(of)
    return gather_faults(program.as_text(), held_shapes(of, state.caches))


@pytest.mark.parametrize("axes", ["tensor=8", "data=2,tensor=4"])
def test_decoding_gathers_neither_a_cache_nor_a_weight(engines, axes):
    engine = engines(axes)
    assert decode_faults(engine) == []
    # Every device holds all tokens: none of them is told by another.
    program, _ = decode_program(engine)
    moved = [found[1] for found in COLLECTIVE.finditer(program.as_text())]
    assert not any("s32[8,2048]" in result or "s32[4,2048]" in result for result in moved)
    # And works on its share of the rows alone: eight, or four of them.
    rows = 8 // engine.layout.mesh.shape["data"]
    hidden = {result.partition("{")[0] for result in moved if ",80]" in result}
    assert hidden == {f"f32[{rows},80]", f"f32[{rows},1,80]"}


@pytest.mark.parametrize("axes", ["tensor=8", "data=2,tensor=4"])
def test_decoding_on_a_mesh_writes_the_caches_in_place(engines, axes):
    program, state = decode_program(engines(axes))
    held = device_bytes([jax.tree.leaves(cache) for cache in state.caches.values()])
    assert program.memory_analysis().alias_size_in_bytes >= held
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * held


def test_twin_without_held_caches_gathers_them(weights, monkeypatch):
    monkeypatch.setattr(cache.slots, "constrain", lambda blocks, sharding: blocks)
    assert decode_faults(programs_on(TINY, weights, make_mesh("data=2,tensor=4")))


def stack_program(spec: PartitionSpec) -> tuple[str, Shape, Shape]:
    """Scan over the layers of a stack of square matrices."""
    mesh = make_mesh("tensor=8")
    placed = NamedSharding(mesh, spec)
    stack = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32, sharding=placed)
    x = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=sharding.replicated(mesh))

    def run(stack, x):
        def layer(x, index):
            return x @ stack[index].T, None

        return jax.lax.scan(layer, x, jnp.arange(8, dtype=jnp.int32))[0]

    program = jax.jit(run, out_shardings=sharding.replicated(mesh)).lower(stack, x).compile()
    return program.as_text(), stack.shape, placed.shard_shape(stack.shape)


def test_twin_that_cuts_the_axis_of_layers_gathers_weights():
    for spec, gathers in ((PartitionSpec(None, "tensor"), False), (PartitionSpec("tensor"), True)):
        text, whole, own = stack_program(spec)
        assert bool(gather_faults(text, [(whole, own), (whole[1:], own[1:])])) == gathers


def test_decoding_moves_no_expert(moe_engines):
    engine = moe_engines("expert=8")
    stacks = [v for v in jax.tree.leaves(engine._weights, is_leaf=_is_split) if _is_split(v)]
    assert len(stacks) == 4
    assert {stack.parts for stack in stacks} == {8}
    assert decode_faults(engine) == []


@pytest.mark.deep
def test_twin_that_reads_experts_one_by_one_moves_them(moe_weights, monkeypatch):
    monkeypatch.setattr(moe, "_default", lambda pairs, parts: "gather")
    assert decode_faults(programs_on(MOE, moe_weights, make_mesh("expert=8")))


def _is_split(value) -> bool:
    return isinstance(value, Split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes"), [*(("gemma-3-4b", axes) for axes in MESHES), ("gemma-4-e2b", MESHES[1])]
)
def test_a_mesh_gives_the_tokens_of_one_device_at_full_depth(name, axes):
    config = tiny(preset(name)).text
    weights = random_weights(config)
    engines = [programs_on(config, weights, mesh) for mesh in (None, make_mesh(axes))]
    expected, found = map(generated, engines)
    assert near_ties(found, expected, *map(merged, engines)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES)
def test_the_real_model_gives_the_same_text_on_a_mesh(gguf_path, axes):
    prompt = ["The capital of France is", "Once upon a time"]
    texts = []
    for mesh in (None, axes):
        one = model.load(gguf_path, layers="scan", mesh=mesh)
        texts.append([c.text for c in one.generate(prompt, max_new_tokens=12)])
    assert default_layers(jnp.dtype(jnp.float32), Layout(make_mesh(axes))) == "unroll"
    assert texts[0] == texts[1]
