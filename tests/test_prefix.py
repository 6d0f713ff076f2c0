"""The tree of prefixes against a plain dict, without a device."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gemlax.engine.prefix import PrefixCache, Root, Window

REACH = 4
ROOTS = [Root("w", 0, ""), Root("w", 1, ""), Root("w", 0, "a"), Root("w", 1, "a")]
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14).map(tuple)


@dataclasses.dataclass
class Span:
    """What a span would hold: for each token, all that its keys and values depend on."""

    labels: tuple
    bytes_per_token: int = 10

    @property
    def num_bytes(self):
        return self.bytes_per_token * len(self.labels)

    def split(self, count):
        return Span(self.labels[:count]), Span(self.labels[count:])


def labels(root, tokens, start=0):
    return tuple((root, tokens[: i + 1]) for i in range(start, len(tokens)))


def save(cache, root, tokens, reach=REACH):
    """Add a snapshot as an engine does."""
    known, _ = cache.covered(root, tokens)
    first = max(0, len(tokens) - reach + 1)
    span = Span(labels(root, tokens, known))
    cache.insert(root, tokens, known, span, Window(first, Span(labels(root, tokens, first))))


def check(match, root, tokens, reach=REACH):
    """What a match has is what the prompt's own prefill would have made."""
    if not match.length:
        return
    held = tuple(label for span in match.spans for label in span.labels)
    assert held[: match.length] == labels(root, tokens)[: match.length]
    seen = range(max(0, match.length - reach + 1), match.length)
    window = match.window.payload.labels
    for position in seen:
        assert window[position - match.window.start] == labels(root, tokens)[position]


def usable(root, tokens, saved):
    """The definition: how much of a prompt some snapshot serves."""
    best = 0
    for other_root, other in saved:
        if other_root != root:
            continue
        same = next(
            (i for i, (a, b) in enumerate(zip(other, tokens, strict=False)) if a != b),
            min(len(other), len(tokens)),
        )
        if same == len(other):
            best = max(best, same)
        first = max(0, len(other) - REACH + 1)
        if max(0, same - REACH + 1) >= first:
            best = max(best, same)
    return best


class Prefixes(RuleBasedStateMachine):
    """Snapshots come and adapters go; nothing is ever too much."""

    def __init__(self):
        super().__init__()
        self.cache, self.saved = PrefixCache(10**9), set()

    @rule(root=st.sampled_from(ROOTS), tokens=TOKENS)
    def save(self, root, tokens):
        save(self.cache, root, tokens)
        self.saved.add((root, tokens))

    @rule(root=st.sampled_from(ROOTS), tokens=TOKENS)
    def look_up(self, root, tokens):
        match = self.cache.match(root, tokens, REACH)
        check(match, root, tokens)
        assert match.length == usable(root, tokens, self.saved)
        self.cache.use(match)

    @rule(adapter=st.integers(0, 1))
    def unload(self, adapter):
        self.cache.forget("w", adapter)
        self.saved = {one for one in self.saved if one[0].adapter != adapter}

    @invariant()
    def bytes_are_those_of_spans_and_windows(self):
        beginnings = {(r, t[: i + 1]) for r, t in self.saved for i in range(len(t))}
        windows = sum(10 * min(REACH - 1, len(tokens)) for _, tokens in self.saved)
        assert self.cache.num_bytes == 14 * len(beginnings) + windows
        assert len(self.cache) == len(self.saved)


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ROOTS), TOKENS), max_size=30), st.integers(0, 900))
def test_a_budget_is_kept_and_what_is_left_is_right(saves, budget):
    cache = PrefixCache(budget)
    for root, tokens in saves:
        save(cache, root, tokens)
        assert cache.num_bytes <= budget
        match = cache.match(root, tokens, REACH)
        check(match, root, tokens)
        cache.use(match)
    for root in ROOTS:
        for adapter in (0, 1):
            cache.forget("w", adapter)
        assert cache.match(root, saves[0][1] if saves else (1,), REACH).length == 0
    assert cache.num_bytes == len(cache) == 0


def test_an_adapter_and_a_salt_are_never_taken_for_one_another():
    cache, prompt = PrefixCache(10**6), (1, 2, 3)
    pairs = [("a", "b"), ("ab", ""), ("", "ab"), (None, "a:b"), ("a:b", "")]
    for adapter, salt in pairs:
        assert cache.match(Root("w", adapter, salt), prompt, REACH).length == 0
        save(cache, Root("w", adapter, salt), prompt)
    assert cache.match(Root("other", "a", "b"), prompt, REACH).length == 0


def test_tokens_are_compared_where_hashes_collide():
    # -1 and -2 have the same hash, and so do tuples of them.
    assert hash((5, -1)) == hash((5, -2))
    cache, root = PrefixCache(10**6), ROOTS[0]
    save(cache, root, (5, -1, 7))
    assert cache.match(root, (5, -2, 7), REACH)[:1] == (1,)


def test_the_window_of_a_node_goes_first_and_its_span_stays_while_it_is_needed():
    cache, root = PrefixCache(14 * 20 + 30 + 10), ROOTS[0]
    short, long = (0,) * 10, (0,) * 20
    save(cache, root, short)
    save(cache, root, long)  # no room for both windows
    assert len(cache) == 1
    assert cache.match(root, long, REACH).length == 20
    assert cache.match(root, (*short, 1), REACH)[::3] == (0, 10)


def test_what_was_used_last_is_kept():
    cache, root = PrefixCache(3 * (14 * 10 + 30)), ROOTS[0]
    prompts = [(i,) * 10 for i in range(4)]
    for prompt in prompts[:3]:
        save(cache, root, prompt)
    cache.use(cache.match(root, prompts[0], REACH))
    save(cache, root, prompts[3])
    kept = [bool(cache.match(root, prompt, REACH).length) for prompt in prompts]
    assert kept == [True, False, True, True]


def test_a_snapshot_that_saves_more_tokens_for_its_bytes_is_kept_longer():
    cache, root = PrefixCache(10**6), ROOTS[0]
    save(cache, root, (1,) * 40)
    save(cache, root, (1,) * 41)  # its window saves one token more
    cache.budget = cache.num_bytes
    save(cache, root, (2,))
    kept = [cache.match(root, (token,) * 41, REACH).length for token in (1, 2)]
    assert kept == [40, 1]


def test_a_chain_of_many_nodes_is_walked():
    cache, root, prompt = PrefixCache(10**9), ROOTS[0], (1,) * 300
    for end in range(1, 300):
        span = Span((0,))
        cache.insert(root, prompt[:end], end - 1, span, Window(0, Span(())))
    assert cache.match(root, (*prompt[:10], 2), 500).length == 10
    assert cache.match(root, prompt, 500).length == 299
