"""A run of training from a file of examples to a folder, and on from where it was stopped."""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from gemlax import adapters
from gemlax.checkpoints.save import check_replaceable
from gemlax.errors import Error, RequestError, UnsupportedError
from gemlax.model import Model
from gemlax.saving import save
from gemlax.tune.data import Encoder, digest, read_examples, read_pairs
from gemlax.tune.lines import check_file
from gemlax.tune.packing import Batches, Rows
from gemlax.tune.report import (
    Log,
    can_plot,
    memory_bytes,
    plot,
    read_settings,
    write_settings,
)  # fmt: skip
from gemlax.tune.settings import TuneSettings
from gemlax.tune.state import Checkpoints
from gemlax.tune.train import Measured, Trainer, learning_rate

__all__ = ["Result", "check_run", "train"]

_log = logging.getLogger(__name__)
RUN, LOG, PLOT, CHECKPOINTS = "run.json", "log.jsonl", "loss.png", "checkpoints"
RESULTS = {"adapter": "adapter", "full": "model"}
MERGE_FIRST = (
    "the model has adapters beside its weights: gemlax convert MODEL FOLDER --adapter DIR merges "
    "one, and the result can be tuned"
)
ROUND = 16  # widths are multiples of it


class Result(NamedTuple):
    """What came of a run. Losses are those of the held-out file, None without one."""

    model: Model
    steps: int
    loss: float
    eval_before: float | None
    eval_after: float | None


# Told what one line of the log has, and how many steps there are.
Progress = Callable[[dict[str, Any], int], None]


def train(
    model: Model,
    data: str | Path,
    output: str | Path,
    settings: TuneSettings | None = None,
    *,
    eval_data: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **changes: Any,
) -> Result:
    """Train an adapter, or all weights, on a JSONL file; the model that is given stays as it is.

    In the folder come the adapter in peft's layout under "adapter" (or, of all weights, a model
    under "model"), a log (log.jsonl), a plot (loss.png) and checkpoints.

    Args:
        data: a line is a conversation, a prompt and a completion, an instruction and an output, or
            a text; for preferences a prompt, chosen and rejected. docs/tune.md has the forms.
        output: a folder that holds no run yet, unless `resume`.
        settings: None: the defaults; `changes` replace attributes of it.
        eval_data: a file of the same form, of which the loss is taken before, at each checkpoint
            and at the end.
        resume: go on from the last checkpoint in `output`, with the settings it was made with.

    Raises:
        Error: a line of the data, named; a loss that is no number; a disk that is full; an output
            that holds a run, or, to resume, another one.
    """
    if jax.process_count() > 1:
        raise UnsupportedError("training runs in one process, over all of its devices")
    settings = dataclasses.replace(settings or TuneSettings(), **changes)
    return _Run(model, Path(data), Path(output), settings, eval_data, resume, progress).go()


def check_run(
    data: Path, eval_data: Path | None, output: Path, settings: TuneSettings, *, resume: bool
) -> None:
    """Check what needs no model: the kind of the files, and that a run can be in the folder."""
    for path in (data, eval_data):
        if path is not None:
            check_file(path)
    Checkpoints(output / CHECKPOINTS)  # says if its package is missing
    result = output / RESULTS["full" if settings.full else "adapter"]
    if resume:
        _check_same(output, _known(data, settings))
        marker = "config.json" if settings.full else "adapter_config.json"
        check_replaceable(result, marker, overwrite=True)
    elif (output / RUN).exists():
        raise Error(f"{output} holds a run already: go on with it by --resume, or give another "
                    "folder")  # fmt: skip
    else:
        for path in (result, output / LOG, output / CHECKPOINTS):
            if path.exists():
                raise Error(f"{path} is there already, of no run that is known: give another "
                            "folder, or move it away")  # fmt: skip
    above = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "be written to" if above.is_dir() else "be a folder: it is a file"
        raise Error(f"{output} cannot be made: {above} cannot {what}")


def _known(data: Path, settings: TuneSettings) -> dict[str, Any]:
    """Return what must be the same when a run goes on, as far as no model is needed for it."""
    known = dataclasses.asdict(settings) | {"rules": repr(settings.rules), "data": digest(data)}
    del known["save_every"]
    if settings.steps is None:  # the data will say
        del known["steps"]
    return known


