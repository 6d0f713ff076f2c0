"""The model a user holds: config, tokenizer, decoder; load, quantize, save, score, generate."""

import dataclasses
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemlax import adapters as lora
from gemlax import checkpoints, ops
from gemlax import tokenizer as tokenizers
from gemlax.adapters import DEFAULT, Choice
from gemlax.chat import ChatFormat, Message
from gemlax.checkpoints import gguf
from gemlax.checkpoints.mistakes import refuse_stand_ins
from gemlax.config import GemmaConfig
from gemlax.decoder import Decoder, Layers
from gemlax.engine import (
    MAX_STEPS,
    Engine,
    PrefixCache,
    Programs,
    Request,
    bucket,
    free_memory,
)
from gemlax.errors import RequestError, UnsupportedError, check_int
from gemlax.generation import (
    Completion,
    Prompt,
    Reply,
    RequestBatch,
    SamplingSettings,
    Session,
    Stream,
    as_ids,
    check_ids,
    read_prompts,
    read_settings,
    spelled_marker,
)
from gemlax.generation.answers import Answer, TokenLogprob, drive
from gemlax.generation.defaults import read_defaults, tell
from gemlax.generation.forms import chat_grammar
from gemlax.generation.settings import describe
from gemlax.grammar import ChatGrammar, Grammar, ToolChoice
from gemlax.ops.storage import Storage
from gemlax.options import check_options, choose_layout, read_dtype
from gemlax.quantization import (
    Rules,
    Texts,
    codes_of,
)
from gemlax.scoring import Score, label_logprobs, top_label_logprobs, windows
from gemlax.sharding import Layout
from gemlax.tokenizer import TextStream, Tokenizer
from gemlax.tokenizer.load import FILES as TOKENIZER_FILES
from gemlax.weights import build_decoder

__all__ = ["Model", "Score", "load", "load_tokenizer"]

_log = logging.getLogger(__name__)
# Tokens of a text that are scored together; each sees at least half as many before it.
_SCORE_WINDOW = 2048


