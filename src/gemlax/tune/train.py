"""The step of training: what is learnt, its optimizer, and one program that changes both.

What is trained is a dict of arrays by path; the base is an argument of the program that no gradient
is made of. The same step serves adapters, full fine-tuning and preferences.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gemlax import ops, scoring
from gemlax.decoder import Decoder
from gemlax.errors import Error, RequestError
from gemlax.qtensor import QTensor
from gemlax.sharding import Layout, put
from gemlax.tune.packing import Rows
from gemlax.tune.settings import TuneSettings

__all__ = ["Measured", "Trainer", "learning_rate", "preference_loss"]

Values = dict[str, jax.Array]


class Measured(NamedTuple):
    """What a step or an evaluation measured."""

    loss: float
    tokens: int  # that were learnt
    norm: float  # of the gradients before clipping
    accuracy: float | None  # of preferences


class Trainer:
    """A decoder in training.

    Attributes:
        values: what is trained, by path.
        optimizer_state: of those alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: TuneSettings,
        *,
        mesh: Mesh | None = None,
        implementation: ops.Backend | None = None,
    ):
        """Train the adapter of a decoder if it has one, else all its weights.

        Raises:
            RequestError: weights held as codes are to be trained, preferences without adapter, or
                settings without steps.
        """
        if settings.steps is None:
            raise RequestError("a trainer needs the number of steps")
        self.settings, self.layout = settings, Layout(mesh, implementation)
        self.full = decoder.adapter is None
        if self.full:
            if settings.beta is not None:
                raise RequestError(
                    "preferences are learnt by an adapter: its base is the reference"
                )
            decoder = _trainable(decoder)
        wanted = nnx.Param if self.full else nnx.LoRAParam
        parts: Any = nnx.split(decoder, wanted, ...)
        self._graph, trained, self._frozen = parts
        flat = dict(nnx.to_flat_state(trained))
        self._variables = {".".join(map(str, path)): (path, v) for path, v in flat.items()}
        # Copies: the step takes its arguments over, and these may be a model's.
        self.values: Values = {
            name: jnp.copy(v.get_value()) for name, (_, v) in self._variables.items()
        }
        self._drops = not self.full and any(m.dropout for m in decoder.adapter)
        self._tx = _optimizer(settings)
        value_shardings, state_shardings = self._shardings()
        if mesh is not None:
            self.values = jax.device_put(self.values, value_shardings)
        init = functools.partial(_with_optax, self._tx.init)
        self.optimizer_state = self.layout.jit(init, state_shardings)(self.values)
        everywhere = self.layout.replicated
        self.program = self.layout.jit(
            self._step, (value_shardings, state_shardings, everywhere), donate_argnums=(0, 1)
        )
        self._evaluate = self.layout.jit(self._totals, everywhere)

    def _shardings(self) -> Any:
        """Return how a mesh holds what is trained, and the optimizer's state beside it."""
        if self.layout.mesh is None:
            return None, None
        mesh, everywhere = self.layout.mesh, self.layout.replicated
        weights = dict(nnx.to_flat_state(self._frozen))
        placements: dict[str, Any] = {}
        for name, (path, _) in self._variables.items():
            placements[name] = everywhere
            variable: Any = weights.get((*path[:-2], "weight"))  # of .../lora/a or b
            weight = None if variable is None else variable.get_value()
            if isinstance(self.values[name].sharding, NamedSharding):
                placements[name] = self.values[name].sharding
            elif isinstance(weight, QTensor):  # A and B as the codes are cut
                spec = (*weight.codes.sharding.spec, None, None, None)[: weight.codes.ndim]
                cut = (None, spec[-1]) if path[-1] == "a" else (spec[-2], None)
                placements[name] = NamedSharding(mesh, PartitionSpec(*spec[:-2], None, *cut))
        state = jax.eval_shape(functools.partial(_with_optax, self._tx.init), self.values)
        placed = _optax().tree_map_params(
            self._tx,
            lambda _, how: how,
            state,
            placements,
            transform_non_params=lambda _: everywhere,
        )
        return placements, placed

    def step(self, number: int, rows: Rows) -> Measured:
        """Change the weights by one batch: rows [accumulate * B, T], step `number` from 0."""
        count = self.settings.accumulate
        if len(rows.tokens) % count:
            raise RequestError(f"{len(rows.tokens)} rows cannot be split into {count} equal parts")
        batch = self._put(Rows(*(a.reshape(count, -1, a.shape[-1]) for a in rows)))
        args = (self._frozen, jnp.int32(number), batch)
        self.values, self.optimizer_state, sums = self.program(
            self.values, self.optimizer_state, *args
        )
        return self._measured(sums)

    def evaluate(self, batches: Iterable[Rows]) -> Measured:
        """Return the loss over all batches of rows [B, T]; nothing is changed."""
        sums = np.zeros(4)
        for rows in batches:
            batch_sums = self._evaluate(self.values, self._frozen, self._put(rows))
            sums += np.asarray([*jax.device_get(batch_sums), 0.0], np.float64)
        return self._measured(sums)

    def decoder(self) -> Decoder:
        """Return the decoder with the weights as they are now."""
        return self._merge(self.values, self._frozen)

    def _measured(self, sums: Any) -> Measured:
        loss, units, right, norm = (x.item() for x in map(np.asarray, sums))
        units = max(units, 1)
        accuracy = None if self.settings.beta is None else right / units
        return Measured(loss / units, int(units), norm, accuracy)

    def _put(self, rows: Rows) -> Rows:
        batch_axis = rows.tokens.ndim - 2
        return put(rows, self.layout.rows(rows.tokens.shape[batch_axis], batch_axis))

    def _merge(self, values: Values, frozen: Any) -> Decoder:
        flat = {
            path: variable.replace(values[name])
            for name, (path, variable) in self._variables.items()
        }
        return nnx.merge(self._graph, nnx.from_flat_state(flat), frozen)

    def _step(self, values: Values, state: Any, frozen: Any, number: jax.Array, batch: Rows) -> Any:
        """Sum the gradients over the parts of a batch, and change the weights once."""
        units = self._units(batch).sum()
        slope = jax.value_and_grad(self._loss, has_aux=True)

        def part(sums: Any, inputs: tuple[jax.Array, Rows]) -> Any:
            index, rows = inputs
            key = None
            if self._drops:
                key = jax.random.fold_in(jax.random.key(self.settings.seed), number)
                key = jax.random.fold_in(key, index)
            (_, totals), slopes = slope(values, frozen, rows, units, key)
            return jax.tree.map(jnp.add, sums, (slopes, totals)), None

        zeros, none = jax.tree.map(jnp.zeros_like, values), jnp.float32(0.0)
        parts = (jnp.arange(self.settings.accumulate, dtype=jnp.int32), batch)
        (slopes, totals), _ = jax.lax.scan(part, (zeros, (none, none, none)), parts)

        def apply(slopes: Values, state: Any, values: Values) -> Any:
            optax = _optax()
            changes, state = self._tx.update(slopes, state, values)
            return optax.apply_updates(values, changes), state, optax.tree.norm(slopes)

        values, state, norm = _with_optax(apply, slopes, state, values)
        return values, state, (*totals, norm)

    def _loss(
        self, values: Values, frozen: Any, rows: Rows, units: Any, key: Any
    ) -> tuple[Any, Any]:
        totals = self._totals(values, frozen, rows, key)
        return totals[0] / jnp.maximum(units, 1.0), totals

    def _units(self, rows: Rows) -> jax.Array:
        """Return what a loss is the mean of: tokens, or pairs that are not filling."""
        if self.settings.beta is None:
            return rows.weights
        chosen = rows.weights[..., 0::2, :]
        return (chosen.sum(axis=-1) > 0).astype(jnp.float32)

    def _totals(self, values: Values, frozen: Any, rows: Rows, key: Any = None) -> Any:
        """Return sums over rows: loss, tokens or pairs, and pairs whose better one is preferred."""
        decoder = self._merge(values, frozen)
        logprobs = self._logprobs(decoder, rows, dropout_key=key)
        units = self._units(rows)
        if self.settings.beta is None:
            return -(logprobs * rows.weights).sum(), units.sum(), jnp.float32(0.0)
        reference = jax.lax.stop_gradient(self._logprobs(decoder, rows, use_adapter=False))
        policy, reference = ((p * rows.weights).sum(axis=1) for p in (logprobs, reference))
        loss, margin = preference_loss(policy, reference, beta=self.settings.beta)
        return (loss * units).sum(), units.sum(), jnp.where(margin > 0, units, 0.0).sum()

    def _logprobs(self, decoder: Decoder, rows: Rows, **how: Any) -> jax.Array:
        hidden, _ = decoder(
            rows.tokens, rows.positions, segments=rows.segments, remat=self.settings.remat, **how
        )
        return scoring.label_logprobs(
            decoder, hidden, rows.labels, rows.weights > 0, frozen=not self.full, layout=self.layout
        )


