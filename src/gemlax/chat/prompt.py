"""From messages to the ids of a prompt, by the checkpoint's template or a built-in format.

A control token is what the format itself wrote: a marker of the vocabulary becomes its id where
each of its characters is marked as the format's own (marked.py). All other text, whatever it
spells, is encoded as plain text, together with the format's text around it: so harmless text gets
the ids it would get in the whole string.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gemlax.chat.formats import answers_to, render_gemma3, render_gemma4
from gemlax.chat.marked import OWN, Marked, marks_of, own, runs
from gemlax.chat.messages import (
    REASONING,
    Message,
    as_given,
    check_tools,
    normalise,
    tools_as_given,
)
from gemlax.chat.parser import CLOSE_CHANNEL, OPEN_CHANNEL, OutputParser
from gemlax.chat.template import Template
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
# A template that reads this of a tool, or of a call, knows OpenAI's form.
READS_FUNCTION = re.compile(r"""\.\s*function\b|["']function["']""")


class TurnIds(NamedTuple):
    """The ids around what a model says: how its turns open and close, and where tools answer."""

    opening: tuple[Any, ...]
    close: Any
    tool_open: int | None
    tool_close: int | None


class ChatFormat:
    """How one checkpoint is talked to.

    Attributes:
        family: "gemma3" or "gemma4", told by the turn markers in the vocabulary; None: neither.
        stop_ids: what ends an answer.
        templates: the checkpoint's own, by name; none: the built-in format is used.
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
                else "default", else the only one. None or empty: the built-in format.
            empty_thought: see formats.py.
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
        if self._marker(TURN["gemma4"]) is not None:
            self.family = "gemma4"
        elif self._marker(TURN["gemma3"]) is not None:
            self.family = "gemma3"
        stops = [self._marker(piece) for piece in (*STOPS.get(self.family or "", ()), *ENDS)]
        found = [tokenizer.eos_id, *(id for id in stops if id is not None)]
        self.stop_ids = tuple(dict.fromkeys(found))

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

        The text of a `Message` object is encoded as the tokens that the model gave, where that
        is the same text: a cache that holds them can be used again.

        Args:
            messages: see `Model.chat`.
            tools: likewise.
            thinking: likewise.
            answered: return a whole conversation, whose last message is an answer, to be trained
                on.
            continue_final_message: the prompt ends in the text of the last message, an
                assistant's, whose turn stays open; None: if the last message is an assistant's.
            template_args: further variables of the checkpoint's template.

        Raises:
            RequestError: malformed messages or tools, or what this format cannot say.
        """
        if isinstance(messages, (str, Mapping, Message)):
            raise RequestError('messages must be a list of {"role": ..., "content": ...}')
        given, offered = list(messages), None if tools is None else tools
        if offered is not None and not isinstance(offered, (str, Mapping)):
            offered = list(offered)
        template = self._template(bool(offered))
        if template is None:
            found, declared = normalise(given, answered=answered), check_tools(offered)
        else:
            found = as_given(given, legacy="function_call" in template.source)
            wrap = READS_FUNCTION.search(template.source) is not None
            declared = tools_as_given(offered, wrap=wrap)
        self._check(template, declared, thinking, template_args or {})
        goes_on = not answered and _goes_on(found, continue_final_message)
        if goes_on and not _last_fields(found[-1]):
            del found[-1], given[-1]  # nothing was said yet
            goes_on = False
        replays = self._mark(found, given, template)
        inputs = [found, declared, dict(template_args or {})]
        if goes_on:
            _mark_last(found)
        how: dict[str, Any] = {"thinking": thinking, "whole": answered or goes_on}
        if template is None:
            text = self._built_in(found, declared, **how)
        else:
            text = self._render(template, found, declared, template_args or {}, **how)
        if goes_on:
            text = _cut(text, _mark_of(len(found) - 1))
        ids = self._ids(text, replays, inputs, template)
        if len(ids) == 1:
            raise RequestError("the chat template writes nothing for these messages")
        return ids

    def _built_in(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any],
        thinking: bool | None,
        whole: bool,
    ) -> str:
        if self.family == "gemma4":
            return render_gemma4(messages, tools, bool(thinking), self._empty_thought, whole)
        return render_gemma3(messages, whole)

    def _render(
        self,
        template: Template,
        messages: list[dict[str, Any]],
        tools: list[Any],
        template_args: Mapping[str, Any],
        thinking: bool | None,
        whole: bool,
    ) -> str:
        """Render with the variables that transformers gives. `whole`: no answer is begun."""
        variables = {"documents": None, **self._special(), **template_args}
        variables |= {"tools": tools or None, "add_generation_prompt": not whole}
        if thinking is not None:
            variables["enable_thinking"] = thinking
        told = _with_tool_responses(messages, template.source)
        return template.render(variables | {"messages": told})

    def parser(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> OutputParser:
        """Return the parser of an answer to a prompt of ids."""
        opened, closed = self._marker(OPEN_CHANNEL), self._marker(CLOSE_CHANNEL)
        last = next((id for id in reversed(prompt) if id in (opened, closed)), None)
        return OutputParser(self._tokenizer, stop, in_thought=last is not None and last == opened)

    def turn_ids(self) -> TurnIds:
        """Return the ids that delimit what the model says.

        Raises:
            RequestError: the vocabulary has no turn markers.
        """
        if self.family is None:
            raise RequestError("this model's vocabulary has no turn markers")
        close = "<turn|>" if self.family == "gemma4" else "<end_of_turn>"
        opening = [self._tokenizer.id_of(TURN[self.family])]
        opening += self._tokenizer.encode("model\n", add_bos=False)
        tools = (self._marker("<|tool_response>"), self._marker("<tool_response|>"))
        return TurnIds(tuple(opening), self._tokenizer.id_of(close), *tools)

    def _template(self, with_tools: bool) -> Template | None:
        """Choose among the checkpoint's templates, as transformers does."""
        if not self.templates:
            return None
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates or len(self.templates) == 1:
            return self.templates.get("default") or next(iter(self.templates.values()))
        raise RequestError(
            f"the checkpoint has the chat templates {', '.join(sorted(self.templates))} and none "
            "of them is the default: leave one, or name one of them default"
        )

    def _check(
        self,
        template: Template | None,
        tools: Sequence[Any],
        thinking: bool | None,
        template_args: Mapping[str, Any],
    ) -> None:
        """Refuse what would be dropped in silence."""
        if template is None and self.family is None:
            raise RequestError(
                "this model cannot chat: its vocabulary has no turn markers (<|turn> or "
                "<start_of_turn>) and the checkpoint no chat template; use generate"
            )
        if template is None and template_args:
            raise RequestError(
                f"the built-in chat format takes no template_args, got {', '.join(template_args)}"
            )
        own_args = [name for name in GIVEN if name in template_args]
        if own_args:
            raise RequestError(f"template_args cannot hold {', '.join(own_args)}")
        source = "" if template is None else template.source
        native = template is None and self.family == "gemma4"
        if tools and not native and "tools" not in source:
            raise RequestError("this model's chat format has no tools (Gemma 4 has)")
        if thinking and not native and "enable_thinking" not in source:
            raise RequestError("this model's chat format has no thinking (Gemma 4 has)")

    def _special(self) -> dict[str, str]:
        """Return the pieces that templates name. They are ours, so a template may write them."""
        tokenizer = self._tokenizer
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
        ids |= {"pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
        named = {f"{name}_token": tokenizer.piece(id) for name, id in ids.items()}
        return {name: own(piece) for name, piece in {**tokenizer.named_pieces, **named}.items()}

    def _marker(self, piece: str) -> int | None:
        id = self._tokenizer.id_of(piece)
        return id if id in self._tokenizer.special_ids else None

    def _mark(
        self, messages: list[dict[str, Any]], given: Sequence[Any], template: Template | None
    ) -> dict[str, dict[str, list[int]]]:
        """Mark the content of messages of the model; return by mark the ids of what it may say."""
        replays = {}
        for index, (one, original) in enumerate(zip(messages, given, strict=True)):
            texts = self._own_ids(original, trims=template is None or "trim" in template.source)
            if texts:
                mark = _mark_of(index)
                one["content"] = Marked(one["content"], mark * len(one["content"]))
                replays[mark] = texts
        return replays

    def _own_ids(self, message: Any, trims: bool) -> dict[str, list[int]]:
        """Return the ids of a Message's content, trimmed, by its text, if they say just that."""
        if not isinstance(message, Message) or not message.tokens:
            return {}
        parser = OutputParser(self._tokenizer)
        try:
            parser.push(message.tokens)
        except RequestError:  # tokens of another vocabulary
            return {}
        parser.flush()
        ids, text = list(parser.content_ids or ()), message.content
        if parser.content != text:
            return {}
        if trims:
            text = text.strip()
            for end in (-1, 0):
                while ids and self._tokenizer.decode([ids[end]]).isspace():
                    ids.pop(end)
        same = ids and self._tokenizer.decode(ids) == text == text.strip()
        return {text: ids} if same else {}

    def _ids(
        self,
        text: str,
        replays: Mapping[str, Mapping[str, list[int]]],
        inputs: Any,
        template: Template | None,
    ) -> list[int]:
        ids: list[int] = []
        plain: list[str] = []

        def flush() -> None:
            joined = "".join(plain)
            plain.clear()
            if template is not None:
                self._report_lost(joined, inputs, template.source)
            ids.extend(self._tokenizer.encode(joined, add_bos=False))

        for mark, run in runs(text):
            said = replays.get(mark, {}).get(run)
            parts = self._tokenizer.split_special(run) if mark == OWN else (run,)
            for part in parts if said is None else said:
                if isinstance(part, int):
                    flush()
                    ids.append(part)
                else:
                    plain.append(part)
        flush()
        bos = self._tokenizer.bos_id
        start = next((i for i, id in enumerate(ids) if id != bos), len(ids))
        return [bos, *ids[start:]]

    def _report_lost(self, plain: str, inputs: Any, source: str) -> None:
        """Say if a template made a marker by a way that marks cannot follow."""
        for part in self._tokenizer.split_special(plain):
            if isinstance(part, int):
                piece = self._tokenizer.piece(part)
                # Without spaces, for what people said may be trimmed before it is put together.
                if piece in source and piece not in "".join("".join(_texts(inputs)).split()):
                    logger.warning(
                        "the chat template writes %s by an operation that is not followed: it is "
                        "encoded as text, not as the control token",
                        piece,
                    )


def _mark_of(index: int) -> str:
    """Return the mark of the input that message `index` is."""
    return chr(ord(OWN) + 1 + index)


def _goes_on(messages: Sequence[Mapping[str, Any]], wanted: bool | None) -> bool:
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
    """Return the fields whose end is gone on from: the content, or else what was thought."""
    if any(text.strip() for text in _texts(message.get("content"))):
        return ["content"]
    return [
        name for name in REASONING if isinstance(message.get(name), str) and message[name].strip()
    ]


def _mark_last(messages: list[dict[str, Any]]) -> None:
    """Mark the text that is gone on from with the mark of its message."""
    last, mark = messages[-1], _mark_of(len(messages) - 1)
    for name in _last_fields(last):
        if isinstance(last[name], str):
            last[name] = Marked(last[name], mark * len(last[name]))
            continue
        for part in last[name]:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] = Marked(part["text"], mark * len(part["text"]))


def _cut(text: str, mark: str) -> str:
    """Return a text up to the last character that is marked."""
    end = marks_of(text).rfind(mark)
    if end < 0:
        raise RequestError(
            "the chat format leaves the last message out, so there is nothing to go on from"
        )
    return text[: end + 1]


def _with_tool_responses(messages: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Put answers of tools that are neither text nor parts where Google's template reads them.

    It takes a dict in a tool's message for a list of parts, and reads `tool_responses` of the
    message with the calls instead.
    """
    if "tool_responses" not in source:
        return messages
    for i, message in enumerate(messages):
        answers = answers_to(messages, i) if message.get("tool_calls") else []
        if "tool_responses" in message or not any(_is_data(m.get("content")) for m in answers):
            continue
        names = {call.get("id"): call["function"]["name"] for call in message["tool_calls"]}
        message["tool_responses"] = [
            {
                "name": answer.get("name") or names.get(answer.get("tool_call_id")),
                "response": answer.get("content"),
            }
            for answer in answers
        ]
    return messages


def _is_data(content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    return isinstance(content, dict) or any(not isinstance(part, dict) for part in parts)


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
