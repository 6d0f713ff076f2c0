"""What is counted, under vLLM's names and labels; `gemlax:` is ours.

Source: vLLM's documentation of its metrics.
"""

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gemlax.serve.work import Update

__all__ = ["Metrics"]

_FIRST = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_WHOLE = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_LABELS = ("model_name", "engine")


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self, model: str):
        self._registry = CollectorRegistry()
        self._names = {"model_name": model, "engine": "0"}
        counter, histogram = self._counter, self._histogram
        self._prompt = counter("prompt_tokens", "prompt tokens read")
        self._cached = counter("prompt_tokens_cached", "prompt tokens found in a cache")
        self._generated = counter("generation_tokens", "tokens generated")
        self._queries = counter("prefix_cache_queries", "prompt tokens looked up in caches")
        self._hits = counter("prefix_cache_hits", "prompt tokens found in caches")
        self._ended = counter("request_success", "answers ended", "finished_reason")
        self.rejections = counter("admission_rejections", "requests refused", "reason")
        self._first_s = histogram("time_to_first_token_seconds", "until the first token", _FIRST)
        self._between_s = histogram("inter_token_latency_seconds", "between tokens", _BETWEEN)
        self._token_s = histogram(
            "request_time_per_output_token_seconds", "mean time between tokens", _BETWEEN
        )
        self._whole_s = histogram("e2e_request_latency_seconds", "from arrival to end", _WHOLE)
        self._queue_s = histogram("request_queue_time_seconds", "waiting for a slot", _WHOLE)
        self._inference_s = histogram("request_inference_time_seconds", "in a slot", _WHOLE)
        self._prefill_s = histogram("request_prefill_time_seconds", "until the first token", _WHOLE)
        self._decode_s = histogram("request_decode_time_seconds", "from the first token", _WHOLE)
        self._prompt_size = histogram("request_prompt_tokens", "tokens of prompts", _TOKENS)
        self._size = histogram("request_generation_tokens", "tokens of answers", _TOKENS)
        self._n = histogram("request_params_n", "answers asked for", (1, 2, 5, 10, 20))
        self._most = histogram("request_params_max_tokens", "max_tokens", _TOKENS)
        self._step = histogram("iteration_tokens_total", "tokens of a step", _TOKENS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        made = Counter(f"vllm:{name}", text, (*_LABELS, *labels), registry=self._registry)
        return made if labels else made.labels(**self._names)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(
            f"vllm:{name}", text, _LABELS, registry=self._registry, buckets=tuple(buckets)
        )
        return made.labels(**self._names)

    def gauge(self, name: str, text: str, read: Callable[[], float], **labels: str) -> None:
        """Add a gauge that is read when it is asked for."""
        made = Gauge(name, text, (*_LABELS, *labels), registry=self._registry)
        made.labels(**self._names, **labels).set_function(read)

    def rejected(self, reason: str) -> None:
        """Count a refused request."""
        self.rejections.labels(**self._names, reason=reason).inc()

    def asked(self, n: int, max_tokens: int) -> None:
        """Count a request that was admitted."""
        self._n.observe(n)
        self._most.observe(max_tokens)

    def stepped(self, tokens: int) -> None:
        """Count the tokens of a step."""
        if tokens:
            self._step.observe(tokens)

    def generated(self, tokens: int) -> None:
        """Count tokens of an answer, as they come: dashboards show their rate."""
        self._generated.inc(tokens)

    def started(self, waited: float) -> None:
        """Count an answer that got a slot."""
        self._queue_s.observe(waited)

    def first_token(self, since_arrival: float) -> None:
        """Count a first token."""
        self._first_s.observe(since_arrival)

    def later_token(self, since_last: float) -> None:
        """Count a token after the first."""
        self._between_s.observe(since_last)

    def ended(self, update: Update, arrival: float, started: float, first: float) -> None:
        """Count an answer that has ended; `first` 0: without a token."""
        now, usage = time.monotonic(), update.usage
        self._ended.labels(**self._names, finished_reason=update.finish_reason or "abort").inc()
        self._whole_s.observe(now - arrival)
        if not started:
            return
        self._prompt.inc(usage.prompt)
        self._queries.inc(usage.prompt)
        self._cached.inc(usage.cached)
        self._hits.inc(usage.cached)
        self._prompt_size.observe(usage.prompt)
        self._size.observe(usage.completion)
        self._inference_s.observe(now - started)
        if first:
            self._prefill_s.observe(first - started)
            self._decode_s.observe(now - first)
            if usage.completion > 1:
                self._token_s.observe((now - first) / (usage.completion - 1))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
