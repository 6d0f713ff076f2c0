"""Compile time, program size and temporaries of scanned against unrolled layers.

Run: python benchmarks/compile.py [--write] [--rounds 3]
One decode step (batch 1, cache of 256, float32) of each size at full depth and toy width. The two
forms take turns. --write puts the table into docs/performance.md. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import report
from flax import nnx

from gemlax import preset, tiny
from gemlax.cache import new_caches
from gemlax.decoder import Decoder

SIZES = ("gemma-3-270m", "gemma-3-4b", "gemma-3-27b", "gemma-4-e2b", "gemma-4-e4b",
         "gemma-4-26b-a4b", "gemma-4-31b")  # fmt: skip


def compile_step(config: Any, layers: Any) -> tuple[float, Any]:
    """Trace and compile one decode step from shapes alone."""
    decoder = nnx.eval_shape(lambda: Decoder(config, layers=layers, read="index", rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(decoder)
    caches = jax.eval_shape(lambda: new_caches(config, 1, 256, jnp.float32))
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(state: Any, token: Any, position: Any, caches: Any) -> Any:
        model = nnx.merge(graphdef, state)
        hidden, caches = model(token, position, caches)
        return model.logits(hidden), caches

    begin = time.perf_counter()
    program = jax.jit(step, donate_argnums=3).lower(state, one, one, caches).compile()
    return time.perf_counter() - begin, program


def measure(name: str, rounds: int) -> dict[str, Any]:
    config = tiny(preset(name)).text
    seconds: dict[str, list[float]] = {"scan": [], "unroll": []}
    row: dict[str, Any] = {"size": name, "layers": config.num_hidden_layers}
    for _ in range(rounds):
        for layers, times in seconds.items():
            jax.clear_caches()
            taken, program = compile_step(config, layers)
            times.append(taken)
            row[f"{layers}_code"] = len(program.as_text())
            row[f"{layers}_temporary"] = program.memory_analysis().temp_size_in_bytes
    row |= {f"{layers}_s": round(statistics.median(times), 2) for layers, times in seconds.items()}
    pairs = [a / b for a, b in zip(seconds["scan"], seconds["unroll"], strict=True)]
    return row | {"ratio": round(statistics.median(pairs), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    compile_step(tiny(preset("gemma-3-270m"), num_hidden_layers=1).text, "scan")  # warms up
    rows = []
    for name in SIZES:
        rows.append(measure(name, args.rounds))
        print(rows[-1])
    text = report.table(
        ("size", "layers", "scan s", "unroll s", "scan / unroll", "scan HLO kB", "unroll HLO kB",
         "scan temporaries kB", "unroll temporaries kB"),
        [
            (r["size"], r["layers"], r["scan_s"], r["unroll_s"], r["ratio"],
             r["scan_code"] // 1000, r["unroll_code"] // 1000,
             r["scan_temporary"] // 1000, r["unroll_temporary"] // 1000)
            for r in rows
        ],
    )  # fmt: skip
    if args.write:
        report.write_section("compile", f"{report.machine()}.\n\n{text}")
    print(json.dumps({"machine": report.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
