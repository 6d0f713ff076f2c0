"""The commands, except `bench`, `chat` and `tune`, and what becomes of their errors."""

import argparse
import itertools
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemlax.cli import output
from gemlax.cli.loading import load_with_tokenizer, model_name
from gemlax.cli.output import write
from gemlax.cli.parser import make_parser
from gemlax.errors import Error

__all__ = ["main", "read_prompt"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; errors are one line on stderr."""
    args = make_parser().parse_args(argv)
    try:
        if sys.stdout is None:
            raise Error("standard output is closed")
        return _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        output.note("\ninterrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        output.drop_output()  # the reader has enough (`| head`)
        return 128 + signal.SIGPIPE
    except Exception as error:
        text = output.describe_error(error)
        if text is None:
            raise
        output.note(f"gemlax: {text}")
        return 1


def _generate(args: argparse.Namespace) -> int:
    from gemlax.generation import SamplingSettings

    prompt = read_prompt(args)
    settings = SamplingSettings(**args.settings, grammar=_read_grammar(args))
    begin = time.perf_counter()
    model = load_with_tokenizer(args)
    with output.status(args, "compiling and reading the prompt") as quiet_down:
        stream = model.stream(prompt, settings)
        first = list(itertools.islice(stream, 1))
        quiet_down()
    first_s = time.perf_counter() - begin
    for piece in itertools.chain(first, stream):
        write(piece, end="")
    write("")
    if stream.completion.error is not None:
        raise Error(stream.completion.error)
    if args.json:
        write(json.dumps(_report(model, stream.completion, first_s)))
    return 0


def _report(model: Any, completion: Any, first_s: float) -> dict[str, Any]:
    usage = completion.usage
    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": usage.num_prompt_tokens,
        "prefill_tok_s": _rate(usage.num_prefilled_tokens, usage.prefill_s),
        "decode_tok_s": _rate(usage.num_tokens, usage.decode_s),
        "accepted_per_step": completion.accepted_per_step,
        "compile_s": round(model.programs.counters.compile_s, 3),
        "first_piece_s": round(first_s, 3),
    }


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if count and seconds > 0 else None


def _read_grammar(args: argparse.Namespace) -> Any:
    from gemlax.grammar import JsonSchema, Regex

    if args.json_schema is not None and args.regex is not None:
        raise Error("give --json-schema or --regex, not both")
    if args.json_schema is not None:
        return JsonSchema(args.json_schema.read_text(encoding="utf-8-sig"))
    return None if args.regex is None else Regex(args.regex)


def read_prompt(args: argparse.Namespace) -> str:
    """Return the prompt of `generate`, without the line end that `echo` and editors write."""
    if args.file is not None and args.prompt is not None:
        raise Error("give a prompt or --file, not both")
    if args.file is not None:
        text = args.file.read_text(encoding="utf-8-sig")
    elif args.prompt is not None and args.prompt != "-":
        return args.prompt
    elif sys.stdin is None or (args.prompt is None and sys.stdin.isatty()):
        raise Error("no prompt: give it as an argument, with --file, or on stdin")
    else:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    return text.removesuffix("\n").removesuffix("\r")


def _chat(args: argparse.Namespace) -> int:
    from gemlax.cli import chat

    return chat.run(args)


def _tune(args: argparse.Namespace) -> int:
    from gemlax.cli import tune

    return tune.run(args)


def _convert(args: argparse.Namespace) -> int:
    done, report = _rewrite(args, "converting", lambda source: {"dtype": args.dtype})
    _write_rewritten(args, report, f"{done.parameters:,} parameters in {done.dtype}")
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from gemlax.checkpoints.base import read_json
    from gemlax.quantization import formats_by_rules, importance_by_rules

    rules = args.format or read_json(args.rules)
    text = None if args.calibration is None else args.calibration.read_text(encoding="utf-8")
    counts: dict[str, int] = {}

    def options(source: Any) -> dict[str, Any]:
        formats = formats_by_rules(rules, source.config.text)
        if not formats:
            raise Error(f"the rules fit no matrix of {args.source}; nothing would be quantised")
        counts.update(Counter(formats.values()))
        tokenizer = source.tokenizer()
        importance = importance_by_rules(rules, source.config, source.read, tokenizer, text)
        return {"formats": formats, "importance": importance}

    done, report = _rewrite(args, "quantising", options)
    which = ", ".join(f"{count} matrices in {format}" for format, count in counts.items())
    text = f"{which}, {done.nbytes / 1e6:,.1f} MB of weights"
    _write_rewritten(args, report | {"matrices": counts}, text)
    return 0


def _rewrite(
    args: argparse.Namespace, doing: str, options: Callable[[Any], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """Write the source as a folder; `options` of it are those of `checkpoints.convert`."""
    from gemlax import checkpoints

    begin = time.perf_counter()
    with (
        checkpoints.open_checkpoint(checkpoints.find(args.source)) as source,
        output.bar(args, f"{doing} {args.source}") as progress,
    ):
        how = options(source)
        try:
            done = checkpoints.convert(
                source, args.target, overwrite=args.overwrite, progress=progress,
                change=_merging(args, source), **how,
            )  # fmt: skip
        except FileExistsError as error:
            raise Error(str(error).replace("pass overwrite=True", "pass --overwrite")) from error
    seconds = round(time.perf_counter() - begin, 3)
    report = {"source": args.source, "target": str(args.target), **done._asdict()}
    return done, report | {"seconds": seconds}


def _merging(args: argparse.Namespace, source: Any) -> Callable[[str], Any] | None:
    """Return what gives the update of each weight by the adapter to be merged, given or beside."""
    from gemlax import adapters

    folder = args.adapter or adapters.beside(source.source)
    if folder is None:
        return None
    if not args.adapter:
        output.note(f"merging the adapter beside the weights of {source.source}")
    return adapters.updates(adapters.read_folder(folder, source.config.text))


def _write_rewritten(args: argparse.Namespace, report: dict[str, Any], text: str) -> None:
    if args.json:
        write(json.dumps(report))
    else:
        write(f"{args.target}: {text}{'' if report['tokenizer'] else ', no tokenizer'}")


def _info(args: argparse.Namespace) -> int:
    from gemlax import cost
    from gemlax.presets import PRESETS, preset

    if not args.all:
        report = _describe_model(args)
    elif args.model is None and args.context is None:
        sizes = ((name, row) for name in PRESETS for row in cost.kv_memory(preset(name).text))
        report = {"kv_memory": [{"model": name, **row._asdict()} for name, row in sizes]}
    else:
        raise Error("--all takes neither a model nor --context")
    if args.json:
        write(json.dumps(report))
        return 0
    memory = report.pop("kv_memory")
    if report:
        output.write_table(report.items())
    write("kv memory of one row, MB (naive: every layer holds every token)")
    cells = [
        [f"{v / 1e6:,.1f}" if k.endswith("_bytes") else v for k, v in row.items()] for row in memory
    ]
    output.write_table(cells, [key.removesuffix("_bytes") for key in memory[0]])
    return 0


def _describe_model(args: argparse.Namespace) -> dict[str, Any]:
    from gemlax import cost, ops
    from gemlax.presets import PRESETS, preset

    stored = None
    if args.model in PRESETS and not Path(args.model).exists():
        name, config = args.model, preset(args.model)
    else:
        from gemlax import checkpoints

        with checkpoints.open_checkpoint(checkpoints.find(model_name(args))) as source:
            source.check()
            source.tokenizer()  # what `load` would refuse is refused here
            name, config, stored = str(source.source), source.config, source.stored_dtype
    text = config.text
    context = text.max_position_embeddings if args.context is None else args.context
    if context < 1:
        raise Error(f"--context must be at least 1, got {context}")
    count, kernels = cost.parameters(text), ops.kernels()
    return {
        "model": name,
        "stored_as": stored or "preset (no weights)",
        "layers": text.num_hidden_layers,
        "pattern": _pattern(text),
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "max_context": text.max_position_embeddings,
        "parameters": count,
        "weight_bytes_float32": 4 * count,
        "weight_bytes_bfloat16": 2 * count,
        "kv_bytes_per_token_float32": cost.kv_bytes_per_token(text, 4),
        "kv_bytes_per_token_bfloat16": cost.kv_bytes_per_token(text, 2),
        "context": context,
        "kv_bytes_at_context_float32": cost.kv_bytes(text, context, 4),
        "kv_bytes_at_context_bfloat16": cost.kv_bytes(text, context, 2),
        "native_kernels": kernels.instructions or f"none: {kernels.reason}",
        "native_formats": ", ".join(kernels.formats) or "none",
        "kv_memory": [row._asdict() for row in cost.kv_memory(text)],
    }


def _pattern(text: Any) -> str:
    """Write the stack as its scans, for example "(5 sliding, 1 full) x 3"."""
    parts = []
    for segment in text.plan.segments:
        runs = ", ".join(f"{run.count} {run.spec.kind.split('_')[0]}" for run in segment.runs)
        parts.append(f"({runs}) x {segment.repeats}")
    return " + ".join(parts)


def _perplexity(args: argparse.Namespace) -> int:
    if str(args.file) != "-":
        text = args.file.read_text(encoding="utf-8-sig")
    elif sys.stdin is None:
        raise Error("standard input is closed")
    else:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    if args.window < 2:
        raise Error(f"--window must be at least 2, got {args.window}")
    model = load_with_tokenizer(args)
    begin = time.perf_counter()
    with output.status(args, "scoring"):
        score = model.score(text, window=args.window, **args.settings)
    if not score.num_tokens:
        raise Error(f"{args.file}: nothing to score, the text is empty")
    seconds = time.perf_counter() - begin
    if args.json:
        write(json.dumps({
            "perplexity": score.perplexity, "log_likelihood": score.log_likelihood,
            "tokens": score.num_tokens, "seconds": round(seconds, 3),
        }))  # fmt: skip
    else:
        write(f"perplexity {score.perplexity:.4f} over {score.num_tokens} tokens")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from gemlax.cli import bench

    return bench.run(args)


def _serve(args: argparse.Namespace) -> int:
    try:
        from gemlax.serve import command
    except ImportError as error:
        text = f'gemlax serve needs {error.name}; install it with: pip install "gemlax[serve]"'
        raise Error(text) from error

    def load_with(adapters: dict[str, Path] | None) -> Any:
        if adapters and args.adapter is not None:
            raise Error("give --adapter or --adapter-dir")
        args.adapter = adapters or args.adapter
        return load_with_tokenizer(args)

    shows = output.shows_progress(args)
    return command.run(args, load_with, model_name(args), write, output.note if shows else None)


_COMMANDS = {
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "convert": _convert,
    "quantize": _quantize,
    "tune": _tune,
    "info": _info,
    "perplexity": _perplexity,
    "bench": _bench,
}
