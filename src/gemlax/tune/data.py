"""Training data: lines of a JSONL file to ids and a mask of the tokens that are learnt.

A line is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}; for preferences
{"prompt": ..., "chosen": ..., "rejected": ...}. The mask is made of ids, not of text: it covers
what the model says and the token that ends its turn, and nothing that a user, a tool or the
template says.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemlax.chat import ChatFormat
from gemlax.errors import Error, RequestError
from gemlax.tokenizer import Tokenizer

__all__ = ["Encoder", "Example", "Pair", "digest", "read_examples", "read_pairs"]

FORMS = (frozenset({"messages"}), frozenset({"prompt", "completion"}), frozenset({"text"}))
CHAT_KEYS = frozenset({"messages", "tools"})
PAIR = frozenset({"prompt", "chosen", "rejected"})
_SHOWN = 80  # characters of a value that an error quotes


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

    def __init__(self, tokenizer: Tokenizer | None, chat: ChatFormat | None):
        """`chat` None: lines of messages are refused."""
        if tokenizer is None:
            raise RequestError("this model has no tokenizer, which training on text needs")
        self._tokenizer, self._chat = tokenizer, chat

    def example(self, line: Mapping[str, Any]) -> Example:
        """Encode one line.

        Raises:
            RequestError: other keys, or values of other types.
        """
        keys = frozenset(line)
        if keys in (CHAT_KEYS, frozenset({"messages"})):
            return self.conversation(line["messages"], line.get("tools"))
        if keys not in FORMS:
            raise RequestError(
                'expected the keys "messages", or "prompt" and "completion", or "text"; '
                f"got {_quoted(keys)}"
            )
        _check_texts(line)
        if "text" in line:
            ids = [*self._begin(line["text"]), self._tokenizer.eos_id]
            return Example(ids, [False] + [True] * (len(ids) - 1))
        return self.completion(line["prompt"], line["completion"])

    def pair(self, line: Mapping[str, Any]) -> Pair:
        """Encode a prompt (a text, or messages) and two answers, which are texts.

        Raises:
            RequestError: other keys, or values of other types.
        """
        if frozenset(line) != PAIR:
            raise RequestError(
                'expected the keys "prompt", "chosen" and "rejected"; '
                f"got {_quoted(frozenset(line))}"
            )
        prompt = line["prompt"]
        _check_texts({k: v for k, v in line.items() if k != "prompt" or not isinstance(v, list)})
        both = []
        for answer in (line["chosen"], line["rejected"]):
            if isinstance(prompt, list):
                said = [*prompt, {"role": "assistant", "content": answer}]
                both.append(self.conversation(said, last_only=True))
            else:
                both.append(self.completion(prompt, answer))
        return Pair(*both)

    def completion(self, prompt: str, completion: str) -> Example:
        """Encode a text and what follows it, which alone is learnt, with the end of the text."""
        start = self._begin(prompt)
        rest = [*self._tokenizer.encode(completion, add_bos=False), self._tokenizer.eos_id]
        return Example(start + rest, [False] * len(start) + [True] * len(rest))

    def conversation(self, messages: Any, tools: Any = None, *, last_only: bool = False) -> Example:
        """Encode a conversation that ends in an answer; all the model's turns are learnt.

        The last answer follows the very prompt that `Model.chat` would make of what is before it:
        where that begins the answer with an empty thought, so does this.

        Raises:
            RequestError: malformed messages, or a model that cannot chat.
        """
        chat = self._chat
        if chat is None:
            raise RequestError("this model cannot chat: give prompt and completion, or text")
        if not isinstance(messages, list):
            raise RequestError(f'"messages" must be a list, got {_short(messages)}')
        last = messages[-1] if messages else None
        thinks = isinstance(last, Mapping) and any(
            last.get(key) for key in ("reasoning", "reasoning_content")
        )
        whole = chat.encode(messages, tools, thinks or None, answered=True)
        prompt = chat.encode(messages[:-1], tools, thinks or None)
        turn = chat.turn_ids()
        learnt = _model_turns(whole, turn)
        start = _last(whole, turn.opening)
        if whole[: len(prompt)] != prompt and prompt[:start] == whole[:start]:
            # The prompt goes on where the conversation has the answer: an empty thought.
            whole = prompt + whole[start:]
            learnt = learnt[:start] + [False] * (len(prompt) - start) + learnt[start:]
        if last_only:
            learnt = [False] * len(prompt) + learnt[len(prompt) :]
        end = next((i for i in reversed(range(len(learnt))) if learnt[i]), -1) + 1
        return Example(whole[: end or None], learnt[: end or None])

    def _begin(self, text: str) -> list[int]:
        """Encode a text after exactly one BOS."""
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text, add_bos=False)]


def read_examples(
    path: Path, encoder: Encoder, max_length: int, *, truncate: bool = False
) -> list[Example]:
    """Read a file of examples.

    Args:
        max_length: the most tokens of one example.
        truncate: cut longer ones at the end, where otherwise they are an error.

    Raises:
        Error: names file and line: broken JSON, keys, values, an example that is too long or of
            which nothing is learnt, or an empty file.
    """

    def encode(line: Mapping[str, Any]) -> Example:
        return _fit(encoder.example(line), max_length, truncate)

    return list(_lines(path, encode))


def read_pairs(
    path: Path, encoder: Encoder, max_length: int, *, truncate: bool = False
) -> list[Pair]:
    """Read a file of preferences; arguments and errors as for `read_examples`."""

    def encode(line: Mapping[str, Any]) -> Pair:
        return Pair(*(_fit(one, max_length, truncate) for one in encoder.pair(line)))

    return list(_lines(path, encode))


def digest(path: Path) -> str:
    """Return what identifies the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _lines(path: Path, encode: Callable[[Mapping[str, Any]], Any]) -> Iterator[Any]:
    found = False
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                line = json.loads(raw.decode("utf-8"))
                if not isinstance(line, dict):
                    raise RequestError(f"expected a JSON object, got {_short(line)}")
                yield encode(line)
            except UnicodeDecodeError as error:
                raise Error(f"{path}, line {number}: not UTF-8: {error.reason}") from error
            except (json.JSONDecodeError, RecursionError) as error:
                raise Error(f"{path}, line {number}: not JSON: {error}") from error
            except RequestError as error:
                raise Error(f"{path}, line {number}: {error}") from error
            found = True
    if not found:
        raise Error(f"{path} is empty: expected one JSON object per line")


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


