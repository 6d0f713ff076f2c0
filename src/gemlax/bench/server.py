"""Load on a server of OpenAI's API, and how fast its answers come. Knows no jax and no engine.

Streams of /v1/completions or of /v1/chat/completions: so many at once (`closed`), or arriving at
random times (`poisson`). Figures have the names that vLLM's benchmark gives them.
"""

import asyncio
import contextlib
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from gemlax.bench.client import Target, request_json, stream_events
from gemlax.errors import RequestError

__all__ = [
    "Answer",
    "Goals",
    "Lengths",
    "Workload",
    "closed",
    "find_model",
    "poisson",
    "read_answer",
    "summarise",
]

# Ids that every vocabulary of Gemma has, and that no template gives a meaning. Prompts begin with
# the BOS of Gemma.
_BOS, _LEAST_ID, _MOST_ID = 2, 1_000, 20_000
# Words of one token each, so that a chat is about as long as is asked for.
_TEXT = """the of and a to in is you that it he was for on are as with his they at be this have
from or one had by word but not what all were we when your can said there use an each which she do
how their if will up other about out many then them these so some her would make like him into time
has look two more write go see number no way could people my than first water been call who oil its
now find long down day did get come made may part"""
_WORDS = _TEXT.split()


class Lengths(NamedTuple):
    """Numbers of tokens, drawn log-uniformly: most are short, few are long. Both ends are drawn."""

    shortest: int
    longest: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Read "128", or a range as "32-512"."""
        shortest, dash, longest = text.partition("-")
        if not (shortest.isdecimal() and (longest.isdecimal() or not dash)):
            raise RequestError(f"a length is a number or a range as 32-512, got {text!r}")
        lengths = cls(int(shortest), int(longest or shortest))
        if not 1 <= lengths.shortest <= lengths.longest:
            raise RequestError(f"a range of lengths begins at 1 or more and rises, got {text!r}")
        return lengths

    def draw(self, generator: random.Random) -> int:
        """Draw one."""
        low, high = math.log(self.shortest), math.log(self.longest + 1)
        return min(self.longest, int(math.exp(generator.uniform(low, high)) + 1e-9))


class Workload(NamedTuple):
    """Requests, drawn from a seed: the same seed gives the same ones.

    Attributes:
        chat: ask /v1/chat/completions, with words; else /v1/completions, with token ids.
        prefix_length: the first tokens of a prompt, which all prompts share.
        ignore_eos: answers get as many tokens as were drawn.
        extra: further fields of each request.
    """

    model: str
    prompts: Lengths = Lengths(128, 128)
    answers: Lengths = Lengths(64, 64)
    chat: bool = False
    prefix_length: int = 0
    ignore_eos: bool = False
    seed: int = 0
    extra: Mapping[str, object] = {}

    @property
    def path(self) -> str:
        """Return the path that requests go to."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def bodies(self, count: int, run: int = 0) -> list[dict[str, object]]:
        """Draw the bodies of `count` requests.

        Runs have the same lengths and the same prefix, and else other tokens: what a server keeps
        of one run is of no use in the next.
        """
        lengths, tokens = random.Random(self.seed), random.Random(f"{self.seed} {run}")
        prefix = _draw_ids(random.Random(f"{self.seed} prefix"), self.prefix_length)
        return [
            self._body(
                prefix + _draw_ids(tokens, self.prompts.draw(lengths)), self.answers.draw(lengths)
            )
            for _ in range(count)
        ]

    def _body(self, ids: list[int], max_tokens: int) -> dict[str, object]:
        if self.chat:
            text = " ".join(_WORDS[i % len(_WORDS)] for i in ids)
            prompt: dict[str, object] = {"messages": [{"role": "user", "content": text}]}
        else:
            prompt = {"prompt": [_BOS, *ids[1:]]}
        ending = {"ignore_eos": True} if self.ignore_eos else {}
        return {
            "model": self.model, **prompt, "max_tokens": max_tokens, "temperature": 0, **ending,
            "stream": True, "stream_options": {"include_usage": True}, **self.extra,
        }  # fmt: skip