def _check_same(output: Path, record: dict[str, Any]) -> None:
    there = read_settings(output / RUN)
    for key in sorted(record):
        if there.get(key) != record[key]:
            raise Error(
                f"{output} holds another run: {key} is {there.get(key)!r} there and "
                f"{record[key]!r} now"
            )


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note a Ctrl-C in the list that is given, for when the step is done; a second one raises.

    In the middle of a step its arrays belong to neither the step before nor the one after.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        _log.warning("stopping after this step; once more stops at once and keeps less")

    handler = signal.getsignal(signal.SIGINT)
    # A handler of the caller's stays, and only the main thread can set one.
    is_main = threading.current_thread() is threading.main_thread()
    if sets := is_main and handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        if sets:
            signal.signal(signal.SIGINT, handler)


class _Run:
    def __init__(
        self,
        model: Model,
        data: Path,
        output: Path,
        settings: TuneSettings,
        eval_data: str | Path | None,
        resume: bool,
        progress: Progress | None,
    ):
        self.model, self.output, self.settings = model, output, settings
        self.progress = progress
        held_out = None if eval_data is None else Path(eval_data)
        check_run(data, held_out, output, settings, resume=resume)
        chat = None
        if model.tokenizer is not None:
            chat = model.chat_format if model.chat_format.family is not None else None
        self.encoder = Encoder(model.tokenizer, chat, parse_special=settings.parse_special)
        self.batches = self._batches(data)
        self.held_out = None if held_out is None else self._batches(held_out)
        self.steps = settings.steps or settings.epochs * self.batches.per_epoch
        config = hashlib.sha256(repr(model.config).encode()).hexdigest()
        self.record = _known(data, settings) | {"steps": self.steps, "config": config}
        if resume:
            _check_same(output, self.record)
        self.checkpoints = Checkpoints(output / CHECKPOINTS)
        self.decoder = self._decoder()
        self.trainer = Trainer(
            self.decoder, dataclasses.replace(settings, steps=self.steps),
            mesh=model.mesh, implementation=model.implementation,
        )  # fmt: skip
        self.first = max(self.checkpoints.steps(), default=0) if resume else 0
        self.done: int | None = self.first  # steps; None in the middle of one
        self._open(resume)

    def _batches(self, path: Path) -> Batches:
        s = self.settings
        max_length = min(s.max_length, self.model.config.text.max_position_embeddings)
        examples: Any
        if s.beta is None:
            examples = texts = read_examples(path, self.encoder, max_length, truncate=s.truncate)
        else:
            examples = read_pairs(path, self.encoder, max_length, truncate=s.truncate)
            texts = [one for pair in examples for one in pair]
        highest = max((i for one in texts for i in one.ids), default=0)
        if refusal := self.model.config.text.refusal(highest):
            raise RequestError(f"{path}: {refusal}")
        sizes = [len(one.ids) for one in texts]
        room = sum(sizes) if s.pack and s.beta is None else max(sizes)
        width = min(s.max_length, -(-room // ROUND) * ROUND)
        return Batches(examples, width, s.batch_size, seed=s.seed, packed=s.pack)

    @property
    def result(self) -> Path:
        """The folder of what is trained."""
        return self.output / RESULTS["full" if self.settings.full else "adapter"]

    def _open(self, resume: bool) -> None:
        """Make the folder, once all that a run needs was found; say what it will lack."""
        if not can_plot():
            _log.warning('no %s will be drawn: pip install "gemlax[tune]" has matplotlib', PLOT)
        try:
            self.checkpoints.check_room(self.trainer.values, self.trainer.optimizer_state)
            if not resume:
                self.output.mkdir(parents=True, exist_ok=True)
                write_settings(self.output / RUN, self.record)
        except OSError as error:
            raise Error(f"cannot write in {self.output}: {error.strerror}") from error

    def _decoder(self) -> Any:
        """Return a decoder of its own that shares the model's arrays, with an adapter on it."""
        s = self.settings
        if self.model.adapters:
            raise RequestError(MERGE_FIRST)
        decoder = nnx.merge(*nnx.split(self.model.decoder))
        if s.full and decoder.adapter is not None:
            raise RequestError("the model has an adapter: merge it, or train it without full")
        if s.full:
            return decoder
        if decoder.adapter is None:
            rules = adapters.Rule() if s.rules is None else s.rules
            decoder.read = "index"  # frozen: nothing of it is kept for the backward pass
            adapters.attach(decoder, rules, key=jax.random.key(s.seed))
        elif s.rules is not None:
            raise RequestError("the model has an adapter, which is trained on: leave out the rules")
        return decoder

    def go(self) -> Result:
        """Train to the end."""
        trainer, first = self.trainer, self.first
        if first:
            trainer.values, trainer.optimizer_state = self.checkpoints.restore(
                first, trainer.values, trainer.optimizer_state
            )
        log = Log(self.output / LOG, first)
        if not any(line["step"] == first and "eval_loss" in line for line in log.lines()):
            self._evaluate(log, first)
        with _interrupts() as noted:
            for step in range(first, self.steps):
                try:
                    self._step(log, step)
                    if noted and step + 1 < self.steps:
                        raise KeyboardInterrupt
                except KeyboardInterrupt:
                    self._keep()
                    raise
        # What the run is for comes first: nothing that is only reported may cost it.
        model = self._save()
        if first < self.steps:
            self._evaluate(log, self.steps)
        lines = log.lines()
        self._plot(lines)
        held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
        before, after = (held_out[0], held_out[-1]) if held_out else (None, None)
        last = [line["loss"] for line in lines if "loss" in line][-1]
        return Result(model, self.steps, last, before, after)

    def _plot(self, lines: list[dict[str, Any]]) -> None:
        if not can_plot():
            return
        try:
            plot(lines, self.output / PLOT)
        except Exception as error:  # fonts, caches, disks: matplotlib raises what it likes
            reason = str(error).partition("\n")[0]
            _log.warning("%s was not drawn: %s", self.output / PLOT, reason)

    def _step(self, log: Log, step: int) -> None:
        rows = self.batches[step]
        begin = time.perf_counter()
        self.done = None
        measured = self.trainer.step(step, rows)
        seconds = time.perf_counter() - begin
        if not (math.isfinite(measured.loss) and math.isfinite(measured.norm)):
            raise Error(self._broken(step + 1, measured))
        self.done = step + 1
        tokens = int((rows.positions >= 0).sum())
        line = {
            "step": step + 1,
            "loss": measured.loss,
            "gradient_norm": measured.norm,
            "learning_rate": float(learning_rate(self.trainer.settings, step)),
            "tokens": tokens,
            "learnt": measured.tokens,
            "tok_s": round(tokens / seconds, 2),
            "seconds": round(seconds, 4),
            "memory_bytes": memory_bytes(),
        }
        if measured.accuracy is not None:
            line["accuracy"] = measured.accuracy
        self._say(log, line)
        done, every = step + 1, self.settings.save_every
        if done == self.steps or (every and done % every == 0):
            self.checkpoints.save(done, self.trainer.values, self.trainer.optimizer_state)
            if done < self.steps:
                self._evaluate(log, done)

    def _keep(self) -> None:
        """Write a checkpoint of a run that is interrupted, and say how it goes on."""
        if self.done is not None:
            self.checkpoints.save(self.done, self.trainer.values, self.trainer.optimizer_state)
        last = max(self.checkpoints.steps(), default=0)
        how = "run the same command with --resume to go on" if last else "nothing is kept"
        _log.warning("%s: stopped; step %d of %d is kept: %s", self.output, last, self.steps, how)

    def _broken(self, step: int, measured: Measured) -> str:
        last = max(self.checkpoints.steps(), default=0)
        kept = f"the checkpoint of step {last} is kept" if last else "there is no checkpoint"
        return (
            f"step {step}: the loss is {measured.loss} and the gradients' norm {measured.norm}; "
            f"nothing was saved, {kept}; a smaller --learning-rate may help"
        )

    def _evaluate(self, log: Log, step: int) -> None:
        if self.held_out is None:
            return
        held_out = self.held_out
        batches: Iterator[Rows] = (held_out[i] for i in range(held_out.per_epoch))
        measured = self.trainer.evaluate(batches)
        line: dict[str, Any] = {"step": step, "eval_loss": measured.loss}
        if measured.accuracy is not None:
            line["eval_accuracy"] = measured.accuracy
        self._say(log, line)

    def _say(self, log: Log, line: dict[str, Any]) -> None:
        log.add(line)
        if self.progress is not None:
            self.progress(line, self.steps)

    def _save(self) -> Model:
        """Write what was trained where other programs find it."""
        given, decoder = self.model, self.trainer.decoder()
        model = Model(
            given.config, decoder, given.tokenizer, given.generation_config, given.chat_template,
            mesh=given.mesh, kv_cache=given.kv_cache, implementation=given.implementation,
        )  # fmt: skip
        if not self.settings.full:
            adapters.save(decoder, self.result, overwrite=True)
            return model
        try:
            save(model, self.result, overwrite=True)
        except FileNotFoundError as error:  # the tokenizer's files are copied from the base
            _log.warning("%s; it is saved without tokenizer: copy the base's into it", error)
            bare = Model(model.config, decoder, None, model.generation_config, model.chat_template)
            save(bare, self.result, overwrite=True)
        return model
