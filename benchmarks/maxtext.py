"""gemlax beside MaxText: one decode step of Gemma 3 4B's 34 layers, scanned, at small width.

Run: python benchmarks/maxtext.py --environment FOLDER [--python python3.12] [--rounds 7] [--write]
FOLDER is a virtual environment with MaxText's wheel and this checkout of gemlax. If it does not
exist, the script makes it (about 3 GB; MaxText needs Python 3.12). Delete it to measure a newer
checkout. Both libraries get the same weights and the same jax. Each runs in its own process; the
processes take turns, and medians are quoted. gemlax also runs on the jax of this Python if that is
another version. --json prints JSON alone; --write puts the table into README.md and docs/.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WHEEL = "maxtext==0.2.5"
# The wheel requires nothing by itself, and its extras are for TPU and CUDA. It imports these.
REQUIREMENTS = (
    WHEEL, "absl-py", "aqtp", "cloud-accelerator-diagnostics", "datasets", "drjax", "etils", "flax",
    "google-cloud-mldiagnostics", "google-cloud-storage", "grain", "jax", "jinja2", "jsonlines",
    "ml-goodput-measurement", "omegaconf", "optax", "orbax-checkpoint", "pathwaysutils", "pillow",
    "psutil", "pydantic", "qwix", "sentencepiece", "sympy", "tensorboardx", "tiktoken", "tokamax",
    "transformers",
)  # fmt: skip
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 34, 128, 4, 4, 64, 512, 1024
WINDOW, PERIOD, PREFILL = 1024, 6, 64
CAPACITIES = (512, 4096)
PROMPT, TOKENS = 40, 24
COMPILATIONS, STEPS = 3, 8
# MaxText's name of a weight: Hugging Face's.
NAMES = {
    "pre_self_attention_norm.scale": "input_layernorm",
    "post_self_attention_norm.scale": "post_attention_layernorm",
    "pre_ffw_norm.scale": "pre_feedforward_layernorm",
    "post_ffw_norm.scale": "post_feedforward_layernorm",
    "self_attention.query.kernel": "self_attn.q_proj",
    "self_attention.key.kernel": "self_attn.k_proj",
    "self_attention.value.kernel": "self_attn.v_proj",
    "self_attention.out.kernel": "self_attn.o_proj",
    "self_attention.query_norm.scale": "self_attn.q_norm",
    "self_attention.key_norm.scale": "self_attn.k_norm",
    "mlp.wi_0.kernel": "mlp.gate_proj",
    "mlp.wi_1.kernel": "mlp.up_proj",
    "mlp.wo.kernel": "mlp.down_proj",
}


class Measured(NamedTuple):
    """One library at one capacity: its facts, its logits, and what runs decode steps."""

    facts: dict[str, Any]
    decoded: np.ndarray  # [1 + TOKENS, VOCABULARY]
    full: np.ndarray
    steps: Callable[[], Any]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make the weight of a Hugging Face name, [out, in]: the same in every process."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
    return random.standard_normal(shape, np.float32) * np.float32(scale)


def token_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, PROMPT + TOKENS).astype(np.int32)


def compiled(lower: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Trace and compile a program several times; return it and what that took."""
    import jax

    seconds = []
    for _ in range(COMPILATIONS):
        jax.clear_caches()
        begin = time.perf_counter()
        program = lower().compile()
        seconds.append(time.perf_counter() - begin)
    temporaries = program.memory_analysis().temp_size_in_bytes
    return program, {"compile_s": seconds, "temporary_mb": temporaries / 1e6}


