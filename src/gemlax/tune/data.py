"""Training data: lines of a JSONL file to ids and a mask of the tokens that are learnt.

lines.py reads the file and forms.py brings each line to a text or a conversation. The mask is made
of ids, not of text: it covers what the model says and the token that ends its turn, and nothing
that a user, a tool or the template says.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemlax.chat import ChatFormat
from gemlax.errors import Error, RequestError
from gemlax.tokenizer import Tokenizer
from gemlax.tune.forms import Conversation, Texts, example_of, pair_of
from gemlax.tune.lines import read_lines

__all__ = ["Encoder", "Example", "Pair", "digest", "read_examples", "read_pairs"]

_log = logging.getLogger(__name__)
# What the messages before an answer may end with: those of a turn that has begun go on in it.
_ASKING = ("user", "system")


class Example(NamedTuple):
    """Ids of one text, and for each whether it is learnt."""

    ids: list[int]
    learnt: list[bool]


class Pair(NamedTuple):
    """Two answers to one prompt, the better one first."""

    chosen: Example
    rejected: Example


class Encoder:
    """Turns a parsed line into ids; knows the tokenizer and how the model is talked to."""

    def __init__(
        self, tokenizer: Tokenizer | None, chat: ChatFormat | None, *, parse_special: bool = True
    ):
        """Take what a model is talked to with.

        Args:
            chat: None: lines of messages are refused.
            parse_special: read markers in texts as what they name, as a chat template wrote them;
                those in messages are text always.
        """
        if tokenizer is None:
            raise RequestError("this model has no tokenizer, which training on text needs")
        self._tokenizer, self._chat, self._parse_special = tokenizer, chat, parse_special

    def example(self, line: Mapping[str, Any], aside: set[str] | None = None) -> Example:
        """Encode one line; the columns that are not read are added to `aside`."""
        form, rest = example_of(line, chats=self._chat is not None)
        if aside is not None:
            aside |= rest
        return self._encode(form)

    def pair(self, line: Mapping[str, Any], aside: set[str] | None = None) -> Pair:
        """Encode two answers and the prompt before them, likewise."""
        chosen, rejected, rest = pair_of(line, chats=self._chat is not None)
        if aside is not None:
            aside |= rest
        return Pair(self._encode(chosen), self._encode(rejected))

    def _encode(self, form: Texts | Conversation) -> Example:
        return self._texts(form) if isinstance(form, Texts) else self._conversation(form)

    def _texts(self, form: Texts) -> Example:
        """Encode a text, and what follows it, which alone is learnt with the end of the text."""
        tokenizer = self._tokenizer
        how = {"add_bos": False, "parse_special": self._parse_special}
        start = [tokenizer.bos_id]  # one, whether or not the text has it
        if form.prompt is not None:
            start += _without(tokenizer.bos_id, tokenizer.encode(form.prompt, **how))
        rest = tokenizer.encode(form.completion, **how)
        rest = _without(tokenizer.bos_id, rest) if len(start) == 1 else rest
        if rest[-1:] != [tokenizer.eos_id]:
            rest.append(tokenizer.eos_id)
        return Example(start + rest, [False] * len(start) + [True] * len(rest))

    def _conversation(self, form: Conversation) -> Example:
        """Encode a conversation that ends in an answer; the model's turns are learnt.

        The last answer follows the very prompt that `Model.chat` would make of what is before it:
        where that begins the answer with an empty thought, so does this.
        """
        chat, messages = self._chat, form.messages
        if chat is None:
            raise RequestError("this model cannot chat: give prompt and completion, or text")
        last = messages[-1]
        thinks = any(last.get(key) for key in ("reasoning", "reasoning_content")) or None
        whole = chat.encode(messages, form.tools, thinks, answered=True)
        turn = chat.turn_ids()
        learnt = _mask(whole, _turns(whole, turn), form)
        start = _last(whole, turn.opening)
        asked = _asked(messages)
        prompt = chat.encode(messages[:asked], form.tools, thinks) if asked else []
        starts_turn = asked and messages[asked - 1]["role"] in _ASKING
        if starts_turn and whole[: len(prompt)] != prompt and prompt[:start] == whole[:start]:
            # The prompt goes on where the conversation has the answer: an empty thought.
            whole = prompt + whole[start:]
            learnt = learnt[:start] + [False] * (len(prompt) - start) + learnt[start:]
        if form.asked:
            before = prompt
            if form.asked != asked:
                before = chat.encode(messages[: form.asked], form.tools, thinks)
            same = _shared(before, whole)
            learnt = [False] * same + learnt[same:]
        end = next((i for i in reversed(range(len(learnt))) if learnt[i]), -1) + 1
        return Example(whole[: end or None], learnt[: end or None])


def read_examples(
    path: Path, encoder: Encoder, max_length: int, *, truncate: bool = False
) -> list[Example]:
    """Read a file of examples.

    Args:
        max_length: the most tokens of one example.
        truncate: cut longer ones at the end, where otherwise they are an error.
    """

    def encode(line: Mapping[str, Any], aside: set[str]) -> Example:
        return _fit(encoder.example(line, aside), max_length, truncate)

    return list(_encoded(path, encode))


def read_pairs(
    path: Path, encoder: Encoder, max_length: int, *, truncate: bool = False
) -> list[Pair]:
    """Read a file of preferences; arguments and errors as for `read_examples`."""

    def encode(line: Mapping[str, Any], aside: set[str]) -> Pair:
        pair = Pair(*(_fit(one, max_length, truncate) for one in encoder.pair(line, aside)))
        if pair.chosen == pair.rejected:
            raise RequestError('"chosen" and "rejected" have the same tokens: nothing is better')
        return pair

    return list(_encoded(path, encode))


def digest(path: Path) -> str:
    """Return what identifies the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _encoded(path: Path, encode: Callable[[Mapping[str, Any], set[str]], Any]) -> Iterator[Any]:
    aside: set[str] = set()
    for where, line in read_lines(path):
        try:
            yield encode(line, aside)
        except RequestError as error:
            raise Error(f"{where}: {error}") from error
    if aside:
        shown = ", ".join(sorted(name[:80] for name in aside)[:20])
        _log.info("%s: not read: %s%s", path, shown, ", ..." if len(aside) > 20 else "")


