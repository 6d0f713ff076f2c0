"""Which requests make an engine compile all programs that serving needs."""

from collections.abc import Callable, Iterator

from gemlax.config import CHUNK
from gemlax.engine import Engine, Request
from gemlax.engine.compiled import Programs, prefill_width

__all__ = ["warm_up"]


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
    rounds = list(_rounds(programs, slots, context))
    for done, (logprobs, sizes) in enumerate(rounds):
        if not tell(done, len(rounds)):
            return
        for index, size in enumerate(sizes):
            # Prompts that begin differently: nothing of the last round's caches is used again.
            first = (2 + (done * slots + index)) % programs.num_tokens
            prompt = (first, *[1 + done % 2] * size)
            engine.submit(
                Request(
                    prompt=prompt, max_length=len(prompt) + 1, settings=template.settings,
                    logprobs=logprobs,
                )
            )  # fmt: skip
        while engine.num_running or engine.num_waiting:
            engine.step()
    tell(len(rounds), len(rounds))


def _rounds(programs: Programs, slots: int, context: int) -> Iterator[tuple[bool, list[int]]]:
    """Yield whether log-probabilities are wanted, and how many tokens each prompt prefills."""
    decoded = [1]
    while decoded[-1] < slots:
        decoded.append(min(2 * decoded[-1], slots))
    for logprobs in (False, True):
        yield from ((logprobs, [1] * rows) for rows in decoded)
    longest = min(CHUNK, context - 2)
    for width in sorted({prefill_width(size) for size in range(1, longest + 1)}):
        for rows in decoded:
            # As many as the scheduler lets into one step, and as share one call.
            size = min(width, longest - rows + 1)
            sizes = [1] * (rows - 1) + [size]
            fits = size > 0 and prefill_width(size) == width and len(programs.divide(sizes)) == 1
            if fits:
                yield False, sizes
