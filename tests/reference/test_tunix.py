"""Tunix's trainer of adapters on our decoder: it finds what is trained, and takes our steps.

Optional, and in no extra: google-tunix 0.1.7 asks for safetensors < 0.8 and an older tokenizers. In
an environment of its own: `pip install google-tunix gguf pytest beartype`, then this file with
PYTHONPATH=src. What its step is made of, flax's gradient and optimizer of `nnx.LoRAParam`, is
tested without it in tests/test_tune_train.py.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tunix.sft import peft_trainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from tuning import SMALL, decoder_of, rows, token_logprobs, trainer

from gemlax import adapters

RATE, STEPS = 1e-2, 3


def loss(model, tokens, positions, segments, labels, weights):
    hidden, _ = model(tokens, positions, segments=segments)
    return -(token_logprobs(model, hidden, labels) * weights).sum() / weights.sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix reads what jax has renamed
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_peft_trainer_learns_what_our_trainer_learns(layers):
    batch = rows(SMALL)
    ours = trainer(decoder_of(SMALL, layers=layers), clip=None, floor=1.0, learning_rate=RATE)
    expected = [ours.step(i, batch).loss for i in range(STEPS)]

    decoder = decoder_of(SMALL, layers=layers)
    adapters.attach(decoder, adapters.Rule(rank=4), key=jax.random.key(1))
    before = {name: np.asarray(b) for name, _, b in named(decoder)}
    config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = peft_trainer.PeftTrainer(decoder, optax.adamw(RATE, weight_decay=0.0), config)
        theirs = theirs.with_loss_fn(loss)
        theirs = theirs.with_gen_model_input_fn(lambda given: given)
        inputs = {name: jnp.asarray(a) for name, a in batch._asdict().items()}
        theirs.train([inputs] * STEPS)
    assert theirs._lora_enabled and theirs.train_steps == STEPS
    for name, _, b in named(decoder):
        assert np.abs(np.asarray(b) - before[name]).max() > 0, name
    tensors = [jnp.asarray(a) for a in (batch.tokens, batch.positions, batch.segments)]
    found = -token_logprobs(decoder, decoder(*tensors[:2], segments=tensors[2])[0], batch.labels)
    found = float((np.asarray(found) * batch.weights).sum() / batch.weights.sum())
    after = ours.step(STEPS, batch).loss
    np.testing.assert_allclose(found, after, rtol=1e-4)
    assert after < expected[0] - 0.1


def named(decoder):
    for module, a, b in adapters.read(decoder):
        yield module.name, a, b