def _model_turns(ids: Sequence[int], turn: Any) -> list[bool]:
    """Say for each id whether the model says it: its turns with their ends, not tools' answers."""
    learnt, inside, i = [False] * len(ids), False, 0
    opening = list(turn.opening)
    while i < len(ids):
        if not inside and list(ids[i : i + len(opening)]) == opening:
            inside, i = True, i + len(opening)
            continue
        learnt[i] = inside
        if inside and ids[i] == turn.close:
            inside = False
        elif inside and turn.tool_open is not None and ids[i] == turn.tool_open:
            # The model says that it waits; the answer is not its own.
            rest = ids[i + 1 :]
            i += rest.index(turn.tool_close) + 1 if turn.tool_close in rest else len(rest)
        i += 1
    return learnt


def _last(ids: Sequence[int], opening: Sequence[int]) -> int:
    """Return where the text after the last opening begins."""
    size = len(opening)
    for i in reversed(range(len(ids) - size + 1)):
        if tuple(ids[i : i + size]) == tuple(opening):
            return i + size
    raise RequestError("the chat template writes no model turn that can be told by its markers")


def _check_texts(line: Mapping[str, Any]) -> None:
    for key, value in line.items():
        if not isinstance(value, str):
            raise RequestError(f'"{key}" must be a text, got {_short(value)}')


def _quoted(keys: frozenset[str]) -> str:
    return ", ".join(f'"{key[:_SHOWN]}"' for key in sorted(keys)[:10]) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
