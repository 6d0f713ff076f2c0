"""From command to first token, and memory while loading: what a new user meets.

Run: python benchmarks/first_token.py [--model demo] [--runs 3] [--write]
Each run is a whole `gemlax generate` process: without a compilation cache, then with a filled
one. Memory is the peak of anonymous memory (RssAnon, read every 10 ms; Linux), beside that of the
same command on a dense toy, which is what the interpreter and the compiler take. The last line is
JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import report
from flax import nnx

import gemlax
from gemlax import checkpoints
from gemlax.config import edit
from gemlax.weights import build_decoder

PROMPT = "The capital of France is"


def run(model: str, *options: str) -> tuple[dict, float, int]:
    """Return the report, the seconds of the whole process and its peak of anonymous bytes."""
    command = [sys.executable, "-m", "gemlax.cli", "generate", PROMPT, "--model", model]
    command += ["--max-new-tokens", "1", "--json", *options]
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    output = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {child.returncode}")
    return json.loads(output.splitlines()[-1]), seconds, peak


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line for line in lines if line.startswith("RssAnon")]
    return int(found[0].split()[1]) * 1024 if found else 0


def held_bytes(model: str) -> int:
    leaves = jax.tree.leaves(nnx.state(gemlax.load(model).decoder))
    return sum(leaf.nbytes for leaf in leaves)


def write_toy(source: str, folder: Path) -> None:
    """Save `tiny` of the same model with its tokenizer and a row for each of its tokens."""
    with checkpoints.open_checkpoint(checkpoints.find(source)) as opened:
        tokenizer, config = opened.tokenizer(), gemlax.tiny(opened.config)
        rows = opened.config.text.vocab_size
    config = edit(config, vocab_size=rows)

    def fill(name, out):
        out[...] = 0.01

    model = gemlax.Model(config, build_decoder(config.text, fill), tokenizer)
    gemlax.save(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    weight_bytes = held_bytes(args.model)
    with tempfile.TemporaryDirectory() as folder:
        toy, cache = Path(folder) / "toy", str(Path(folder) / "cache")
        write_toy(args.model, toy)
        run(args.model, "--compilation-cache", cache)  # fills the cache and the page cache
        cold, warm, peaks, toy_peaks = [], [], [], []
        for _ in range(args.runs):
            _, seconds, peak = run(args.model)
            cold.append(seconds)
            peaks.append(peak)
            toy_peaks.append(run(str(toy), "--layers", "scan")[2])
            warm.append(run(args.model, "--compilation-cache", cache)[1])
    found = {
        "first_token_s": round(statistics.median(cold), 2),
        "first_token_cached_s": round(statistics.median(warm), 2),
        "peak_mb": round(statistics.median(peaks) / 1e6),
        "toy_peak_mb": round(statistics.median(toy_peaks) / 1e6),
        "weights_mb": round(weight_bytes / 1e6),
        "runs": {"cold_s": cold, "cached_s": warm, "peak": peaks, "toy_peak": toy_peaks},
    }
    print(json.dumps(found))
    if args.write:
        rows = [
            ("process until the first token, s", found["first_token_s"]),
            ("the same with a filled compilation cache, s", found["first_token_cached_s"]),
            ("peak of anonymous memory, MB", found["peak_mb"]),
            ("of it the weights as they are held, MB", found["weights_mb"]),
            ("the peak of a dense toy, MB", found["toy_peak_mb"]),
        ]
        report.write_section(
            "first-token", f"{report.machine()}.\n\n{report.table(('what', 'median'), rows)}"
        )


if __name__ == "__main__":
    main()
