"""Generation on a toy model: which tokens, when it ends, what it reports, what it refuses."""

import copy
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from adapters import build
from golden.conditioned import conditioned_weights

import gemlax
from gemlax import Model, RequestError, preset, tiny
from gemlax.generation import SamplingSettings
from gemlax.generation.answers import Answer, drive
from gemlax.generation.settings import seeds
from gemlax.names import text_weights
from gemlax.tokenizer import Tokenizer

# One period; window 32, 512 tokens.
CONFIG = tiny(preset("gemma-3-1b"), num_hidden_layers=6)
# Twice the rounding of this depth (test_decoder.SAME): two tokens nearer than this may swap.
NEAR = 1e-4
NORMAL, CONTROL, BYTE = 1, 3, 6


def toy_tokenizer(num_tokens: int = 512) -> Tokenizer:
    """Special tokens, all bytes, and pairs of letters."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pairs = [a + b for a, b in itertools.product(letters, letters)]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    types = [CONTROL] * 4
    pieces += [f"<0x{i:02X}>" for i in range(256)]
    types += [BYTE] * 256
    pieces += ["▁", *letters, *pairs][: num_tokens - len(pieces)]
    types += [NORMAL] * (len(pieces) - len(types))
    scores = [-float(i) for i in range(len(pieces))]
    return Tokenizer.from_vocabulary(pieces, scores, types, bos_id=2, eos_id=1, unk_id=3, pad_id=0)


@pytest.fixture(scope="module")
def decoder():
    return build(CONFIG, conditioned_weights("test_generate", text_weights(CONFIG.text)), "index")


@pytest.fixture(scope="module")
def model(decoder):
    return Model(CONFIG, decoder, toy_tokenizer())


@pytest.fixture(scope="module")
def ids_model(model):
    """The same model as if it had come without a tokenizer."""
    return variant(model, tokenizer=None)


def variant(model, **changes):
    """The same engine with another config or generation_config: nothing is compiled again."""
    other = copy.copy(model)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def prompts(*lengths):
    random = np.random.default_rng(11)
    return [[2, *random.integers(264, 512, length - 1).tolist()] for length in lengths]


def assert_greedy(model, prompt, tokens):
    """Each token has the best logit of a full forward, or one within NEAR of it."""
    logits = np.asarray(model.logits([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(tokens)), tokens]
    assert (logits.max(axis=-1) - chosen).max() < NEAR


@pytest.mark.parametrize(
    "length",
    [
        1,
        40,
        530,
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(1100, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_have_the_best_logit_of_a_full_forward(ids_model, length):
    (prompt,) = prompts(length)
    (completion,) = ids_model.generate([prompt], max_new_tokens=12)
    assert len(completion.tokens) == 12
    assert_greedy(ids_model, prompt, completion.tokens)


def test_prompts_of_different_length_share_a_batch(ids_model):
    some = prompts(100, 3, 47)
    together = ids_model.generate(some, max_new_tokens=10)
    for prompt, completion in zip(some, together, strict=True):
        assert_greedy(ids_model, prompt, completion.tokens)


def test_requests_one_after_another_do_not_touch_each_other(ids_model):
    long, short = prompts(100, 20)
    first = ids_model.generate([long], max_new_tokens=10)
    ids_model.generate([short], max_new_tokens=10)
    assert ids_model.generate([long], max_new_tokens=10) == first


def test_a_stop_id_ends_its_row_alone(ids_model):
    some = prompts(30, 31)
    free = ids_model.generate(some, max_new_tokens=8)
    at = 3
    stop = free[0].tokens[at]
    assert stop not in free[0].tokens[:at]
    assert stop not in free[1].tokens
    stopping = variant(ids_model, config=dataclasses.replace(CONFIG, eos_token_id=(1, stop)))
    ended, other = stopping.generate(some, max_new_tokens=8)
    assert (ended.tokens, ended.finish_reason) == (free[0].tokens[: at + 1], "stop")
    assert (other.tokens, other.finish_reason) == (free[1].tokens, "length")
    configured = variant(ids_model, generation_config={"eos_token_id": [1, stop]})
    assert configured.generate(some, max_new_tokens=8) == [ended, other]


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(model):
    some = ["hello", "world"]
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    free = model.generate(some, **settings)
    text = free[0].text
    middle = len(text) // 2
    stop = next(s for n in range(3, 9) if text.find(s := text[middle : middle + n]) == middle)
    assert stop not in free[1].text
    ended, other = model.generate(some, stop=stop, **settings)
    assert ended.text == text[:middle]
    assert ended.finish_reason == "stop"
    assert ended.tokens == free[0].tokens[: len(ended.tokens)]
    decoded = model.tokenizer.decode(ended.tokens)
    assert stop in decoded
    assert stop not in model.tokenizer.decode(ended.tokens[:-1])
    assert other == free[1]


@pytest.mark.parametrize("way", [{"top_k": 40}, {"top_p": 0.9}])
def test_seeds_give_each_row_its_own_stream_whatever_the_batch(ids_model, way):
    (prompt,) = prompts(20)
    settings = {"max_new_tokens": 12, "temperature": 1.0, **way}
    rows = ids_model.generate([prompt] * 3, seed=5, **settings)
    assert len({tuple(row.tokens) for row in rows}) == 3
    for r, row in enumerate(rows):
        assert ids_model.generate([prompt], seed=5 + r, **settings)[0] == row
    assert ids_model.generate([prompt] * 3, seed=[7, 5, 6], **settings) == [rows[2], *rows[:2]]


def test_a_stream_yields_its_first_piece_before_the_last_token_is_dispatched(ids_model):
    (prompt,) = prompts(20)
    counters = ids_model.programs.counters
    calls, tokens = counters.decode_calls, counters.decode_tokens
    stream = ids_model.stream(prompt, max_new_tokens=20)
    first = next(stream)
    assert len(first) == 1
    assert (counters.decode_calls - calls, counters.decode_tokens - tokens) == (1, 1)
    rest = [token for piece in stream for token in piece]
    assert counters.decode_tokens - tokens == 20
    assert counters.decode_calls - calls > 2
    assert stream.completion == ids_model.generate([prompt], max_new_tokens=20)[0]
    assert first + rest == stream.completion.tokens


def test_streamed_pieces_put_together_are_the_text(model):
    settings = {"max_new_tokens": 60, "temperature": 1.5, "seed": 8}
    stream = model.stream("abc def", **settings)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.completion.text == model.generate("abc def", **settings).text
    assert "\ufffd" not in "".join(pieces[:1])


def test_a_generation_without_stop_strings_is_one_call_of_the_device(model):
    before = model.programs.counters.decode_calls
    model.generate("abc", max_new_tokens=64)
    assert model.programs.counters.decode_calls == before + 1


def test_logprobs_are_those_of_the_model_before_any_setting(ids_model):
    (prompt,) = prompts(20)
    settings = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5}
    (out,) = ids_model.generate([prompt], max_new_tokens=6, logprobs=3, **settings)
    logits = ids_model.logits([[*prompt, *out.tokens]])[0, len(prompt) - 1 : -1]
    want = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for i, entry in enumerate(out.logprobs):
        assert entry.token == out.tokens[i]
        assert entry.logprob == pytest.approx(want[i, entry.token], abs=1e-4)
        assert list(entry.top.values()) == pytest.approx(np.sort(want[i])[::-1][:3], abs=1e-4)
    (plain,) = ids_model.generate([prompt], max_new_tokens=6, **settings)
    assert (plain.tokens, plain.logprobs) == (out.tokens, None)
    (zero,) = ids_model.generate([prompt], max_new_tokens=2, logprobs=0)
    assert [entry.top for entry in zero.logprobs] == [{}, {}]


def test_presence_counts_the_output_alone(ids_model):
    (prompt,) = prompts(20)
    inside, outside = prompt[5], next(i for i in range(300, 512) if i not in prompt)
    settings = {"logit_bias": {inside: 2e6, outside: 1.5e6}, "presence_penalty": 1e6}
    (out,) = ids_model.generate([prompt], max_new_tokens=3, **settings)
    # The prompt's own is free until it has been said; then each in turn has the penalty.
    assert out.tokens == [inside, outside, inside]


def test_repetition_counts_the_prompt_too(ids_model):
    (prompt,) = prompts(20)
    logits = np.asarray(ids_model.logits([prompt]))[0, -1]
    worst = min(prompt, key=lambda token: logits[token])
    assert logits[worst] < -0.1
    lifted = {"max_new_tokens": 1, "logit_bias": {worst: 1e4}}
    assert ids_model.generate([prompt], **lifted)[0].tokens == [worst]
    assert ids_model.generate([prompt], repetition_penalty=1e6, **lifted)[0].tokens != [worst]


def test_defaults_come_from_generation_config(ids_model):
    (prompt,) = prompts(20)
    config = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95}
    configured = variant(ids_model, generation_config=config)
    chosen = {k: v for k, v in config.items() if k != "do_sample"}
    want = ids_model.generate([prompt], max_new_tokens=8, seed=4, **chosen)
    assert configured.generate([prompt], max_new_tokens=8, seed=4) == want
    greedy = ids_model.generate([prompt], max_new_tokens=8)
    assert configured.generate([prompt], max_new_tokens=8, temperature=0) == greedy
    # Without do_sample transformers takes the arg-max, whatever else the file says.
    quiet = variant(ids_model, generation_config={"temperature": 0.9, "top_k": 30})
    assert quiet.generate([prompt], max_new_tokens=8) == greedy


def test_ids_that_stand_for_no_text_are_never_sampled(decoder, ids_model):
    (prompt,) = prompts(20)
    best = ids_model.generate([prompt], max_new_tokens=1)[0].tokens[0]
    image = variant(ids_model, config=dataclasses.replace(CONFIG, placeholder_ids=(best,)))
    assert image.generate([prompt], max_new_tokens=1)[0].tokens[0] != best
    suppressed = variant(ids_model, generation_config={"suppress_tokens": [best]})
    assert suppressed.generate([prompt], max_new_tokens=1)[0].tokens[0] != best
    small = Model(CONFIG, decoder, toy_tokenizer(300))  # the table has 512 rows
    out = small.generate([prompt], max_new_tokens=40, temperature=5.0)[0].tokens
    assert max(out) < 300


def test_output_ends_at_the_context(ids_model):
    (prompt,) = prompts(20)
    (out,) = ids_model.generate([prompt], max_new_tokens=50, context=27)
    assert (len(out.tokens), out.finish_reason) == (7, "length")
    (full,) = ids_model.generate([prompt], max_new_tokens=50, context=20)
    assert (full.tokens, full.text, full.finish_reason) == ([], "", "length")
    (huge,) = ids_model.generate([prompt], max_new_tokens=2**40, context=27)
    assert huge == out
    (none,) = ids_model.generate([prompt], max_new_tokens=0)
    assert none.tokens == []


def test_text_in_gives_text_out(model):
    one = model.generate("abc", max_new_tokens=5)
    assert one.text == model.tokenizer.decode(one.tokens)
    assert model.generate(["abc"], max_new_tokens=5) == [one]
    assert model.generate([model.tokenizer.encode("abc")], max_new_tokens=5) == [one]


def test_no_pair_of_tokens_comes_twice(ids_model):
    (prompt,) = prompts(20)
    tokens = ids_model.generate([prompt], max_new_tokens=40, no_repeat_ngram_size=1)[0].tokens
    whole = [*prompt, *tokens]
    assert len(set(tokens)) == len(tokens) and not set(tokens) & set(prompt)
    settings = {"max_new_tokens": 40, "no_repeat_ngram_size": 2, "temperature": 0.3}
    for speculate in (None, 3):
        (out,) = ids_model.generate([prompt], speculate=speculate, **settings)
        whole = [*prompt, *out.tokens]
        pairs = list(itertools.pairwise(whole))
        assert not set(pairs[len(prompt) - 1 :]) & set(pairs[: len(prompt) - 1])
        assert len(set(pairs[len(prompt) - 1 :])) == len(out.tokens)


def test_drafts_change_nothing_of_what_is_forbidden(ids_model):
    prompt = [2, *([300, 310, 320] * 8)]
    (free,) = ids_model.generate([prompt], max_new_tokens=16)
    bad = [free.tokens[:2], [free.tokens[2]]]
    settings = {"max_new_tokens": 16, "no_repeat_ngram_size": 4, "bad_words": bad,
                "stop_ids": [free.tokens[1]], "min_new_tokens": 5}  # fmt: skip
    (plain,) = ids_model.generate([prompt], **settings)
    (drafted,) = ids_model.generate([prompt], speculate=3, **settings)
    assert drafted.tokens == plain.tokens
    assert free.tokens[2] not in plain.tokens and len(plain.tokens) >= 5


def test_bad_words_do_not_come_with_or_without_a_space(model):
    free = model.generate("hello", max_new_tokens=1, logit_bias={model.tokenizer.id_of("dq"): 90})
    assert free.text == "dq"
    settings = {"max_new_tokens": 3, "logit_bias": {model.tokenizer.id_of("dq"): 90}}
    assert "dq" not in model.generate("hello", bad_words=["dq"], **settings).text
    assert model.generate("hello", bad_words=[], **settings).text == "dqdqdq"
    eos = model.tokenizer.eos_id
    ended = model.generate("hello", bad_words=["<eos>", [eos]], logit_bias={eos: 1e4})
    assert ended.finish_reason == "stop"  # as in transformers


def test_no_stop_id_comes_before_min_new_tokens(ids_model):
    some = prompts(10, 12)
    bias = {"logit_bias": {1: 1e4}, "max_new_tokens": 9}
    lengths = [len(out.tokens) for out in ids_model.generate(some, min_new_tokens=4, **bias)]
    assert lengths == [5, 5]
    whole = variant(ids_model, generation_config={"min_length": 13})
    assert [len(out.tokens) for out in whole.generate(some, **bias)] == [4, 2]
    assert [len(out.tokens) for out in whole.generate(some, min_new_tokens=0, **bias)] == [1, 1]


def test_lengths_come_from_generation_config(ids_model):
    (prompt,) = prompts(20)
    for said, count in (({"max_new_tokens": 3}, 3), ({"max_length": 24}, 4),
                        ({"max_length": 10, "max_new_tokens": 2}, 2)):  # fmt: skip
        configured = variant(ids_model, generation_config=said)
        assert len(configured.generate([prompt])[0].tokens) == count
        assert len(configured.generate([prompt], max_new_tokens=5)[0].tokens) == 5
    with pytest.raises(RequestError, match=r"has 20 tokens, and the .*_config has max_length 20"):
        variant(ids_model, generation_config={"max_length": 20}).generate([prompt])


def test_stop_strings_of_generation_config_end_the_text(model):
    free = model.generate("hello", max_new_tokens=12)
    stop = free.text[4:7]
    configured = variant(model, generation_config={"stop_strings": stop})
    assert configured.generate("hello", max_new_tokens=12).text == free.text[: free.text.find(stop)]


@pytest.mark.parametrize("stop", ["<bos>", ["<bos>"], ["###", "<bos>", "\n"]], ids=str)
def test_a_stop_string_that_spells_a_control_token_stops_at_it(model, stop):
    bos = model.tokenizer.bos_id
    for way in (model.generate, lambda *a, **k: list(s := model.stream(*a, **k)) and s.completion):
        bias = {bos: 500.0, model.tokenizer.id_of("dq"): 501.0}
        out = way("hello", max_new_tokens=6, presence_penalty=5.0, logit_bias=bias, stop=stop)
        assert (out.text, out.tokens[-1], out.finish_reason) == ("dq", bos, "stop")


def test_markers_in_a_text_are_read_where_asked_and_told_once(model, caplog):
    other = variant(model)
    text = "<bos>hello<eos>"
    want = [2, *model.tokenizer.encode("hello", add_bos=False), 1]
    parsed = other.generate(text, max_new_tokens=2, parse_special=True)
    assert parsed == other.generate([want], max_new_tokens=2)[0]
    assert other.score(text, parse_special=True) == other.score([want])[0]
    assert not caplog.records
    plain = other.generate(text, max_new_tokens=2)
    assert plain == other.generate([model.tokenizer.encode(text)], max_new_tokens=2)[0]
    other.generate([text, "hello"], max_new_tokens=2)
    other.score(text)
    (record,) = caplog.records
    assert "'<bos>', which is read as plain text" in record.getMessage()
    assert "parse_special=True" in record.getMessage() and record.levelname == "WARNING"


def test_none_says_nothing_and_names_of_ids_may_be_digits(ids_model):
    (prompt,) = prompts(20)
    settings = {"max_new_tokens": 4, "stop_ids": [300], "logit_bias": {301: 9.0}, "context": 64}
    want = ids_model.generate([prompt], **settings)
    names = ("presence_penalty", "frequency_penalty", "seed", "stop", "parse_special", "bad_words")
    given = settings | dict.fromkeys(names) | {"logit_bias": {"301": 9.0}}
    assert ids_model.generate([prompt], **given) == want
    with pytest.raises(RequestError, match="logit_bias: id '3x' is outside"):
        ids_model.generate([prompt], logit_bias={"3x": 1.0})


def test_after_the_largest_seed_comes_the_first():
    assert seeds(2**32 - 1, 3) == [2**32 - 1, 0, 1]
    with pytest.raises(RequestError, match=r"seed must be an integer in \[0, 2\*\*32\)"):
        SamplingSettings(seed=2**32)


def test_numpy_numbers_are_as_good_as_pythons(ids_model):
    (prompt,) = prompts(20)
    settings = {"max_new_tokens": 4, "stop_ids": [300], "logit_bias": {301: 1.0}, "context": 64}
    want = ids_model.generate([prompt], **settings)
    settings |= {"max_new_tokens": np.int64(4), "stop_ids": np.asarray([300, 1], np.uint16)}
    settings |= {"logit_bias": {np.int32(301): np.float32(1)}, "context": np.int16(64)}
    assert ids_model.generate(np.asarray([prompt]), **settings) == want
    assert ids_model.generate(iter([np.asarray(prompt)]), **settings) == want


def test_scores_are_the_log_likelihood_of_a_full_forward(ids_model):
    some = prompts(100, 2, 300)
    for prompt, score in zip(some, ids_model.score(some), strict=True):
        logits = ids_model.logits([prompt])[0, :-1]
        want = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
        total = want[np.arange(len(prompt) - 1), prompt[1:]].sum()
        assert score.num_tokens == len(prompt) - 1
        assert score.log_likelihood == pytest.approx(total, rel=1e-5)
        assert score.perplexity == pytest.approx(np.exp(-total / (len(prompt) - 1)), rel=1e-4)


def test_a_long_text_is_scored_in_windows_each_token_once(ids_model):
    (prompt,) = prompts(150)
    score = ids_model.score([prompt], window=64)[0]
    total, scored = 0.0, 1
    while scored < len(prompt):
        start = max(1, scored - 32)
        piece = [2, *prompt[start : start + 63]]  # each window starts with BOS
        logits = ids_model.logits([piece])[0, :-1]
        want = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
        own = want[np.arange(len(piece) - 1), piece[1:]]
        total += own[scored - start :].sum()
        scored = start + len(piece) - 1
    assert score.num_tokens == 149
    assert score.log_likelihood == pytest.approx(total, rel=1e-5)


def test_a_text_of_one_token_has_nothing_to_score(ids_model):
    (score,) = ids_model.score([[2]])
    assert score == (0.0, 0) and np.isnan(score.perplexity)


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ([], {}, "no prompt: got an empty list"),
        ([[]], {}, "must hold at least one id"),
        ([1, 2, 3], {}, "a prompt is a str, a list of str, or a list of lists of ids"),
        (["a", [1]], {}, "a prompt is a str, a list of str, or a list of lists of ids"),
        ([[2, 512]], {}, "token id 512 is outside [0, 512)"),
        ([[2, -1]], {}, "token id -1 is outside [0, 512)"),
        ("abc", {"max_new_tokens": -1}, "max_new_tokens must be an integer >= 0, got -1"),
        ("abc", {"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 0, got 2.5"),
        ([[2.0, 3.5]], {}, "a prompt must be integer token ids, got 2.0 (float)"),
        ([[2, True]], {}, "a prompt must be integer token ids, got True (bool)"),
        ([[2, "3"]], {}, "a prompt must be integer token ids, got '3' (str)"),
        (np.asarray([[2.0, 3.0]]), {}, "a prompt must be integer token ids"),
        ("abc", {"stop_ids": [2.0]}, "stop_ids must be integer token ids, got 2.0 (float)"),
        ("abc", {"stop_ids": 5}, "stop_ids must be a list of token ids, got 5"),
        ("abc", {"stop_ids": [True]}, "stop_ids must be integer token ids"),
        ("abc", {"stop_ids": [999999]}, "stop_ids: id 999999 is outside [0, 512)"),
        ("abc", {"stop_ids": [-1]}, "stop_ids: id -1 is outside [0, 512)"),
        ("abc", {"logit_bias": {2.0: 1}}, "logit_bias: id 2.0 is outside [0, 512)"),
        ("abc", {"stop": "<eos>\n"}, "'<eos>\\n' cannot occur: it holds a control token"),
        ("abc", {"stop": ["a", "x<bos>"]}, "'x<bos>' cannot occur"),
        ("abc", {"bad_words": "dq"}, "bad_words must be a list of words or of ids, got 'dq'"),
        ("abc", {"bad_words": ["a", ""]}, "bad_words must be words or lists of ids, got ''"),
        ("abc", {"bad_words": [5]}, "bad_words must be words or lists of ids, got 5"),
        ("abc", {"bad_words": [[5, 1.5]]}, "bad_words must be integer token ids, got 1.5"),
        ("abc", {"bad_words": [[512]]}, "bad_words: id 512 is outside [0, 512)"),
        ("abc", {"min_new_tokens": -1}, "min_new_tokens must be an integer >= 0, got -1"),
        ("abc", {"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size must be an integer >= 0"),
        ("abc", {"logit_bias": dict.fromkeys(range(512), -np.inf)}, "all 512 tokens are forbidden"),
        ("abcdefgh", {"context": 3}, "the prompt has 5 tokens, more than the context of 3"),
        (
            ["ab", "abcdefgh", "abcdef"],
            {"context": 3},
            "2 of 3 prompts, counted from 0, are longer than the context of 3: 1 (5 tokens), 2 (4",
        ),
        ([[2] * 9] * 8, {"context": 8}, "4 (9 tokens) and 3 more; shorten them"),
        ("abc", {"context": 0}, "context must be a positive integer, got 0"),
        ("abc", {"context": 10**6}, "context must be in [1, 32768] tokens, got 1000000"),
        ("abc", {"temperature": -1.0}, "temperature must be a finite number"),
        ("abc", {"temperature": float("nan")}, "temperature must be a finite number"),
        ("abc", {"seed": -1}, "seed must be an integer in [0, 2**32), got -1"),
        ("abc", {"seed": [1, 2]}, "seed must be an integer or a list of 1, got [1, 2]"),
        ("abc", {"stop": ""}, "stop must be non-empty strings"),
        ("abc", {"stop": ["a", 3]}, "stop must be non-empty strings, got ['a', 3]"),
        ("abc", {"logprobs": 21}, "logprobs must be None or in [0, 20], got 21"),
        ("abc", {"logprobs": "3"}, "logprobs must be None or in [0, 20], got '3'"),
        ("abc\ud800", {}, "surrogate"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_served_says_why(model, prompt, settings, said):
    calls = model.programs.counters.prefill_calls
    with pytest.raises(RequestError) as error:
        model.generate(prompt, **settings)
    assert said in str(error.value)
    assert model.programs.counters.prefill_calls == calls


def test_text_without_a_tokenizer_is_refused(ids_model):
    with pytest.raises(RequestError, match="has no tokenizer: give lists of ids"):
        ids_model.generate("abc")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        ids_model.generate([[2, 5]], stop="x")


def test_a_model_may_hold_its_caches_in_8_bits(decoder, ids_model):
    small = Model(CONFIG, decoder, kv_cache="int8")
    prompt = prompts(40)
    engine = small._engine(1)
    (request,) = small.requests(prompt, SamplingSettings(max_new_tokens=8)).requests
    engine.submit(request)
    engine.step()
    assert {c.k.codes.dtype.name for c in engine._state.caches.values()} == {"int8"}
    plain = ids_model.generate(prompt, max_new_tokens=1, logprobs=1)[0].logprobs[0]
    found = small.generate(prompt, max_new_tokens=1, logprobs=1)[0].logprobs[0]
    assert found.token == plain.token
    assert 0 < abs(found.logprob - plain.logprob) < 0.2


def test_caches_come_in_no_other_form(tmp_path):
    with pytest.raises(RequestError, match="kv_cache must be 'int8' or None, got 'int4'"):
        gemlax.load(tmp_path, kv_cache="int4")


def test_an_unknown_setting_of_a_stream_is_named(model):
    with pytest.raises(TypeError, match="unknown settings \\['temprature'\\]"):
        model.stream("abc", temprature=1.0)


@pytest.mark.parametrize(
    ("tokens", "lengths", "said"),
    [
        ([1, 2], None, "tokens must be integer ids [B, T], got int64 of shape [2]"),
        ([[1.5]], None, "tokens must be integer ids"),
        ([[1, 600]], None, "token id 600"),
        ([[1, 2]], [3], "lengths must be 1 numbers in [1, 2], got [3]"),
        ([[1, 2]], [0], "lengths must be"),
        ([[1, 2]], [1, 1], "lengths must be"),
    ],
    ids=str,
)
def test_ids_of_the_wrong_shape_are_refused(model, tokens, lengths, said):
    with pytest.raises(RequestError) as error:
        model.logits(tokens, lengths)
    assert said in str(error.value)


def test_hidden_states_give_the_logits(ids_model):
    (prompt,) = prompts(20)
    hidden = ids_model.hidden([prompt])
    assert hidden.shape == (1, 20, CONFIG.text.hidden_size)
    logits = ids_model.decoder.logits(hidden)
    np.testing.assert_allclose(logits, ids_model.logits([prompt]), atol=1e-5)


def test_a_caller_that_leaves_frees_its_slots(ids_model):
    settings = SamplingSettings(max_new_tokens=12)
    batch = ids_model.requests(prompts(20), settings)
    engine = ids_model._engine(1, *batch.requests)
    pieces = drive(engine, [Answer(batch.requests[0], None, None)], itertools.repeat(1))
    next(pieces)
    assert engine.num_running == 1
    pieces.close()
    assert (engine.num_running, engine.num_free_slots) == (0, 1)
