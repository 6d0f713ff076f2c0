"""`gemlax tune`: arguments to settings, a bar while it runs, and what is reported at the end."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gemlax.adapters import Rule, Rules
from gemlax.checkpoints.base import read_json
from gemlax.cli import output
from gemlax.cli.loading import load
from gemlax.errors import RequestError
from gemlax.tune.run import MERGE_FIRST, Progress, check_run, train
from gemlax.tune.settings import TuneSettings

__all__ = ["run", "settings_of"]

_ADAPTER = ("rank", "alpha", "dropout")


def run(args: argparse.Namespace) -> int:
    """Train, and report losses. What is wrong is reported before a model is loaded."""
    settings = settings_of(args)
    if args.adapter:
        raise RequestError(MERGE_FIRST)
    check_run(args.data, args.eval_data, args.output, settings, resume=args.resume)
    args.quantize = args.quantize or "dense"
    model = load(args)
    begin = time.perf_counter()
    with _bar(args) as progress:
        result = train(
            model, args.data, args.output, settings,
            eval_data=args.eval_data, resume=args.resume, progress=progress,
        )  # fmt: skip
    if args.json:
        output.write(json.dumps({
            "output": str(args.output), "steps": result.steps, "loss": result.loss,
            "eval_loss_before": result.eval_before, "eval_loss": result.eval_after,
            "seconds": round(time.perf_counter() - begin, 3),
        }))  # fmt: skip
        return 0
    output.write(f"{args.output}: {result.steps} steps, loss {result.loss:.4f}")
    if result.eval_after is not None:
        output.write(f"held out: {result.eval_before:.4f} before, {result.eval_after:.4f} after")
    return 0


def settings_of(args: argparse.Namespace) -> TuneSettings:
    """Return the settings that arguments stand for."""
    given = zip(_ADAPTER, (args.rank, args.alpha, args.dropout), strict=True)
    adapter = {name: value for name, value in given if value is not None}
    full = args.settings.get("full", False)
    if args.rules is not None and adapter:
        raise RequestError("--rules gives rank, alpha and dropout of each module: omit those")
    if full and (args.rules is not None or adapter):
        raise RequestError("--full trains all weights: it takes no --rules, --rank or --alpha")
    if args.beta is not None and not args.dpo:
        raise RequestError("--beta is for --dpo")
    rules: Rules | None = None
    if args.rules is not None:
        rules = _read_rules(read_json(args.rules))
    elif not full:
        rules = Rule(**({"alpha": 16.0} | adapter))
    beta = None if not args.dpo else 0.1 if args.beta is None else args.beta
    return TuneSettings(**args.settings, rules=rules, beta=beta)


def _read_rules(by_pattern: Any) -> dict[str, Rule | int]:
    """Read rules by pattern: a rank, or an object of rank, alpha and dropout."""
    rules: dict[str, Rule | int] = {}
    for pattern, rule in by_pattern.items():
        if isinstance(rule, dict) and rule.keys() <= set(_ADAPTER):
            rules[pattern] = Rule(**rule)
        elif isinstance(rule, int):
            rules[pattern] = rule
        else:
            raise RequestError(
                f"rules give a rank, or an object of rank, alpha and dropout; {pattern!r} has "
                f"{rule!r}"
            )
    return rules


@contextmanager
def _bar(args: argparse.Namespace) -> Iterator[Progress | None]:
    """Show steps, loss, speed, memory and the time that is left."""
    if not output.shows_progress(args):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        BarColumn(10), MofNCompleteColumn(), TextColumn("{task.description}"), TextColumn("left"),
        TimeLeft(),
    )  # fmt: skip  # 80 characters when all is known
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("compiling", total=None)
        parts: dict[str, str] = {}

        def show(line: dict[str, Any], steps: int) -> None:
            if "eval_loss" in line:
                parts["held out"] = f"held out {line['eval_loss']:.4f}"
            else:
                parts["loss"] = f"loss {line['loss']:.4f}"
                parts["speed"] = f"{line['tok_s']:,.0f} tok/s"
                parts["memory"] = f"{line['memory_bytes'] / 1e9:.1f} GB"
            text = "  ".join(parts.values())
            bar.update(task, completed=line["step"], total=steps, description=text)

        yield show