def num_bytes(tree: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def run_gemlax(capacity: int, implementation: str) -> Measured:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gemlax import ops
    from gemlax.cache import new_caches
    from gemlax.config import from_hf
    from gemlax.presets import PRESETS
    from gemlax.weights import build_decoder

    config = from_hf({
        **PRESETS["gemma-3-4b"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM,
        "intermediate_size": MLP, "vocab_size": VOCABULARY, "sliding_window": WINDOW,
    }).text  # fmt: skip

    def fill(name: str, out: np.ndarray) -> None:
        out[...] = weight(name, out.shape)

    graph, weights = nnx.split(build_decoder(config, fill, layers="scan", read="index"))

    def step(weights: Any, tokens: Any, positions: Any, caches: Any) -> Any:
        model = nnx.merge(graph, weights)
        hidden, caches = model(tokens, positions, caches)
        logits = model.logits(hidden)
        return jnp.argmax(logits, -1).astype(jnp.int32), positions + 1, caches, logits

    ids = jnp.asarray(token_ids())[None]
    places = jnp.arange(ids.shape[1])[None]
    caches = new_caches(config, 1, capacity, "float32")
    cache_mb = num_bytes(caches) / 1e6
    with ops.implementation(implementation):
        full = jax.jit(step)(weights, ids, places, None)[3][0, PROMPT - 1 :]
        prefill = jax.jit(step, donate_argnums=3)
        args = (weights, ids[:, :PROMPT], places[:, :PROMPT], caches)
        *_, caches, logits = prefill(*args)
        args = (weights, ids[:, :1], places[:, :1], caches)
        program, facts = compiled(lambda: jax.jit(step, donate_argnums=3).lower(*args))
    decoded = [logits[0, -1]]
    for i in range(PROMPT, PROMPT + TOKENS):
        state = program(weights, ids[:, i : i + 1], places[:, i : i + 1], caches)
        caches = state[2]
        decoded.append(state[3][0, 0])

    def steps() -> Any:
        nonlocal state
        for _ in range(STEPS):
            state = program(weights, *state[:3])
        return state

    return Measured(facts | {"cache_mb": cache_mb}, np.stack(decoded), np.asarray(full), steps)


def run_maxtext(capacity: int) -> Measured:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from flax.core.spmd import logical_axis_rules

    engine = maxtext_engine(capacity)
    abstract = nnx.split(engine.model, nnx.Param, ...)[1]
    weights = nnx.from_flat_state([
        (path, variable.replace(maxtext_weight(path, variable.get_value().shape)))
        for path, variable in nnx.to_flat_state(abstract)
    ])  # fmt: skip
    weights = engine.load_params(params=weights, rng=jax.random.PRNGKey(0))
    ids, key = token_ids(), jax.random.PRNGKey(0)

    def forward(weights: Any, rest: Any, tokens: Any) -> Any:
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)
        model = nnx.merge(engine.graphdef, weights, cache, rest, copy=True)
        places, ones = jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, jnp.int32)
        return model(tokens, places, decoder_segment_ids=ones, enable_dropout=False,
                     model_mode="train")  # fmt: skip

    template = engine._nnx_cache_state_template()
    with engine._mesh, logical_axis_rules(engine.config.logical_axis_rules):
        full = jax.jit(forward)(weights, engine._nnx_rest_state, jnp.asarray(ids)[None])
    padded = np.zeros(PREFILL, np.int32)
    padded[:PROMPT] = ids[:PROMPT]
    prefix, _ = engine.prefill(
        params=weights, padded_tokens=jnp.asarray(padded), true_length=PROMPT, rng=key, slot=0
    )
    decoded = [np.asarray(prefix["logits"])[0, 0]]
    state = engine.insert(prefix, engine.init_decode_state(key), slot=0)
    lower = type(engine)._generate_jit.lower
    program, facts = compiled(lambda: lower(engine, weights, state, rng=key))
    for token in ids[PROMPT:]:
        state["tokens"] = jnp.full_like(state["tokens"], token)
        state, _ = program(weights, state, rng=key)
        decoded.append(np.asarray(state["logits"])[0, 0])

    def steps() -> Any:
        nonlocal state
        for _ in range(STEPS):
            state, _ = program(weights, state, rng=key)
        return state

    facts["cache_mb"] = num_bytes(state["cache"]) / 1e6
    return Measured(facts, np.stack(decoded), np.asarray(full)[0, PROMPT - 1 :], steps)


