"""gemlax, llama.cpp and transformers on the real Gemma 3 270M, taking turns on two threads.

Run: python benchmarks/peers.py FILE.gguf --llama-python PYTHON --torch-python PYTHON FOLDER
         [--rounds 3] [--write]
The first PYTHON has llama-cpp-python; the second torch and transformers, which read the FOLDER that
`gemlax convert FILE.gguf FOLDER` wrote, in float32. Without them gemlax runs alone. Each turn is a
process of its own: load, then for every depth a prompt and 64 greedy tokens, twice; the better
counts, and the median over the turns is quoted. --write puts a table and a plot into docs/
(matplotlib). The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DEPTHS, STEPS, ROWS = (128, 1024, 4000), 64, 8
# Ids that are words; the two programs get the same.
FIRST_ID = 1000


def prompt(depth: int) -> list[int]:
    return [2, *range(FIRST_ID, FIRST_ID + depth - 1)]


def run_gemlax(path: str) -> dict[str, float]:
    import jax

    import gemlax

    begin = time.perf_counter()
    model = gemlax.load(path, implementation="cpu")
    jax.block_until_ready(jax.tree.leaves(model._state))
    found = {"load_s": time.perf_counter() - begin}
    counters = model.programs.counters
    for depth, rows in [*((depth, 1) for depth in DEPTHS), (128, ROWS)]:
        prefill, decode = [], []
        for _ in range(3):  # the first compiles
            old = (counters.prefill_s, counters.decode_s, counters.decode_tokens)
            model.generate([prompt(depth)] * rows, max_new_tokens=STEPS, stop_ids=(), context=8192)
            prefill.append(rows * depth / (counters.prefill_s - old[0]))
            decode.append((counters.decode_tokens - old[2]) / (counters.decode_s - old[1]))
        name = f"{depth}" if rows == 1 else f"{depth}x{rows}"
        found |= {f"prefill_{name}": max(prefill), f"decode_{name}": max(decode)}
    found["weights_mb"] = sum(a.nbytes for a in jax.tree.leaves(model._state)) / 1e6
    return found


def run_llama(path: str) -> dict[str, float]:
    from llama_cpp import Llama

    begin = time.perf_counter()
    model = Llama(path, n_ctx=8192, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
    found = {"load_s": time.perf_counter() - begin}
    for depth in DEPTHS:
        prefill, decode = [], []
        for _ in range(2):
            model.reset()
            start = time.perf_counter()
            model.eval(prompt(depth))
            middle = time.perf_counter()
            for _ in range(STEPS):
                model.eval([FIRST_ID])
            prefill.append(depth / (middle - start))
            decode.append(STEPS / (time.perf_counter() - middle))
        found |= {f"prefill_{depth}": max(prefill), f"decode_{depth}": max(decode)}
    return found


def run_transformers(folder: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {"load_s": time.perf_counter() - begin}
    for depth in DEPTHS[:2]:  # 4,000 tokens take minutes
        prefill, decode = [], []
        with torch.inference_mode():
            for _ in range(2):
                start = time.perf_counter()
                out = model(torch.tensor([prompt(depth)]), use_cache=True, logits_to_keep=1)
                middle = time.perf_counter()
                for _ in range(STEPS):
                    token = out.logits[:, -1:].argmax(dim=-1)
                    out = model(token, past_key_values=out.past_key_values, use_cache=True)
                prefill.append(depth / (middle - start))
                decode.append(STEPS / (time.perf_counter() - middle))
        found |= {f"prefill_{depth}": max(prefill), f"decode_{depth}": max(decode)}
    return found


def turn(python: str, name: str, path: str) -> dict[str, float]:
    command = [python, __file__, path, "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(medians: dict[str, dict[str, float]], limit: float) -> None:
    import report

    names = list(medians)
    rows: list[list[Any]] = []
    for key in medians["gemlax"]:
        values = [medians[name].get(key) for name in names]
        row = [key.replace("_", " "), *("-" if v is None else f"{v:.4g}" for v in values)]
        ours = values[0]
        rows.append([*row, *("-" if v is None else f"{ours / v:.2f}" for v in values[1:])])
    head = ("tok/s, at depth x rows", *names, *(f"gemlax / {name}" for name in names[1:]))
    line = f"{report.machine()}; read bandwidth {limit:.1f} GB/s."
    text = f"{line}\n\n{report.table(head, rows)}\n\n![tokens per second](peers.png)"
    report.write_section("peers", text)
    draw(medians, limit)


def draw(medians: dict[str, dict[str, float]], limit: float) -> None:
    """Plot the table, and the most that memory allows, as docs/peers.png."""
    import matplotlib

    matplotlib.use("agg")
    import report
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colors = dict(zip(WORKERS, ("#1a73e8", "#9aa0a6", "#dadce0"), strict=True))
    for axes, what in zip(both, ("decode", "prefill"), strict=True):
        width = 0.84 / len(medians)
        for i, depth in enumerate(DEPTHS):
            speeds = {name: row.get(f"{what}_{depth}") for name, row in medians.items()}
            measured = {name: speed for name, speed in speeds.items() if speed}
            for place, (name, speed) in enumerate(measured.items()):
                x = i + (place - (len(measured) - 1) / 2) * width
                bar = axes.bar(
                    x, speed, width * 0.94, color=colors[name], label=name if not i else ""
                )
                axes.bar_label(bar, fmt="{:.0f}", fontsize=8, padding=2)
        axes.set_xticks(range(len(DEPTHS)), [f"{depth:,}" for depth in DEPTHS])
        axes.set_title(
            {"decode": "Decoding, tokens/s", "prefill": "Reading a prompt, tokens/s"}[what]
        )
        axes.set_xlabel({"decode": "tokens in the cache", "prefill": "tokens of the prompt"}[what])
        axes.spines[["top", "right"]].set_visible(False)
    most = limit * 1e3 / medians["gemlax"]["weights_mb"]
    both[0].axhline(most, color="black", linestyle=":", label="limit: read bandwidth / weights")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)  # fmt: skip
    figure.savefig(report.PAGE.parent / "peers.png", dpi=120)


WORKERS = {"gemlax": run_gemlax, "llama.cpp": run_llama, "transformers": run_transformers}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--llama-python", metavar="PYTHON")
    parser.add_argument("--torch-python", nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/")
    parser.add_argument("--worker", choices=list(WORKERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args.path)))
        return
    path = str(Path(args.path).resolve())
    peers = {"gemlax": (sys.executable, path)}
    if args.llama_python:
        peers["llama.cpp"] = (args.llama_python, path)
    if args.torch_python:
        peers["transformers"] = tuple(args.torch_python)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, (python, file) in peers.items():
            turns[name].append(turn(python, name, file))
            print(name, {key: round(v, 2) for key, v in turns[name][-1].items()}, flush=True)
    medians = {
        name: {key: statistics.median(t[key] for t in found) for key in found[0]}
        for name, found in turns.items()
    }
    from gemlax import bench

    limit = bench.streaming_read()
    if args.write:
        write(medians, limit)
    print(json.dumps({"limit_gb_s": round(limit, 1), "medians": medians, "turns": turns}))


if __name__ == "__main__":
    main()
