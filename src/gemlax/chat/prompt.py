"""From messages to the ids of a prompt, by the checkpoint's template or a built-in format.

No text in a message or a tool makes a control token: before rendering, each character that can
begin a marker ("<") is replaced by a private-use character that no input holds, and put back when
the pieces between the markers that the format itself wrote are encoded as plain text. So harmless
text gets the ids it would get in the whole string.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gemlax.chat.formats import answers_to, render_gemma3, render_gemma4, strip_thinking
from gemlax.chat.messages import Message, check_tools, normalise, plain_response
from gemlax.chat.parser import CLOSE_CHANNEL, OPEN_CHANNEL, OutputParser
from gemlax.chat.template import Template
from gemlax.errors import RequestError
from gemlax.tokenizer import Tokenizer

__all__ = ["ChatFormat", "TurnIds"]

Messages = Iterable[Mapping[str, Any] | Message]

# What tells the families apart, and what ends an answer. A call that waits for its response ends
# in <|tool_response>.
TURN = {"gemma4": "<|turn>", "gemma3": "<start_of_turn>"}
STOPS = {"gemma4": ("<turn|>", "<|tool_response>"), "gemma3": ("<end_of_turn>",)}
PRIVATE = range(0xF0000, 0xFFFFE)


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
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, *, empty_thought: bool = True
    ):
        """`template`: Jinja source; None: the built-in format. `empty_thought`: see formats.py."""
        self._tokenizer, self._empty_thought = tokenizer, empty_thought
        self.template = Template(template) if template is not None else None
        self.family: Literal["gemma3", "gemma4"] | None = None
        if self._marker(TURN["gemma4"]) is not None:
            self.family = "gemma4"
        elif self._marker(TURN["gemma3"]) is not None:
            self.family = "gemma3"
        stops = [self._marker(piece) for piece in STOPS.get(self.family or "", ())]
        found = [tokenizer.eos_id, *(id for id in stops if id is not None)]
        self.stop_ids = tuple(dict.fromkeys(found))

    def encode(
        self,
        messages: Messages,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        *,
        answered: bool = False,
    ) -> list[int]:
        """Return the ids of the prompt, with exactly one BOS.

        The text of a `Message` object is encoded as the tokens that the model gave, where that
        is the same text: a cache that holds them can be used again. `answered`: return a whole
        conversation, whose last message is an answer, to be trained on.

        Raises:
            RequestError: malformed messages or tools, or what this format cannot say.
        """
        if isinstance(messages, (str, Mapping, Message)):
            raise RequestError('messages must be a list of {"role": ..., "content": ...}')
        given = list(messages)
        found, declared = normalise(given, answered=answered), check_tools(tools)
        self._check(declared, thinking)
        guard = _Guard(self._starts, (found, declared, self._template_source))
        replays = {}
        for one, original in zip(found, given, strict=True):
            if one["role"] == "assistant" and self.family == "gemma4":
                one["content"] = _each_text(one["content"], strip_thinking)
            ids = self._own_ids(original)
            if ids:
                one["content"] = guard.new()
                replays[one["content"]] = ids
        found = [guard.hide(one) for one in found]
        text = self._render(found, guard.hide(declared), thinking, answered)
        return self._ids(text, guard, replays)

    def parser(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> OutputParser:
        """Return the parser of an answer to a prompt of ids."""
        opened, closed = self._marker(OPEN_CHANNEL), self._marker(CLOSE_CHANNEL)
        last = next((id for id in reversed(prompt) if id in (opened, closed)), None)
        return OutputParser(self._tokenizer, stop, in_thought=last is not None and last == opened)

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        thinking: bool | None,
        answered: bool,
    ) -> str:
        if self.template is not None:
            special = {f"{n}_token": self._tokenizer.piece(i) for n, i in self._named().items()}
            told = _for_template(messages, "tool_responses" in self.template.source)
            variables = {"messages": told, "add_generation_prompt": not answered, **special}
            variables |= {"tools": tools or None}
            if thinking is not None:
                variables["enable_thinking"] = thinking
            return self.template.render(variables)
        if self.family == "gemma4":
            return render_gemma4(messages, tools, bool(thinking), self._empty_thought, answered)
        return render_gemma3(messages, answered)

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

    def _check(self, tools: Sequence[Any], thinking: bool | None) -> None:
        """Refuse what would be dropped in silence."""
        source = self._template_source
        if self.template is None and self.family is None:
            raise RequestError(
                "this model cannot chat: its vocabulary has no turn markers (<|turn> or "
                "<start_of_turn>) and the checkpoint no chat template; use generate"
            )
        native = self.template is None and self.family == "gemma4"
        if tools and not native and "tools" not in source:
            raise RequestError("this model's chat format has no tools (Gemma 4 has)")
        if thinking and not native and "enable_thinking" not in source:
            raise RequestError("this model's chat format has no thinking (Gemma 4 has)")

    @property
    def _template_source(self) -> str:
        return "" if self.template is None else self.template.source

    def _named(self) -> dict[str, int]:
        own = self._tokenizer
        return {"bos": own.bos_id, "eos": own.eos_id, "pad": own.pad_id, "unk": own.unk_id}

    def _marker(self, piece: str) -> int | None:
        id = self._tokenizer.id_of(piece)
        return id if id in self._tokenizer.special_ids else None

    @functools.cached_property
    def _starts(self) -> list[str]:
        """The characters that begin a marker."""
        pieces = (self._tokenizer.piece(id) for id in self._tokenizer.special_ids)
        # No letter: the words of our own that hold data together (role, user) stay as they are.
        return sorted({piece[0] for piece in pieces if not piece[0].isalnum()})

    def _own_ids(self, message: Any) -> list[int] | None:
        """Return the ids of a Message's content, if they are one run and say just that, trimmed."""
        if not isinstance(message, Message) or not message.tokens:
            return None
        parser = OutputParser(self._tokenizer)
        try:
            parser.push(message.tokens)
        except RequestError:  # tokens of another vocabulary
            return None
        parser.flush()
        ids, text = list(parser.content_ids or ()), message.content
        if parser.content != text:
            return None
        if self.template is None or "trim" in self.template.source:
            text = text.strip()
            for end in (-1, 0):
                while ids and self._tokenizer.decode([ids[end]]).isspace():
                    ids.pop(end)
        return ids if ids and self._tokenizer.decode(ids) == text == text.strip() else None

    def _ids(self, text: str, guard: "_Guard", replays: Mapping[str, list[int]]) -> list[int]:
        ids: list[int] = []
        for part in self._tokenizer.split_special(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in _split_at(part, replays):
                if piece in replays:
                    ids += replays[piece]
                else:
                    ids += self._tokenizer.encode(guard.show(piece), add_bos=False)
        bos = self._tokenizer.bos_id
        start = next((i for i, id in enumerate(ids) if id != bos), len(ids))
        return [bos, *ids[start:]]


def _for_template(messages: list[dict[str, Any]], native: bool) -> list[dict[str, Any]]:
    """Put answers of tools that are objects where a template can read them.

    Google's template takes a dict in a tool message for a list of parts; `native`: it reads
    objects from `tool_responses` of the message with the calls. Others get JSON.
    """
    for i, message in enumerate(messages):
        answers = list(answers_to(messages, i)) if message.get("tool_calls") else []
        if not any(isinstance(answer["content"], Mapping) for answer in answers):
            continue
        if native:
            message["tool_responses"] = [
                {"name": answer["name"], "response": plain_response(answer["content"])}
                for answer in answers
            ]
        for answer in answers:
            if isinstance(answer["content"], Mapping):
                answer["content"] = json.dumps(answer["content"], ensure_ascii=False)
    return messages


class _Guard:
    """Swaps the characters that begin markers for private ones that the inputs do not hold."""

    def __init__(self, starts: Sequence[str], inputs: Any):
        used: set[str] = set()

        def note(text: str) -> str:
            used.update(text)
            return text

        _each_text(inputs, note)
        self._free = (chr(code) for code in PRIVATE if chr(code) not in used)
        self._hidden = {start: self.new() for start in starts}
        self._to = str.maketrans(self._hidden)
        self._back = str.maketrans({private: start for start, private in self._hidden.items()})

    def new(self) -> str:
        """Return one more character that nothing holds."""
        found = next(self._free, None)
        if found is None:
            raise RequestError("the messages use up all private-use characters of plane 15")
        return found

    def hide(self, value: Any) -> Any:
        """Return a copy with the characters swapped in all text of it."""
        return _each_text(value, lambda text: text.translate(self._to))

    def show(self, text: str) -> str:
        """Put the characters back."""
        return text.translate(self._back)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of nested lists and dicts with each text changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(item, change) for item in value]
    return value


def _split_at(text: str, marks: Iterable[str]) -> list[str]:
    """Split a text into the marks and what is between them."""
    pieces = [text]
    for mark in marks:
        pieces = [p for piece in pieces for p in _around(piece, mark)]
    return [piece for piece in pieces if piece]


def _around(text: str, mark: str) -> list[str]:
    before, found, after = text.partition(mark)
    return [before, mark, *_around(after, mark)] if found else [before]
