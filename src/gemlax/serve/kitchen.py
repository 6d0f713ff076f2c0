"""Where requests are made into jobs: rendered, encoded, checked and admitted.

What takes time runs in a few threads, so that the event loop goes on.
"""

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from gemlax.adapters import DEFAULT
from gemlax.chat import OutputParser
from gemlax.engine import Request
from gemlax.errors import RequestError, UnsupportedError
from gemlax.generation import RequestBatch, SamplingSettings, read_prompts, read_settings
from gemlax.generation.answers import Answer
from gemlax.generation.defaults import read_stop
from gemlax.generation.forms import chat_grammar
from gemlax.grammar import ChatGrammar
from gemlax.model import Model
from gemlax.serve.admission import Place
from gemlax.serve.jobs import Job, Ticket, show_logprob
from gemlax.serve.metrics import Metrics
from gemlax.serve.options import ServeOptions
from gemlax.serve.seating import count_characters, seated
from gemlax.serve.work import (
    ChatRequest,
    CompletionRequest,
    Delta,
    ServeError,
    TokenLogprob,
    Update,
    Usage,
)
from gemlax.serve.worker import Worker
from gemlax.tokenizer import TextStream, Tokenizer

__all__ = ["MAX_BAD_WORDS", "MAX_BIAS", "ModelKitchen"]

# Places that the programs have for what a request may bring; more would compile others.
MAX_BIAS, MAX_BAD_WORDS = 512, 64
_MAX_WORD = 8  # tokens
_MAX_PROMPTS = 1024
_SETTINGS = {field.name for field in dataclasses.fields(SamplingSettings)}
T = TypeVar("T")


class _Prepared(NamedTuple):
    """What the threads make of a request: an engine's request for each answer, and its text."""

    prompts: list[list[int]]
    requests: list[Request]
    batch: RequestBatch
    stop_names: Mapping[int, str | int]
    echoed: list[Update]
    streams: bool = False  # calls come piece by piece