def maxtext_engine(capacity: int) -> Any:
    """Build MaxText's own engine, with its defaults except for the widths and float32."""
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.inference.maxengine import maxengine

    settings = dict(
        run_name="x", model_name="gemma3-4b", override_model_config=True,
        base_num_decoder_layers=LAYERS, base_emb_dim=HIDDEN, base_num_query_heads=HEADS,
        base_num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, base_mlp_dim=MLP, vocab_size=VOCABULARY,
        sliding_window_size=WINDOW, max_prefill_predict_length=PREFILL, max_target_length=capacity,
        per_device_batch_size=1.0, dtype="float32", weight_dtype="float32", hardware="cpu",
        matmul_precision="float32", float32_logits=True, float32_qk_product=True,
        normalize_embedding_logits=True, attention="dot_product", scan_layers=True,
        decode_sampling_strategy="greedy", enable_checkpointing=False, log_config=False,
        skip_jax_distributed_system=True, tokenizer_type="sentencepiece", jax_cache_dir="",
    )  # fmt: skip
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(["x", str(base), *(f"{k}={v}" for k, v in settings.items())])
    return maxengine.MaxEngine(config)


def register_result() -> None:
    """Make a pytree of MaxText's stand-in for JetStream's class: its programs return one."""
    import jax
    from maxtext.inference.maxengine import maxengine

    result, arrays = maxengine.engine_api.ResultTokens, ("data", "log_prob")
    static = ("tokens_idx", "valid_idx", "length_idx", "samples_per_slot")
    jax.tree_util.register_pytree_node(
        result,
        lambda r: ([getattr(r, n, None) for n in arrays], [getattr(r, n) for n in static]),
        lambda rest, held: result(**dict(zip((*arrays, *static), (*held, *rest), strict=True))),
    )


