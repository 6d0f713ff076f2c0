"""`gemlax tune`: arguments to settings, a bar while it runs, and what is said at the end."""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemlax.adapters import Rule, Rules
from gemlax.checkpoints.base import read_json
from gemlax.errors import RequestError
from gemlax.model import Model
from gemlax.tune.run import MERGE_FIRST, Progress, check_run, train
from gemlax.tune.settings import TuneSettings

__all__ = ["add_arguments", "check", "run", "settings_of"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `gemlax tune` takes beside the options of models."""
    add = parser.add_argument
    add("data", type=Path, help="JSONL: messages, conversations, prompts, instructions or texts")
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder for all results")
    add("--eval-data", type=Path, metavar="F", help="held-out file; its loss is reported")
    add("--resume", action="store_true", help="continue from the last checkpoint in the folder")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--dpo", action="store_true", help="learn preferences")
    add("--beta", type=float, metavar="X", help="strength of --dpo (default: 0.1)")
    add("--rank", type=int, metavar="N", help="rank of the adapter (default: 8)")
    add("--alpha", type=float, metavar="X", help="LoRA scale is alpha / rank (default: 16)")
    add("--dropout", type=float, metavar="P",
        help="chance that an input of the adapter is dropped (default: 0)")  # fmt: skip
    add("--rules", type=Path, metavar="F",
        help="JSON file with rank, alpha and dropout by module name")  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    groups = {"full": kinds, "steps": length, "epochs": length}
    for field in dataclasses.fields(TuneSettings):
        _add_setting(groups.get(field.name, parser), field)


def _add_setting(parser: Any, field: dataclasses.Field[Any]) -> None:
    """Add the option of a field; a flag changes what is the default."""
    said, default, dashed = field.metadata, field.default, field.name.replace("_", "-")
    option = said.get("option", f"--no-{dashed}" if default is True else f"--{dashed}")
    if option is None:
        return
    if said["kind"] is bool:
        text = f"do not {said['help']}" if default else said["help"]
        action = "store_false" if default else "store_true"
        parser.add_argument(option, dest=field.name, action=action, help=text)
        return
    shown = said["unset"] if default is None else default
    parser.add_argument(
        option, type=said["kind"], default=default,
        metavar="N" if said["kind"] is int else "X", help=f"{said['help']} (default: {shown})",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Say what is wrong with arguments and files before a model is loaded."""
    settings = settings_of(args)
    if args.adapter:
        raise RequestError(MERGE_FIRST)
    check_run(args.data, args.eval_data, args.output, settings, resume=args.resume)


def settings_of(args: argparse.Namespace) -> TuneSettings:
    """Return the settings that arguments stand for."""
    names = {field.name for field in dataclasses.fields(TuneSettings)}
    given = {key: value for key, value in vars(args).items() if key in names}
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
        parts = zip(("rank", "alpha", "dropout"), adapter, strict=True)
        rules = Rule(**({"alpha": 16.0} | {key: v for key, v in parts if v is not None}))
    beta = None if not args.dpo else 0.1 if args.beta is None else args.beta
    return TuneSettings(**{**given, "rules": rules, "beta": beta})


def _rules(by_pattern: Any) -> dict[str, Rule | int]:
    """Read rules by pattern: a rank, or an object of rank, alpha and dropout."""
    rules: dict[str, Rule | int] = {}
    for pattern, rule in by_pattern.items():
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
        result = train(
            model, args.data, args.output, settings,
            eval_data=args.eval_data, resume=args.resume, progress=progress,
        )  # fmt: skip
    return {
        "output": str(args.output),
        "steps": result.steps,
        "loss": result.loss,
        "eval_loss_before": result.eval_before,
        "eval_loss": result.eval_after,
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
