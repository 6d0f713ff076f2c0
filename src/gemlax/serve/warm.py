"""Which requests make an engine compile all programs that serving needs."""

import dataclasses
from collections.abc import Callable, Iterator

from gemlax.config import CHUNK
from gemlax.engine import Engine, Request
from gemlax.engine.compiled import Programs, prefill_width
from gemlax.generation.requests import FORCED_DRAFTS
from gemlax.grammar import Constraint

__all__ = ["warm_up"]

# Tokens of a prompt that a prefix cache takes a snapshot of.
_KEPT = 128


class _Drafts(Constraint):
    """Lets everything come, and drafts in each step as a grammar with one way on does."""

    def forced(self) -> list[int]:
        return [0] * FORCED_DRAFTS


def warm_up(
    engine: Engine,
    programs: Programs,
    slots: int,
    context: int,
    template: Request,
    tell: Callable[[int, int], bool],
) -> None:
    """Run small requests so that every bucket is compiled, the smallest first.

    Args:
        engine: nothing runs on it.
        programs: of the engine.
        slots: the most requests that will run at once.
        context: the most tokens of one.
        template: a request whose settings are as wide as any will be.
        tell: is told (rounds done, rounds in all); False: give up.
    """
    rounds = list(_rounds(programs, template, slots, context))
    for done, requests in enumerate(rounds):
        if not tell(done, len(rounds)):
            return
        for request in requests:
            engine.submit(request)
        while engine.num_running or engine.num_waiting:
            engine.step()
    tell(len(rounds), len(rounds))


def _rounds(
    programs: Programs, template: Request, slots: int, context: int
) -> Iterator[list[Request]]:
    """Yield requests that run at the same time."""
    count, size = 0, programs.num_tokens
    drafts = _Drafts(None, num_tokens=size, eos_id=0, stop_ids=())

    def request(num_filled: int, logprobs: bool, *, is_forced: bool = False) -> Request:
        # Prompts that begin differently: nothing of another one's caches is used again.
        nonlocal count
        count += 1
        prompt = ((1 + count) % size, *[1 + (1 + count) // size % (size - 1)] * num_filled)
        one = dataclasses.replace(
            template, prompt=prompt, max_length=len(prompt) + 1, logprobs=logprobs, stop_ids=()
        )
        if not is_forced:
            return one
        max_length = len(prompt) + FORCED_DRAFTS + 1
        return dataclasses.replace(
            one, constraint=drafts, max_length=max_length, num_drafts=FORCED_DRAFTS
        )

    buckets = [1]
    while buckets[-1] < slots:
        buckets.append(min(2 * buckets[-1], slots))
    for logprobs in (False, True):
        for rows in buckets:
            yield [request(1, logprobs) for _ in range(rows)]
    for logprobs in (False, True):
        for rows in buckets if context > FORCED_DRAFTS + 2 else []:
            yield [request(1, logprobs, is_forced=True) for _ in range(rows)]
    longest = min(CHUNK, context - 2)
    for width in sorted({prefill_width(size) for size in range(1, longest + 1)}):
        for rows in buckets:
            # As many as the scheduler lets into one step, and as share one call.
            filled = min(width, longest - rows + 1)
            sizes = [1] * (rows - 1) + [filled]
            fits = filled > 0 and prefill_width(filled) == width
            if fits and len(programs.divide(sizes)) == 1:
                yield [request(one, False) for one in sizes]
    kept = request(min(_KEPT, longest), False)
    kept = dataclasses.replace(kept, snapshot_at=(len(kept.prompt) - 1,))
    # It leaves a snapshot, loses its slot, and goes on from the snapshot.
    yield from ([kept], [request(1, False) for _ in range(slots)], [kept])
