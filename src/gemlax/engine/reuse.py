"""What an engine does with a `PrefixCache`: when snapshots are taken, and who goes on from them."""

from collections.abc import Sequence

from gemlax.engine.allocator import SlotAllocator
from gemlax.engine.compiled import Programs
from gemlax.engine.prefix import WORTH_REUSING, PrefixCache, Root
from gemlax.engine.request import Request
from gemlax.engine.scheduler import Row
from gemlax.engine.snapshots import Snapshots
from gemlax.engine.state import State

__all__ = ["Reuse"]

# A long prompt leaves a snapshot at each multiple of so many tokens, so that little is lost where
# its client goes away.
EVERY = 2048
# Where a prompt shares at least so many tokens that no snapshot serves, it takes one; so many
# tokens of a slot are saved before another request takes it.
WORTH_SAVING = 64


class Reuse:
    """Saves to and restores from a prefix cache the slots of one engine.

    A row's `snapshots` are the numbers of tokens at which one is to be taken, in rising order;
    None: nobody has looked yet what it can go on from. No chunk is cut for them: a ring is longer
    than its window by a chunk, so it still has the window at each place of the last one.
    """

    def __init__(self, programs: Programs, cache: PrefixCache):
        self._snapshots, self._cache = Snapshots(programs), cache
        self._weights = programs  # theirs; an id could be another object's later
        self._generations: dict[int, int] = {}

    def forget(self, adapter: int) -> None:
        """Forget what was made with an entry of the tables of adapters: it is another one now."""
        generation = self._generations.get(adapter, 0)
        self._cache.forget(self._weights, (adapter, generation))
        self._generations[adapter] = generation + 1

    def save_slot(self, state: State, row: Row, allocator: SlotAllocator) -> None:
        """Save what the slot of a new row holds and the row has no use for."""
        contents = allocator.contents(row.slot)
        if len(contents.tokens) - row.num_cached >= WORTH_SAVING and allocator.holds_window(
            contents
        ):
            root = self._root(*contents.origin)
            self._save(state, root, row.slot, contents.tokens, WORTH_SAVING)

    def restore(self, state: State, rows: Sequence[Row], allocator: SlotAllocator) -> State:
        """Let each new row, in the order of admission, go on from the longest known beginning.

        One that begins as a row before it, which is being prefilled, waits for its snapshots.
        """
        for index, row in enumerate(rows):
            if row.snapshots is not None:
                continue
            row.is_waiting = any(self._is_worth_waiting(row, other) for other in rows[:index])
            if row.is_waiting:
                continue
            prompt, origin = row.request.prompt, row.request.origin
            match = self._cache.match(self._root(*origin), prompt[:-1], self._snapshots.reach)
            if match.length >= row.num_filled + WORTH_REUSING:
                state = self._snapshots.restore(state, row.slot, match)
                self._cache.use(match)
                row.num_cached = row.num_filled = row.highest = match.length
                allocator.restored(row.slot, prompt[: match.length], origin)
            row.snapshots = _places(row.request, row.num_filled)
            if match.known - row.num_filled >= WORTH_SAVING:
                row.snapshots = sorted({*row.snapshots, match.known})
        return state

    def take(self, state: State, row: Row) -> None:
        """Take the snapshots that the last chunk of a row has passed."""
        while row.snapshots and row.snapshots[0] <= row.num_filled:
            tokens = row.request.prompt[: row.snapshots.pop(0)]
            root = self._root(*row.request.origin)
            self._save(state, root, row.slot, tokens, WORTH_REUSING)

    def _save(
        self, state: State, root: Root, slot: int, tokens: Sequence[int], fewest: int
    ) -> None:
        """Add a snapshot, unless the one before it lacks fewer than so many tokens."""
        known, served = self._cache.covered(root, tokens)
        if len(tokens) - served >= fewest:
            span, window = self._snapshots.save(state, slot, known, len(tokens))
            self._cache.insert(root, tokens, known, span, window)

    def _is_worth_waiting(self, row: Row, other: Row) -> bool:
        """Whether a row before this one will soon leave a snapshot of their common beginning."""
        if row.request.origin != other.request.origin:
            return False
        places = other.snapshots
        if places is None:
            places = _places(other.request, other.num_filled)
        # What can go on from a beginning has one token more.
        one, two = row.request.prompt[:-1], other.request.prompt
        worth = [place for place in places if row.num_filled + WORTH_SAVING <= place <= len(one)]
        return any(one[:place] == two[:place] for place in worth[:1])

    def _root(self, adapter: int, salt: str) -> Root:
        return Root(self._weights, (adapter, self._generations.get(adapter, 0)), salt)


def _places(request: Request, num_filled: int) -> list[int]:
    """Return where a prompt leaves snapshots that is in the caches up to `num_filled`."""
    last = len(request.prompt) - 1
    places = {*request.snapshot_at, *range(EVERY, last + 1, EVERY)}
    return sorted(place for place in places if num_filled < place <= last)
