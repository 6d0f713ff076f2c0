"""Fields that OpenAI's chat and text completions share, and what becomes of them."""

import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Annotated, Protocol, TypeVar

import msgspec
from msgspec import Meta

from gemlax.serve.body import JsonObject, openai_error_body, refuse
from gemlax.serve.parts import failure
from gemlax.serve.work import Answers, ServeError, Update, Usage

__all__ = [
    "Shared",
    "StreamOptions",
    "check_name",
    "data_event",
    "finish",
    "shared_arguments",
    "stream_events",
    "usage_body",
]

_log = logging.getLogger(__name__)
MAX_STOPS = 16
DONE = b"data: [DONE]\n\n"
# What other servers take and this one does not, with the values that change nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "prompt_logprobs": (False,),
    "repeat_penalty": (1,),
    "return_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "xtc_probability": (0,),
}
T = TypeVar("T")
Number = Annotated[float, Meta(ge=-2, le=2)]
Natural = Annotated[int, Meta(ge=0)]


class StreamOptions(msgspec.Struct):
    """What a stream tells besides the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(msgspec.Struct):
    """What an answer must match, as vLLM has it."""

    json: JsonObject | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Shared(msgspec.Struct):
    """The fields. What is not here is ignored, and null is as good as absent."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Natural] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Natural] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    response_format: JsonObject | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Meta(max_length=128)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] | None = None
    # Refused unless they say what would be done anyway.
    best_of: object = None
    dry_multiplier: object = None
    dynatemp_range: object = None
    grammar: object = None
    guided_choice: object = None
    guided_grammar: object = None
    guided_json: object = None
    guided_regex: object = None
    json_schema: object = None
    length_penalty: object = None
    logits_processors: object = None
    mirostat: object = None
    prompt_logprobs: object = None
    repeat_penalty: object = None
    return_token_ids: object = None
    truncate_prompt_tokens: object = None
    typical_p: object = None
    use_beam_search: object = None
    xtc_probability: object = None


def shared_arguments(asked: Shared, max_tokens: int | None, key_id: str) -> JsonObject:
    """Return the keyword arguments of the kitchen's request; raise ServeError for what is wrong."""
    _check_neutral(asked)
    if asked.stream_options is not None and not asked.stream:
        refuse("stream_options", "there is no stream")
    stop = [asked.stop] if isinstance(asked.stop, str) else (asked.stop or [])
    if len(stop) > MAX_STOPS or "" in stop:
        refuse("stop", f"at most {MAX_STOPS} strings that are not empty")
    settings = {
        "max_new_tokens": max_tokens,
        "min_new_tokens": asked.min_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "repetition_penalty": asked.repetition_penalty,
        "logit_bias": _bias(asked.logit_bias),
        "bad_words": asked.bad_words,
        "allowed_ids": asked.allowed_token_ids,
        "seed": None if asked.seed is None else asked.seed % 2**32,
        "stop": stop or None,
        "stop_ids": asked.stop_token_ids,
    }
    return {
        "model": asked.model,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "n": asked.n or 1,
        "ignore_eos": bool(asked.ignore_eos),
        "include_stop": bool(asked.include_stop_str_in_output),
        "grammar": _grammar(asked),
        "cache_salt": asked.cache_salt or "",
        "priority": asked.priority or 0,
        "key_id": key_id,
    }


def _check_neutral(asked: Shared) -> None:
    given = msgspec.structs.asdict(asked)
    for name, neutral in NEUTRAL.items():
        value = given[name]
        if value is not None and all(value != one for one in neutral):
            refuse(name, "this server does not have it")


def _bias(given: Mapping[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    for name in given:
        if not (name.isascii() and name.isdigit()):
            refuse("logit_bias", f"{name[:40]!r} is not a token id")
    return {int(name): value for name, value in given.items()}


def _grammar(asked: Shared) -> object:
    """Return the spec of what the answer must match; None: anything."""
    wanted = asked.structured_outputs
    form = asked.response_format
    if wanted is None and (form is None or form.get("type") == "text"):
        return None
    from gemlax.grammar import (  # it loads llguidance, which most servers never need
        Choice,
        JsonObject,
        JsonSchema,
        Lark,
        Regex,
        read_response_format,
    )

    if wanted is None:
        return read_response_format(form)
    specs: list[object] = [] if form is None else [read_response_format(form)]
    specs += [] if wanted.json is None else [JsonSchema(wanted.json)]
    specs += [] if wanted.regex is None else [Regex(wanted.regex)]
    specs += [] if wanted.choice is None else [Choice(wanted.choice)]
    specs += [] if wanted.grammar is None else [Lark(wanted.grammar)]
    specs += [JsonObject()] if wanted.json_object else []
    if len(specs) != 1:
        refuse("structured_outputs", "give one of json, regex, choice, grammar and json_object")
    return specs[0]


def check_name(name: object, where: str) -> str:
    """Return a name that is a text with something in it."""
    if not isinstance(name, str) or not name:
        refuse(where, "it must be a name")
    return name


def data_event(body: object) -> bytes:
    """Return an event without a name, as OpenAI's older APIs stream."""
    return b"data: %b\n\n" % msgspec.json.encode(body)


def error_event(error: ServeError) -> bytes:
    """Return the event that ends a stream which failed."""
    return data_event(openai_error_body(error))


class StreamWriter(Protocol):
    """Writes the chunks of one request.

    Attributes:
        shows_usage: the last chunk is wanted.
    """

    shows_usage: bool

    def opening(self) -> Iterator[bytes]:
        """Yield what comes before anything is said."""

    def take(self, update: Update) -> Iterator[bytes]:
        """Yield the chunks of an update."""

    def last(self) -> bytes:
        """Return the chunk with what the answers took."""


async def stream_events(answers: Answers, writer: StreamWriter) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a stream to its end; an error is its last event."""
    try:
        if opening := b"".join(writer.opening()):
            yield opening
        async for update in answers:
            if chunks := b"".join(writer.take(update)):
                yield chunks
            if error := failure(update):
                raise error
        yield (writer.last() if writer.shows_usage else b"") + DONE
    except ServeError as error:
        yield error_event(error)
    except Exception:
        _log.exception("a stream failed")
        yield error_event(ServeError(500, "the server failed at this answer"))


def finish(update: Update) -> JsonObject:
    """Return the fields of a choice that say why it has ended."""
    return {"finish_reason": update.finish_reason, "stop_reason": update.stop}


def usage_body(usages: Sequence[Usage], per_prompt: int = 1) -> JsonObject:
    """Return the usage of several answers; every `per_prompt` of them have a prompt in common."""
    asked = usages[::per_prompt]
    prompt, completion = sum(u.prompt for u in asked), sum(u.completion for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached for u in asked)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning for u in usages)},
    }
