"""The model a user holds: config, tokenizer, decoder; load, quantize, save, score, generate."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from gemlax import adapters as lora
from gemlax import checkpoints, ops, sharding
from gemlax import tokenizer as tokenizers
from gemlax.adapters import DEFAULT, Choice
from gemlax.chat import ChatFormat, Message
from gemlax.checkpoints import gguf
from gemlax.completion import Completion, Request, Stream
from gemlax.config import GemmaConfig
from gemlax.decoder import Decoder, Layers
from gemlax.errors import RequestError, UnsupportedError
from gemlax.generate import DecodeState, Engine, bucket
from gemlax.ops.storage import Storage
from gemlax.quantization import (
    Rules,
    Texts,
    check_rules,
    codes_by_rules,
    codes_of,
    importance_by_rules,
)
from gemlax.session import Reply, Session
from gemlax.tokenizer import Tokenizer
from gemlax.weights import build_decoder, held_formats, held_weights, named_weights, weight_reader

__all__ = ["Model", "Score", "load", "load_tokenizer", "quantize", "save"]

Prompt = str | Sequence[str] | Sequence[Sequence[int]]

_log = logging.getLogger(__name__)
# Steps between two looks at the host, when nothing is streamed: Ctrl-C waits for no more.
_BLOCK = 128
# Tokens of a text that are scored together; each sees at least half as many before it.
_SCORE_WINDOW = 2048
_SCORE_ROWS = 128


class Score(NamedTuple):
    """The log-likelihood (natural) of `num_tokens` tokens, each given those before it."""

    log_likelihood: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return float(np.exp(-self.log_likelihood / max(self.num_tokens, 1)))


class Model:
    """A Gemma model: `load` makes one.

    Attributes:
        config: a `GemmaConfig`.
        tokenizer: a `Tokenizer`, or None when the checkpoint has none (ids in, ids out).
        decoder: the NNX module with the weights. They are read at load; do not change them.
        generation_config: the checkpoint's defaults for `generate`, by Hugging Face's names.
        chat_template: the checkpoint's own Jinja template; None: the built-in format is used.
        mesh: over which the decoder's weights lie, or None.
        kv_cache: how caches are held, as for `load`.
        implementation: of stored weights and of attention, as for `load`.
        adapters: by name, those that `generate(adapter=...)` chooses from; `load` puts them there.
    """

    def __init__(
        self,
        config: GemmaConfig,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        mesh: Mesh | None = None,
        kv_cache: Storage = None,
        implementation: ops.Implementation | None = None,
        adapters: Mapping[str, lora.Stored] | None = None,
    ):
        self.adapters = dict(adapters or {})
        if mesh is not None and implementation is None:
            implementation = "xla"  # a kernel would gather what the mesh cuts
        self.implementation = implementation
        self.config, self.decoder, self.tokenizer = config, decoder, tokenizer
        self.chat_template = chat_template
        self.generation_config = dict(generation_config or {})
        self.mesh, self.kv_cache = mesh, kv_cache
        self.dtype = decoder.norm.weight.get_value().dtype
        known = tokenizer.num_tokens if tokenizer else config.text.vocab_size
        self.engine = Engine(
            decoder, num_tokens=min(known, config.text.vocab_size), dtype=self.dtype, mesh=mesh,
            storage=kv_cache, implementation=implementation, adapters=tuple(self.adapters),
        )  # fmt: skip
        graphdef, self._state = nnx.split(decoder)

        def jit(function: Callable[..., Array], **options: Any) -> Callable[..., Array]:
            def whole(state: Any, tokens: Array, positions: Array, rows: Array | None) -> Array:
                decoder = nnx.merge(graphdef, state)
                lora.choose(decoder, rows)
                return function(decoder, tokens, positions)

            return jax.jit(ops.cpu.bind(implementation, whole), **options)

        self._hidden = jit(lambda decoder, *args: decoder(*args)[0])
        self._logits = jit(_all_logits)
        self._score = jit(
            _token_logprobs,
            out_shardings=None if mesh is None else sharding.replicated(mesh),
        )

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
        return self.engine.put(np.asarray(chosen, np.int32)) if self.adapters else None

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
        self._check_ids(ids[valid])
        positions = np.where(valid, columns[None], ops.EMPTY).astype(np.int32)
        return self.engine.put((np.where(valid, ids, 0).astype(np.int32), positions))

    def score(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        window: int = _SCORE_WINDOW,
        adapter: str | None = DEFAULT,
    ) -> Score | list[Score]:
        """Return the log-likelihood of each text, given its first token (BOS for a str).

        A text longer than `window` tokens is scored in windows that overlap by half, so every
        token beyond the first window sees about window / 2 tokens before it. Each window starts
        with the text's BOS: without it Gemma's likelihoods are far off (docs/log.md).
        """
        prompts = self._ids(texts)
        window = min(window, self.config.text.max_position_embeddings)
        if window < 2:
            raise RequestError(f"window must be at least 2 tokens, got {window}")
        rows = self._entries(adapter, 1)
        totals = [self._score_one(np.asarray(ids, np.int32), window, rows) for ids in prompts]
        return totals[0] if isinstance(texts, str) else totals

    def _score_one(self, ids: np.ndarray, window: int, rows: Array | None) -> Score:
        total, count, scored = 0.0, 0, 1
        bos = ids[:1] if ids[0] == self.config.bos_token_id else ids[:0]
        while scored < len(ids):
            start = max(len(bos), scored - window // 2)
            piece = np.concatenate([bos, ids[start : start + window - len(bos)]])
            end = start + len(piece) - len(bos)
            width = bucket(len(piece), 16)
            row = np.zeros((1, width), np.int32)
            row[0, : len(piece)] = piece
            tokens, positions = self._padded(row, [len(piece)])
            logprobs = np.asarray(self._score(self._state, tokens, positions, rows), np.float64)[0]
            new = end - scored
            total += float(logprobs[len(piece) - 1 - new : len(piece) - 1].sum())
            count += end - scored
            scored = end
        return Score(total, count)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        context: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: int | None = None,
        speculate: int | None = None,
        adapter: Choice = DEFAULT,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        Args:
            prompt: a str, a list of str, or a list of lists of ids. A str gets one BOS.
            max_new_tokens: the most tokens to generate.
            context: the most tokens of prompt and output together; None: what the model takes.
            temperature, top_k, top_p, min_p, repetition_penalty: None: the checkpoint's
                generation_config, else temperature 0 (arg-max) and everything else off.
                top_k 0 turns it off. The repetition penalty counts prompt and output, the
                presence and frequency penalties the output.
            logit_bias: added to the logits of these ids; -inf forbids one.
            seed: row r draws with seed + r; a list gives each row its own.
            stop: strings that end the text; they are not part of it.
            stop_ids: ids that end a row, besides those of the checkpoint.
            logprobs: also return the log-probability of each token and the n (0 to 20) likeliest.
            speculate: draft up to so many tokens (at most 15) from the text so far, and judge them
                in one step: the same tokens but for near ties, and sooner where a text repeats.
                None or 0: off.
            adapter: the name of one that was loaded, or a list with one for each prompt; None: the
                base. Without it, the adapter called "default", if there is one.

        Raises:
            RequestError: a setting outside its range, or a prompt that does not fit.
        """
        options = {k: v for k, v in locals().items() if k not in ("self", "prompt")}
        request = self._request(prompt, options)
        rows = None
        for rows in request.run(itertools.repeat(_BLOCK)):
            request.push(rows)
        completions = [request.completion(row, rows) for row in range(len(request.prompts))]
        return completions[0] if isinstance(prompt, str) else completions

    def stream(self, prompt: str | Sequence[int], **settings: Any) -> Stream:
        """Generate for one prompt and yield the text piece by piece; settings as for `generate`."""
        one = prompt if isinstance(prompt, str) else [list(prompt)]
        return Stream(self._request(one, settings))

    def chat(
        self,
        messages: Iterable[Mapping[str, Any] | Message],
        *,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        stream: bool = False,
        **sampling: Any,
    ) -> Message | Reply:
        """Answer a conversation.

        Args:
            messages: {"role", "content", ...} as in OpenAI and transformers; roles system,
                developer, user, assistant, model and tool. An answer is appended as it is. No
                text in them is read as a control token.
            tools: function declarations with a JSON schema (Gemma 4).
            thinking: let the model reason first (Gemma 4); None: the format's default, off.
            stream: return a `Reply`, which yields deltas and then has `.message`.
            **sampling: settings of `generate`, but `logprobs`; `stop` is looked for in the
                content alone.

        Raises:
            RequestError: malformed messages, roles out of order, what the format cannot say, a
                template that fails, a model that cannot chat.
        """
        reply = self._reply(messages, tools=tools, thinking=thinking, options=sampling)
        return reply if stream else reply.finish(itertools.repeat(_BLOCK))

    def session(
        self,
        *,
        system: str | None = None,
        tools: Iterable[Any] | None = None,
        thinking: bool | None = None,
        **sampling: Any,
    ) -> Session:
        """Start a conversation that keeps its cache: each turn prefills only what is new."""
        _ = self.chat_format  # a model that has no tokenizer says so now
        told = None if tools is None else list(tools)
        ask = functools.partial(self._reply, tools=told, thinking=thinking, options=sampling)
        context = sampling.get("context") or self.config.text.max_position_embeddings
        return Session(ask, context, system)

    def _reply(
        self,
        messages: Iterable[Mapping[str, Any] | Message],
        *,
        tools: Iterable[Any] | None,
        thinking: bool | None,
        options: Mapping[str, Any],
        before: DecodeState | None = None,
    ) -> Reply:
        if options.get("logprobs") is not None:
            raise RequestError("a chat gives no logprobs; use generate")
        ids = self.chat_format.encode(messages, tools, thinking)
        stops = (*self.chat_format.stop_ids, *(options.get("stop_ids") or ()))
        request = self._request([ids], {**options, "stop_ids": stops})
        return Reply(request, self.chat_format.parser(ids, request.stop), before)

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """How this model is talked to: its own template, or the built-in format of its family."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer, which a chat needs")
        # Google's E2B and E4B templates write no empty thought, those of 12B to 31B do; only the
        # former have per-layer inputs.
        empty_thought = not self.config.text.hidden_size_per_layer_input
        return ChatFormat(self.tokenizer, self.chat_template, empty_thought=empty_thought)

    def _request(self, prompt: Prompt, options: Mapping[str, Any]) -> Request:
        prompts = self._ids(prompt)
        return Request(
            self.engine, self.config, self.tokenizer, self.generation_config, prompts, options
        )

    def _ids(self, prompt: Prompt) -> list[list[int]]:
        """Return the prompts as ids: a str gets one BOS."""
        items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
        if not items:
            raise RequestError("no prompt: got an empty list")
        if all(isinstance(item, str) for item in items):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give lists of ids, not text")
            prompts = [self.tokenizer.encode(item) for item in items]
            self._check_ids(np.asarray(list(itertools.chain(*prompts))))
            return prompts
        if any(isinstance(item, (str, int, np.integer)) for item in items):
            raise RequestError("a prompt is a str, a list of str, or a list of lists of ids")
        prompts = [[int(i) for i in item] for item in items]
        if not all(prompts):
            raise RequestError("a prompt of ids must hold at least one id (BOS)")
        self._check_ids(np.asarray(list(itertools.chain(*prompts))))
        return prompts

    def _check_ids(self, ids: np.ndarray) -> None:
        vocab = self.config.text.vocab_size
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if wrong.size:
            raise RequestError(f"token id {wrong[0]} is outside [0, {vocab})")


def _all_logits(decoder: Decoder, tokens: Array, positions: Array) -> Array:
    return decoder.logits(decoder(tokens, positions)[0])


def _token_logprobs(decoder: Decoder, tokens: Array, positions: Array) -> Array:
    """Return [B, T - 1] log-probabilities of tokens[:, 1:]; logits exist for a block at a time."""
    hidden = decoder(tokens, positions)[0][:, :-1]
    targets = tokens[:, 1:]
    pad = -hidden.shape[1] % _SCORE_ROWS if hidden.shape[1] > _SCORE_ROWS else 0
    rows = min(_SCORE_ROWS, hidden.shape[1])
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    flat = jnp.pad(targets, ((0, 0), (0, pad))).reshape(-1, rows)

    def block(args: tuple[Array, Array]) -> Array:
        logits = decoder.logits(args[0])
        own = jnp.take_along_axis(logits, args[1][:, None], axis=-1)[:, 0]
        return own - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(block, (hidden, flat)).reshape(tokens.shape[0], -1)
    return out[:, : targets.shape[1]]


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
    implementation: ops.Implementation | None = None,
    adapters: str | Path | Mapping[str, str | Path] | None = None,
) -> Model:
    """Load a model from a folder, a GGUF file, or a name; nothing is downloaded.

    Args:
        path_or_name: a folder (Hugging Face safetensors, Google's Orbax), a `.gguf` file, "demo"
            (the `demo` extra), or a Hugging Face name that is in the local cache (the `hub` extra).
        dtype: of weights and activations; None: float32 on CPU, bfloat16 elsewhere.
        layers: "scan", "unroll", or None for the faster one of this backend.
        progress: told (bytes filled, bytes in all).
        mesh: spread the model over all devices, as "data=2,tensor=4" says: rows over data and
            fsdp, widths over fsdp, heads, MLP and vocabulary over tensor, experts over expert.
            With several processes (`jax.distributed`) each makes the same calls.
        kv_cache: "int8" holds keys and values as 8-bit codes (docs/log.md); None: in `dtype`.
        quantize: how matrices are held. "stored": as the file has them; "dense": decoded; "int8",
            "int4", "nf4": quantised now; or rules, see `quantization.Rules`. None: "stored" where
            native kernels run, and for a folder that gemlax quantised; else "dense".
        calibration: texts that int4 shall suit, some thousand tokens; None: a page of ours.
        implementation: of products with codes and attention: "xla", "cpu" (kernels); None: faster.
        adapters: a folder as peft writes it, or several by name: `generate(adapter=)` chooses.

    Raises:
        NotImplementedError: `implementation="cpu"` without kernels.
        FileNotFoundError: no such path, or a name that is not here.
        CheckpointError: a damaged file, or tensors that do not fit the config.
        UnsupportedError: another architecture or format.
        RequestError: an option out of range, an unfit mesh, or an adapter of another base.
    """
    dtype = jnp.dtype(_default_dtype() if dtype is None else dtype)
    _check_options(dtype, layers, kv_cache, implementation)
    check_rules(quantize)
    placed, implementation = _mesh(mesh, quantize, implementation)
    with ops.implementation(implementation):
        native = ops.cpu.live() is not None
    with checkpoints.open_checkpoint(checkpoints.find(path_or_name)) as source:
        source.check()
        as_stored = placed is None and (native or source.keeps_codes)
        rules = quantize or ("stored" if as_stored else "dense")
        decoder = build_decoder(
            source.config.text, source.read, dtype=dtype, layers=layers, progress=progress,
            mesh=placed, codes=codes_of(source, rules, calibration),
        )  # fmt: skip
        if (tokenizer := source.tokenizer()) is None:
            _log.info("%s has no tokenizer: ids in, ids out", source.source)
        return Model(
            source.config, decoder, tokenizer, source.generation_config, source.chat_template,
            mesh=placed, kv_cache=kv_cache, implementation=implementation,
            adapters=_load_adapters(decoder, adapters),
        )  # fmt: skip


def _mesh(mesh: Any, quantize: Rules | None, implementation: Any) -> tuple[Mesh | None, Any]:
    """Return the mesh, and the implementation: no kernel reads codes that are cut over devices."""
    if mesh is None:
        return None, implementation
    if quantize == "stored" or (quantize not in (None, "dense") and implementation == "cpu"):
        raise RequestError(
            "a file's own codes and native kernels need one device; on a mesh quantize= takes "
            "'int8', 'int4', 'nf4' or rules, and XLA decodes them"
        )
    return sharding.make_mesh(mesh), implementation if quantize in (None, "dense") else "xla"


def _load_adapters(decoder: Decoder, folders: Any) -> dict[str, lora.Stored]:
    """Read adapters and put them on a decoder as tables."""
    if not folders:
        return {}
    named = dict(folders) if isinstance(folders, Mapping) else {DEFAULT: folders}
    stored = {name: lora.read_folder(folder, decoder.config) for name, folder in named.items()}
    for one in stored.values():
        lora.check_same_base(one, decoder)
    lora.put_tables(decoder, stored)
    return stored


def _check_options(dtype: Any, layers: Any, kv_cache: Any, implementation: Any) -> None:
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise RequestError(
            f"dtype must be float32 or bfloat16, got {dtype.name} "
            "(Gemma's activations overflow float16)"
        )
    if layers not in (None, "scan", "unroll"):
        raise RequestError(f"layers must be 'scan', 'unroll' or None, got {layers!r}")
    if kv_cache not in (None, "int8"):
        raise RequestError(f"kv_cache must be 'int8' or None, got {kv_cache!r}")
    if implementation not in (None, "xla", "cpu"):
        raise RequestError(f"implementation must be 'xla', 'cpu' or None, got {implementation!r}")


def _default_dtype() -> Any:
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a folder, a `tokenizer.json`, a `*.model` or a `*.gguf` file."""
    if Path(path).suffix == ".gguf":
        return gguf.load_tokenizer(Path(path))
    return tokenizers.load_tokenizer(path)


def quantize(model: Model, rules: Rules, *, calibration: Texts | None = None) -> Model:
    """Return a model whose matrices are codes, made of the weights of another, which stays.

    Matrices that are codes already are decoded first, so that their error and the new one add up.
    Layers stay scanned or unrolled, and everything else is the given model's.

    Args:
        rules: as `load` takes them: "int8", "int4", "nf4", or a format by pattern of names;
            "dense" decodes.
        calibration: as `load` takes it.

    Raises:
        RequestError: a format that cannot be made, a weight that is no matrix of whole groups or
            not finite, or a model on a mesh.
    """
    check_rules(rules)
    if rules == "stored":
        raise RequestError("quantize='stored' is for load: a model in memory has no file")
    if model.mesh is not None:
        raise RequestError("a model on a mesh cannot be quantised: load it with quantize=")
    if any(lora.adapted(model.decoder)):
        raise RequestError("a model with adapters cannot be quantised: load it with quantize=")
    old, read = model.decoder, weight_reader(model.decoder)

    def fill(name: str, out: np.ndarray) -> None:
        out[...] = read(name)

    importance = importance_by_rules(rules, model.config, fill, model.tokenizer, calibration)
    decoder = build_decoder(
        model.config.text, fill, dtype=model.dtype, layers="scan" if old.scanned else "unroll",
        codes=codes_by_rules(model.config.text, fill, rules, importance),
    )  # fmt: skip
    return Model(
        model.config, decoder, model.tokenizer, model.generation_config, model.chat_template,
        kv_cache=model.kv_cache, implementation=model.implementation,
    )  # fmt: skip


def save(
    model: Model, path: str | Path, *, keep_codes: bool = False, overwrite: bool = False
) -> None:
    """Write a folder that transformers and `load` read: safetensors, config, tokenizer.

    The folder appears whole or not at all. `load(path, dtype=model.dtype)` gives the same
    weights bit for bit.

    Args:
        model: what is saved; matrices that are codes are decoded.
        path: a new or empty folder whose parent exists.
        keep_codes: write matrices that are codes as they are. Then the file is as small as the
            model in memory and `load` gives the same codes, but transformers cannot read it.
        overwrite: replace a folder that holds a model.

    Raises:
        FileExistsError: `path` exists and is not an empty folder, unless `overwrite`.
        OSError: it cannot be written; nothing is left behind.
        RequestError: `keep_codes` of a model that has none, or a model with adapters.
        UnsupportedError: the model is spread over several processes.
    """
    if jax.process_count() > 1:
        raise UnsupportedError(
            "a model that several processes hold cannot be saved; load it in one"
        )
    if any(lora.adapted(model.decoder)):
        raise RequestError(
            "the model has adapters, which its weights do not show: gemlax.adapters.merge adds one "
            "to them, gemlax.adapters.save writes one by itself"
        )
    formats = held_formats(model.decoder) if keep_codes else {}
    if keep_codes and not formats:
        raise RequestError("keep_codes: the model holds no codes; quantize it, or leave it out")
    checkpoints.save_safetensors(
        Path(path),
        model.config,
        held_weights(model.decoder) if keep_codes else named_weights(model.decoder),
        generation_config=checkpoints.generation_ids(model.config) | model.generation_config,
        formats=formats,
        write_tokenizer=functools.partial(
            checkpoints.write_tokenizer, model.tokenizer, model.chat_template
        ),
        overwrite=overwrite,
    )
