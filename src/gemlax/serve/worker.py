"""The engine's thread: the only one that touches the rows.

The event loop sends commands through one queue; each tick takes them, gives free slots to those who
wait, runs one step, and wakes the readers of what came of it.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

from gemlax.engine import Engine, Event, Request
from gemlax.errors import RequestError
from gemlax.model import Model
from gemlax.serve.admission import Admission, Waiting
from gemlax.serve.jobs import Job, Ticket
from gemlax.serve.metrics import Metrics
from gemlax.serve.options import ServeOptions
from gemlax.serve.pace import Pace
from gemlax.serve.warm import warm_up
from gemlax.serve.work import FinishReason, ServeError, Update

__all__ = ["Worker"]

_log = logging.getLogger(__name__)
# A tick that takes longer than so many seconds, and ten of the longest before, hangs.
_HANGS = 60.0


class EngineFailed(Exception):
    """The same step failed twice in a row."""


class Worker:
    """Runs jobs on one engine.

    Attributes:
        admission: the places; its `state` says whether the server is ready.
        engine: what runs.
        progress: rounds of warm-up done, and in all.
        failure: why the thread has ended, where it was not asked to.
    """

    def __init__(self, model: Model, options: ServeOptions, metrics: Metrics, template: Request):
        """`template`: a request whose settings are as wide as any will be."""
        self.admission, self.metrics = Admission(options, metrics.rejected), metrics
        self.progress, self.failure = (0, 1), ""
        self._programs, self._options, self._template = model.programs, options, template
        self._pace = Pace(options.itl_target)
        self._prefixes = model.prefix_cache
        if self._prefixes is not None and options.cache_mb is not None:
            self._prefixes.budget = options.cache_mb * 2**20
        self.engine = Engine(
            model.programs, options.slots, options.context, interleaved=self._pace.chunk(1),
            prefix_cache=self._prefixes or None,
        )  # fmt: skip
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: Waiting[Ticket] = Waiting()
        self._running: dict[int, Ticket] = {}
        self._told: dict[Job, None] = {}  # who is woken after this tick
        self._tick_begin: float | None = None
        self._longest = 0.0
        self._last_failure = ""
        self._stopping: float | None = None  # when what still runs is aborted
        self._gate, self._closed = threading.Lock(), False  # nothing is submitted to a closed one
        self._thread = threading.Thread(target=self._run, name="gemlax-engine", daemon=True)

    def start(self) -> None:
        """Compile, then serve, in a thread of its own."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let the answers of a job wait for slots; raise ServeError 503 if the thread has ended."""
        with self._gate:
            if self._closed:
                raise ServeError(503, "the server is shutting down", code="draining")
            self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """End a job wherever it is."""
        self._commands.put(lambda: self._cancel(job))

    def drain(self, seconds: float) -> None:
        """Admit nobody any more; end when nobody runs, at the latest after so many seconds."""
        if self.admission.state != "failed":
            self.admission.state = "draining"
        until = time.monotonic() + seconds
        self._commands.put(lambda: self._stop_at(until))

    def join(self, seconds: float) -> bool:
        """Wait until the thread has ended; False: it has not."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def has_ended(self) -> bool:
        """Whether the thread has come to its end."""
        return self._closed and not self._thread.is_alive()

    @property
    def num_running(self) -> int:
        """How many answers have a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """How many answers wait for one."""
        return len(self._waiting)

    @property
    def running(self) -> list[Ticket]:
        """Those that have a slot."""
        return list(self._running.values())

    @property
    def stuck_for(self) -> float:
        """For how many seconds the tick has taken longer than one ever should; 0: it does not."""
        begin = self._tick_begin
        if begin is None or self.admission.state == "loading":
            return 0.0
        return max(0.0, time.monotonic() - begin - _HANGS - 10 * self._longest)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and moves."""
        return self._thread.is_alive() and not self.stuck_for and self.admission.state != "failed"

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        error = ServeError(503, "the server is shutting down", code="draining", retry_after=2.0)
        try:
            self._warm_up()
            while not self._is_over():
                self._tick()
        except EngineFailed as failed:
            self.failure = f"the engine failed twice: {failed}"
        except Exception as failed:
            _log.exception("the engine's thread has failed")
            self.failure = f"{type(failed).__name__}: {failed}"
        if self.failure:
            self.admission.state = "failed"
            error = ServeError(500, "the engine has failed")
        with self._gate:
            self._closed = True
        self._take_commands(wait=False)
        for ticket in [*self._waiting.entries, *self._running.values()]:
            self._end(ticket, error, "error" if self.failure else "abort")
        self._wake()
        self._tick_begin = None

    def _warm_up(self) -> None:
        begin = time.monotonic()

        def tell(done: int, rounds: int) -> bool:
            self.progress = (done, rounds)
            return self.admission.state == "loading"

        options = self._options
        warm_up(self.engine, self._programs, options.slots, options.context, self._template, tell)
        if self._prefixes is not None:
            self._prefixes.clear()
        if self.admission.state == "loading":
            self.admission.state = "ready"
        _log.info("ready after %.1f s of compiling", time.monotonic() - begin)

    def _is_over(self) -> bool:
        if self._stopping is None:
            return False
        idle = not self._running and not self._waiting.entries and self._commands.empty()
        return idle or time.monotonic() >= self._stopping

    def _stop_at(self, until: float) -> None:
        self._stopping = until

    def _tick(self) -> None:
        self._take_commands(wait=not (self._running or self._waiting.entries))
        self._tick_begin = now = time.monotonic()
        self._end_overdue(now)
        self._feed(now)
        if self._running:
            self._step()
        self._wake()
        self._longest = max(self._longest, time.monotonic() - now)
        self._tick_begin = None

    def _take_commands(self, *, wait: bool) -> None:
        try:
            command = self._commands.get(block=wait)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            pass

    def _add(self, job: Job) -> None:
        if job.is_cancelled:
            job.place.leave()
            job.open_answers = 0
            return
        for ticket in job.tickets:
            self._waiting.add(ticket)

    def _cancel(self, job: Job) -> None:
        error = ServeError(499, "the request was cancelled")
        for ticket in job.tickets:
            if self._waiting.remove(ticket) or self._leave_slot(ticket):
                self._end(ticket, error, "abort")

    def _leave_slot(self, ticket: Ticket) -> bool:
        """Free the slot of an answer; False: it has none."""
        if ticket.request_id is None:
            return False
        self.engine.cancel(ticket.request_id)
        return self._running.pop(ticket.request_id, None) is not None

    def _end_overdue(self, now: float) -> None:
        """End what has waited, or taken, too long."""
        options = self._options
        for ticket in list(self._waiting.entries):
            waited = now - ticket.arrival
            if waited > min(options.queue_timeout, options.request_timeout):
                self._waiting.remove(ticket)
                text = f"no slot became free within {waited:.0f} s; try again later"
                late = ServeError(503, text, code="queue_timeout", retry_after=5.0)
                self._end(ticket, late, "error")
        for ticket in list(self._running.values()):
            if now - ticket.arrival > options.request_timeout:
                self._leave_slot(ticket)
                text = f"the request took longer than {options.request_timeout:g} s"
                self._end(ticket, ServeError(504, text, code="request_timeout"), "error")

    def _feed(self, now: float) -> None:
        """Give free slots to those who wait."""
        while self._waiting.entries and len(self._running) < self._options.slots:
            keys = Counter(ticket.key for ticket in self._running.values())
            ticket = self._waiting.take(now, keys, self._options.slots)
            request = ticket.answer.request
            try:
                ticket.request_id = self.engine.submit(request)
            except RequestError as error:
                self._end(ticket, ServeError(400, str(error)), "error")
                continue
            ticket.times.started = now
            ticket.job.place.started(len(request.prompt))
            self._running[ticket.request_id] = ticket
            self.metrics.started(now - ticket.arrival)

    def _step(self) -> None:
        decoding = sum(ticket.times.first > 0 for ticket in self._running.values())
        self.engine.interleaved = self._pace.chunk(decoding)
        counters = self._programs.counters
        tokens, prefill_s, decode_s = counters.prefill_tokens, counters.prefill_s, counters.decode_s
        try:
            events = self.engine.step()
        except Exception as failed:
            self._fail(failed)
            return
        self._last_failure = ""
        now = time.monotonic()
        filled = counters.prefill_tokens - tokens
        if filled:
            self._pace.note_prefill(filled, counters.prefill_s - prefill_s)
        if events:
            self._pace.note_step(len(events), counters.decode_s - decode_s)
        self.metrics.stepped(filled + sum(len(event.tokens) for event in events))
        for event in events:
            self._take(event, now)

    def _take(self, event: Event, now: float) -> None:
        ticket = self._running[event.request_id]
        try:
            update = ticket.take(event)
        except Exception:
            _log.exception("an answer could not be read")
            self._leave_slot(ticket)
            self._end(ticket, ServeError(500, "the answer could not be read"), "error")
            return
        times = ticket.times
        self.metrics.generated(len(update.tokens))
        if update.tokens:
            if times.first:
                self.metrics.later_token(now - times.last)
            else:
                times.first = now
                self.metrics.first_token(now - ticket.arrival)
            times.last = now
        if update.finish_reason is None:
            self._tell(ticket, update)
            return
        if event.finish_reason is None:
            self.engine.cancel(event.request_id)
        del self._running[event.request_id]
        self._finish(ticket, update)

    def _fail(self, failed: Exception) -> None:
        """End whatever had a slot after a step that failed; the engine has reset itself."""
        text = f"{type(failed).__name__}: {failed}"
        _log.error("a step of the engine has failed", exc_info=failed)
        tickets, self._running = list(self._running.values()), {}
        for ticket in tickets:
            self._end(ticket, ServeError(500, "the engine has failed in a step"), "error")
        if text == self._last_failure:
            raise EngineFailed(text)
        self._last_failure = text

    def _end(self, ticket: Ticket, error: ServeError, reason: FinishReason) -> None:
        """End an answer before its time."""
        update = Update(ticket.index, usage=ticket.usage(), finish_reason=reason, error=error)
        self._finish(ticket, update)

    def _finish(self, ticket: Ticket, update: Update) -> None:
        times = ticket.times
        ticket.request_id = None
        ticket.job.open_answers -= 1
        took = time.monotonic() - times.started if times.started else None
        ticket.job.place.leave(1, took)
        self.metrics.ended(update, ticket.arrival, times.started, times.first)
        self._tell(ticket, update)

    def _tell(self, ticket: Ticket, update: Update) -> None:
        ticket.job.put(update)
        self._told[ticket.job] = None

    def _wake(self) -> None:
        """Wake the readers: once for each loop, not once for each token."""
        if not self._told:
            return
        jobs, self._told = list(self._told), {}
        for loop in {job.loop for job in jobs}:
            ready = [job for job in jobs if job.loop is loop]
            try:
                loop.call_soon_threadsafe(_wake_all, ready)
            except RuntimeError:  # the loop is closed: nobody reads any more
                _log.debug("the readers' loop is closed")


def _wake_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.wake()
