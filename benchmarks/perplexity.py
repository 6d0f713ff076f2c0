"""Perplexity of the real Gemma 3 270M with its weights in each format, by XLA and by the kernels.

Run: python benchmarks/perplexity.py FILE.gguf [--text tests/golden/text.txt] [--write]
float32 are the decoded weights of the file; bfloat16, int8, int4 and nf4 are made of them, so their
error comes on top of the file's own. "calibrated": int4 that suits this project's documents rather
than the page it is made with by default. The text is scored in one window. The last line is JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import report

import gemlax

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tests" / "golden" / "text.txt"
DOCUMENTS = [
    (ROOT / name).read_text("utf-8")
    for name in ("README.md", "ARCHITECTURE.md", "docs/tune.md", "CONTRIBUTING.md")
]
ALL_INT4 = {"*": "int4"}
# Name, options of `load`, and whether a kernel reads these weights.
CASES: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("float32", {"quantize": "dense"}, False),
    ("bfloat16", {"quantize": "dense", "dtype": "bfloat16"}, True),
    ("as stored", {"quantize": "stored"}, True),
    ("int8", {"quantize": "int8"}, True),
    ("int4", {"quantize": "int4"}, True),
    ("int4, calibrated", {"quantize": "int4", "calibration": DOCUMENTS}, True),
    ("int4, the table too", {"quantize": ALL_INT4}, True),
    ("the same, calibrated", {"quantize": ALL_INT4, "calibration": DOCUMENTS}, True),
    ("nf4", {"quantize": "nf4"}, False),
)


def score(path: str, text: str, implementation: Any, options: dict[str, Any]) -> dict[str, float]:
    begin = time.perf_counter()
    model = gemlax.load(path, layers="scan", implementation=implementation, **options)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model._state))
    found = model.score(text)
    return {
        "perplexity": round(found.perplexity, 4),
        "tokens": found.num_tokens,
        "weights_mb": round(weights / 1e6, 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    text = args.text.read_text("utf-8")
    rows = []
    for name, options, native in CASES:
        row: dict[str, Any] = {"weights": name}
        for implementation in ("xla", "cpu") if native else ("xla",):
            row[implementation] = score(args.path, text, implementation, options)
            jax.clear_caches()
        rows.append(row)
        print(row, flush=True)
    base = rows[0]["xla"]["perplexity"]
    if args.write:
        lines = []
        for row in rows:
            found = [row[key]["perplexity"] if key in row else None for key in ("xla", "cpu")]
            shown = ["-" if value is None else f"{value:.3f}" for value in found]
            ratio = f"{100 * (found[0] / base - 1):+.2f}"
            lines.append((row["weights"], row["xla"]["weights_mb"], *shown, ratio))
        head = ("weights", "MB in memory", "XLA", "native", "XLA over float32, %")
        tokens = rows[0]["xla"]["tokens"]
        line = f"{report.machine()}; {tokens} tokens of {args.text.name}."
        report.write_section("perplexity", f"{line}\n\n{report.table(head, lines)}")
    print(json.dumps({"tokens": rows[0]["xla"]["tokens"], "rows": rows}))


if __name__ == "__main__":
    main()
