"""The options of every command, and what its help says. Nothing is run here.

Options of sampling and of training are made from the fields of their settings.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from gemlax.generation import SamplingSettings
from gemlax.tune.settings import TuneSettings

__all__ = ["CHAT_TOKENS", "make_parser"]

# The most tokens of an answer in a chat, where neither the user nor the checkpoint says how many.
CHAT_TOKENS = 1024
# Settings without an option. (--adapter is an option of the model.)
_NO_OPTION = (
    "bad_words", "logit_bias", "stop_ids", "logprobs", "adapter", "grammar", "allowed_ids",
    "thinking_budget",
)  # fmt: skip
_SAMPLING = [f.name for f in dataclasses.fields(SamplingSettings) if f.name not in _NO_OPTION]
_METAVARS = {int: "N", float: "X", str: "TEXT"}

_EXAMPLES = {
    "generate": r"""
  gemlax generate "The capital of France is"
  gemlax generate --model gemma-3-1b-pt/ --temperature 0.8 --top-k 64 --seed 7 "Once upon a time"
  cat story.txt | gemlax generate - --max-new-tokens 64 --stop '\n\n' --json
  gemlax generate --json-schema person.json "Ada Lovelace as JSON: "
  gemlax generate --regex " (yes|no)" "Is the sky blue? Answer:"
  gemlax generate --model gemma-3-27b-it/ --mesh data=2,tensor=4 "Once upon a time"

In --stop, \n, \t and \\ stand for newline, tab and backslash. On several hosts, run the same
command on each with --coordinator HOST:PORT --num-processes N --process-id I; the first one prints.
To try a mesh on one CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=8 first.
""",
    "chat": r"""
  gemlax chat --model gemma-3-4b-it/ --system "Answer in one sentence."
  printf 'Hello!\nAnd in French?\n' | gemlax chat --model gemma-3-1b-it/ --temperature 0

/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer. When standard
input is not a terminal, each line of it is a turn.
""",
    "convert": """
  gemlax convert gemma-4-26b-a4b.gguf gemma-4-26b-a4b/ --dtype bfloat16
  gemlax convert gemma-3-1b-orbax/ gemma-3-1b/ --json

Transformers and gemlax read the target. It has the text decoder, without encoders.
""",
    "quantize": """
  gemlax quantize gemma-3-1b-pt/ gemma-3-1b-int8/ --format int8
  gemlax quantize gemma-3-1b-pt/ gemma-3-1b-int4/ --format int4 --calibration text.txt
  gemlax quantize model.gguf smaller/ --rules rules.json --json

Rules are a JSON object that gives a format (int8, int4, nf4 or dense) to each pattern of weight
names: {"embed_tokens.weight": "int8", "*.mlp.*": "int4"}. The first pattern that fits counts; what
none fits stays dense. Only gemlax reads the target; gemlax convert makes floats of it again. A
source that is quantised already is decoded first.
""",
    "tune": """
  gemlax tune train.jsonl --output tuned --eval-data held-out.jsonl --epochs 3
  gemlax tune train.jsonl --output tuned --epochs 3 --resume
  gemlax tune train.jsonl --model gemma-3-1b-it/ --quantize nf4 --rank 16 --output tuned
  gemlax tune pairs.jsonl --dpo --beta 0.1 --output preferred

