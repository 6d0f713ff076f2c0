"""One decode step of Gemma 3 1B with its matrices in bfloat16, int8 and int4.

Run: python benchmarks/quantised.py [--preset gemma-3-1b] [--steps 8] [--rounds 7] [--write]
Real width, random codes, scanned layers, float32 caches, position 128, batch 1 and 8. The cases
take turns. "share" is the bytes of the weights over time, of what memory allows. The last line is
JSON.
"""

import argparse
import functools
import json
from typing import Any

import jax
import numpy as np
import report
from cases import Case
from flax import nnx

from gemlax import bench, preset
from gemlax.formats import FORMATS, Coded
from gemlax.names import text_weights
from gemlax.weights import build_decoder

NAMES = ("bfloat16", "int8", "int4")
BATCHES = (1, 8)
POSITION = 128


def build(config: Any, format: Any) -> Any:
    """Codes of small weights: sound numbers, made quickly."""
    shapes = text_weights(config)
    form = FORMATS[format]
    rng = np.random.default_rng(0)

    def codes(name: str) -> Coded | None:
        shape = shapes[name]
        if len(shape) < 2:
            return None
        if format == "bfloat16":  # positive numbers from 0.0001 to 0.03
            held = rng.integers(0x3900, 0x3D00, shape, np.uint16)
            return Coded(format, held ^ (rng.integers(0, 2, shape, np.uint16) << 15))
        width = shape[-1] // form.block * form.elements
        low = -127 if form.dtype == np.int8 else 0
        held = rng.integers(low, 128, (*shape[:-1], width), form.dtype)
        scales = np.full((*shape[:-1], shape[-1] // form.block), 0x3900, np.uint16)
        return Coded(format, held, scales)

    return build_decoder(config, lambda name, out: out.fill(0), codes=codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-1b")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    config = preset(args.preset).text
    limit = bench.streaming_read()
    cases, sizes = {}, {}
    for format in NAMES:
        decoder = build(config, format)
        sizes[format] = sum(a.nbytes for a in jax.tree.leaves(nnx.state(decoder)))
        for batch in BATCHES:
            cases[format, batch] = Case(decoder, capacity=512, batch=batch)
    works = {
        key: functools.partial(case.decode, POSITION, args.steps) for key, case in cases.items()
    }
    rows = []
    for (format, batch), times in bench.timed(works, args.rounds).items():
        ms = report.step(cases[format, batch], times, args.steps)["step_ms"]
        rows.append({
            "weights": format,
            "batch": batch,
            "weights_mb": round(sizes[format] / 1e6),
            "step_ms": ms,
            "tok_s": round(1e3 * batch / ms, 1),
            "share": round(sizes[format] / ms / 1e6 / limit, 2),
            "temporary_mb": round(
                cases[format, batch].decode_program.memory()["temporary_bytes"] / 1e6, 1
            ),
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if args.write:
        head = ("weights", "batch", "weights MB", "step ms", "tok/s", "share", "temporaries MB")
        text = report.table(head, [tuple(row.values()) for row in rows])
        line = f"{report.machine()}; read bandwidth {limit:.1f} GB/s."
        report.write_section("quantised", f"{line}\n\n{text}")
    print(json.dumps({"preset": args.preset, "limit_gb_s": round(limit, 1), "rows": rows}))


if __name__ == "__main__":
    main()
