"""KV memory of every size: all layers in full against rings, sharing and 8-bit codes.

Run: python benchmarks/kv_memory.py [--write]
From the configs alone; tests/test_cost.py compares with the arrays that are allocated. --write puts
the table into docs/performance.md. The last line is JSON.
"""

import argparse
import json

import report

from gemlax import PRESETS, cost, preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    rows = [(name, row) for name in PRESETS for row in cost.kv_memory(preset(name).text)]
    shown = [
        (
            name,
            f"{row.tokens:,}",
            *(f"{size / 1e6:,.1f}" for size in row[1:]),
            f"{row.naive_bytes / row.bfloat16_bytes:.1f}",
        )
        for name, row in rows
    ]
    head = ("size", "tokens", "naive MB", "bfloat16 MB", "int8 MB", "naive / bfloat16")
    text = report.table(head, shown)
    print(text)
    if args.write:
        report.write_section("kv-memory", text)
    print(json.dumps({"rows": [{"size": name, **row._asdict()} for name, row in rows]}))


if __name__ == "__main__":
    main()