A line of the data is an object with "messages" (or ShareGPT's "conversations"), "prompt" and
"completion", "instruction" and "output", or "text"; for --dpo with "prompt", "chosen" and
"rejected" (docs/tune.md has all forms). The model learns answers, not prompts. Markers such as
<end_of_turn> are read in texts, never in messages.
The folder gets the adapter as peft writes it (with --full a model), log.jsonl, loss.png and
checkpoints. --resume continues from the last checkpoint and reaches the same losses.
""",
    "serve": r"""
  gemlax serve --model gemma-3-4b-it/
  gemlax serve --model gemma-3-4b-it/ --slots 16 --context 16384 --adapter-dir adapters/
  GEMLAX_API_KEY=secret gemlax serve --model gemma-3-4b-it/ --host 0.0.0.0 --port 8080

Clients of OpenAI's and Anthropic's APIs take http://127.0.0.1:8000/v1 and http://127.0.0.1:8000 as
their base URL. GET /health answers 200 once everything is compiled. SIGTERM lets running answers
come to their end; a second one ends at once. docs/serve.md lists the endpoints.
""",
    "info": """
  gemlax info gemma-3-4b --context 32768
  gemlax info model.gguf --json
  gemlax info --all
""",
    "perplexity": """
  gemlax perplexity book.txt --model gemma-3-1b-pt/
""",
    "bench": """
  gemlax bench decode --depth 4096
  gemlax bench prefill --model gemma-3-1b --dtype bfloat16 --prompt-length 2048
  gemlax bench compile --model gemma-3-27b --tiny --layers unroll

  gemlax bench --server http://localhost:8000 --concurrency 1,4,16 --ignore-eos
  gemlax bench --server http://localhost:8000 --rate 0.5,2 --prompt-length 32-2048 --chat --json

A preset gets random weights. gemlax bench decode --help lists the options. With --server, requests
of random tokens are streamed from a running server of OpenAI's API, gemlax serve or another, after
one that is not counted. The names of the figures are those of vLLM's benchmark: ttft is the time
to the first text, tpot that of each further token, itl that between pieces of text, e2el the whole.
""",
    "bench decode": """
  gemlax bench decode --model gemma-3-1b --batch 8 --depth 1024

The bytes that a step reads are compared with what this machine reads at best, measured in the same
run. The last line is JSON.
""",
    "bench prefill": """
  gemlax bench prefill --model model.gguf --prompt-length 2048
""",
    "bench compile": """
  gemlax bench compile --model gemma-3-27b --tiny --layers unroll
""",
}


# Options as help shows them: name, value and its default, and behind two spaces what it does. A
# value is an integer (N), a number (X, P), a path (FILE, FOLDER), one of {a,b}, or else a text.
_REPORT = """
--json  end with one JSON line on stdout
--quiet  show no progress on stderr
"""
_MODEL = f"""
--model M  folder, .gguf file or name (default: the demo)
--dtype {{float32,bfloat16}}  dtype of weights and maths (default: float32 on a CPU, else bfloat16)
--layers {{scan,unroll}}  how layers are compiled (default: the faster way)
--kv-cache {{int8}}  keep keys and values in 8 bits (default: in the dtype of the model)
--quantize {{stored,dense,int8,int4,nf4}}  how matrices are kept
  (default: as the file has them where native kernels run)
--implementation {{xla,cpu}}  cpu: native kernels, or an error
  (default: native kernels where they were built)
--adapter DIR  apply a LoRA adapter in peft's format
--compilation-cache DIR  keep compiled programs in DIR; the next run starts faster
--mesh AXES  spread over all devices: sizes of data, fsdp, tensor and expert, as data=2,tensor=4
--coordinator HOST:PORT  address of process 0, for several hosts
--num-processes N  number of hosts
--process-id N  number of this host, from 0
{_REPORT}"""
_GENERATE = """
prompt?  the text; '-' or nothing: read stdin without its last line end
--file FILE  read the prompt from a file
--json-schema FILE  answer with JSON that the schema in FILE accepts
--regex PATTERN  answer with text that the pattern matches as a whole
"""
_CHAT = """
--system TEXT  system text: instructions for the whole conversation
--thinking  let the model reason before it answers (Gemma 4)
"""
_SERVE = """
--host H=127.0.0.1  address to listen on; others than this machine need a key, or --no-auth
--port N=8000  port to listen on; 0: a free one
--api-key KEY  key that clients must send; better in GEMLAX_API_KEY or a file
--api-key-file FILE  file with a key on each line
--no-auth  let anybody ask, also from other machines
--cors-origin URL  let pages of this origin ask, as https://example.org; may be repeated
--served-model-name NAME  name of the model for clients (default: that of its folder or file)
--adapter-dir FOLDER  folder of adapters; clients choose one by giving its name as the model
--slots N=8  answers generated at once
--context N  tokens of a prompt and its answer (default: 8192, or the model's limit)
--max-queue N=64  answers that may wait for a slot
--max-queue-tokens N=262144  prompt tokens that may wait
--cache-mb N  MB of memory for beginnings of prompts (default: a tenth of what is free)
--itl-target X=0.1  seconds between two tokens of an answer while prompts are read
--queue-timeout X=300  seconds that an answer may wait
--request-timeout X=3600  seconds that a request may take
--drain X=30  seconds that answers may go on after SIGTERM
"""
_REWRITE = f"""
source  folder, .gguf file or name
target FOLDER  new folder, in a folder that exists
--adapter DIR  add a LoRA adapter to the weights
--overwrite  replace the model at the target
{_REPORT}"""
_CONVERT = """
--dtype {float32,bfloat16}  dtype of the weights
  (default: as stored; float32 for float16 and quantised ones)
"""
_FORMATS = """
--format {int8,int4,nf4}  format of every matrix except routers
--rules FILE  JSON file with a format for each pattern
"""
_QUANTIZE = """
--calibration FILE  text of some thousand tokens that int4 is fitted to
  (default: a page that gemlax brings)
"""
_TUNE = """
data FILE  JSONL file of messages, conversations, prompts, instructions or texts
--eval-data FILE  held-out file; its loss is reported
--resume  continue from the last checkpoint in the folder
--rules FILE  JSON file with rank, alpha and dropout by module name
--rank N  rank of the adapter (default: 8)
--alpha X  LoRA scale is alpha / rank (default: 16)
--dropout P  probability that an input of the adapter is dropped (default: 0)
--beta X  strength of --dpo (default: 0.1)
"""
_INFO = """
model?  folder, .gguf file, name or preset
--all  show the KV memory of every preset
--context N  show KV bytes at N tokens (default: the model's limit)
--json  print one JSON line on stdout
"""
_PERPLEXITY = """
file FILE  UTF-8 text file; '-': stdin
--window N=2048  score N tokens at a time
"""
_BENCH = {
    "decode": ("measure decode steps", """
--depth N=128  tokens before the first step
--steps N=16  decode steps in a round
"""),
    "prefill": ("measure the prefill of a prompt", """
--depth N=0  tokens before the prompt
--prompt-length N=512  tokens of the prompt
"""),
    "compile": ("measure the compilation of both programs", """
--prompt-length N=512  tokens of the prompt
"""),
}  # fmt: skip
_CASE = """
--model M  preset (random weights), folder, .gguf file or name (default: the demo)
--tiny  use the model's layers at toy width, with random weights
--dtype {float32,bfloat16}=float32  dtype of weights and maths
--layers {scan,unroll}  how layers are compiled (default: the faster way)
--batch N=1  requests at once
--capacity N  tokens that a slot has room for (default: those needed)
--rounds N=5  rounds after one of warm-up
--json  print nothing except the JSON line on stdout
--quiet  show no progress on stderr
"""
_SERVER = """
--server URL  measure a running server, as http://localhost:8000
--api-key KEY  key of the server (default: GEMLAX_API_KEY of the environment)
--model M  name that requests give (default: the first that the server lists)
--chat  ask for chats, not for completions
--concurrency N,...  requests that run at once, one run for each number (default: 1,4,16,64)
--rate X,...  requests a second, at random times (Poisson); instead of --concurrency
--num-requests N=64  requests of a run
--prompt-length N[-N]=128  tokens of a prompt; a range is drawn from log-uniformly
--answer-length N[-N]=64  most tokens of an answer, likewise
--prefix-length N=0  tokens before those, which all prompts share
--ignore-eos  answers get all the tokens they may have
--goodput NAME:MS,...  count the requests that keep below such times, as ttft:1000,tpot:100
--extra-body JSON  object of further fields of each request
--timeout X=600  seconds after which a request has failed
--seed N=0  seed of lengths, tokens and arrivals
--json  print nothing except the JSON line on stdout
--quiet  show no progress on stderr
"""
# Options of `_MODEL` that `bench` does without.
_NOT_IN_CASE = ("compilation_cache", "mesh", "coordinator", "num_processes", "process_id",
                "kv_cache", "quantize", "implementation", "adapter")  # fmt: skip
_KINDS: dict[str, Any] = {"N": int, "X": float, "P": float, "FILE": Path, "FOLDER": Path}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gemlax: {message}; see {self.prog} --help\n")


def _add(parser: Any, options: str) -> None:
    """Add options that are written as help shows them."""
    for line in options.replace("\n  ", " ").split("\n"):
        usage, _, text = line.partition("  ")
        name, _, value = usage.partition(" ")
        metavar, _, default = value.partition("=")
        if not usage:
            continue
        if not metavar and name.startswith("-"):
            parser.add_argument(name, action="store_true", help=text)
            continue
        more: dict[str, Any] = {"type": _KINDS.get(metavar, str)}
        if text.endswith("may be repeated"):
            more["action"] = "append"
        if metavar.startswith("{"):
            more = {"choices": metavar.strip("{}").split(",")}
        elif name.startswith("-"):
            more["metavar"] = metavar
        if default:
            more["default"], text = more.get("type", str)(default), f"{text} (default: {default})"
        if name.endswith("?"):
            more["nargs"] = "?"
        parser.add_argument(name.rstrip("?"), help=text, **more)


class _Setting(argparse.Action):
    """Collects the settings that are given in `settings`; the others keep their defaults."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        given = namespace.settings
        if self.nargs == 0:
            values = self.const
        elif self.const == "append":
            values = (*given.get(self.dest, ()), values)
        namespace.settings = {**given, self.dest: values}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `command` of what it parses names the command."""
    parser = _Parser(prog="gemlax", description="Google's Gemma in JAX.")
    parser.add_argument("--version", action="version", version=f"gemlax {version('gemlax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    generate = _command(commands, "generate", "continue a text", _GENERATE + _MODEL)
    _add_sampling(generate)
    chat = _command(commands, "chat", "talk to a model", _MODEL + _CHAT)
    asked = [name for name in _SAMPLING if name != "parse_special"]
    _add_sampling(chat, asked, max_new_tokens=f"the checkpoint's, else {CHAT_TOKENS}")
    _command(commands, "serve", "answer over HTTP as OpenAI and Anthropic do", _MODEL + _SERVE)
    _command(commands, "convert", "write a model as a Hugging Face folder", _REWRITE + _CONVERT)
    quantize = _command(
        commands, "quantize", "write a model with quantised matrices", _REWRITE + _QUANTIZE
    )
    _add(quantize.add_mutually_exclusive_group(required=True), _FORMATS)
    _add_tune(_command(commands, "tune", "train an adapter, or all weights", _TUNE))
    _command(commands, "info", "show what a model is and costs, without loading it", _INFO)
    score = _command(commands, "perplexity", "score a text file", _PERPLEXITY + _MODEL)
    _add_sampling(score, ["parse_special"])
    bench = _command(commands, "bench", "measure speed and memory, or a server", _SERVER)
    kinds = bench.add_subparsers(dest="what", metavar="decode|prefill|compile")
    bench.set_defaults(usage_error=bench.error)
    for name, (text, options) in _BENCH.items():
        case = _command(kinds, name, text, options + _CASE, "bench ")
        case.set_defaults(**dict.fromkeys(_NOT_IN_CASE))
    return parser


def _command(commands: Any, name: str, text: str, options: str, within: str = "") -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"examples:\n{_EXAMPLES[within + name].lstrip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add(parser, options)
    return parser


def _add_setting(parser: Any, field: Any, default: Any = None) -> None:
    """Add the option of a field; a flag changes what is the default."""
    metadata, dashed = field.metadata, field.name.replace("_", "-")
    kind = (*typing.get_args(field.type), field.type)[0]
    more: dict[str, Any] = {"action": _Setting, "dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        name = f"--no-{dashed}" if field.default else f"--{dashed}"
        text = f"do not {metadata['help']}" if field.default else metadata["help"]
        more |= {"nargs": 0, "const": not field.default}
    else:
        name = f"--{dashed}"
        default = default or (
            field.default if field.default not in (None, ()) else metadata["unset"]
        )
        repeated = "; may be repeated" if kind is str else ""
        text = f"{metadata['help']}{repeated} (default: {default})"
        more |= {"type": _unescaped if kind is str else kind}
        more |= {"metavar": metadata.get("metavar") or _METAVARS[kind]}
        more |= {"const": "append" if kind is str else None}
    parser.add_argument(metadata.get("option") or name, help=text, **more)


def _unescaped(text: str) -> str:
    """Read the escapes of newline, tab and backslash; any other backslash is one."""
    meant = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
    return re.sub(r"\\[nt\\]", lambda escape: meant[escape[0]], text)


def _add_sampling(parser: Any, names: Sequence[str] = _SAMPLING, **defaults: str) -> None:
    parser.set_defaults(settings={})
    for field in dataclasses.fields(SamplingSettings):
        if field.name in names:
            _add_setting(parser, field, defaults.get(field.name))


def _add_tune(parser: Any) -> None:
    parser.set_defaults(settings={})
    text = "folder for all results"
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help=text)
    kinds, length = (parser.add_mutually_exclusive_group() for _ in range(2))
    _add(kinds, "--dpo  learn preferences")
    groups = {"full": kinds, "steps": length, "epochs": length}
    for field in dataclasses.fields(TuneSettings):
        if field.metadata.get("option", field.name) is not None:
            _add_setting(groups.get(field.name, parser), field)
    _add(parser, _MODEL)
