"""Cases of docs/compatibility.md: tokenizers, chat templates, generation_config.json."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import sentencepiece
import tokenizers
from compatibility import Case, Read
from disk import gguf_tensors, random_weights, write_gguf
from vocabularies import (
    TOY_IDS,
    TOY_MERGES,
    TOY_PIECES,
    TOY_SCORES,
    TOY_TYPES,
    chat_tokenizer,
    toy,
)

import gemlax
from gemlax.chat import ChatFormat
from gemlax.checkpoints import open_checkpoint
from gemlax.generation.defaults import read_defaults, tell
from gemlax.tokenizer import find_chat_template
from gemlax.tokenizer.spm import write_model
from gemlax.tokenizer.vocabulary import Vocabulary

__all__ = ["CASES"]

TOKENIZER, TEMPLATE = "Tokenizers", "Chat templates"
SETTING = "Keys of generation_config.json"
SPM, FAST = "the sentencepiece package", "the tokenizers package"
TEXTS = ["hello world", " hello  world ", "hell<b>or</b>\n\n", "éß中 \n x", "", "<bo s> ▁▁"]
MORE = len(TOY_PIECES)
BOM = b"\xef\xbb\xbf"


# Tokenizers.


def toy_model() -> bytes:
    return write_model(
        Vocabulary.create(TOY_PIECES, TOY_TYPES, **TOY_IDS, add_bos=True), TOY_SCORES
    )


def fast(path: Path) -> Callable[[str], list[int]]:
    """Return what the tokenizers package makes of text, in which no marker is one."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def sentences(data: bytes) -> Callable[[str], list[int]]:
    return sentencepiece.SentencePieceProcessor(model_proto=data).encode


def same_ids(given: Path, oracle: Callable[[str], list[int]]) -> Read:
    tokenizer = gemlax.load_tokenizer(given)
    found = {text: tokenizer.encode(text, add_bos=False) for text in TEXTS}
    return Read(found, {text: oracle(text) for text in TEXTS})


