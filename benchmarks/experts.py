"""The ways to run experts, by number of rows: which is fastest decides ops/moe.py's default.

Run: python benchmarks/experts.py [--write] [--rounds 3]
One layer of Gemma 4 26B-A4B at real width (128 experts, 8 active, float32, random weights and
random choices). The ways take turns. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

from gemlax import ops, preset

ROWS = (1, 4, 8, 16, 32, 128, 512)
WAYS = ("gather", "sorted", "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    text = preset("gemma-4-26b-a4b").text
    count, hidden, inner = text.layers[0].num_experts, text.hidden_size, text.moe_intermediate_size
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * shape[-1] ** -0.5)

    gate_up, down = draw(count, 2 * inner, hidden), draw(count, hidden, inner)
    run = jax.jit(ops.experts, static_argnames="implementation")
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        x, weights = draw(rows, hidden), jnp.ones((rows, text.top_k_experts), jnp.float32)
        chosen = [random.permutation(count)[: text.top_k_experts] for _ in range(rows)]
        ids = jnp.asarray(np.stack(chosen), jnp.int32)
        ways = [way for way in WAYS if way != "gather" or rows <= 32]  # beyond, it takes long
        times: dict[str, list[float]] = {way: [] for way in ways}
        for round_ in range(args.rounds + 1):
            for way in ways:
                begin = time.perf_counter()
                out = run(x, weights, ids, gate_up, down, algorithm=way)
                jax.block_until_ready(out)
                if round_:  # the first compiles
                    times[way].append((time.perf_counter() - begin) * 1e3)
        medians = {way: round(statistics.median(values), 1) for way, values in times.items()}
        found.append({"rows": rows, **medians})
        print(found[-1])
    shown = [(r["rows"], *(r.get(way, "-") for way in WAYS)) for r in found]
    text_table = report.table(("rows", *(f"{way} ms" for way in WAYS)), shown)
    if args.write:
        report.write_section("experts", f"{report.machine()}.\n\n{text_table}")
    print(json.dumps({"machine": report.machine(), "rows": found}))


if __name__ == "__main__":
    main()
