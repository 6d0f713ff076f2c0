"""From messages to the ids of a prompt, by the checkpoint's chat template or a built-in one.

A control token is what the template itself wrote: a marker of the vocabulary becomes its id where
each of its characters is marked as the template's own (marked.py). All other text, whatever it
spells, is encoded as plain text, together with the template's text around it: so harmless text gets
the ids it would get in the whole string.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gemlax.chat.marked import OWN, Marked, mark_own, marks_of, runs
from gemlax.chat.messages import (
    REASONING,
    Message,
    as_given,
    check_tools,
    normalise,
    tools_as_given,
)
from gemlax.chat.parser import CLOSE_CHANNEL, OPEN_CHANNEL, OutputParser
from gemlax.chat.template import BuiltIn, Template
from gemlax.errors import RequestError
from gemlax.tokenizer import Tokenizer

__all__ = ["ChatFormat", "TurnIds"]

logger = logging.getLogger(__name__)

Messages = Iterable[Mapping[str, Any] | Message]

# What tells the families apart, and what ends an answer. A call that waits for its response ends
# in <|tool_response>.
TURN = {"gemma4": "<|turn>", "gemma3": "<start_of_turn>"}
STOPS = {"gemma4": ("<turn|>", "<|tool_response>"), "gemma3": ("<end_of_turn>",)}
# What ends a turn in the templates of other models that people give Gemma, such as ChatML.
# Source: llama.cpp, llama-vocab.cpp, special_eog_ids.
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>",
    "<|return|>", "<|call|>", "<EOT>", "[EOT]", "</s>", "<end_of_utterance>",
)  # fmt: skip
# What `encode` itself hands to a template.
GIVEN = ("messages", "tools", "add_generation_prompt")


class TurnIds(NamedTuple):
    """The ids around what a model says: how its turns open and close, and where tools answer."""

    opening: tuple[Any, ...]
    close: Any
    tool_open: int | None
    tool_close: int | None


class ChatFormat:
    """How one checkpoint is talked to.

    Attributes:
        family: "gemma3" or "gemma4", by the turn markers in the vocabulary; None: neither.
        stop_ids: what ends an answer.
        templates: the checkpoint's own, by name; none: the built-in one is used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str | Mapping[str, str] | None = None,
        *,
        empty_thought: bool = True,
    ):
        """Take up a tokenizer and the checkpoint's templates.

        Args:
            tokenizer: the checkpoint's.
            template: Jinja source, or several by name: "tool_use" is used where there are tools,
                else "default", else the only one. None or empty: the built-in template.
            empty_thought: see gemma4.jinja.
        """
        self._tokenizer, self._empty_thought = tokenizer, empty_thought
        sources = {"default": template} if isinstance(template, str) else dict(template or {})
        self.templates = {
            name: Template(source) for name, source in sources.items() if source.strip()
        }
        if len(self.templates) < len(sources):
            empty = ", ".join(sorted(set(sources) - set(self.templates)))
            logger.warning("the chat template is empty (%s): it is not used", empty)
        self.family: Literal["gemma3", "gemma4"] | None = None
        if self.marker(TURN["gemma4"]) is not None:
            self.family = "gemma4"
        elif self.marker(TURN["gemma3"]) is not None:
            self.family = "gemma3"
        self._built_in = None if self.templates or not self.family else BuiltIn(self.family)
        stops = [self.marker(piece) for piece in (*STOPS.get(self.family or "", ()), *ENDS)]
        ends = [tokenizer.eos_id, *(id for id in stops if id is not None)]
        self.stop_ids = tuple(dict.fromkeys(ends))

    def encode(
        self,
        messages: Messages,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        *,
        answered: bool = False,
        continue_final_message: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the ids of the prompt, with exactly one BOS.

        A `Message` object becomes the tokens that the model gave, if its text is still the same.

        Args:
            messages: see `Model.chat`.
            tools: likewise.
            thinking: likewise.
            answered: return a whole conversation, which ends in an answer, to be trained on.
            continue_final_message: see `Model.chat`; the turn of the last message stays open.
            template_args: further variables of the checkpoint's template.

        Raises:
            RequestError: malformed messages or tools, or what this template cannot say.
        """
        if isinstance(messages, (str, Mapping, Message)):
            raise RequestError('messages must be a list of {"role": ..., "content": ...}')
        given, args = list(messages), dict(template_args or {})
        if tools is not None and not isinstance(tools, (str, Mapping)):
            tools = list(tools)
        template = self._template(bool(tools))
        if isinstance(template, BuiltIn):
            turns, declared = normalise(given, answered=answered), check_tools(tools)
        else:
            turns = as_given(given, template.source)
            declared = tools_as_given(tools, template.source)
        _check(template, declared, thinking, args)
        continues = not answered and _continues(turns, continue_final_message)
        if continues and not _last_fields(turns[-1]):
            del turns[-1], given[-1]  # nothing was said yet
            continues = False
        replays = self._mark(turns, given, trims="trim" in template.source)
        if continues:
            _mark_last(turns)
        # The variables that transformers gives, and one of the built-in templates.
        variables = {"documents": None, **self._special(), **args, "messages": turns}
        variables |= {"tools": declared or None}
        variables |= {"add_generation_prompt": not (answered or continues)}
        variables |= {} if thinking is None else {"enable_thinking": thinking}
        if isinstance(template, BuiltIn):
            variables["empty_thought"] = self._empty_thought
        text = template.render(variables)
        if continues:
            text = _cut(text, _mark_of(len(turns) - 1))
        ids, plain = self._ids(text, replays)
        if isinstance(template, Template):
            self._report_lost(plain, [turns, declared, args], template.source)
        if len(ids) == 1:
            raise RequestError("the chat template writes nothing for these messages")
        return ids

    def parser(
        self,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        streams_arguments: bool = False,
    ) -> OutputParser:
        """Return the parser of an answer to a prompt of ids; see `OutputParser`."""
        return OutputParser(
            self._tokenizer, stop, in_thought=self._in_thought(prompt), include_stop=include_stop,
            streams_arguments=streams_arguments,
        )  # fmt: skip

    def _in_thought(self, prompt: Sequence[int]) -> bool:
        opened, closed = self.marker(OPEN_CHANNEL), self.marker(CLOSE_CHANNEL)
        last = next((id for id in reversed(prompt) if id in (opened, closed)), None)
        return last is not None and last == opened

    def boundaries(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return how many ids of a prompt other prompts are likely to begin with, in rising order.

        Up to the end of a system turn with its tools, to the end of the last user turn, and all but
        the last one. Where a system text is part of the first user turn (Gemma 3), no id says so.
        """
        marker = self.marker(TURN[self.family]) if self.family else None
        turns = [place for place, id in enumerate(prompt) if id == marker]
        places = {*turns[-1:], len(prompt) - 1}
        if len(turns) > 1:
            system = self._tokenizer.encode("system\n", add_bos=False)
            if list(prompt[turns[0] + 1 :][: len(system)]) == system:
                places.add(turns[1])
        return tuple(sorted(places))

    def turn_ids(self) -> TurnIds:
        """Return the ids that delimit what the model says."""
        if self.family is None:
            raise RequestError("this model's vocabulary has no turn markers")
        opening = [self._tokenizer.id_of(TURN[self.family])]
        opening += self._tokenizer.encode("model\n", add_bos=False)
        close = self._tokenizer.id_of(STOPS[self.family][0])
        tools = (self.marker("<|tool_response>"), self.marker("<tool_response|>"))
        return TurnIds(tuple(opening), close, *tools)

    def _template(self, with_tools: bool) -> Template | BuiltIn:
        """Choose among the checkpoint's templates, as transformers does."""
        if self._built_in is not None:
            return self._built_in
        if not self.templates:
            raise RequestError(
                "this model cannot chat: its vocabulary has no turn markers (<|turn> or "
                "<start_of_turn>) and the checkpoint no chat template; use generate"
            )
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates or len(self.templates) == 1:
            return self.templates.get("default") or next(iter(self.templates.values()))
        raise RequestError(
            f"the checkpoint has the chat templates {', '.join(sorted(self.templates))} and none "
            "of them is the default: leave one, or name one of them default"
        )

    def _special(self) -> dict[str, str]:
        """Return the pieces that templates name. They are ours, so a template may write them."""
        tokenizer = self._tokenizer
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        ids |= {"pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
        named = {f"{name}_token": tokenizer.piece(id) for name, id in ids.items()}
        return {
            name: mark_own(piece) for name, piece in {**tokenizer.named_pieces, **named}.items()
        }

    def marker(self, piece: str) -> int | None:
        """Return the id of a control token, None if the vocabulary has none of this name."""
        id = self._tokenizer.id_of(piece)
        return id if id in self._tokenizer.special_ids else None

    def _mark(
        self, messages: list[dict[str, Any]], given: Sequence[Any], trims: bool
    ) -> dict[tuple[str, str], list[int]]:
        """Mark the content of messages of the model; return its ids by mark and text."""
        replays = {}
        for index, (message, original) in enumerate(zip(messages, given, strict=True)):
            text, ids = self._replayed(original, trims)
            if ids:
                _mark_field(message, "content", _mark_of(index))
                replays[_mark_of(index), text] = ids
        return replays

    def _replayed(self, message: Any, trims: bool) -> tuple[str, list[int]]:
        """Return a Message's content, and its tokens if they say just that; trimmed if need be."""
        if not isinstance(message, Message) or not message.tokens:
            return "", []
        parser = OutputParser(self._tokenizer)
        try:
            parser.push(message.tokens)
        except RequestError:  # tokens of another vocabulary
            return "", []
        parser.flush()
        ids, text = list(parser.content_ids or ()), message.content
        if parser.content != text:
            return "", []
        if trims:
            text = text.strip()
            for end in (-1, 0):
                while ids and self._tokenizer.decode([ids[end]]).isspace():
                    ids.pop(end)
        return text, ids if self._tokenizer.decode(ids) == text == text.strip() else []

    def _ids(
        self, text: str, replays: Mapping[tuple[str, str], list[int]]
    ) -> tuple[list[int], list[str]]:
        """Return the ids of a rendered prompt, and the stretches that were encoded as text."""
        ids: list[int] = []
        stretches = [""]
        for mark, run in runs(text):
            parts: Iterable[str | int] = (run,)
            if mark == OWN:
                parts = self._tokenizer.split_special(run)
            elif (mark, run) in replays:
                parts = replays[mark, run]
            for part in parts:
                if isinstance(part, str):
                    stretches[-1] += part
                    continue
                if stretches[-1]:
                    ids += self._tokenizer.encode(stretches[-1], add_bos=False)
                    stretches.append("")
                ids.append(part)
        ids += self._tokenizer.encode(stretches[-1], add_bos=False)
        bos = self._tokenizer.bos_id
        start = next((i for i, id in enumerate(ids) if id != bos), len(ids))
        return [bos, *ids[start:]], stretches

    def _report_lost(self, stretches: Iterable[str], inputs: Any, source: str) -> None:
        """Say if a template made a marker in a way that marks cannot follow."""
        # Without spaces, for what people said may be trimmed before it is put together.
        said = "".join("".join(_texts(inputs)).split())
        for part in (part for text in stretches for part in self._tokenizer.split_special(text)):
            piece = self._tokenizer.piece(part) if isinstance(part, int) else ""
            if piece and piece in source and piece not in said:
                logger.warning(
                    "the chat template writes %s by an operation that is not followed: it is "
                    "encoded as text, not as the control token",
                    piece,
                )


def _check(
    template: Template | BuiltIn, tools: Sequence[Any], thinking: bool | None, args: dict[str, Any]
) -> None:
    """Refuse what would be dropped in silence."""
    if isinstance(template, BuiltIn) and args:
        raise RequestError(
            f"the built-in chat format takes no template_args, got {', '.join(args)}"
        )
    if taken := [name for name in GIVEN if name in args]:
        raise RequestError(f"template_args cannot hold {', '.join(taken)}")
    if tools and "tools" not in template.source:
        raise RequestError("this model's chat format has no tools (Gemma 4 has)")
    if thinking and "enable_thinking" not in template.source:
        raise RequestError("this model's chat format has no thinking (Gemma 4 has)")


def _mark_of(index: int) -> str:
    """Return the mark of the input that message `index` is."""
    return chr(ord(OWN) + 1 + index)


def _continues(messages: Sequence[Mapping[str, Any]], wanted: bool | None) -> bool:
    """Whether the prompt ends in the last message instead of the beginning of an answer."""
    last = messages[-1]
    is_answer = last.get("role") in ("assistant", "model")
    if wanted and not is_answer:
        raise RequestError(
            "continue_final_message goes on from a message of role assistant, and the last one is "
            f"of role {last.get('role')}"
        )
    if is_answer and last.get("tool_calls") and wanted is not False:
        raise RequestError(
            "the last message calls tools: answer them in messages of role tool, or ask something"
        )
    return is_answer if wanted is None else wanted


def _last_fields(message: Mapping[str, Any]) -> list[str]:
    """Return the fields whose end is continued: the content, or else what was thought."""
    if any(text.strip() for text in _texts(message.get("content"))):
        return ["content"]
    return [
        name for name in REASONING if isinstance(message.get(name), str) and message[name].strip()
    ]


def _mark_last(messages: list[dict[str, Any]]) -> None:
    """Mark the text that is continued with the mark of its message."""
    last, mark = messages[-1], _mark_of(len(messages) - 1)
    for name in _last_fields(last):
        for part in [last] if isinstance(last[name], str) else last[name]:
            _mark_field(part, name if part is last else "text", mark)


def _mark_field(holder: Any, name: str, mark: str) -> None:
    if isinstance(holder, dict) and isinstance(holder.get(name), str):
        holder[name] = Marked(holder[name], mark * len(holder[name]))


def _cut(text: str, mark: str) -> str:
    """Return a text up to the last character that is marked."""
    end = marks_of(text).rfind(mark)
    if end < 0:
        raise RequestError(
            "the chat format leaves the last message out, so there is nothing to go on from"
        )
    return text[: end + 1]


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
