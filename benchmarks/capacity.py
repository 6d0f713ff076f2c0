"""What room in the cache costs: one decode step at one position, in a long cache and in a short.

Run: python benchmarks/capacity.py [--preset gemma-3-270m] [--steps 16] [--rounds 9] [--write]
Real width, random float32 weights, scanned layers, stacked caches. The two take turns, so that a
change in the machine's speed meets both. The last line is JSON.
"""

import argparse
import functools
import json

import report
from cases import Case

from gemlax import bench, preset

CAPACITIES = (512, 8192)
POSITION = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    decoder = bench.random_decoder(preset(args.preset).text, layers="scan")
    cases = {capacity: Case(decoder, capacity=capacity) for capacity in CAPACITIES}
    works = {
        capacity: functools.partial(case.decode, POSITION, args.steps)
        for capacity, case in cases.items()
    }
    rows = []
    for capacity, times in bench.timed(works, args.rounds).items():
        rows.append({
            "capacity": capacity,
            **report.step(cases[capacity], times, args.steps),
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    ratio = round(rows[1]["step_ms"] / rows[0]["step_ms"], 2)
    if args.write:
        head = ("capacity", "cache MB", "temporaries MB", "step ms", "least", "most")
        text = report.table(head, [tuple(row.values()) for row in rows])
        line = f"A step at {CAPACITIES[1]} takes {ratio} times one at {CAPACITIES[0]}."
        report.write_section("capacity", f"{report.machine()}.\n\n{text}\n\n{line}")
    print(json.dumps({"preset": args.preset, "position": POSITION, "ratio": ratio, "rows": rows}))


if __name__ == "__main__":
    main()
