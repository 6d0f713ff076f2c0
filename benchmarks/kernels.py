"""Products with a stack of weights by the native kernels, beside what memory allows.

Run: python benchmarks/kernels.py [--rounds 15] [--write]
Each format: eight layers of 16.8 million weights (rows of 2048), one after another in a scan, with
1 and 8 rows of activations. The formats take turns. The last line is JSON.
"""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import report

from gemlax import bench, ops
from gemlax.formats import FORMATS, encode
from gemlax.qtensor import At, QTensor

LAYERS, WIDTH, FEATURES = 8, 2048, 8192
ROWS = (1, 8)


def stack(format: str) -> QTensor:
    """Random codes: what they decode to costs nothing."""
    rng = np.random.default_rng(0)
    if format in ("int8", "int4"):
        weights = rng.standard_normal((LAYERS, FEATURES, WIDTH), np.float32)
        codes, scales = encode(weights, format)
        return QTensor(jnp.asarray(codes), format, jnp.asarray(scales))
    form = FORMATS[format]
    shape = (LAYERS, FEATURES, WIDTH // form.block * form.elements)
    if format == "float32":
        return QTensor(jnp.asarray(rng.standard_normal(shape, np.float32)), format)
    most = 16_000 if form.dtype == np.uint16 else 60  # no infinities among the scales
    return QTensor(jnp.asarray(rng.integers(0, most, shape).astype(form.dtype)), format)


@jax.jit
def run(x: jax.Array, weight: QTensor) -> jax.Array:
    def layer(x: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        return x + 1e-9 * ops.linear(x, At(weight, index))[:, :WIDTH], None

    return jax.lax.scan(layer, x, jnp.arange(LAYERS, dtype=jnp.int32))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    kernels = ops.kernels_in_use()
    if kernels is None:
        raise SystemExit("no native kernels here: see CONTRIBUTING.md")
    limit = bench.streaming_read()
    rows = []
    for format in FORMATS:
        if format == "nf4":
            continue  # XLA alone
        weight = stack(format)
        size = sum(a.nbytes for a in jax.tree.leaves(weight))
        works = {
            n: functools.partial(lambda x: run(x, weight).block_until_ready(), jnp.ones((n, WIDTH)))
            for n in ROWS
        }
        row: dict[str, object] = {"format": format, "bits": round(8 * size / weight_count(), 2)}
        took = {
            n: times.report("x", "ms", 1)["x_ms"]
            for n, times in bench.timed(works, args.rounds).items()
        }
        for n, ms in took.items():
            row[f"gb_s_{n}"] = round(size / ms / 1e6, 1)
            row[f"gmac_s_{n}"] = round(n * weight_count() / ms / 1e6, 1)
        row["share"] = round(size / took[1] / 1e6 / limit, 2)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.write:
        head = ("format", "bits", "GB/s, 1 row", "GMAC/s, 1 row", "GB/s, 8 rows", "GMAC/s, 8 rows",
                "share of the limit, 1 row")  # fmt: skip
        text = report.table(head, [tuple(row.values()) for row in rows])
        line = f"{report.machine()}, kernels {kernels}; read bandwidth {limit:.1f} GB/s."
        report.write_section("kernels", f"{line}\n\n{text}")
    print(json.dumps({"kernels": kernels, "limit_gb_s": round(limit, 1), "rows": rows}))


def weight_count() -> int:
    return LAYERS * FEATURES * WIDTH


if __name__ == "__main__":
    main()