def _fit(example: Example, max_length: int, truncate: bool) -> Example:
    if len(example.ids) > max_length:
        if not truncate:
            raise RequestError(
                f"{len(example.ids)} tokens, and --max-length is {max_length}: raise it, shorten "
                "the text, or cut with --truncate"
            )
        example = Example(example.ids[:max_length], example.learnt[:max_length])
    if not any(example.learnt[1:]):
        raise RequestError(f"no token to learn among the {len(example.ids)} of this example")
    return example


# Where the model speaks, from and to, inside each of its turns: tools' answers part them.
Turns = list[list[range]]


def _turns(ids: Sequence[int], turn: Any) -> Turns:
    """Return where the model speaks: its turns with their ends, without tools' answers."""
    found: Turns = []
    opening, i, size = list(turn.opening), 0, len(turn.opening)
    while i < len(ids):
        if list(ids[i : i + size]) != opening:
            i += 1
            continue
        parts: list[range] = []
        start = i = i + size
        while i < len(ids) and ids[i] != turn.close:
            if turn.tool_open is not None and ids[i] == turn.tool_open:
                # The model says once that it waits; what is answered is not its own.
                if i > start or not parts:
                    parts.append(range(start, i + 1))
                rest = ids[i + 1 :]
                i += rest.index(turn.tool_close) + 1 if turn.tool_close in rest else len(rest)
                start = i + 1
            i += 1
        parts.append(range(start, min(i + 1, len(ids))))
        found.append([part for part in parts if part])
        i += 1
    return found


def _mask(ids: Sequence[int], turns: Turns, form: Conversation) -> list[bool]:
    """Say for each id whether it is learnt."""
    mask = [False] * len(ids)
    for parts, learnt in zip(turns, _learnt_turns(turns, form), strict=True):
        for part, is_learnt in zip(parts, learnt, strict=True):
            mask[part.start : part.stop] = [is_learnt] * len(part)
    return mask


def _learnt_turns(turns: Turns, form: Conversation) -> list[list[bool]]:
    """Say for each part of each turn whether it is learnt, by the marks of its messages."""
    spoken = [i for i, message in enumerate(form.messages) if message["role"] == "assistant"]
    if all(form.learnt[i] for i in spoken):
        return [[True] * len(parts) for parts in turns]
    runs: list[list[int]] = []
    for i in spoken:
        between = form.messages[runs[-1][-1] + 1 : i] if runs else []
        if runs and all(message["role"] == "tool" for message in between):
            runs[-1].append(i)
        else:
            runs.append([i])
    if len(runs) != len(turns):
        runs = [[i] for i in spoken]
    if len(runs) != len(turns):
        raise RequestError(
            "not every turn is to be learnt, and this chat template does not write one for each "
            "message of the model"
        )
    found = []
    for parts, run in zip(turns, runs, strict=True):
        marks = [form.learnt[i] for i in run]
        if len(set(marks)) == 1:
            marks = marks[:1] * len(parts)
        elif len(parts) != len(run) or any(form.messages[i]["content"] for i in run[:-1]):
            raise RequestError(
                f"messages[{run[0]}] to messages[{run[-1]}] are one turn of the model's: mark all "
                "of them alike"
            )
        found.append(marks)
    return found


def _asked(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return how many messages are before the last answer."""
    count = len(messages)
    while count and messages[count - 1]["role"] == "assistant":
        count -= 1
    return count


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _without(bos: int, ids: Sequence[int]) -> list[int]:
    return list(itertools.dropwhile(lambda id: id == bos, ids))


def _last(ids: Sequence[int], opening: Sequence[int]) -> int:
    """Return where the text after the last opening begins."""
    size = len(opening)
    for i in reversed(range(len(ids) - size + 1)):
        if tuple(ids[i : i + size]) == tuple(opening):
            return i + size
    raise RequestError("the chat template writes no model turn that can be told by its markers")