class Model:
    """A Gemma model: `load` makes one.

    Attributes:
        config: a `GemmaConfig`.
        tokenizer: a `Tokenizer`, or None when the checkpoint has none (ids in, ids out).
        decoder: the NNX module with the weights. They are read at load; do not change them.
        generation_config: the checkpoint's defaults for `generate`, by Hugging Face's names.
        chat_template: the checkpoint's own Jinja template, or several by name; None: the built-in
            format is used.
        mesh: over which the decoder's weights lie, or None.
        kv_cache: how caches are held, as for `load`.
        implementation: of stored weights and of attention, as for `load`.
        adapters: by name, those that `generate(adapter=...)` chooses from; `load` puts them there.
        programs: the compiled programs, which all its engines share.
        prefix_cache: what chats and sessions begin with, so that the next one that begins so need
            not be prefilled. It may take a tenth of the memory that was free (`budget`, in bytes; 0
            turns it off). None on a mesh.
    """

    def __init__(
        self,
        config: GemmaConfig,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        *,
        mesh: Mesh | None = None,
        kv_cache: Storage = None,
        implementation: ops.Backend | None = None,
        adapters: Mapping[str, lora.Stored] | None = None,
    ):
        self.adapters = dict(adapters or {})
        self._told = False  # that markers in a prompt are plain text
        self.layout = Layout(mesh, implementation)
        self.implementation = self.layout.implementation
        self.config, self.decoder, self.tokenizer = config, decoder, tokenizer
        self.chat_template = chat_template
        self.generation_config = dict(generation_config or {})
        self.mesh, self.kv_cache = mesh, kv_cache
        self.dtype = decoder.dtype
        known = tokenizer.num_tokens if tokenizer else config.text.num_ids
        while tokenizer and known - 1 in tokenizer.unused_ids:
            known -= 1
        self.programs = Programs(
            decoder, num_tokens=min(known, config.text.num_ids), dtype=self.dtype, mesh=mesh,
            storage=kv_cache, implementation=implementation, adapters=tuple(self.adapters),
        )  # fmt: skip
        self.prefix_cache = PrefixCache(free_memory() // 10) if mesh is None else None
        graphdef, self._state = nnx.split(decoder)

        def jit(function: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
            def whole(state: Any, tokens: Array, positions: Array, rows: Array | None) -> Any:
                decoder = nnx.merge(graphdef, state)
                hidden = decoder(tokens, positions, adapter_rows=rows)[0]
                return function(decoder, hidden, tokens)

            return self.layout.jit(whole, shardings)

        self._hidden = jit(lambda decoder, hidden, tokens: hidden)
        self._logits = jit(lambda decoder, hidden, tokens: decoder.logits(hidden))
        self._score = jit(
            lambda decoder, hidden, tokens: label_logprobs(
                decoder, hidden[:, :-1], tokens[:, 1:], tokens[:, 1:] >= 0, layout=self.layout
            ),
            self.layout.replicated,
        )
        self._top_logprobs = jit(
            lambda decoder, hidden, tokens: top_label_logprobs(
                decoder, hidden[:, :-1], tokens[:, 1:]
            ),
            self.layout.replicated,
        )

    def __reduce__(self) -> Any:
        raise UnsupportedError(
            "a Model cannot be pickled: it holds compiled programs and the memory of its devices; "
            "let the other process load it. Its tokenizer can be pickled: use that alone"
        )

    def __copy__(self) -> "Model":
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def hidden(
        self,
        tokens: Int[Any, "B T"],
        lengths: Sequence[int] | None = None,
        *,
        adapter: Choice = DEFAULT,
    ) -> Float[Array, "B T D"]:
        """Return the hidden states after the final norm; rows are right-padded to `lengths`."""
        padded = self._padded(tokens, lengths)
        return self._hidden(self._state, *padded, self._entries(adapter, len(padded[0])))

    def logits(
        self,
        tokens: Int[Any, "B T"],
        lengths: Sequence[int] | None = None,
        *,
        adapter: Choice = DEFAULT,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits, without a cache; rows are right-padded to `lengths`.

        Raises:
            RequestError: tokens that are not ids of [B, T], lengths that do not fit, or an adapter
                that is not there.
        """
        padded = self._padded(tokens, lengths)
        return self._logits(self._state, *padded, self._entries(adapter, len(padded[0])))

    def _entries(self, adapter: Choice, batch: int) -> Array | None:
        chosen = lora.entries(tuple(self.adapters), adapter, batch)
        return self.programs.put(np.asarray(chosen, np.int32)) if self.adapters else None

    def _padded(self, tokens: Any, lengths: Any) -> tuple[Array, Array]:
        ids = np.asarray(tokens)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            raise RequestError(
                f"tokens must be integer ids [B, T], got {ids.dtype} of shape {list(ids.shape)}"
            )
        batch, width = ids.shape
        lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
        if lengths.shape != (batch,) or lengths.min() < 1 or lengths.max() > width:
            raise RequestError(f"lengths must be {batch} numbers in [1, {width}], got {lengths}")
        columns = np.arange(width)
        valid = columns[None] < lengths[:, None]
        check_ids(ids[valid], self.config.text, self.tokenizer)
        positions = np.where(valid, columns[None], ops.EMPTY).astype(np.int32)
        return self.programs.put((np.where(valid, ids, 0).astype(np.int32), positions))

    def score(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        window: int = _SCORE_WINDOW,
        parse_special: bool = False,
        adapter: str | None = DEFAULT,
    ) -> Score | list[Score]:
        """Return the log-likelihood of each text, given its first token (BOS for a str).

        A text longer than `window` tokens is scored in windows that overlap by half, so every
        token beyond the first window sees about window / 2 tokens before it. Each window starts
        with the text's BOS: without it Gemma's likelihoods are far off (docs/log.md).
        """
        prompts = self._ids(texts, parse_special)
        window = min(check_int("window", window, 2), self.config.text.max_position_embeddings)
        rows = self._entries(adapter, 1)
        totals = [self._score_one(np.asarray(ids, np.int32), window, rows) for ids in prompts]
        return totals[0] if isinstance(texts, str) else totals

    def _score_one(self, ids: np.ndarray, window: int, rows: Array | None) -> Score:
        total, count = 0.0, 0
        for piece, new in windows(ids, window, self.config.bos_token_id):
            row = np.zeros((1, bucket(len(piece), 16)), np.int32)
            row[0, : len(piece)] = piece
            tokens, positions = self._padded(row, [len(piece)])
            logprobs = np.asarray(self._score(self._state, tokens, positions, rows), np.float64)[0]
            total += float(logprobs[len(piece) - 1 - new : len(piece) - 1].sum())
            count += new
        return Score(total, count)

    def prompt_logprobs(
        self, prompt: Sequence[int], top: int = 0, *, adapter: str | None = DEFAULT
    ) -> list[TokenLogprob]:
        """Return the log-probability of each token of a prompt, given all before it.

        The first one has none (NaN). `top`: how many of the likeliest tokens are reported.
        """
        (ids,) = read_prompts([prompt], self.tokenizer, self.config.text)
        row = np.zeros((1, bucket(len(ids), 16)), np.int32)
        row[0, : len(ids)] = ids
        padded = self._padded(row, [len(ids)])
        scores = self._top_logprobs(self._state, *padded, self._entries(adapter, 1))
        label_logprobs, top_ids, top_values = (np.asarray(x)[0].tolist() for x in scores)
        logprobs = [TokenLogprob(ids[0], float("nan"), {})]
        rows = zip(ids[1:], label_logprobs, top_ids, top_values, strict=False)
        for token, logprob, *likeliest in rows:
            # Rows of the table without a token are not the text's.
            pairs = [
                (i, p) for i, p in zip(*likeliest, strict=True) if i < self.programs.num_tokens
            ]
            logprobs.append(TokenLogprob(token, logprob, dict(pairs[:top])))
        return logprobs

    def generate(
        self, prompt: Prompt, settings: SamplingSettings | None = None, **changes: Any
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        Args:
            prompt: a str, a list of str, or a list of lists of ids. A str gets one BOS.
            settings: how; None: as the checkpoint's generation_config says.
            **changes: settings by name, as in `generate(prompt, temperature=0.7)`.

        Raises:
            RequestError: a setting outside its range, or a prompt that does not fit.

        The settings:
        """
        chosen = read_settings(settings, changes)
        batch = self.requests(self._ids(prompt, chosen.parse_special), chosen)
        answers = [self._answer(batch, request) for request in batch.requests]
        texts = dict.fromkeys(map(id, answers), "")
        for answer, piece in drive(
            self._engine(len(answers), *batch.requests), answers, itertools.repeat(MAX_STEPS)
        ):
            if answer.parser is not None:
                texts[id(answer)] += piece
        completions = [answer.completion(texts[id(answer)]) for answer in answers]
        return completions[0] if isinstance(prompt, str) else completions

    generate.__doc__ = inspect.cleandoc(generate.__doc__ or "") + "\n" + describe()

    def _engine(self, slots: int, *requests: Request, chat: bool = False) -> Engine:
        """Return an engine with room for requests; it grows when longer ones come."""
        capacity = max((request.max_length for request in requests), default=1)
        prefixes = self.prefix_cache if chat and self.prefix_cache else None
        return Engine(self.programs, slots, capacity, prefix_cache=prefixes)

    def _answer(self, batch: RequestBatch, request: Request) -> Answer:
        stream = TextStream(self.tokenizer, batch.stop) if self.tokenizer else None
        return Answer(request, stream, batch.num_logprobs)

    def stream(
        self,
        prompt: str | Sequence[int],
        settings: SamplingSettings | None = None,
        **changes: Any,
    ) -> Stream:
        """Generate for one prompt and yield the text piece by piece; settings as for `generate`."""
        chosen = read_settings(settings, changes)
        one: Prompt = prompt if isinstance(prompt, str) else [prompt]
        batch = self.requests(self._ids(one, chosen.parse_special), chosen)
        (request,) = batch.requests
        return Stream(self._engine(1, request), self._answer(batch, request))

    def chat(
        self,
        messages: Iterable[Mapping[str, Any] | Message],
        *,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        stream: bool = False,
        continue_final_message: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | Grammar | None = None,
        settings: SamplingSettings | None = None,
        **changes: Any,
    ) -> Message | Reply:
        """Answer a conversation.

        Args:
            messages: {"role", "content", ...} as in OpenAI and transformers; roles system,
                developer, user, assistant, model and tool, or what the checkpoint's template
                takes. An answer is appended as it is. No text in them is read as a control token.
            tools: function declarations with a JSON schema (Gemma 4).
            thinking: let the model reason first (Gemma 4); None: the format's default, off.
            stream: return a `Reply`, which yields deltas and then has `.message`.
            continue_final_message: the answer goes on from the text of the last message, an
                assistant's, and holds only what is new; None: if that is the last message. False
                begins a new answer.
            template_args: further variables of the checkpoint's chat template.
            tool_choice: hold calls to their schemas (Gemma 4): "auto" (text, then calls),
                "required" (calls alone), {"name": ...} (one call of it) or "none". A stream then
                gives calls piece by piece ("call", "arguments"). None: nothing is held to.
            parallel_tool_calls: whether an answer may call more than one, where held to.
            response_format: what the content must match, as OpenAI writes it, or a grammar.
            settings, **changes: as for `generate`, except `logprobs`; `stop` is looked for in the
                content alone; a `grammar` is a response_format.

        Raises:
            RequestError: malformed messages, roles out of order, what the format cannot say, a
                template that fails, a model that cannot chat.
        """
        how: dict[str, Any] = {"thinking": thinking, "template_args": template_args}
        listed = tools if tools is None or isinstance(tools, (str, Mapping)) else list(tools)
        how |= {"tools": listed, "continue_final_message": continue_final_message}
        chosen = read_settings(settings, changes)
        form = self._form(
            tools=listed, thinking=thinking, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls, response_format=response_format,
        )  # fmt: skip
        reply = self._reply(messages, how, chosen, form)
        return reply if stream else reply.finish(itertools.repeat(MAX_STEPS))

    def session(
        self,
        *,
        system: str | None = None,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | Grammar | None = None,
        settings: SamplingSettings | None = None,
        **changes: Any,
    ) -> Session:
        """Start a conversation that keeps its cache: each turn prefills only what is new."""
        declared = None if tools is None else list(tools)
        how = {"tools": declared, "thinking": thinking, "template_args": template_args}
        chosen = read_settings(settings, changes)
        context = chosen.context or self.config.text.max_position_embeddings

        form = self._form(
            tools=declared, thinking=thinking, tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls, response_format=response_format,
        )  # fmt: skip

        def ask(messages: list[Any], engine: Engine) -> Reply:
            return self._reply(messages, how, chosen, form, engine)

        return Session(ask, lambda: self._engine(1, chat=True), context, system)

    def _reply(
        self,
        messages: Iterable[Mapping[str, Any] | Message],
        how: Mapping[str, Any],
        settings: SamplingSettings,
        form: ChatGrammar,
        engine: Engine | None = None,
    ) -> Reply:
        """`how`: keywords of `ChatFormat.encode`. `engine` None: one of its own."""
        if settings.logprobs is not None:
            raise RequestError("a chat gives no logprobs; use generate")
        if settings.parse_special:
            raise RequestError("no text of a chat is read as a control token: no parse_special")
        ids = self.chat_format.encode(messages, **how)
        given = settings.grammar
        if isinstance(given, Sequence):
            raise RequestError("a chat has one answer: give one grammar, not a list")
        form = form.joined(given, ids)
        grammar = form if form.constrains else None
        batch = self.chat_requests([ids], dataclasses.replace(settings, grammar=grammar))
        (request,) = batch.requests
        parser = self.chat_format.parser(
            ids, batch.stop, streams_arguments=form.constrains and form.tool_choice != "none"
        )
        return Reply(engine or self._engine(1, request, chat=True), request, parser)

    def _form(self, **how: Any) -> ChatGrammar:
        _ = self.chat_format  # a model that has no tokenizer says so
        assert self.tokenizer is not None
        return chat_grammar(self.tokenizer, **how)

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How this model is talked to: its own template, or the built-in format of its family."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer, which a chat needs")
        # Google's E2B and E4B templates write no empty thought, those of 12B to 31B do; only the
        # former have per-layer inputs.
        empty_thought = not self.config.text.hidden_size_per_layer_input
        return ChatFormat(self.tokenizer, self.chat_template, empty_thought=empty_thought)

    def chat_requests(self, prompts: list[list[int]], settings: SamplingSettings) -> RequestBatch:
        """Likewise for chats, whose answers also end at what ends a turn."""
        stops = (*self.chat_format.stop_ids, *as_ids(settings.stop_ids, "stop_ids"))
        batch = self.requests(prompts, dataclasses.replace(settings, stop_ids=stops))
        batch.requests = [
            dataclasses.replace(one, snapshot_at=self.chat_format.boundaries(one.prompt))
            for one in batch.requests
        ]
        return batch

    def requests(self, prompts: list[list[int]], settings: SamplingSettings) -> RequestBatch:
        """Return an engine's request for each prompt of ids, checked."""
        return RequestBatch(
            self.programs, self.config, self.tokenizer, self.generation_config, prompts, settings
        )

    def _ids(self, prompt: Prompt, parse_special: bool = False) -> list[list[int]]:
        """Return the prompts as ids; say once that markers in a text are read as plain text."""
        if not isinstance(prompt, str):
            prompt = list(prompt)  # type: ignore[assignment]  # it is read twice
        marker = None if parse_special or self._told else spelled_marker(prompt, self.tokenizer)
        if marker is not None:
            self._told = True
            _log.warning(
                "the prompt spells %r, which is read as plain text and not as the control token; "
                "parse_special=True (--parse-special) reads it as the token, chat writes the "
                "tokens of a conversation itself",
                marker,
            )
        config = self.config.text
        return read_prompts(prompt, self.tokenizer, config, parse_special=parse_special)


def load(
    path_or_name: str | Path,
    *,
    dtype: Any = None,
    layers: Layers | None = None,
    progress: Callable[[int, int], None] | None = None,
    mesh: Mesh | Mapping[str, int] | str | None = None,
    kv_cache: Storage = None,
    quantize: Rules | None = None,
    calibration: Texts | None = None,
    implementation: ops.Backend | None = None,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
) -> Model:
    """Load a model from a folder, a GGUF file, or a name; nothing is downloaded.

    Args:
        path_or_name: a folder (Hugging Face safetensors, Google's Orbax), a `.gguf` file, "demo"
            (the `demo` extra), or a Hugging Face name that is in the local cache (the `hub` extra).
        dtype: "float32", "bfloat16"; None or "auto": float32 on CPU, bfloat16 elsewhere.
        layers: "scan", "unroll", or None for the faster one of this backend.
        progress: told (bytes filled, bytes in all).
        mesh: over all devices, as "data=2,tensor=4" says: rows over data and fsdp, widths over
            fsdp, heads, MLP and vocabulary over tensor, experts over expert. Each of several
            processes (`jax.distributed`) makes the same calls.
        kv_cache: "int8" holds keys and values as 8-bit codes (docs/log.md); None: in `dtype`.
        quantize: how matrices are held: "stored" as in the file, "dense", "int8", "int4", "nf4", or
            rules (`quantization.Rules`); None: "stored" where native kernels run, else "dense".
        calibration: texts that int4 shall suit, some thousand tokens; None: a page of ours.
        implementation: of products with codes and attention: "xla", "cpu" (kernels); None: faster.
        adapters: a peft folder, or several by name; None: one beside the weights, if any; {}: none.

    Raises:
        NotImplementedError: `implementation="cpu"` without kernels.
        FileNotFoundError: no such path, or a name that is not here.
        CheckpointError: a damaged file, or tensors that do not fit the config.
        UnsupportedError: another architecture or format.
        RequestError: an option out of range, an unfit mesh, or an adapter of another base.
    """
    dtype = read_dtype(dtype)
    check_options(layers, kv_cache, implementation, quantize)
    layout = choose_layout(mesh, quantize, implementation)
    with ops.implementation(layout.implementation):
        native = ops.kernels_in_use() is not None
    with checkpoints.open_checkpoint(checkpoints.find(path_or_name)) as source:
        source.check()
        tokenizer = _tokenizer(source)
        stored = lora.read_folders(adapters, source.config.text, source.source)
        template = lora.template_of(stored, source.chat_template, source.source)
        keeps = layout.mesh is None and (native or source.keeps_codes)
        rules = quantize or ("stored" if keeps else "dense")
        decoder = build_decoder(
            source.config.text, source.read, dtype=dtype, layers=layers, progress=progress,
            mesh=layout.mesh, codes=codes_of(source, rules, calibration),
        )  # fmt: skip
        decoder.base = lora.base_of(path_or_name, source.source, source.config)
        lora.put_folders(decoder, stored)
        return Model(
            source.config, decoder, tokenizer, source.generation_config, template, mesh=layout.mesh,
            kv_cache=kv_cache, implementation=layout.implementation, adapters=stored,
        )  # fmt: skip


def _tokenizer(source: checkpoints.Checkpoint) -> Tokenizer | None:
    """Read the tokenizer; check the generation_config, and say what of it is not applied."""
    file = f"{source.source}/generation_config.json"
    defaults = read_defaults(source.generation_config, source.config.text.vocab_size, file)
    if (tokenizer := source.tokenizer()) is None:
        _log.info("%s has no tokenizer: ids in, ids out", source.source)
    tell(defaults, tokenizer, file)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a folder, a `tokenizer.json`, a `*.model` or a GGUF file."""
    path = Path(path).expanduser()
    model = checkpoints.find_gguf(path)
    if model is not None:
        return gguf.load_tokenizer(model)
    if path.exists():
        folder, names = (path, TOKENIZER_FILES) if path.is_dir() else (path.parent, [path.name])
        refuse_stand_ins(folder, names)
    return tokenizers.load_tokenizer(path)
