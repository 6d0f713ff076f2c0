"""The engine: requests come, share one batch of slots, and leave, one step at a time."""

import numpy as np

from gemlax import ops
from gemlax.cache import round_capacity
from gemlax.config import CHUNK
from gemlax.engine import drafts as lookup
from gemlax.engine.allocator import Ring, SlotAllocator
from gemlax.engine.compiled import Programs, prefill_width
from gemlax.engine.prefix import PrefixCache
from gemlax.engine.programs import MAX_STEPS, Output
from gemlax.engine.request import STOP_PLACES, Event, FinishReason, Request, Usage
from gemlax.engine.reuse import Reuse
from gemlax.engine.scheduler import Chunk, Row, Scheduler
from gemlax.engine.state import State, joining
from gemlax.errors import RequestError
from gemlax.grammar import mask_width

__all__ = ["Engine"]

# Steps that must be left for a program of fewer rows to be compiled: a second or two.
WORTH_COMPILING = 64


class Engine:
    """Runs requests in a batch of slots that they join and leave.

    It is driven by one thread: `submit` and `cancel` between steps. The device state is made at
    the first step and grows with the longest request.

    Attributes:
        interleaved: see `Scheduler`; it may be set between steps.
    """

    def __init__(
        self,
        programs: Programs,
        slots: int,
        capacity: int,
        *,
        interleaved: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ):
        """Allocate nothing yet.

        Args:
            programs: of the decoder.
            slots: how many requests run at once (rounded up to a bucket).
            capacity: how many tokens a slot has room for at first (rounded up to a bucket).
            interleaved: see `Scheduler`.
            prefix_cache: what prompts begin with is kept there and not prefilled again; engines
                and threads may share it. Not on a mesh.
        """
        self._reuse = None if prefix_cache is None else Reuse(programs, prefix_cache)
        self._programs = programs
        self._num_slots = programs.num_slots(slots)
        self._capacity = round_capacity(capacity)
        self._places: tuple[int, ...] = ()
        self._next_id = 0
        self._ended: list[Event] = []
        self.interleaved = interleaved
        self._reset()

    @property
    def num_running(self) -> int:
        """How many requests have a slot."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """How many requests have no slot yet."""
        return self._scheduler.num_waiting

    @property
    def num_free_slots(self) -> int:
        """How many slots are free."""
        return self._allocator.num_free

    def submit(self, request: Request) -> int:
        """Take a request; return its id. It gets a slot in one of the next steps.

        Raises:
            RequestError: an empty prompt, or too many stop ids.
        """
        if not request.prompt:
            raise RequestError("the prompt has no token: give at least BOS")
        if len(request.stop_ids) > STOP_PLACES:
            raise RequestError(
                f"at most {STOP_PLACES} stop ids are supported, got {len(request.stop_ids)}"
            )
        request_id, self._next_id = self._next_id, self._next_id + 1
        if request.max_length <= len(request.prompt):
            usage = Usage(len(request.prompt))
            self._ended.append(Event(request_id, [], usage, finish_reason="length"))
        else:
            self._scheduler.submit(request_id, request)
        return request_id

    def cancel(self, request_id: int) -> bool:
        """End a request wherever it is, and free its slot; False: it has ended before."""
        row = self._scheduler.find(request_id)
        if row is None:
            return self._scheduler.withdraw(request_id)
        self._scheduler.leave(row)
        return True

    def forget_adapter(self, adapter: int) -> None:
        """Use nothing again that was made with an entry of the tables of adapters.

        To be called when another adapter takes its place, or none, and no request runs with it.
        """
        self._allocator.forget(adapter)
        if self._reuse is not None:
            self._reuse.forget(adapter)

    def step(self, steps: int = 1) -> list[Event]:
        """Admit who waits, prefill a chunk, decode up to `steps` tokens; return what came of it.

        While requests wait, or rows draft, one call decodes until the first row ends.
        """
        events, self._ended = self._ended, []
        try:
            self._scheduler.interleaved = self.interleaved
            joined = self._scheduler.admit()
            if joined:
                self._make_room(joined)
            for row in joined:
                self._join(row)
            self._restore()
            chunks = self._scheduler.chunks()
            for call in self._programs.divide([c.stop - c.start for c in chunks]):
                self._prefill([chunks[index] for index in call])
            rows = self._scheduler.decoding()
            if rows:
                events += self._decode(rows, min(steps, MAX_STEPS))
        except BaseException:
            # A program that failed has used up the state: nothing of it can be used again.
            self._reset()
            raise
        return events

    def _reset(self) -> None:
        """End every request and forget the device state."""
        self._state: State | None = None
        self._allocator = SlotAllocator(self._num_slots, self._rings())
        self._scheduler = Scheduler(self._allocator, chunk=CHUNK, interleaved=self.interleaved)

    def _rings(self) -> list[Ring]:
        specs = {spec.kind: spec for spec in self._programs.config.layers if spec.owns_kv}
        return [
            Ring(spec.window, spec.cache_slots(self._capacity, CHUNK))
            for spec in specs.values()
            if spec.window is not None
        ]

    def _make_room(self, joining_rows: list[Row]) -> None:
        """Make the state, or let it grow, so that it holds these requests."""
        requests = [row.request for row in joining_rows]
        capacity = max(self._capacity, *(round_capacity(r.max_length) for r in requests))
        wanted = [self._places, *(r.settings.places() for r in requests)]
        places = tuple(map(max, zip(*(sizes for sizes in wanted if sizes), strict=True)))
        if self._state is None:
            self._state = self._programs.new_state(self._num_slots, capacity, places)
        elif capacity > self._capacity or places != self._places:
            self._state = self._programs.grow(self._state, capacity, places)
        self._capacity, self._places = capacity, places
        self._allocator.rings = tuple(self._rings())

    def _join(self, row: Row) -> None:
        assert self._state is not None
        if self._reuse is not None:
            self._reuse.save_slot(self._state, row, self._allocator)
        new = joining(row.request, row.slot, row.num_cached, self._state, self._programs.num_tokens)
        self._state = self._programs.join(self._state, new)

    def _restore(self) -> None:
        """Let rows whose prompt begins as another one did go on from there."""
        rows = self._scheduler.filling()
        if self._reuse is not None and rows:
            assert self._state is not None
            self._state = self._reuse.restore(self._state, rows, self._allocator)

    def _prefill(self, chunks: list[Chunk]) -> None:
        width = prefill_width(max(chunk.stop - chunk.start for chunk in chunks))
        rows = [chunk.row for chunk in chunks]
        slots, order = self._call_rows("prefill", rows, (width,), slack=1)
        tokens = np.zeros((len(order), width), np.int32)
        positions = np.full((len(order), width), ops.EMPTY, np.int32)
        for index, chunk in zip(order[: len(chunks)], chunks, strict=True):
            size = chunk.stop - chunk.start
            tokens[index, :size] = chunk.row.tokens[chunk.start : chunk.stop]
            positions[index, :size] = np.arange(chunk.start, chunk.stop)
        assert self._state is not None
        begin = self._programs.counters.prefill_s
        self._state = self._programs.prefill(self._state, tokens, positions, slots)
        for chunk in chunks:
            chunk.row.prefill_s += self._programs.counters.prefill_s - begin
            self._scheduler.filled(chunk)
            if self._reuse is not None:
                self._reuse.take(self._state, chunk.row)

    def _call_rows(
        self, name: str, rows: list[Row], rest: tuple[object, ...], slack: int = 2
    ) -> tuple[np.ndarray | None, list[int]]:
        """Return the slots of a call, and where each row lies in it; a bucket is filled up.

        Where all slots run, as they do on a mesh, they run in order without a map of rows (None).
        `slack`: see `Programs.smallest`.
        """
        assert self._state is not None
        size = self._num_slots
        if len(rows) < size:
            size = self._programs.smallest(name, self._state, len(rows), rest, slack)
        if size == self._num_slots:
            used = [row.slot for row in rows]
            return None, used + [slot for slot in range(self._num_slots) if slot not in used]
        slots = np.zeros(size, np.int32)
        slots[: len(rows)] = [row.slot for row in rows]
        return slots, list(range(size))

    def _decode(self, rows: list[Row], steps: int) -> list[Event]:
        begin = self._programs.counters.decode_s
        proposals = self._propose(rows)
        tried = lookup.is_worthwhile([len(one) for one in proposals], self._num_drafts(rows))
        if not tried:
            proposals = [[] for _ in rows]
        events = self._fill_masks(rows, proposals)
        if events:  # the others decode in the next step
            return events
        logprobs = any(row.request.logprobs for row in rows)
        assert self._state is not None
        if tried:
            output, order = self._verify(rows, proposals, logprobs)
        else:
            remaining = max(row.request.max_length - len(row.tokens) for row in rows)
            slack = 2 if remaining >= WORTH_COMPILING else self._num_slots
            slots, order = self._call_rows("decode", rows, (logprobs,), slack)
            running = np.zeros(len(order), bool)
            running[order[: len(rows)]] = True
            # What a row drafts, or may say, depends on its last token.
            alone = any(row.proposer is not None or row.constraint is not None for row in rows)
            self._state, output = self._programs.decode(
                self._state, slots, running, steps=1 if alone else steps,
                eager=self._scheduler.num_waiting > 0, logprobs=logprobs,
                masks=self._masks(rows, order, 0),
            )  # fmt: skip
        extra = lookup.extra_steps(len(rows), self._num_drafts(rows)) if tried else None
        for row in rows:
            row.decode_s += self._programs.counters.decode_s - begin
        return [
            self._take(row, output, index, len(proposal), extra if proposal else None)
            for row, index, proposal in zip(rows, order, proposals, strict=False)
        ]

    def _num_drafts(self, rows: list[Row]) -> int:
        return max(row.request.num_drafts for row in rows)

    def _propose(self, rows: list[Row]) -> list[list[int]]:
        proposals: list[list[int]] = []
        for row in rows:
            room = row.request.max_length - len(row.tokens) - 1
            most = min(row.request.num_drafts, room)
            drafts = [] if row.constraint is None else row.constraint.forced()[:most]
            if not drafts and row.proposer is not None:
                drafts = row.proposer.propose(most)
                if row.constraint is not None:
                    drafts = drafts[: row.constraint.check(drafts)]
            proposals.append(drafts)
        return proposals

    def _fill_masks(self, rows: list[Row], proposals: list[list[int]]) -> list[Event]:
        """Fill the masks of rows with a constraint; end those whose constraint fails."""
        events = []
        for row, drafts in zip(rows, proposals, strict=True):
            if row.constraint is not None:
                width = mask_width(self._programs.num_tokens)
                row.masks = np.empty((len(drafts) + 1, width), np.uint32)
                row.constraint.fill(row.masks, drafts)
                if row.constraint.error is not None:
                    self._scheduler.leave(row)
                    error = row.constraint.error
                    events.append(Event(row.request_id, [], row.usage, None, "error", error))
        return events

    def _masks(self, rows: list[Row], order: list[int], num_drafts: int) -> np.ndarray | None:
        """Return the masks of a call, [b, W] without drafts; None: all ids may come everywhere."""
        if all(row.constraint is None for row in rows):
            return None
        shape = (len(order), num_drafts + 1, mask_width(self._programs.num_tokens))
        masks = np.full(shape, 0xFFFFFFFF, np.uint32)
        for index, row in zip(order, rows, strict=False):
            if row.constraint is not None:
                masks[index, : len(row.masks)] = row.masks
        return masks if num_drafts else masks[:, 0]

    def _verify(
        self, rows: list[Row], proposals: list[list[int]], logprobs: bool
    ) -> tuple[Output, list[int]]:
        width = self._num_drafts(rows)
        slots, order = self._call_rows("verify", rows, (width, logprobs))
        running = np.zeros(len(order), bool)
        drafts = np.zeros((len(order), width), np.int32)
        counts = np.zeros(len(order), np.int32)
        for index, proposal in zip(order, proposals, strict=False):
            running[index] = True
            drafts[index, : len(proposal)] = proposal
            counts[index] = len(proposal)
        assert self._state is not None
        self._state, output = self._programs.verify(
            self._state, slots, running, drafts, counts, logprobs=logprobs,
            masks=self._masks(rows, order, width),
        )  # fmt: skip
        return output, order

    def _take(
        self, row: Row, output: Output, index: int, num_drafts: int, extra: float | None
    ) -> Event:
        """Take in what a call added to one row; a row that has ended leaves its slot."""
        count = int(output.counts[index])
        tokens = output.tokens[index, :count].tolist()
        # The last token and the drafts were written; the caches keep what came before the new last.
        row.highest = max(row.highest, len(row.tokens) + max(num_drafts, count - 1))
        error, is_finished = None, False
        if row.constraint is not None:
            count = row.constraint.advance(tokens)
            error, is_finished = row.constraint.error, row.constraint.is_finished
            tokens = tokens[:count]
        row.tokens += tokens
        row.num_filled = len(row.tokens) - 1
        row.num_steps += count if extra is None else 1
        if row.proposer is not None:
            row.proposer.extend(tokens)
            row.proposer.account(count, extra)
        logprobs = None
        if row.request.logprobs and output.logprobs is not None:
            own, ids, values = (part[index, :count] for part in output.logprobs)
            logprobs = (own, ids, values)
        reason: FinishReason | None = None
        if error is not None:
            reason = "error"
        elif is_finished or (tokens and tokens[-1] in row.request.stop_ids):
            reason = "stop"
        elif len(row.tokens) >= row.request.max_length:
            reason = "length"
        if reason is not None:
            self._scheduler.leave(row)
        return Event(row.request_id, tokens, row.usage, logprobs, reason, error)
