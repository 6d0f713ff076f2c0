"""Decoding against transformers: teacher forced through caches, and greedy up to near ties."""

from typing import NamedTuple

import adapters
import numpy as np
import pytest
import torch
from golden import hf
from golden.conditioned import valid_tokens
from reference.toys import Toy, clear_choices

import gemlax

# Windows that are decoded token by token.
WINDOWS = 2
# A differing greedy token is a tie when the reference's logits are closer than this times noise.
NEAR_TIE = 4


class Forced(NamedTuple):
    """Prompts with their outputs as one batch, and transformers' logits on them, without a cache.

    `clear` [B, T] leaves out padding, and where a router's choice is open.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    clear: np.ndarray

    def error(self, logits: np.ndarray) -> float:
        """Return the largest difference of these logits from transformers'."""
        return float(np.abs(logits - self.logits)[self.clear].max())


def check_decoding(
    case: Toy, layers: adapters.Stack, monkeypatch: pytest.MonkeyPatch, cached: bool = True
) -> None:
    """Check two windows of greedy decoding, and with `cached` also the logits through caches."""
    adapters.read_caches_in_blocks_of(32, monkeypatch)
    decoder = adapters.build(case.config, case.weights, layers)
    model = gemlax.Model(case.config, decoder)
    prompts = [row[:n].tolist() for row, n in zip(case.tokens, case.lengths, strict=True)]
    count = WINDOWS * case.hf_config["sliding_window"]
    found = model.generate(prompts, max_new_tokens=count, temperature=0.0, logprobs=0)
    # A row may meet the end token, as transformers' does; the others go on.
    lengths = [len(completion.tokens) for completion in found]
    assert lengths.count(count) >= 2
    forced = teacher_forced(case, prompts, [completion.tokens for completion in found])
    noise = forced.error(np.asarray(model.logits(forced.tokens, forced.lengths)))
    assert noise <= adapters.LOGITS * case.std
    if cached:
        steps = min(count, int(forced.lengths.min()) - 1)
        through = adapters.cached_logits(decoder, forced.tokens, forced.lengths, steps)
        print(f"{case.size}: cached logits differ by {forced.error(through) / case.std:.1e} std")
        assert forced.error(through) <= adapters.LOGITS * case.std
    ties, off = 0, 0.0
    for row, (prompt, completion) in enumerate(zip(prompts, found, strict=True)):
        tokens, start = completion.tokens, len(prompt) - 1
        steps_of = slice(start, start + len(tokens))
        # Where a router's choice is open, every token ties.
        clear = forced.clear[row, steps_of]
        reference = np.where(clear[:, None], forced.logits[row, steps_of], 0.0)
        ties += check_greedy(tokens, reference, noise)
        if row == 0:  # transformers' cache is its own; its logits without one judge every row
            expected = greedy(case.reference, prompt, count)
            check_same_until_a_tie(tokens, expected, reference, noise)
        logprobs = log_softmax(reference)[np.arange(len(tokens)), tokens]
        found_logprobs = np.array([p.logprob for p in completion.logprobs])
        off = max(off, *np.abs(found_logprobs - logprobs)[clear])
    print(
        f"{case.size} {layers}: {ties} near ties in {sum(lengths)} tokens; noise "
        f"{noise / case.std:.1e} std; cached log-probabilities differ by {off / case.std:.1e} std"
    )
    # Both the logit and the normaliser may be off.
    assert off <= 2 * adapters.LOGITS * case.std


def teacher_forced(case: Toy, prompts: list[list[int]], outputs: list[list[int]]) -> Forced:
    """Return each prompt with its output, and transformers' logits."""
    rows = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), lengths.max()), np.int32)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = row
    run, valid = hf.run(case.reference, ids, lengths), valid_tokens(lengths)
    clear = valid & clear_choices(run)
    assert clear[valid].mean() > 0.99
    return Forced(ids, lengths, run.logits, clear)


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """Return what transformers' own greedy decoding, with its cache, goes on with."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def check_greedy(tokens: list[int], reference: np.ndarray, noise: float) -> int:
    """Check that each token is the reference's arg-max or a near tie; return how many are ties."""
    gaps = reference.max(axis=-1) - reference[np.arange(len(tokens)), tokens]
    assert gaps.max() < NEAR_TIE * noise
    return int((gaps > 0).sum())


def check_same_until_a_tie(
    tokens: list[int], expected: list[int], reference: np.ndarray, noise: float
) -> None:
    """Check that two continuations are equal up to the first near tie of the reference."""
    for logits, token, other in zip(reference, tokens, expected, strict=False):
        if token != other:
            assert abs(logits[token] - logits[other]) < NEAR_TIE * noise
            return
    assert len(tokens) == len(expected)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