def learning_rate(settings: TuneSettings, step: Any) -> Any:
    """Return the learning rate of a step, counted from 0: it rises, then falls by a cosine."""
    assert settings.steps is not None
    warmup = math.ceil(settings.warmup * settings.steps)
    part = jnp.clip((step - warmup) / max(settings.steps - warmup, 1), 0.0, 1.0)
    fallen = settings.floor + (1 - settings.floor) * 0.5 * (1 + jnp.cos(jnp.pi * part))
    return settings.peak_rate * jnp.minimum((step + 1) / max(warmup, 1), fallen)


def _optimizer(settings: TuneSettings) -> Any:
    """Return Adam with decoupled weight decay (arXiv 1711.05101), behind the clipping."""
    optax = _optax()
    schedule = functools.partial(learning_rate, settings)
    adam = optax.adamw(schedule, weight_decay=settings.weight_decay)
    if settings.clip is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(settings.clip), adam)


def preference_loss(
    policy: Float[Array, "R"], reference: Float[Array, "R"], *, beta: float
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """Return the DPO loss of each pair, and by how much the policy prefers the chosen answer.

    Rows 2i and 2i + 1 are the log-probabilities of chosen and rejected answers.
    Source: arXiv 2305.18290, equation 7.
    """
    gained = beta * (policy - reference)
    margin = gained[0::2] - gained[1::2]
    return -jax.nn.log_sigmoid(margin), margin


def _trainable(decoder: Decoder) -> Decoder:
    """Return a decoder all of whose weights are arrays that have a gradient."""
    graph, state = nnx.split(decoder)
    flat = dict(nnx.to_flat_state(state))
    for path, variable in flat.items():
        weight: Any = variable.get_value()
        if isinstance(weight, QTensor) and weight.format in ("float32", "bfloat16"):
            weight = weight.dense()
        if not isinstance(weight, jax.Array):
            raise RequestError(
                "codes cannot be trained: load the model with quantize='dense', or train an adapter"
            )
        flat[path] = variable.replace(weight)
    decoder = nnx.merge(graph, nnx.from_flat_state(flat))
    decoder.read = "slice"
    return decoder


def _with_optax(function: Any, *args: Any) -> Any:
    """Run what optax wrote, which mixes dtypes, whatever promotion is set."""
    with jax.numpy_dtype_promotion("standard"):
        return function(*args)


def _optax() -> Any:
    try:
        import optax
    except ImportError as error:
        raise Error('training needs optax; install it with: pip install "gemlax[tune]"') from error
    return optax
