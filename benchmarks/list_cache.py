"""What the list contract costs: one decode step with a list of caches against stacked ones.

Run: python benchmarks/list_cache.py [--preset gemma-3-270m] [--capacity 8192] [--write]
Real width, random float32 weights. The list has one `LayerCache` per layer that owns keys and
values. The forms take turns, so that a change in the machine's speed meets all; the last line is
JSON.
"""

import argparse
import functools
import json

import report
from cases import Case

from gemlax import bench, preset

FORMS = [(layers, cache) for layers in ("scan", "unroll") for cache in ("stacked", "list")]
POSITION = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    config = preset(args.preset).text
    decoders = {key: bench.random_decoder(config, layers=key) for key in ("scan", "unroll")}
    cases = {
        (layers, cache): Case(decoders[layers], capacity=args.capacity, cache=cache)
        for layers, cache in FORMS
    }
    works = {
        form: functools.partial(case.decode, POSITION, args.steps) for form, case in cases.items()
    }
    rows = []
    for form, times in bench.timed(works, args.rounds).items():
        rows.append({
            "layers": form[0], "cache": form[1],
            **report.step(cases[form], times, args.steps),
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if args.write:
        head = ("layers", "cache", "cache MB", "temporaries MB", "step ms", "least", "most")
        text = report.table(head, [tuple(row.values()) for row in rows])
        report.write_section("list-cache", f"{report.machine()}.\n\n{text}")
    print(json.dumps({"preset": args.preset, "capacity": args.capacity, "rows": rows}))


if __name__ == "__main__":
    main()