def _draw_ids(generator: random.Random, length: int) -> list[int]:
    return [generator.randint(_LEAST_ID, _MOST_ID) for _ in range(length)]


class Answer(NamedTuple):
    """One request, in seconds of `time.perf_counter`.

    Attributes:
        times: when each piece of text came.
        end: when the stream ended.
        cached_tokens: of the prompt, that the server had already; None: it does not say.
        error: why it failed; such an answer counts in no figure except `failed`.
    """

    start: float
    times: tuple[float, ...]
    end: float
    prompt_tokens: int = 0
    tokens: int = 0
    cached_tokens: int | None = None
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds until the first text; of an answer without text, until its end."""
        return (self.times[0] if self.times else self.end) - self.start

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first."""
        return (self.end - self.start - self.ttft) / max(self.tokens - 1, 1)


class Goals(NamedTuple):
    """What a good request keeps below, in ms; None: no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Goals":
        """Read goals as "ttft:1000,tpot:100"."""
        goals = {}
        for part in text.split(","):
            name, _, value = part.partition(":")
            try:
                goals[name] = float(value)
            except ValueError:
                name = ""
            if name not in cls._fields:
                raise RequestError(f"goals are given as ttft:1000,tpot:100,e2el:5000, got {text!r}")
        return cls(**goals)

    def met_by(self, answer: Answer) -> bool:
        """Return whether a request keeps them all."""
        taken = (answer.ttft, answer.tpot, answer.end - answer.start)
        return all(goal is None or 1e3 * s <= goal for goal, s in zip(self, taken, strict=True))


async def find_model(target: Target) -> str:
    """Return the first model that the server lists."""
    listed = await request_json(target, "GET", "/v1/models")
    try:
        return str(listed["data"][0]["id"])  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise RequestError(f"{target} lists no model: give its name with --model") from None


async def read_answer(
    target: Target, path: str, body: Mapping[str, object], timeout: float = 600
) -> Answer:
    """Send one request and read its stream. Raise `RequestError` where it fails."""
    start = time.perf_counter()
    times: list[float] = []
    texts: list[str] = []
    usage: Mapping[str, object] = {}
    finished = False
    async with contextlib.aclosing(stream_events(target, path, body, timeout)) as events:
        async for data in events:
            now = time.perf_counter()
            if data == b"[DONE]":
                break
            text, ended, told = _read_event(data)
            if text:
                times.append(now)
                texts.append(text)
            finished, usage = finished or ended, told or usage
    end = time.perf_counter()
    if not finished:
        raise RequestError("the stream broke off before its end")
    details = usage.get("prompt_tokens_details")
    return Answer(
        start, tuple(times), times[-1] if times else end,
        prompt_tokens=_count(usage, "prompt_tokens") or 0,
        tokens=_count(usage, "completion_tokens") or len(times),
        cached_tokens=_count(details, "cached_tokens") if isinstance(details, dict) else None,
        text="".join(texts),
    )  # fmt: skip


def _read_event(data: bytes) -> tuple[str, bool, Mapping[str, object]]:
    """Return the text of an event, whether it ends the answer, and the usage it reports."""
    event = json.loads(data)
    if not isinstance(event, dict):
        raise RequestError("an event of the stream is not an object")
    if "error" in event:
        error = event["error"]
        raise RequestError(str(error.get("message", error) if isinstance(error, dict) else error))
    text, ended = "", False
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice
        parts = [delta.get(name) for name in ("text", "content", "reasoning_content")]
        parts += [call["function"].get("arguments") for call in delta.get("tool_calls") or ()]
        text += "".join(part for part in parts if part)
        ended = ended or choice.get("finish_reason") is not None
    return text, ended, event.get("usage") or {}


def _count(usage: Mapping[str, object], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) else None


async def _try_answer(
    target: Target, path: str, body: Mapping[str, object], timeout: float
) -> Answer:
    """Like `read_answer`; a failure is an answer with an error."""
    start = time.perf_counter()
    try:
        return await read_answer(target, path, body, timeout)
    except (RequestError, ValueError, AttributeError, KeyError, TypeError) as error:
        text = str(error) if isinstance(error, RequestError) else "an event is malformed"
        return Answer(start, (), time.perf_counter(), error=text)


async def closed(
    target: Target,
    path: str,
    bodies: Iterable[Mapping[str, object]],
    concurrency: int,
    *,
    timeout: float = 600,
    done: Callable[[Answer], object] = lambda answer: None,
) -> list[Answer]:
    """Keep `concurrency` requests running until all were sent; a new one follows each that ends."""
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def work() -> None:
        for body in waiting:
            answers.append(await _try_answer(target, path, body, timeout))
            done(answers[-1])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return answers


async def poisson(
    target: Target,
    path: str,
    bodies: Iterable[Mapping[str, object]],
    rate: float,
    *,
    seed: int = 0,
    timeout: float = 600,
    done: Callable[[Answer], object] = lambda answer: None,
) -> list[Answer]:
    """Send `rate` requests a second on average, at random times, whatever is still running."""
    answers: list[Answer] = []

    async def send(body: Mapping[str, object]) -> None:
        answers.append(await _try_answer(target, path, body, timeout))
        done(answers[-1])

    async with asyncio.TaskGroup() as group:
        async for body in _arrivals(bodies, rate, seed):
            group.create_task(send(body))
    return answers


async def _arrivals(
    bodies: Iterable[Mapping[str, object]], rate: float, seed: int
) -> AsyncIterator[Mapping[str, object]]:
    generator, due = random.Random(seed), time.perf_counter()
    for body in bodies:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        yield body
        due += generator.expovariate(rate)


def summarise(answers: Sequence[Answer], goals: Goals | None = None) -> dict[str, object]:
    """Return what requests took, under vLLM's names. At least one of them must have ended well.

    Text that comes in one piece counts as one interval of `itl_ms`, however many tokens it has.
    """
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise RequestError(f"every request failed: {answers[0].error if answers else 'none sent'}")
    duration = max(a.end for a in answers) - min(a.start for a in answers)
    total_input, total_output = (sum(a.prompt_tokens for a in good), sum(a.tokens for a in good))
    report: dict[str, object] = {
        "completed": len(good), "failed": len(answers) - len(good), "duration": round(duration, 3),
        "total_input_tokens": total_input, "total_output_tokens": total_output,
        "request_throughput": round(len(good) / duration, 4),
        "output_throughput": round(total_output / duration, 2),
        "total_token_throughput": round((total_input + total_output) / duration, 2),
        "request_goodput": goals and round(sum(map(goals.met_by, good)) / duration, 4),
    }  # fmt: skip
    if any(answer.cached_tokens is not None for answer in good):
        report["total_cached_tokens"] = sum(answer.cached_tokens or 0 for answer in good)
    gaps = [b - a for answer in good for a, b in zip(answer.times, answer.times[1:], strict=False)]
    series = {
        "ttft": [answer.ttft for answer in good],
        "tpot": [answer.tpot for answer in good if answer.tokens > 1],
        "itl": gaps,
        "e2el": [answer.end - answer.start for answer in good],
    }
    for name, seconds in series.items():
        report |= _spread(name, [1e3 * s for s in seconds])
    if errors := Counter(answer.error for answer in answers if answer.error is not None):
        report["errors"] = dict(errors)
    return report


def _spread(name: str, ms: list[float]) -> dict[str, object]:
    """Return mean, median and the 99th percentile; None where there is no value."""
    if not ms:
        return dict.fromkeys((f"mean_{name}_ms", f"p50_{name}_ms", f"p99_{name}_ms"))
    ordered = sorted(ms)
    place = 0.99 * (len(ms) - 1)
    low = int(place)
    high = min(low + 1, len(ms) - 1)
    p99 = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
    figures = {"mean": statistics.fmean(ms), "p50": statistics.median(ms), "p99": p99}
    return {f"{kind}_{name}_ms": round(value, 3) for kind, value in figures.items()}
