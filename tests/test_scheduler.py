"""The scheduler and the allocator of slots against a model of the caches, without a device."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gemlax.engine.allocator import Ring, SlotAllocator
from gemlax.engine.drafts import Proposer, is_worthwhile
from gemlax.engine.request import Request
from gemlax.engine.scheduler import Scheduler

RINGS = (Ring(4, 7), Ring(8, 100))
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30).map(tuple)


@dataclasses.dataclass
class Held:
    """What one slot's ring holds: the position in each place, and the token at each position."""

    places: dict[int, int] = dataclasses.field(default_factory=dict)
    tokens: list[int] = dataclasses.field(default_factory=list)
    adapter: int = 0


class Slots(RuleBasedStateMachine):
    """Requests come and go; a ring of 7 places is written as the device writes it."""

    def __init__(self):
        super().__init__()
        self.allocator = SlotAllocator(3, RINGS)
        self.held = [Held() for _ in range(3)]
        self.running = {}

    @rule(prompt=TOKENS, adapter=st.integers(0, 1))
    def reserve(self, prompt, adapter):
        reservation = self.allocator.reserve(prompt, adapter)
        if reservation is None:
            assert len(self.running) == 3
            return
        slot, cached = reservation
        assert slot not in self.running
        assert cached < len(prompt)
        held = self.held[slot]
        if cached:
            assert held.adapter == adapter
            assert held.tokens[:cached] == list(prompt[:cached])
            window = range(max(cached - RINGS[0].window + 1, 0), cached)
            assert all(held.places.get(p % RINGS[0].size) == p for p in window)
        held.places = {place: p for place, p in held.places.items() if p < cached}
        held.tokens, held.adapter = held.tokens[:cached], adapter
        self.running[slot] = [list(prompt), cached, cached]

    @precondition(lambda self: self.running)
    @rule(data=st.data(), answer=TOKENS, rejected=st.integers(0, 3))
    def leave(self, data, answer, rejected):
        slot = data.draw(st.sampled_from(sorted(self.running)))
        prompt, cached, highest = self.running.pop(slot)
        tokens = prompt + list(answer)
        filled = data.draw(st.integers(cached, len(tokens) - 1))
        held = self.held[slot]
        for position in range(cached, filled + rejected):
            held.places[position % RINGS[0].size] = position
            highest = max(highest, position + 1)
        held.places = {place: p for place, p in held.places.items() if p < filled}
        held.tokens = tokens[:filled]
        self.allocator.free(slot, tokens[:filled], held.adapter, num_cached=cached, highest=highest)

    @invariant()
    def every_slot_is_free_or_running(self):
        assert self.allocator.num_free + len(self.running) == 3


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_slot_is_not_taken_back_twice():
    allocator = SlotAllocator(1)
    slot, _ = allocator.reserve((1, 2), 0)
    allocator.free(slot, (1,), 0, num_cached=0, highest=1)
    with pytest.raises(ValueError, match="free already"):
        allocator.free(slot, (1,), 0, num_cached=0, highest=1)


def test_the_slot_that_holds_most_of_a_prompt_is_taken():
    allocator = SlotAllocator(2)
    slots = [allocator.reserve((9,), 0).slot for _ in range(2)]
    for slot, tokens in zip(slots, ((5, 6), (5, 6, 7, 8)), strict=True):
        allocator.free(slot, tokens, 0, num_cached=0, highest=len(tokens))
    assert allocator.match_prefix((5, 6, 7, 1), 0) == (slots[1], 3)
    assert allocator.match_prefix((5, 6, 7, 1), 1) == (slots[0], 0)


def make_request(prompt, new=3):
    return Request(tuple(prompt), len(prompt) + new, settings=None)


ARRIVALS = st.lists(
    st.tuples(
        st.integers(1, 40),  # tokens of the prompt
        st.integers(1, 9),  # of the answer
        st.integers(0, 5),  # step at which it comes
        st.none() | st.integers(0, 30),  # step at which it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(ARRIVALS, st.sampled_from([None, 4]), st.integers(1, 4))
def test_every_request_is_filled_in_order_and_ends_or_is_cancelled(arrivals, interleaved, slots):
    scheduler = Scheduler(SlotAllocator(slots, RINGS), chunk=8, interleaved=interleaved)
    filled, admitted, ended = {}, [], set()
    for step in range(600):
        for request_id, (prompt, new, come, cancelled) in enumerate(arrivals):
            if come == step:
                scheduler.submit(request_id, make_request([request_id] * prompt, new))
            if cancelled == step and come <= step and request_id not in ended:
                row = scheduler.find(request_id)
                if row is None:
                    assert scheduler.withdraw(request_id)
                else:
                    scheduler.leave(row)
                ended.add(request_id)
        for row in scheduler.admit():
            admitted.append(row.request_id)
            filled[row.request_id] = row.num_cached
        chunks = scheduler.chunks()
        busy = scheduler.decoding()
        for chunk in chunks:
            assert chunk.start == filled[chunk.row.request_id]
            assert 0 < chunk.stop - chunk.start <= (4 if interleaved and busy else 8)
            filled[chunk.row.request_id] = chunk.stop
            scheduler.filled(chunk)
        for row in scheduler.decoding():
            assert filled[row.request_id] == len(row.request.prompt) - 1
            row.tokens.append(0)
            row.num_filled += 1
            row.highest = max(row.highest, row.num_filled)
            filled[row.request_id] += 1
            if len(row.tokens) == row.request.max_length:
                scheduler.leave(row)
                ended.add(row.request_id)
            else:
                filled[row.request_id] = len(row.request.prompt) - 1
        running = {row.request_id for row in scheduler.rows()}
        waiting = set(scheduler.waiting_ids())
        assert not running & waiting and not (running | waiting) & ended
        assert len(running) <= slots
        assert not (waiting and len(running) < slots) or step == 0 or ended
    assert ended == set(range(len(arrivals)))
    order = {request_id: arrivals[request_id][2] for request_id in admitted}
    assert [order[i] for i in admitted] == sorted(order.values())


def naive_drafts(tokens, most):
    """The definition: what followed the last earlier place where the last 3, or 2, tokens stood."""
    for size in (3, 2):
        tail = tokens[-size:]
        for end in range(len(tokens) - 2, size - 2, -1):
            if len(tail) == size and tokens[end - size + 1 : end + 1] == tail:
                said = list(tokens)
                for order in range(most):
                    said.append(said[end + 1 + order])
                return said[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 9))
def test_drafts_are_what_followed_the_same_tokens_before(tokens, cut, most):
    proposer = Proposer(tokens[:cut])
    for token in tokens[cut:]:
        proposer.extend([token])
    assert proposer.propose(most) == naive_drafts(tokens, most)


def test_a_row_whose_drafts_are_wrong_stops_drafting_and_starts_again():
    proposer = Proposer([1, 2, 1, 2, 1, 2])
    assert proposer.propose(2)
    while proposer.propose(2):
        proposer.account(1, extra=1.0)
    for _ in range(60):
        proposer.account(1, None)
    assert proposer.propose(2)


def test_a_step_with_drafts_pays_only_where_enough_rows_have_some():
    assert is_worthwhile([3], 3)
    assert not is_worthwhile([0, 0], 3)
    assert not is_worthwhile([3, *[0] * 7], 3)
