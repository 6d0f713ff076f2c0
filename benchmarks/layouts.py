"""Scanned against unrolled layers: compile time, temporaries and step time of one decode step.

Run: python benchmarks/layouts.py [--preset gemma-3-270m] [--capacity 512] [--steps 16] [--write]
Weights are random. The forms take turns, so that a change in the machine's speed meets all of
them; the last line is JSON. `default_layers` follows these figures (docs/log.md).
"""

import argparse
import functools
import json

import jax
import report
from cases import Case

from gemlax import bench, preset

HELD = (("unroll", "index"), ("scan", "slice"), ("scan", "index"))
FORMS = [(dtype, *held) for dtype in ("float32", "bfloat16") for held in HELD]
POSITION = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    config = preset(args.preset).text
    cases = {}
    for dtype, layers, read in FORMS:
        decoder = bench.random_decoder(config, dtype=dtype, layers=layers, read=read)
        cases[dtype, layers, read] = Case(decoder, capacity=args.capacity)
    works = {
        form: functools.partial(case.decode, POSITION, args.steps) for form, case in cases.items()
    }
    rows = []
    for form, times in bench.timed(works, args.rounds).items():
        program = cases[form].decode_program
        shown = [round(1e3 * seconds / args.steps, 1) for seconds in times]
        rows.append({
            "dtype": form[0], "layers": form[1], "read": form[2],
            "compile_s": round(program.trace_s + program.compile_s, 2),
            "temporary_mb": round(program.memory()["temporary_bytes"] / 1e6, 1),
            "step_ms": shown[0],
            "spread_ms": shown[1:],
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if args.write:
        shown = [(*list(r.values())[:-1], " to ".join(map(str, r["spread_ms"]))) for r in rows]
        head = ("dtype", "layers", "read", "compile s", "temporaries MB", "step ms", "spread ms")
        report.write_section("layouts", f"{report.machine()}.\n\n{report.table(head, shown)}")
    print(json.dumps({"preset": args.preset, "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
