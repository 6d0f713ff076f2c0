"""`gemlax tune`: arguments to settings, a bar while it runs, and what is said at the end."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gemlax.adapters import Rule, Rules
from gemlax.checkpoints.base import read_json
from gemlax.errors import RequestError
from gemlax.model import Model
from gemlax.tune.run import MERGE_FIRST, Progress, Settings, check_run, train

__all__ = ["check", "run", "settings_of"]


def check(args: argparse.Namespace) -> None:
    """Say what is wrong with arguments and files before a model is loaded."""
    settings = settings_of(args)
    if args.adapter:
        raise RequestError(MERGE_FIRST)
    check_run(args.data, args.eval_data, args.output, settings, resume=args.resume)


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings that arguments stand for.

    Raises:
        RequestError: arguments that exclude one another, or rules of another form.
    """
    own = {key: value for key, value in vars(args).items() if key in vars(Settings())}
    adapter = (args.rank, args.alpha, args.dropout)
    if args.rules is not None and adapter != (None, None, None):
        raise RequestError("--rules says rank, alpha and dropout of each module: leave those out")
    if args.full and (args.rules is not None or adapter != (None, None, None)):
        raise RequestError("--full trains all weights: it takes no --rules, --rank or --alpha")
    if args.beta is not None and not args.dpo:
        raise RequestError("--beta is for --dpo")
    rules: Rules | None = None
    if args.rules is not None:
        rules = _rules(read_json(args.rules))
    elif not args.full:
        given = zip(("rank", "alpha", "dropout"), adapter, strict=True)
        rules = Rule(**({"alpha": 16.0} | {key: v for key, v in given if v is not None}))
    beta = None if not args.dpo else 0.1 if args.beta is None else args.beta
    return Settings(**{**own, "rules": rules, "beta": beta})


def _rules(found: Any) -> dict[str, Rule | int]:
    """Read rules by pattern: a rank, or an object of rank, alpha and dropout."""
    rules: dict[str, Rule | int] = {}
    for pattern, rule in found.items():
        if isinstance(rule, dict) and rule.keys() <= {"rank", "alpha", "dropout"}:
            rules[pattern] = Rule(**rule)
        elif isinstance(rule, int):
            rules[pattern] = rule
        else:
            raise RequestError(
                f"rules give a rank, or an object of rank, alpha and dropout; {pattern!r} has "
                f"{rule!r}"
            )
    return rules


def run(args: argparse.Namespace, model: Model, *, shown: bool) -> dict[str, Any]:
    """Train, with a bar on standard error if `shown`, and return what came of it."""
    settings = settings_of(args)
    begin = time.perf_counter()
    with _bar(shown) as progress:
        found = train(
            model, args.data, args.output, settings,
            eval_data=args.eval_data, resume=args.resume, progress=progress,
        )  # fmt: skip
    return {
        "output": str(args.output),
        "steps": found.steps,
        "loss": found.loss,
        "eval_loss_before": found.eval_before,
        "eval_loss": found.eval_after,
        "seconds": round(time.perf_counter() - begin, 3),
    }


@contextmanager
def _bar(shown: bool) -> Iterator[Progress | None]:
    """Show steps, loss, speed, memory and the time that is left."""
    if not shown:
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

        def tell(line: dict[str, Any], steps: int) -> None:
            if "eval_loss" in line:
                parts["held out"] = f"held out {line['eval_loss']:.4f}"
            else:
                parts["loss"] = f"loss {line['loss']:.4f}"
                parts["speed"] = f"{line['tok_s']:,.0f} tok/s"
                parts["memory"] = f"{line['memory_bytes'] / 1e9:.1f} GB"
            text = "  ".join(parts.values())
            bar.update(task, completed=line["step"], total=steps, description=text)

        yield tell
