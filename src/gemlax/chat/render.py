"""Renders chat templates with jinja2's sandbox, so that the text knows what the template wrote.

It imports nothing of gemlax except marked.py: the worker process for templates of checkpoints uses
it as well. Such a template is rendered twice: as transformers would, which gives the text, and with
its own text marked (marked.py), which tells what the template itself wrote.
"""

import functools
import json
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
from markupsafe import Markup

from gemlax.chat.marked import INPUT, Marked, join, mark_own, marks_of, runs

__all__ = ["answer", "compile_template", "render", "render_twice"]

# Methods of a text that may put other texts in.
INSERTING = ("format", "format_map", "join", "replace")


class _Namespace(jinja2.utils.Namespace):
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


class _Dicts:
    """What `dict` is to a template: it makes them, and shows nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what a model said for training: its body as it is."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return a call of the body, which has a scope of its own then, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("written")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def written(self, caller: Callable[[], str]) -> str:
        return caller()


class _SafeMarked(Markup):
    """What `safe` makes of marked text: as long as nothing else is done to it, the marks hold."""

    marks: str | None = None

    def __str__(self) -> str:
        return str.__str__(self) if self.marks is None else Marked(str.__str__(self), self.marks)


class _MarkedCode(jinja2.compiler.CodeGenerator):
    """Writes the template's own texts as marked ones, also those folded at compile time."""

    def visit_Const(self, node: jinja2.nodes.Const, frame: jinja2.compiler.Frame) -> None:
        value = node.as_const(frame.eval_ctx)
        if isinstance(value, (str, tuple, list, dict)):
            self.write(_source_of(value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(
        self, node: jinja2.nodes.TemplateData, frame: jinja2.compiler.Frame
    ) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_TemplateData(node, frame)
        else:
            self.write(_source_of(node.data))

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:
        """Write `~`, which jinja's runtime does with "".join."""
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Any) -> str:
        return _source_of("".join(group))


class _MarkedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with operations on text that carry marks on."""

    code_generator_class = _MarkedCode
    concat = staticmethod(join)
    intercepted_binops = frozenset("%")
    mark_own = staticmethod(mark_own)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Look up an attribute; methods of plain text may put marked text in."""
        return super().getattr(_marked_for(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(_marked_for(obj, argument), argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute %, also where plain text is the form of marked text."""
        return super().call_binop(context, operator, _marked(left), right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `format` of the sandbox, followed where the form is marked."""
        plain = super().wrap_str_format(value)
        if plain is None or not isinstance(value.__self__, Marked):
            return plain
        form = value.__self__
        mapped = value.__name__ == "format_map"

        def follow(*args: Any, **kwargs: Any) -> str:
            if not mapped:
                return _Followed(self).follow(form, args, kwargs)
            if kwargs or len(args) != 1:
                return plain(*args, **kwargs)  # says what is wrong
            return _Followed(self).follow(form, (), args[0])

        return follow


class _Followed(jinja2.sandbox.SandboxedFormatter):
    """Notes the pieces that `format` puts together.

    A piece of the form has the form's mark, if it is the same all over; a value put in as it is,
    its own marks. If the pieces do not add up to the text, all of it counts as input.
    """

    def follow(self, form: Marked, args: Any, kwargs: Any) -> str:
        alike = set(marks_of(form))
        self.mark = alike.pop() if len(alike) == 1 else INPUT
        self.pieces: list[str] = []
        text = self.vformat(form, args, kwargs)
        noted = join(self.pieces)
        return noted if noted == text else str.__str__(text)

    def parse(self, format_string: str) -> Iterator[Any]:
        for literal, *field in super().parse(str.__str__(format_string)):
            self.pieces.append(Marked(literal, self.mark * len(literal)))
            yield (literal, *field)

    def format_field(self, value: Any, format_spec: str) -> Any:
        text = super().format_field(value, format_spec)
        self.pieces.append(value if isinstance(value, Marked) and not format_spec else text)
        return text


def _source_of(value: Any) -> str:
    """Return Python source of a constant, each text of it marked as the template's own."""
    if type(value) is str:
        return f"environment.mark_own({value!r})"
    if type(value) in (tuple, list):
        inner = "".join(_source_of(item) + ", " for item in value)
        return f"({inner})" if type(value) is tuple else f"[{inner}]"
    if type(value) is dict:
        pairs = (f"{_source_of(key)}: {_source_of(item)}" for key, item in value.items())
        return "{" + ", ".join(pairs) + "}"
    return repr(value)


def _marked(value: Any) -> Any:
    """Return a text as one that follows what is put in."""
    return Marked(value) if type(value) is str else value


def _marked_for(value: Any, attribute: Any) -> Any:
    inserts = type(value) is str and isinstance(attribute, str) and attribute in INSERTING
    return Marked(value) if inserts else value


# The filters `join`, `replace`, `format` and `safe`, with marks.


@jinja2.pass_eval_context
def _join_marked(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
    return jinja2.filters.do_join(context, value, _marked(d), attribute)


@jinja2.pass_eval_context
def _replace_marked(context: Any, s: Any, old: str, new: str, count: int | None = None) -> Any:
    return jinja2.filters.do_replace(context, _marked(s), old, new, count)


def _format_marked(value: Any, *args: Any, **kwargs: Any) -> Any:
    return jinja2.filters.do_format(_marked(value), *args, **kwargs)


def _mark_safe(value: Any) -> Any:
    if not isinstance(value, Marked):
        return jinja2.filters.do_mark_safe(value)
    safe = _SafeMarked(str.__str__(value))
    safe.marks = marks_of(value)
    return safe


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers' `tojson` does: nothing is escaped for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=8)
def compile_template(source: str, marked: bool) -> jinja2.Template:
    """Compile for the sandbox, with the options of transformers."""
    kind = _MarkedEnvironment if marked else jinja2.sandbox.ImmutableSandboxedEnvironment
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    if marked:
        environment.filters |= {"join": _join_marked, "replace": _replace_marked}
        environment.filters |= {"format": _format_marked, "safe": _mark_safe}
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: CLOCK[0].strftime(format)
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _Dicts()
    return environment.from_string(source)


CLOCK = [datetime.now()]  # the same for all renderings of a request


class _TooLong(Exception):
    """A template wrote more than it may."""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Render with marks a template that is trusted: nothing is bounded."""
    return join(compile_template(source, True).generate(variables))


def _render_bounded(request: dict[str, Any], marked: bool) -> str:
    size, parts = 0, []
    random.seed(CLOCK[0].timestamp())  # `random` draws the same each time
    for part in compile_template(request["template"], marked).generate(request["variables"]):
        size += len(part)
        if size > request["max_chars"]:
            raise _TooLong(f"it writes more than {request['max_chars']} characters")
        parts.append(part)
    return join(parts)


def render_twice(request: dict[str, Any]) -> dict[str, Any]:
    """Render plainly and with marks; say if what they write differs."""
    CLOCK[0] = datetime.now()
    text = _render_bounded(request, marked=False)
    fault, spans, end = "", [], 0
    try:
        for *path, last, mark in request["marks"]:
            holder = functools.reduce(lambda value, key: value[key], path, request["variables"])
            holder[last] = Marked(holder[last], mark * len(holder[last]))
        marked = _render_bounded(request, marked=True)
        # What writes something else each time, as the address of an object, is no fault of ours.
        if marked != text and _render_bounded(request, marked=False) == text:
            fault = _difference(text, marked)
    except Exception as error:  # one that the template alone does not raise
        fault = f"{type(error).__name__}: {error}"[:200]
    if fault:
        return {"text": text, "spans": [], "fault": fault}
    for mark, run in runs(marked):
        if mark != INPUT:
            spans.append([end, end + len(run), mark])
        end += len(run)
    return {"text": str.__str__(marked), "spans": spans}


def _difference(text: str, other: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return f"{text[start : start + 40]!r} and {str.__str__(other[start : start + 40])!r}"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Render one request; whatever goes wrong is in the answer."""
    try:
        return render_twice(request)
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself too deeply"}
    except _TooLong as error:
        return {"error": str(error)}
    except Exception as error:  # a template can raise anything
        return {"error": f"{type(error).__name__}: {error}"[:500] + _line_of(error)}


def _line_of(error: Exception) -> str:
    """Say which line of the template an error is of, if jinja says it."""
    if isinstance(error, jinja2.exceptions.TemplateSyntaxError):
        return f" (line {error.lineno})"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == "<template>"]
    return f" (line {lines[-1]})" if lines else ""
