"""What depth costs to compile: all 62 layers of Gemma 3 27B against its first 8, at toy width.

Run: python benchmarks/depth.py [--rounds 3] [--write]
Tracing and compiling one decode program, scanned and unrolled, each time with jax's caches
emptied. The stacks take turns; the last line is JSON.
"""

import argparse
import json
import statistics

import jax
import report
from cases import Case

from gemlax import bench, preset, tiny

DEPTHS = (8, 62)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    cases = {}
    for layers in ("scan", "unroll"):
        for depth in DEPTHS:
            config = tiny(preset("gemma-3-27b"), num_hidden_layers=depth).text
            cases[layers, depth] = Case(bench.random_decoder(config, layers=layers))
    seconds: dict[tuple[str, int], list[float]] = {form: [] for form in cases}
    for round_ in range(args.rounds + 1):
        for form, case in cases.items():
            jax.clear_caches()
            program = case.compile_decode()
            if round_:  # the first round warms up
                seconds[form].append(program.trace_s + program.compile_s)
    rows = []
    for layers in ("scan", "unroll"):
        short, deep = (statistics.median(seconds[layers, depth]) for depth in DEPTHS)
        rows.append({"layers": layers, "short_s": round(short, 2), "deep_s": round(deep, 2),
                     "ratio": round(deep / short, 2)})  # fmt: skip
        print(rows[-1])
    if args.write:
        head = ("layers", *(f"{depth} layers, s" for depth in DEPTHS), "ratio")
        text = report.table(head, [tuple(row.values()) for row in rows])
        report.write_section("depth", f"{report.machine()}.\n\n{text}")
    print(json.dumps({"preset": "gemma-3-27b", "depths": DEPTHS, "rows": rows}))


if __name__ == "__main__":
    main()