def maxtext_weight(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return a variable of MaxText: stacks have their layers on axis 1, norms hold scale + 1."""
    if path[-1] == "embedding":
        return weight("embed_tokens.weight", shape) * np.float32(math.sqrt(HIDDEN))
    if path[-2] == "decoder_norm":
        return weight("norm.weight", shape) + 1
    group, layer, *parts = path[1:]
    name, index = NAMES[".".join(parts)], int(layer.removeprefix("layers_"))
    whole = LAYERS // PERIOD * PERIOD
    if group == "layers_remainder":
        return maxtext_layer(f"layers.{whole + index}.{name}.weight", shape)
    one = shape[:1] + shape[2:]
    layers = [maxtext_layer(f"layers.{i}.{name}.weight", one) for i in range(index, whole, PERIOD)]
    return np.stack(layers, axis=1)


def maxtext_layer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return weight(name, shape) + 1
    inputs = math.prod(shape[:-1]) if "o_proj" in name else shape[0]
    return weight(name, (math.prod(shape) // inputs, inputs)).T.reshape(shape)


WORKERS: dict[str, Callable[[int], Measured]] = {
    "maxtext": run_maxtext,
    "gemlax-xla": lambda capacity: run_gemlax(capacity, "xla"),
    "gemlax": lambda capacity: run_gemlax(capacity, "cpu"),
}


def work(name: str, folder: str) -> None:
    """Print the facts as one line of JSON, then the ms of a step for each capacity asked for."""
    answer, sys.stdout = sys.stdout, sys.stderr  # MaxText prints
    import jax

    if name == "maxtext":
        register_result()
    measured, facts = {}, {"jax": jax.__version__}
    for capacity in CAPACITIES:
        one = measured[capacity] = WORKERS[name](capacity)
        deviation = float(one.full.std())
        error = float(np.abs(one.decoded - one.full).max()) / deviation
        facts[str(capacity)] = one.facts | {"error": error, "deviation": deviation}
    np.save(Path(folder) / f"{name}.npy", measured[CAPACITIES[0]].full)
    print(json.dumps(facts), file=answer, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        jax.block_until_ready(measured[int(line)].steps())
        taken = 1e3 * (time.perf_counter() - begin) / STEPS
        print(json.dumps({"step_ms": taken}), file=answer, flush=True)


class Peer:
    """A process that measures one library."""

    def __init__(self, label: str, python: str, worker: str, folder: Path):
        self.label, self.log = label, folder / f"{label}.log"
        self.logits = folder / f"{worker}.npy"
        # Both keep this folder off the path, where this file would hide the package `maxtext`.
        flag = "-P" if python == sys.executable else "-I"
        command = [python, flag, __file__, "--worker", worker, "--folder", str(folder)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"),
            text=True, cwd=folder, env=environment,
        )  # fmt: skip
        self.facts = self.read()
        self.full = np.load(self.logits)
        self.times: dict[int, list[float]] = {capacity: [] for capacity in CAPACITIES}

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def turn(self, capacity: int) -> float:
        print(capacity, file=self.process.stdin, flush=True)
        return self.read()["step_ms"]

    def result(self) -> dict[str, Any]:
        """Return medians; `step_range_ms` has the least and the most."""
        rows = {}
        for capacity, times in self.times.items():
            facts = self.facts[str(capacity)]
            rows[capacity] = facts | {
                "compile_s": statistics.median(facts["compile_s"]),
                "step_ms": statistics.median(times),
                "step_range_ms": [min(times), max(times)],
            }
        return {"jax": self.facts["jax"], "capacities": rows}


def make_environment(folder: Path, python: str) -> str:
    """Return the Python of the environment, which is made if it does not exist."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        install = [str(inside), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *REQUIREMENTS], check=True)
        subprocess.run([*install, str(ROOT)], check=True)
    return str(inside)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import jax

    python = make_environment(args.environment.resolve(), args.python)
    peers = [Peer("MaxText", python, "maxtext", folder)]
    peers.append(Peer("gemlax, XLA alone", python, "gemlax-xla", folder))
    peers.append(Peer("gemlax, native kernels", python, "gemlax", folder))
    if jax.__version__ != peers[0].facts["jax"]:
        label = f"the same, jax {jax.__version__}"
        peers.append(Peer(label, sys.executable, "gemlax", folder))
    for round_ in range(args.rounds + 1):
        for capacity in CAPACITIES:
            for peer in peers:
                taken = peer.turn(capacity)
                if round_:  # the first warms up
                    peer.times[capacity].append(taken)
    for peer in peers:
        peer.process.stdin.close()
        peer.process.wait()
    first, *others = peers
    apart = max(float(np.abs(first.full - peer.full).max()) for peer in others)
    return {
        "wheel": WHEEL,
        "rounds": args.rounds,
        "load": os.getloadavg(),
        "full_forwards_apart": apart / float(first.full.std()),
        "results": {peer.label: peer.result() for peer in peers},
    }


def text(found: dict[str, Any]) -> str:
    """Write the table and the line above it."""
    import report

    results = found["results"]
    labels = list(results)
    kinds = (
        ("decode step, ms", "step_ms", ".3g"),
        ("temporaries of the step, MB", "temporary_mb", ".3g"),
        ("caches, MB", "cache_mb", ".3g"),
        ("compiling the step, s", "compile_s", ".2g"),
        ("cached decode off by, standard deviations", "error", ".2g"),
    )
    rows = []
    for title, key, form in kinds:
        values = [[results[x]["capacities"][c][key] for c in CAPACITIES] for x in labels]
        ratios = [old / new for old, new in zip(*values[:2], strict=True)]
        cells = [" / ".join(format(value, form) for value in pair) for pair in values]
        rows.append(
            [title, *cells, " / ".join(f"{x:,.0f}" if x > 9 else f"{x:.1f}" for x in ratios)]
        )
    line = (
        f"{report.machine().split(',')[0]}; {found['wheel'].replace('==', ' ')}; "
        f"jax {results['MaxText']['jax']} unless a column says otherwise; "
        f"load {found['load'][0]:.1f}; medians of {found['rounds']} turns. "
        "Without caches the libraries differ by "
        f"{found['full_forwards_apart']:.1g} standard deviations of the logits."
    )
    slots = " / ".join(f"{capacity:,}" for capacity in CAPACITIES)
    head = [f"with {slots} slots", *labels, "MaxText / gemlax, XLA alone"]
    return f"{line}\n\n{report.table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, metavar="FOLDER")
    parser.add_argument("--python", default="python3.12", help="what makes the environment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--write", action="store_true", help="into README.md and docs/")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder)
        return
    if args.environment is None:
        parser.error("--environment is required")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    table = text(found)
    if args.write:
        import report

        for page in (report.README, report.PAGE):
            report.write_section("maxtext", table, page)
    print(json.dumps(found) if args.json else table)


if __name__ == "__main__":
    main()
