"""A LoRA step of the real Gemma 3 270M by gemlax and by transformers with peft, taking turns.

Run: gemlax convert demo FOLDER; python benchmarks/tune.py FOLDER --peft-python PYTHON [--rounds 3]
PYTHON is an interpreter with torch, transformers and peft; without it gemlax runs alone. Each turn
is a process of its own: load in float32, one step that is not counted, then `--steps` steps with
AdamW on the same rows; once with all tokens learnt, once with the second half of each row. Losses
are compared: the first is that of the base. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

RANK, ALPHA, RATE = 8, 16, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
THREADS = 2
PARTS = {"all": 0, "half": 2}  # of a row that is not learnt: none, or length / 2
SAME_LOSS = 1e-3


def ids(rows: int, length: int) -> list[list[int]]:
    """Rows of words, the same for both."""
    return [[2, *(1000 + (7 * i + 131 * r) % 5000 for i in range(length - 1))] for r in range(rows)]


def run_gemlax(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np

    import gemlax
    from gemlax import adapters
    from gemlax.tune import Trainer, TuneSettings
    from gemlax.tune.packing import Rows

    found: dict[str, Any] = {}
    model = gemlax.load(args.path, dtype="float32", quantize="dense", layers=args.layers)
    adapters.attach(model.decoder, adapters.Rule(rank=RANK, alpha=ALPHA), key=jax.random.key(0))
    model.decoder.read = "index"
    tokens = np.asarray(ids(args.batch, args.length), np.int32)
    at = np.broadcast_to(np.arange(args.length, dtype=np.int32), tokens.shape)
    labels = np.roll(tokens, -1, axis=1)
    settings = TuneSettings(
        steps=100, learning_rate=RATE, warmup=0.0, floor=1.0, remat=args.remat, clip=None
    )
    trainer = Trainer(model.decoder, settings)
    start = jax.device_get((trainer.values, trainer.optimizer_state))
    for name, part in PARTS.items():
        trainer.values, trainer.optimizer_state = jax.device_put(start)  # one program for both
        first = args.length // part if part else 0
        learnt = (at >= max(first - 1, 0)) & (at < args.length - 1)
        rows = Rows(tokens, at, np.zeros_like(at), labels, learnt.astype(np.float32))
        losses, times = [], []
        for step in range(args.steps + 1):
            begin = time.perf_counter()
            losses.append(trainer.step(step, rows).loss)
            times.append(time.perf_counter() - begin)
        found |= {f"{name}_loss": losses, f"{name}_tok_s": tokens.size / min(times[1:])}
        found[f"{name}_first_s"] = times[0]
    return found


def run_peft(args: argparse.Namespace) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        base = transformers.AutoModelForCausalLM.from_pretrained(args.path, dtype=torch.float32)
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"
            ),
        )
        if args.remat:
            model.enable_input_require_grads()
            base.gradient_checkpointing_enable()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        tokens = torch.tensor(ids(args.batch, args.length))
        labels = tokens.clone()
        labels[:, : args.length // part if part else 0] = -100
        losses, times = [], []
        for _ in range(args.steps + 1):
            begin = time.perf_counter()
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            times.append(time.perf_counter() - begin)
        found |= {f"{name}_loss": losses, f"{name}_tok_s": tokens.numel() / min(times[1:])}
        found[f"{name}_first_s"] = times[0]
    return found


def turn(python: str, name: str, argv: list[str]) -> dict[str, Any]:
    command = [python, __file__, *argv, "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write(found: dict[str, Any], names: list[str]) -> None:
    import report

    head = ("learnt", *(f"{name}, tok/s" for name in names), "ratio")
    rows = [
        [part, *(found[f"{name}_{part}_tok_s"] for name in names), found.get(f"{part}_ratio", "-")]
        for part in PARTS
    ]
    about = f"{report.machine()}; {found['batch']} rows of {found['length']} tokens"
    about += ", layers computed again in the backward pass." if found["remat"] else "."
    report.write_section("tune", f"{about}\n\n{report.table(head, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--peft-python", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", choices=["scan", "unroll"])
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--worker", choices=["gemlax", "peft"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps({"gemlax": run_gemlax, "peft": run_peft}[args.worker](args)))
        return
    peers = {"gemlax": sys.executable}
    if args.peft_python:
        peers["peft"] = args.peft_python
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for _ in range(args.rounds):
        for name, python in peers.items():
            turns[name].append(turn(python, name, sys.argv[1:]))
            shown = {k: round(v, 2) for k, v in turns[name][-1].items() if k.endswith(("_s",))}
            print(name, shown, flush=True)
    found: dict[str, Any] = {"batch": args.batch, "length": args.length, "remat": args.remat}
    for part in PARTS:
        for name in peers:
            speeds = [t[f"{part}_tok_s"] for t in turns[name]]
            found[f"{name}_{part}_tok_s"] = round(statistics.median(speeds), 2)
        if "peft" in peers:
            ours, theirs = (turns[name][0][f"{part}_loss"][0] for name in peers)
            if abs(ours - theirs) > SAME_LOSS:
                raise SystemExit(f"the losses differ: {ours} and {theirs}")
            ratios = [a[f"{part}_tok_s"] / b[f"{part}_tok_s"]
                      for a, b in zip(*turns.values(), strict=True)]  # fmt: skip
            found[f"{part}_ratio"] = round(statistics.median(ratios), 3)
            print(f"{part}: {found[f'{part}_ratio']} times transformers and peft")
    if args.write:
        write(found, list(peers))
    print(json.dumps(found | {"turns": turns}))


if __name__ == "__main__":
    main()
