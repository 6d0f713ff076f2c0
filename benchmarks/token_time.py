"""Where the time of a token goes: each kind of native kernel, and all the rest.

Run: python benchmarks/token_time.py FILE.gguf [--rounds 5] [--steps 64] [--write]
A prompt of 128 and of 1,024 tokens, then greedy steps at depth 128 with one row and with eight. The
best round counts: the machine is shared. Kernels meter themselves; the rest is XLA's operations,
its calls of kernels, and one copy to the host per block of steps. The last line is JSON.
"""

import argparse
import dataclasses
import json
from typing import Any

import jax
import report

import gemlax
from gemlax import bench, ops
from gemlax.ops import cpu

# Prompt tokens, rows, and whether the steps are measured or the prompt.
CASES = ((128, 1, False), (1024, 1, False), (128, 1, True), (128, 8, True))
FIRST_ID = 1000
Spent = dict[str, tuple[int, float]]


def between(before: Spent, after: Spent) -> dict[str, float]:
    """Return ms of each kind of kernel that ran between two readings."""
    return {
        name: 1e3 * (seconds - before.get(name, (0, 0.0))[1])
        for name, (calls, seconds) in after.items()
        if calls > before.get(name, (0, 0.0))[0]
    }


class Run:
    """One model, and what its rounds took."""

    def __init__(self, path: str):
        self.model: Any = gemlax.load(path, implementation="cpu")
        programs = self.model.programs
        self.counters, prefill = programs.counters, programs.prefill

        def prefill_and_read(*args: Any) -> Any:
            state = jax.block_until_ready(prefill(*args))
            self.prefilled = cpu.spent()
            return state

        programs.prefill = prefill_and_read

    def once(self, depth: int, rows: int, steps: int, decoding: bool) -> Any:
        """Return ms of the prompt, or of one step, and of each kind of kernel in it."""
        old, before = dataclasses.replace(self.counters), cpu.spent()
        prompt = [2, *range(FIRST_ID, FIRST_ID + depth - 1)]
        self.model.generate([prompt] * rows, max_new_tokens=steps, stop_ids=(), context=2048)
        if not decoding:
            return 1e3 * (self.counters.prefill_s - old.prefill_s), between(before, self.prefilled)
        kinds = between(self.prefilled, cpu.spent())
        count = (self.counters.decode_tokens - old.decode_tokens) / rows
        ms = 1e3 * (self.counters.decode_s - old.decode_s) / count
        return ms, {name: taken / count for name, taken in kinds.items()}


def measure(run: Run, depth: int, rows: int, decoding: bool, steps: int, rounds: int) -> Any:
    """Return what the best of the rounds took."""
    found = [run.once(depth, rows, steps, decoding) for _ in range(rounds + 1)]
    total, kinds = min(found[1:], key=lambda taken: taken[0])  # the first compiles
    rest = total - sum(kinds.values())
    return {
        "what": f"{'step' if decoding else 'prompt'}, depth {depth}, rows {rows}",
        "ms": round(total, 2),
        "kernels": {name: round(ms, 3) for name, ms in kinds.items()},
        "rest_ms": round(rest, 3),
        "rest_share": round(rest / total, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    if ops.kernels_in_use() is None:
        raise SystemExit("no native kernels here: see CONTRIBUTING.md")
    run, cases = Run(args.path), []
    for depth, rows, decoding in CASES:
        steps = args.steps if decoding else 1
        cases.append(measure(run, depth, rows, decoding, steps, args.rounds))
        print(json.dumps(cases[-1]), flush=True)
    limit = bench.streaming_read()
    if args.write:
        names = sorted({name for case in cases for name in case["kernels"]})
        head = ("what", "ms", *names, "rest", "rest, share")
        table = report.table(
            head,
            [
                (
                    case["what"],
                    case["ms"],
                    *(case["kernels"].get(name, "-") for name in names),
                    case["rest_ms"],
                    case["rest_share"],
                )
                for case in cases
            ],
        )
        line = (
            f"{report.machine()}, kernels {ops.kernels_in_use()}; read bandwidth {limit:.1f} GB/s."
        )
        report.write_section("token-time", f"{line}\n\n{table}")
    print(
        json.dumps({"kernels": ops.kernels_in_use(), "limit_gb_s": round(limit, 1), "cases": cases})
    )


if __name__ == "__main__":
    main()
