"""The application: every API before one kitchen.

A protocol is a module with a function `routes(kitchen) -> list[Route]`. Its endpoints make a
`ChatRequest` or a `CompletionRequest` of a body, ask the kitchen, and write the `Update`s that come
back; `body.endpoint` reads bodies and turns each `ServeError` into the protocol's own shape,
`sse.EventStream` sends events. Protocols that need a model and nothing else are listed in
`PROTOCOLS`; `http.Front` stands before all of them and before the page.
"""

from collections.abc import Callable, Iterable

from starlette.routing import Route, Router
from starlette.types import ASGIApp

from gemlax.serve import anthropic, openai_chat, openai_completions, page, responses, service
from gemlax.serve.http import Front
from gemlax.serve.kitchen import ModelKitchen
from gemlax.serve.options import ServeOptions
from gemlax.serve.security import Gate
from gemlax.serve.work import Kitchen

__all__ = ["PROTOCOLS", "add_gauges", "make_app", "put_together"]

PROTOCOLS: list[Callable[[Kitchen], list[Route]]] = [
    openai_chat.routes,
    openai_completions.routes,
    responses.routes,
    anthropic.routes,
]


def make_app(kitchen: ModelKitchen, gate: Gate) -> ASGIApp:
    """Return the application of a model."""
    add_gauges(kitchen)
    return put_together(kitchen, gate, kitchen.options, service.routes(kitchen))


def put_together(
    kitchen: Kitchen, gate: Gate, options: ServeOptions, more: Iterable[Route] = ()
) -> ASGIApp:
    """Return the page, the protocols and more routes behind the checks that hold for all."""
    routes = [route for protocol in PROTOCOLS for route in protocol(kitchen)]
    router = Router([*page.routes(), *more, *routes], redirect_slashes=False)
    return Front(router, gate, options)


def add_gauges(kitchen: ModelKitchen) -> None:
    """Let the metrics show what is there now."""
    worker, options, metrics = kitchen.worker, kitchen.options, kitchen.metrics
    gauge = metrics.gauge
    gauge("vllm:num_requests_running", "answers that have a slot", lambda: worker.num_running)
    gauge("vllm:num_requests_waiting", "answers that wait", lambda: worker.num_waiting)

    def used() -> float:
        tokens = sum(t.usage().prompt + t.usage().completion for t in worker.running)
        return tokens / (options.slots * options.context)

    gauge("vllm:kv_cache_usage_perc", "share of the caches that is used", used)
    counters = kitchen.model.programs.counters
    gauge("gemlax:programs_compiled", "programs compiled", lambda: counters.programs)
    gauge("gemlax:slots", "slots", lambda: options.slots)
    gauge("gemlax:seconds_stuck", "how long the engine hangs", lambda: worker.stuck_for)