def edited_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write the toy's tokenizer.json, changed."""
    toy(merges=TOY_MERGES).save(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    return path


def json_file(folder: Path, change: Callable[[dict[str, Any]], Any] = len) -> Read:
    """Compare a tokenizer.json with what the tokenizers package makes of it."""
    return same_ids(folder, fast(edited_json(folder, change)))


def model_file(folder: Path, name: str = "tokenizer.model") -> Read:
    (folder / name).write_bytes(toy_model())
    return same_ids(folder if name == "tokenizer.model" else folder / name, sentences(toy_model()))


def added(folder: Path, name: str, content: Any) -> Read:
    """Add tokens beside a tokenizer.model; they are found whole."""
    (folder / "tokenizer.model").write_bytes(toy_model())
    (folder / name).write_text(json.dumps(content))
    tokenizer = gemlax.load_tokenizer(folder)
    hello = sentences(toy_model())("hello")
    found = tokenizer.encode("hello<tool>hello", add_bos=False, parse_special=True)
    return Read(found, [*hello, MORE, *hello])


def marked(folder: Path) -> Read:
    toy(merges=TOY_MERGES).save(folder)
    ids = fast(folder / "tokenizer.json")
    for path in folder.iterdir():
        path.write_bytes(BOM + path.read_bytes())
    return same_ids(folder, ids)


def relabelled(content: dict[str, Any]) -> None:
    """Take the markers out of the added tokens."""
    kept = [t for t in content["added_tokens"] if "_of_turn>" not in t["content"]]
    content["added_tokens"] = kept


def plain_marker(folder: Path) -> Read:
    edited_json(folder, relabelled)
    found = gemlax.load_tokenizer(folder).encode("<end_of_turn>", parse_special=True)
    return Read(found[1:], [TOY_PIECES.index("<end_of_turn>")])


def vocabulary_of(**changes: Any) -> dict[str, Any]:
    """Return the toy as GGUF metadata, filled up to the rows of the table."""
    rest = 512 - MORE
    own: dict[str, Any] = {
        "tokens": TOY_PIECES + [f"<unused{i}>" for i in range(1, rest + 1)],
        "scores": TOY_SCORES + [-1e4] * rest, "token_type": TOY_TYPES + [3] * rest,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in (own | changes).items()}


def gguf_file(folder: Path, oracle: str, **changes: Any) -> Read:
    """Compare a GGUF vocabulary with the oracle's ids of the same pieces."""
    extra = vocabulary_of(**changes)
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    if oracle == SPM:
        return same_ids(path, sentences(toy_model()))
    toy(merges=TOY_MERGES).save(folder / "t")
    return same_ids(path, fast(folder / "t" / "tokenizer.json"))


def twice(folder: Path) -> Read:
    """Have a piece twice, as Google's own QAT files of Gemma 4 do."""
    pieces = [*TOY_PIECES, "hello", *(f"<unused{i}>" for i in range(1, 512 - MORE))]
    types = [*TOY_TYPES, 1, *[3] * (511 - MORE)]
    extra = vocabulary_of(tokens=pieces, token_type=types)
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    tokenizer = gemlax.load_tokenizer(path)
    both = tokenizer.decode([TOY_PIECES.index("hello"), MORE])
    return Read((tokenizer.encode("hello", add_bos=False), both), ([MORE], "hellohello"))


def strips(folder: Path) -> Read:
    """Add a token that takes in the blanks beside it."""
    toy(merges=TOY_MERGES).save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True)])
    said = {str(MORE): {"content": "<tool>", "special": True, "lstrip": True, "rstrip": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": said}))
    text = "hello  <tool>  hello"
    found = gemlax.load_tokenizer(folder).encode(text, add_bos=False, parse_special=True)
    return Read(found, backend.encode(text, add_special_tokens=False).ids)


def holes(folder: Path) -> Read:
    edited_json(folder, lambda c: c["model"]["vocab"].update(more=MORE + 1))
    tokenizer = gemlax.load_tokenizer(folder)
    return Read((tokenizer.decode([MORE, MORE + 1]), tokenizer.unused_ids), ("more", {MORE}))


def normal_markers(folder: Path) -> Read:
    """Type the markers of turns as ordinary pieces, as some converters did."""
    types = [1 if "_of_turn" in p else t for p, t in zip(TOY_PIECES, TOY_TYPES, strict=True)]
    extra = vocabulary_of(token_type=types + [3] * (512 - MORE))
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    with open_checkpoint(path) as checkpoint:
        chat = ChatFormat(checkpoint.tokenizer())
    return Read((chat.family, chat.stop_ids), ("gemma3", (1, TOY_PIECES.index("<end_of_turn>"))))


def refused_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    gemlax.load_tokenizer(edited_json(folder, change))


def other_kind(folder: Path) -> None:
    extra = {"tokenizer.ggml.model": "gpt2"}
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer() is None


def strings(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


TOOL = {"content": "<tool>", "special": True}
TOKENIZERS = [
    Case(TOKENIZER, "tokenizer.json", json_file, oracle=FAST),
    Case(TOKENIZER, "tokenizer.json, merges as strings", partial(json_file, change=strings),
         oracle=FAST),
    Case(TOKENIZER, "tokenizer.json, `ignore_merges`", oracle=FAST,
         check=partial(json_file, change=lambda c: c["model"].update(ignore_merges=True))),
    Case(TOKENIZER, "tokenizer.json with truncation and padding", oracle=FAST,
         check=partial(json_file, change=lambda c: c.update(
             truncation={"max_length": 99, "strategy": "LongestFirst", "stride": 0,
                         "direction": "Right"}))),
    Case(TOKENIZER, "tokenizer.json whose markers are no added tokens", plain_marker, "loads",
         log="markers"),
    Case(TOKENIZER, "tokenizer.model", model_file, oracle=SPM),
    Case(TOKENIZER, "a `.model` file by another name", partial(model_file, name="gemma.model"),
         oracle=SPM),
    Case(TOKENIZER, "tokenizer.model and added_tokens.json", oracle=SPM,
         check=partial(added, name="added_tokens.json", content={"<tool>": MORE})),
    Case(TOKENIZER, "tokenizer.model and `added_tokens_decoder`", oracle=SPM,
         check=partial(added, name="tokenizer_config.json",
                       content={"added_tokens_decoder": {str(MORE): TOOL}})),
    Case(TOKENIZER, "a byte order mark before each file (Windows)", marked, oracle=FAST),
    Case(TOKENIZER, "GGUF, scores", partial(gguf_file, oracle=SPM), oracle=SPM),
    Case(TOKENIZER, "GGUF, merges", oracle=FAST,
         check=partial(gguf_file, oracle=FAST, model="gemma4", merges=TOY_MERGES)),
    Case(TOKENIZER, "GGUF, byte pieces typed NORMAL", oracle=SPM,
         check=partial(gguf_file, oracle=SPM, token_type=[
             *(1 if kind == 6 else kind for kind in TOY_TYPES), *[3] * (512 - MORE)])),
    Case(TOKENIZER, "GGUF, a piece twice", twice, "loads", "the last id counts",
         log="several ids"),
    Case(TOKENIZER, "an added token that strips its sides", strips, oracle=FAST),
    Case(TOKENIZER, "ids with holes", holes, "loads", "an id without a piece is never made"),
    Case(TOKENIZER, "GGUF, markers of turns typed NORMAL", normal_markers, "loads",
         "they are markers, and the end of a turn stops"),
    Case(TOKENIZER, "GGUF of another kind (gpt2): ids in, ids out", verdict="loads",
         log="no tokenizer", check=other_kind),
    Case(TOKENIZER, "no merges", verdict="refused", error="has no merges",
         check=partial(refused_json, change=lambda c: c["model"].update(merges=[]))),
    Case(TOKENIZER, "tokenizer.json of another kind (WordLevel)", verdict="refused",
         error="not BPE", check=partial(refused_json, change=lambda c: c.update(
             model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}))),
    Case(TOKENIZER, "an added token with the id of another", verdict="refused", error="<unused0>",
         check=partial(added, name="added_tokens.json", content={"<tool>": 6})),
]  # fmt: skip


# Chat templates.

SOURCE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ASKED = [{"role": "user", "content": " a < b\n"}]
WITH_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
NO_TEMPLATE = "<bos><start_of_turn>user\na < b<end_of_turn>\n<start_of_turn>model\n"
CONFIG_FILE = "tokenizer_config.json"


def rendered(template: Any, source: str, tools: Any = None) -> Read:
    """Compare the ids of a prompt with those of what jinja2 itself writes."""
    tokenizer = chat_tokenizer("gemma3")
    found = ChatFormat(tokenizer, template).encode(ASKED, tools)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    text = environment.from_string(source).render(
        bos_token="<bos>", messages=ASKED, tools=tools, add_generation_prompt=True
    )
    return Read(found, tokenizer.encode(text, add_bos=False, parse_special=True))


def template_in(folder: Path, file: str, content: Any, tools: Any = None,
                source: str = SOURCE) -> Read:  # fmt: skip
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return rendered(find_chat_template(folder), source, tools)


def template_in_gguf(folder: Path, extra: dict[str, Any]) -> Read:
    path = write_gguf(folder / "m.gguf", gguf_tensors(random_weights()), extra=extra)
    with open_checkpoint(path) as checkpoint:
        return rendered(checkpoint.chat_template, SOURCE)


def built_in(folder: Path, content: str | None = None) -> Read:
    if content is not None:
        (folder / "chat_template.jinja").write_text(content)
    tokenizer = chat_tokenizer("gemma3")
    found = ChatFormat(tokenizer, find_chat_template(folder)).encode(ASKED)
    return Read(found, tokenizer.encode(NO_TEMPLATE, add_bos=False, parse_special=True))


def template_case(kind: str, file: str, content: Any, **how: Any) -> Case:
    said = {key: how.pop(key) for key in ("log", "error", "verdict") if key in how}
    check = partial(template_in, file=file, content=content, **how)
    return Case(TEMPLATE, kind, check, oracle="" if "error" in said else "jinja2", **said)


def named(**sources: str) -> list[dict[str, str]]:
    return [{"name": name, "template": source} for name, source in sources.items()]


TEMPLATES = [
    template_case("chat_template.jinja", "chat_template.jinja", SOURCE),
    template_case("in tokenizer_config.json", CONFIG_FILE, {"chat_template": SOURCE}),
    template_case("chat_template.json", "chat_template.json", {"chat_template": SOURCE}),
    template_case("processor_config.json", "processor_config.json", {"chat_template": SOURCE}),
    template_case("several by name: the default", CONFIG_FILE,
                  {"chat_template": named(rag="x", default=SOURCE)}),
    template_case("several by name: tool_use, where there are tools", CONFIG_FILE,
                  {"chat_template": named(default="x", tool_use=SOURCE)}, tools=WITH_TOOLS),
    template_case("one with another name", CONFIG_FILE, {"chat_template": named(chat=SOURCE)},
                  log="the only chat template, chat, is used"),
    template_case("additional_chat_templates/", "additional_chat_templates/tool_use.jinja", SOURCE,
                  tools=WITH_TOOLS, log="tool_use"),
    Case(TEMPLATE, "GGUF, tokenizer.chat_template", oracle="jinja2",
         check=partial(template_in_gguf, extra={"tokenizer.chat_template": SOURCE})),
    Case(TEMPLATE, "GGUF, a named one beside it", oracle="jinja2",
         check=partial(template_in_gguf, extra={"tokenizer.chat_template": SOURCE,
                                                "tokenizer.chat_template.rag": "x"})),
    template_case("that looks at the content", "chat_template.jinja",
                  SOURCE + "{{ messages[0].content.split('<') | length }}",
                  source=SOURCE + "{{ messages[0].content.split('<') | length }}"),
    Case(TEMPLATE, "none: the built-in format", built_in, "loads", "Gemma 3's own text"),
    Case(TEMPLATE, "an empty one", partial(built_in, content="\n"), "loads", "Gemma 3's own text",
         log="is empty"),
    template_case("with a syntax error", "chat_template.jinja", "{% for m in messages %}",
                  verdict="refused", error="TemplateSyntaxError"),
    template_case("that calls raise_exception", "chat_template.jinja",
                  "{{ raise_exception('roles must alternate') }}", verdict="refused",
                  error="roles must alternate"),
    template_case("that reaches for Python's insides", "chat_template.jinja",
                  "{{ ''.__class__.__mro__ }}", verdict="refused", error="SecurityError"),
    template_case("that is neither text nor a list", CONFIG_FILE, {"chat_template": 3},
                  verdict="refused", error="must be a string"),
]  # fmt: skip


# Keys of generation_config.json.

NOTHING = read_defaults({}, MORE)


def applied(folder: Path, said: dict[str, Any], want: dict[str, Any]) -> Read:
    """Compare what differs from the defaults of an empty file."""
    defaults = read_defaults(said, MORE, "generation_config.json")
    tell(defaults, toy(), "generation_config.json")
    before = NOTHING._asdict() | NOTHING.sampling
    found = defaults._asdict() | defaults.sampling
    changed = {key: found[key] for key in found if found[key] != before[key] and key != "sampling"}
    changed.pop("not_applied", None)
    changed.pop("unknown", None)
    return Read(changed | {"": 0}, want | {"": 0})


def setting(said: dict[str, Any], log: str = "", error: str = "", **want: Any) -> Case:
    kind = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in said.items())
    note = "" if log or error else "applied" if want else "changes nothing, as in transformers"
    verdict = "refused" if error else "loads"
    return Case(SETTING, kind, partial(applied, said=said, want=want), verdict, note, log, error)


DRAWS = {"do_sample": True}
SETTINGS = [
    setting(DRAWS, temperature=1.0, top_k=50),
    setting(DRAWS | {"temperature": 0.7}, temperature=0.7, top_k=50),
    setting(DRAWS | {"top_k": 64, "top_p": 0.95}, temperature=1.0, top_k=64, top_p=0.95),
    setting(DRAWS | {"top_k": 0, "min_p": 0.1}, temperature=1.0, min_p=0.1),
    setting({"do_sample": False, "temperature": 0.7}),
    setting({"repetition_penalty": 1.2}, repetition_penalty=1.2),
    setting({"no_repeat_ngram_size": 3}, no_repeat_ngram_size=3),
    setting({"bad_words_ids": [[7, 8]]}, bad_words=[[7, 8]]),
    setting({"sequence_bias": [[[20], -10.0]]}, sequence_bias={(20,): -10.0}),
    setting({"suppress_tokens": [7]}, suppress=[7]),
    setting({"begin_suppress_tokens": [7]}, begin_suppress=[7]),
    setting({"max_new_tokens": 20}, max_new_tokens=20),
    setting({"max_length": 99}, max_length=99),
    setting({"min_new_tokens": 2}, min_new_tokens=2),
    setting({"min_length": 30}, min_length=30),
    setting({"stop_strings": ["###"]}, stop=["###"]),
    setting({"eos_token_id": [1, 5]}, stop_ids=[1, 5]),
    setting({"num_beams": 1, "typical_p": 1.0, "use_cache": True}),
    *(
        setting({key: value}, log=f"{key}={value!r}")
        for key, value in {
            "num_beams": 4, "num_return_sequences": 2, "typical_p": 0.9, "eta_cutoff": 0.001,
            "epsilon_cutoff": 0.01, "guidance_scale": 1.5, "penalty_alpha": 0.6,
            "exponential_decay_length_penalty": [5, 1.1], "encoder_repetition_penalty": 1.1,
            "forced_eos_token_id": 1, "watermarking_config": {"bias": 2.5}, "max_time": 3.0,
        }.items()
    ),
    setting({"presence": 1}, log="not known, left aside: presence"),
    setting({"temperature": "hot"}, error="temperature"),
    setting({"top_p": 1.5}, error="top_p"),
    setting({"suppress_tokens": [-1]}, error="suppress_tokens"),
]  # fmt: skip

CASES = [*TOKENIZERS, *TEMPLATES, *SETTINGS]
