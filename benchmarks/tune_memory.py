"""The peak of memory of a training step of the real Gemma 3 270M, by what is trained on what base.

Run: python benchmarks/tune_memory.py [--batch 2] [--length 256] [--write]
Each row is a process of its own: load the demo model, two steps with AdamW on rows of which all
tokens are learnt, and the most that was resident (Linux). The last line is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

# Name: how the base is held, whether all weights are trained, whether layers are computed again.
CASES = {
    "LoRA, float32": ("dense", False, False),
    "LoRA, float32, remat": ("dense", False, True),
    "LoRA, as stored": ("stored", False, True),
    "QLoRA, int8": ("int8", False, True),
    "QLoRA, nf4": ("nf4", False, True),
    "all weights, float32, remat": ("dense", True, True),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    import gemlax
    from gemlax import adapters
    from gemlax.tune import Trainer, TuneSettings
    from gemlax.tune.packing import Rows

    quantize, full, remat = CASES[args.worker]
    model = gemlax.load("demo", dtype="float32", quantize=quantize)
    if not full:
        adapters.attach(model.decoder, adapters.Rule(rank=8), key=jax.random.key(0))
        model.decoder.read = "index"
    tokens = np.random.default_rng(0).integers(1000, 9000, (args.batch, args.length), np.int32)
    at = np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape)
    learnt = (at < args.length - 1).astype(np.float32)
    rows = Rows(tokens, at, np.zeros_like(at), np.roll(tokens, -1, axis=1), learnt)
    held = sum(a.nbytes for a in jax.tree.leaves(model._state))
    trainer = Trainer(
        model.decoder, TuneSettings(steps=10, learning_rate=1e-5, warmup=0.0, remat=remat)
    )
    for step in range(2):
        loss = trainer.step(step, rows).loss
    trained = sum(a.nbytes for a in trainer.values.values())
    optimizer = sum(a.nbytes for a in jax.tree.leaves(trainer.optimizer_state))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sizes = {"base": held, "trained": trained, "optimizer": optimizer, "peak": peak}
    return {f"{name}_mb": round(size / 1e6, 1) for name, size in sizes.items()} | {"loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(run(args)))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in CASES:
        command = [sys.executable, __file__, "--worker", name]
        command += ["--batch", str(args.batch), "--length", str(args.length)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, found[name], flush=True)
    if args.write:
        import report

        head = ("trained", "base MB", "trained MB", "optimizer MB", "peak MB")
        rows = [[name, *list(case.values())[:4]] for name, case in found.items()]
        about = f"{report.machine()}; {args.batch} rows of {args.length} tokens."
        report.write_section("tune-memory", f"{about}\n\n{report.table(head, rows)}")
    print(json.dumps({"batch": args.batch, "length": args.length, "cases": found}))


if __name__ == "__main__":
    main()
