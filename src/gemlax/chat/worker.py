"""Renders chat templates in a process of its own, which template.py starts and may kill.

Run as a file: it knows nothing of gemlax. One JSON object comes per line on standard input, one
goes out per line: {"text": ...} or {"error": ...}. A template is code of a stranger: the sandbox
keeps it from Python's inside, limits on memory and processor time are the operating system's.
"""

import functools
import json
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows: bounded by the parent's clock alone
    resource = None  # type: ignore[assignment]  # no such module there

__all__ = ["main"]


class Namespace(jinja2.utils.Namespace):
    """`namespace()`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` is a name that a template may use
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model said for training: its body as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> None:
    """Raise what a template says is wrong."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers' `tojson` does: nothing is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=4)
def compile_template(source: str) -> jinja2.Template:
    """Compile for the sandbox, with the options of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    return environment.from_string(source)


def render(request: dict[str, Any]) -> dict[str, str]:
    """Render one request; whatever goes wrong is in the answer."""
    limit, size, parts = request["max_chars"], 0, []
    try:
        for part in compile_template(request["template"]).generate(request["variables"]):
            size += len(part)
            if size > limit:
                return {"error": f"it writes more than {limit} characters"}
            parts.append(part)
        return {"text": "".join(parts)}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except Exception as error:  # a template can raise anything
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def limit_time(seconds: float) -> None:
    """End this process when it computes for longer, even if the parent is gone."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime + seconds) + 1
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (until, hard))


def main() -> None:
    """Answer requests until standard input ends. Arguments: bytes of memory, seconds."""
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        limit_time(seconds)
        try:
            answer = json.dumps(render(json.loads(line)))
        except MemoryError:
            answer = json.dumps({"error": "it needs too much memory"})
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