class ModelKitchen:
    """Makes requests into answers of one model.

    Attributes:
        model, options: those of the server.
        worker: the engine's thread.
        metrics: what is counted.
        created: when the server was started, by the wall clock.
        choices: the adapter of each name under which the model answers; None: the base alone.
    """

    def __init__(self, model: Model, options: ServeOptions):
        """Nothing runs until `start`."""
        if model.tokenizer is None:
            raise RequestError("this model has no tokenizer, which a server needs")
        limit = model.config.text.max_position_embeddings
        if not 2 <= options.context <= limit:
            raise RequestError(f"context must be in [2, {limit}] tokens, got {options.context}")
        self.model, self.options = model, options
        self.tokenizer: Tokenizer = model.tokenizer
        self.created = int(time.time())
        self.metrics = Metrics(options.name)
        base = DEFAULT if DEFAULT in model.adapters else None
        named = [name for name in model.adapters if name != DEFAULT]
        if options.name in named:
            raise RequestError(f"{options.name!r} is the name of the model and of an adapter")
        self.choices: dict[str, str | None] = {options.name: base, **{n: n for n in named}}
        template = self._widest()
        self._places = template.settings.places()
        self._longest_piece = max(
            len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.num_tokens)
        )
        self.worker = Worker(model, options, self.metrics, template)
        self._pool = ThreadPoolExecutor(2, "gemlax-kitchen")
        self._scorer = ThreadPoolExecutor(1, "gemlax-scorer")

    def start(self) -> None:
        """Compile, then answer."""
        self.worker.start()

    def close(self) -> None:
        """Let the threads end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._scorer.shutdown(wait=False, cancel_futures=True)

    def _widest(self) -> Request:
        """Return a request whose settings are as wide as any that is taken."""
        free = (i for i in range(self.model.programs.num_tokens) if i not in self._never)
        bias = dict.fromkeys([i for i, _ in zip(free, range(MAX_BIAS), strict=False)], 0.5)
        word = [self.tokenizer.bos_id] * _MAX_WORD
        words = [[*word[1:], i] for i in range(min(2 * MAX_BAD_WORDS, 100))]
        settings = SamplingSettings(max_new_tokens=1, logit_bias=bias, bad_words=words)
        (request,) = self.model.requests([[self.tokenizer.bos_id]], settings).requests
        return request

    @functools.cached_property
    def _never(self) -> frozenset[int]:
        return frozenset(self.tokenizer.unused_ids)

    # What protocols call.

    async def chat(self, request: ChatRequest) -> Job:
        """See `work.Kitchen`."""
        name, settings = self._checked(request, request.n)
        place = self.worker.admission.enter(request.key_id, request.n)
        try:
            prepared = await self._in(self._pool, self._prepare_chat, request, settings)
            return self._submit(request, name, prepared, place)
        except BaseException:
            place.leave()
            raise

    async def complete(self, request: CompletionRequest) -> Job:
        """See `work.Kitchen`."""
        if not 1 <= len(request.prompts) <= _MAX_PROMPTS:
            text = f"prompt: from 1 to {_MAX_PROMPTS} prompts, got {len(request.prompts)}"
            raise ServeError(400, text, param="prompt")
        name, settings = self._checked(request, request.n * len(request.prompts))
        place = self.worker.admission.enter(request.key_id, request.n * len(request.prompts))
        try:
            prepared = await self._in(self._pool, self._prepare_prompts, request, settings)
            if request.echo:
                adapter = self.choices[name]
                echo = functools.partial(self._echo, request, prepared, adapter)
                prepared = prepared._replace(echoed=await self._in(self._scorer, echo))
            return self._submit(request, name, prepared, place)
        except BaseException:
            place.leave()
            raise

    async def count(self, request: ChatRequest) -> int:
        """See `work.Kitchen`."""
        self._name(request.model)
        return len(await self._in(self._pool, self.encode, request))

    async def render(self, request: ChatRequest) -> list[int]:
        """Return the ids of a chat's prompt."""
        return await self._in(self._pool, self.encode, request)

    async def tokenize(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; `special`: with BOS."""

        def encode() -> list[int]:
            self._bound_text(len(text))
            return self.tokenizer.encode(text, add_bos=special)

        return await self._in(self._pool, encode)

    # What they have in common.

    def _name(self, model: str | None) -> str:
        name = self.options.name if model is None else model
        if name not in self.choices:
            known = ", ".join(self.choices)
            text = f"there is no model {name!r}; this server has {known}"
            raise ServeError(404, text[:500], param="model", code="model_not_found")
        return name

    def _checked(
        self, request: ChatRequest | CompletionRequest, answers: int
    ) -> tuple[str, SamplingSettings]:
        """Check what takes no time; return the model's name and the settings of one answer."""
        self.worker.admission.check_open()
        name, options = self._name(request.model), self.options
        if not 1 <= request.n <= options.slots:
            text = f"n must be in [1, {options.slots}], got {request.n}"
            raise ServeError(400, text, param="n")
        if answers > options.slots + options.max_queue:
            text = f"{answers} answers are asked for, more than this server ever has places for"
            raise ServeError(400, text, param="prompt")
        given = dict(request.settings)
        if isinstance(request, ChatRequest):
            given["thinking_budget"] = request.thinking_budget
        else:
            given["grammar"] = request.grammar
        seed = given.get("seed")
        assert seed is None or isinstance(seed, int)
        given["seed"] = secrets.randbits(32) if seed is None else seed % 2**32
        if given.get("max_new_tokens") is None:
            given["max_new_tokens"] = options.context
        more = {"context": options.context, "adapter": self.choices[name]}
        with _as_serve_errors():
            return name, read_settings(None, {**given, **more, "logprobs": request.logprobs})

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: object) -> T:
        """Run something in a thread; what it finds wrong with a request becomes a ServeError."""

        def run() -> T:
            with _as_serve_errors():
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(pool, run)

    # What runs in threads.

    def encode(self, request: ChatRequest) -> list[int]:
        """Return the ids of a chat's prompt."""
        self._bound_text(count_characters([request.messages, request.tools]))
        messages = seated(request.messages, self.model.chat_format.family)
        tools = list(request.tools) if request.tool_choice != "none" else None
        return self.model.chat_format.encode(
            messages, tools or None, request.thinking,
            continue_final_message=request.continue_final_message,
            template_args=request.template_args,
        )  # fmt: skip

    def _prepare_chat(self, request: ChatRequest, settings: SamplingSettings) -> _Prepared:
        ids = self.encode(request)
        form = self._form(request).joined(None, ids)
        if form.constrains:
            settings = dataclasses.replace(settings, grammar=form)
        prepared = self._prepare(request, [ids], settings, self.model.chat_requests)
        return prepared._replace(streams=form.constrains and form.tool_choice != "none")

    def _form(self, request: ChatRequest) -> ChatGrammar:
        """Return what the answer must look like: its calls are always held to their schemas."""
        tools = list(request.tools)
        return chat_grammar(
            self.tokenizer, tools=tools, thinking=request.thinking,
            tool_choice=request.tool_choice if tools or request.tool_choice != "auto" else None,
            parallel_tool_calls=request.parallel_tool_calls, response_format=request.grammar,
        )  # fmt: skip

    def _prepare_prompts(self, request: CompletionRequest, settings: SamplingSettings) -> _Prepared:
        self._bound_text(count_characters([p for p in request.prompts if isinstance(p, str)]))
        config, prompts = self.model.config.text, []
        for prompt in request.prompts:
            one = prompt if isinstance(prompt, str) else [prompt]
            special = settings.parse_special
            prompts += read_prompts(one, self.tokenizer, config, parse_special=special)
        return self._prepare(request, prompts, settings, self.model.requests)

    def _bound_text(self, characters: int) -> None:
        """Refuse what cannot fit before it is read: the tokenizer takes its time."""
        limit = self.options.context * self._longest_piece
        if characters > limit:
            text = f"the prompt has {characters} characters; {limit} is the most that may fit"
            more = {"n_ctx": self.options.context}
            raise ServeError(400, text, code="context_length_exceeded", extra=more)

    def _prepare(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        settings: SamplingSettings,
        make: Callable[[list[list[int]], SamplingSettings], RequestBatch],
    ) -> _Prepared:
        context, longest = self.options.context, max(map(len, prompts))
        is_echo = isinstance(request, CompletionRequest) and request.max_tokens_zero
        if longest + (not is_echo) > context:
            text = f"the prompt has {longest} tokens, and with an answer {context} fit: shorten it"
            raise ServeError(
                400, text, code="context_length_exceeded",
                extra={"n_prompt_tokens": longest, "n_ctx": context},
            )  # fmt: skip
        assert isinstance(settings.seed, int)
        seeds = [(settings.seed + choice) % 2**32 for choice in range(request.n)] * len(prompts)
        each = [ids for ids in prompts for _ in range(request.n)]
        batch = make(each, dataclasses.replace(settings, seed=seeds))
        requests, stop_names = batch.requests, self._stop_names(settings)
        for size, room in zip(requests[0].settings.places(), self._places, strict=True):
            if size > room:
                text = (
                    f"at most {MAX_BIAS} entries of logit_bias, and {MAX_BAD_WORDS} bad_words of "
                    f"{_MAX_WORD} tokens"
                )
                raise ServeError(400, text, param="logit_bias")
        if request.ignore_eos:
            requests = [dataclasses.replace(one, stop_ids=tuple(stop_names)) for one in requests]
        requests = [dataclasses.replace(one, salt=request.cache_salt) for one in requests]
        return _Prepared(prompts, requests, batch, stop_names, [])

    def _stop_names(self, settings: SamplingSettings) -> dict[int, str | int]:
        """Return what the caller called the ids that end an answer."""
        ends = {text: read_stop(text, self.tokenizer) for text in settings.stop}
        names: dict[int, str | int] = {int(id): int(id) for id in settings.stop_ids}
        return names | {end: text for text, end in ends.items() if isinstance(end, int)}

    def _echo(
        self, request: CompletionRequest, prepared: _Prepared, adapter: str | None
    ) -> list[Update]:
        """Return an update with each prompt, and with its log-probabilities if they are wanted."""
        updates: list[Update] = []
        for prompt, ids in zip(request.prompts, prepared.prompts, strict=True):
            logprobs: list[TokenLogprob] = []
            if request.logprobs is not None:
                scores = self.model.prompt_logprobs(ids, request.logprobs, adapter=adapter)
                logprobs = [show_logprob(self.tokenizer, one) for one in scores]
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            update = Update(0, [Delta("content", text)], ids, logprobs, Usage(len(ids)))
            updates += [
                dataclasses.replace(update, index=len(updates) + i) for i in range(request.n)
            ]
        return updates

    # Back on the event loop.

    def _submit(
        self, request: ChatRequest | CompletionRequest, name: str, prepared: _Prepared, place: Place
    ) -> Job:
        job = Job(prepared.prompts, name, place, self.worker.cancel)
        now, chat = time.monotonic(), isinstance(request, ChatRequest)
        tickets = []
        for index, one in enumerate(prepared.requests):
            stop = prepared.batch.stop
            parser: OutputParser | TextStream
            if chat:
                parser = self.model.chat_format.parser(
                    one.prompt, stop, include_stop=request.include_stop,
                    streams_arguments=prepared.streams,
                )  # fmt: skip
            else:
                parser = TextStream(self.tokenizer, stop, include_stop=request.include_stop)
            tickets.append(
                Ticket(
                    job=job, index=index, answer=Answer(one, parser, prepared.batch.num_logprobs),
                    tokenizer=self.tokenizer, key=request.key_id, priority=request.priority,
                    stop_names=prepared.stop_names, arrival=now,
                    # Where calls come piece by piece the grammar lets only one come.
                    single_call=isinstance(request, ChatRequest)
                    and not (request.parallel_tool_calls or prepared.streams),
                )
            )  # fmt: skip
        job.add(tickets)
        for update in prepared.echoed:
            job.put(update)
            job.wake()
        if isinstance(request, CompletionRequest) and request.max_tokens_zero:
            for ticket in tickets:
                job.put(Update(ticket.index, usage=ticket.usage(), finish_reason="length"))
            job.open_answers = 0
            job.wake()
            place.leave()
            return job
        place.wait_with(sum(len(one.prompt) for one in prepared.requests))
        first = prepared.requests[0]
        self.metrics.asked(request.n, first.max_length - len(first.prompt))
        self.worker.submit(job)
        return job


@contextlib.contextmanager
def _as_serve_errors() -> Iterator[None]:
    """Make what is wrong with a request a ServeError 400, which names its field if it can."""
    try:
        yield
    except RecursionError:
        raise ServeError(400, "the request is nested too deeply") from None
    except (RequestError, UnsupportedError) as error:
        text = str(error)
        first = text.partition(" ")[0].rstrip(":").partition("[")[0]
        param = first if first in _SETTINGS else None
        if first == "messages":
            param = text.partition(" ")[0].rstrip(":")
        raise ServeError(400, text, param=param) from error
