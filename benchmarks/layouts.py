"""Scanned against unrolled layers: compile time, temporaries and step time of one decode step.

Run: python benchmarks/layouts.py [--preset gemma-3-270m] [--capacity 512] [--steps 16] [--write]
Weights are random. The forms take turns, so that a change in the machine's speed meets all of
them; the last line is JSON. `default_layers` follows these figures (docs/log.md).
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
from flax import nnx

from gemlax import preset
from gemlax.cache import new_caches
from gemlax.weights import build_decoder

HELD = (("unroll", "index"), ("scan", "slice"), ("scan", "index"))
FORMS = [(dtype, *held) for dtype in ("float32", "bfloat16") for held in HELD]


class Form:
    """One way to hold the layers, compiled."""

    def __init__(self, config: Any, dtype: str, layers: Any, read: Any, capacity: int):
        random = np.random.default_rng(0)

        def fill(name: str, out: np.ndarray) -> None:
            noise = random.standard_normal(out.shape[-1], np.float32) * 0.03
            out[...] = noise.astype(out.dtype)

        decoder = build_decoder(config, fill, dtype=dtype, layers=layers, read=read)
        graphdef, self.state = nnx.split(decoder)

        def loop(state: Any, token: Any, caches: Any, start: Any, steps: Any) -> Any:
            model = nnx.merge(graphdef, state)

            def step(carry: Any) -> Any:
                i, token, caches = carry
                hidden, caches = model(token[:, None], jnp.full((1, 1), i, jnp.int32), caches)
                best = jnp.argmax(model.logits(hidden[:, -1]), axis=-1)
                return i + 1, best.astype(jnp.int32), caches

            return jax.lax.while_loop(lambda c: c[0] < start + steps, step, (start, token, caches))

        self.token = jnp.zeros((1,), jnp.int32)
        self.caches = new_caches(config, 1, capacity, dtype)
        zero = jnp.int32(0)
        begin = time.perf_counter()
        lowered = jax.jit(loop, donate_argnums=2).lower(
            self.state, self.token, self.caches, zero, zero
        )
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - begin

    def step_ms(self, steps: int) -> float:
        """Time `steps` steps from position 128 on."""
        begin = time.perf_counter()
        out = self.program(self.state, self.token, self.caches, jnp.int32(128), jnp.int32(steps))
        jax.block_until_ready(out)
        _, self.token, self.caches = out
        return (time.perf_counter() - begin) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    config = preset(args.preset).text
    forms = {form: Form(config, *form, args.capacity) for form in FORMS}
    times: dict[tuple, list[float]] = {form: [] for form in FORMS}
    for round_ in range(args.rounds + 1):
        for form in FORMS:
            taken = forms[form].step_ms(args.steps)
            if round_:  # the first round warms up
                times[form].append(taken)
    rows = []
    for form, made in forms.items():
        memory = made.program.memory_analysis()
        rows.append({
            "dtype": form[0], "layers": form[1], "read": form[2],
            "compile_s": round(made.compile_s, 2),
            "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 1),
            "step_ms": round(statistics.median(times[form]), 1),
            "spread_ms": [round(min(times[form]), 1), round(max(times[form]), 1)],
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    if args.write:
        shown = [(r["dtype"], r["layers"], r["read"], r["compile_s"], r["temporary_mb"],
                  r["step_ms"], " to ".join(map(str, r["spread_ms"]))) for r in rows]  # fmt: skip
        head = ("dtype", "layers", "read", "compile s", "temporaries MB", "step ms", "spread ms")
        report.write_section("layouts", f"{report.machine()}.\n\n{report.table(head, shown)}")
    print(json.dumps({"preset": args.preset, "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
