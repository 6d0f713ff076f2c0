"""The decoder for users of Flax Linen: its layers are scanned by `nn.scan`.

There is no second maths. The parameters lie below "params" at the paths and with the shapes of
the NNX decoder's variables; a call checks them, puts that decoder together around them and hands
it Linen's scan. Caches ride in the carry here too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import meta, unfreeze
from jaxtyping import Array, Float, Int

from gemlax import adapters
from gemlax import decoder as blocks
from gemlax.config import TextConfig
from gemlax.decoder import Layers, Read
from gemlax.errors import CheckpointError
from gemlax.layers import Linear, LoRAConstant
from gemlax.weights import abstract_decoder

__all__ = ["Decoder", "to_linen", "to_nnx"]

_COLLECTIONS = {nnx.LoRAParam: "lora", LoRAConstant: "lora_constants"}
_SHOWN = 8  # wrong leaves named in one error


class Decoder(nn.Module):
    """The text decoder of Gemma as a Linen module; arguments as for `gemlax.Decoder`.

        model = gemlax.linen.Decoder(config.text)
        variables = model.init(jax.random.key(0), tokens, positions)
        hidden, kv_caches = model.apply(variables, tokens, positions, kv_caches)
        logits = model.apply(variables, hidden, method="logits")

    `nn.get_partition_spec(variables)` gives the logical axes: "layers" first where layers are
    stacked. With `read="slice"` the base can be trained; `read="index"` is for decoding and for
    adapters. Adapters are a collection "lora", which alone is trained then, and another one,
    "lora_constants": `to_linen` makes both of a decoder that has them; without them the base runs.

    Raises:
        CheckpointError: on `apply`, a parameter that is missing, unknown or of another shape.
    """

    config: TextConfig
    layers: Layers = "scan"
    read: Read = "slice"
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the parameters, or check those that are there."""
        form: Any = {"layers": self.layers, "read": self.read, "dtype": jnp.dtype(self.dtype)}
        graphdef, variables = abstract_decoder(self.config, **form)
        if self.is_initializing():
            rngs = nnx.Rngs(self.make_rng("params"))
            state = nnx.state(blocks.Decoder(self.config, **form, rngs=rngs))
            for name, tree in to_linen(state, self.layers)["params"].items():
                self.param(name, lambda _, tree=tree: tree)
        given = _leaves(self.variables.get("params", {}))
        _check(given, {_key(path): v.get_value().shape for path, v in variables.items()})
        filled = {path: v.replace(given[_key(path)]) for path, v in variables.items()}
        lora: dict[tuple[str, ...], Any] = {}
        for name in _COLLECTIONS.values():
            lora |= _leaves(self.variables.get(name, {}))

        def decoder() -> Any:
            whole = nnx.merge(graphdef, nnx.from_flat_state(filled))
            _put_adapters(whole, lora)
            return whole

        # In a function, or Linen would take it for a submodule of its own.
        self._decoder: Callable[[], Any] = decoder

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        positions: Int[Array, "*B T"] | None = None,
        kv_caches: Any = None,
        attention_metadata: Any = None,
        **how: Any,
    ) -> tuple[Float[Array, "*B T D"], Any]:
        """Return the hidden states after the final norm, and the caches with this step written."""
        how["scan"] = _LiftedScan(self)
        return self._decoder()(tokens, positions, kv_caches, attention_metadata, **how)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits of hidden states."""
        return self._decoder().logits(hidden)


class _LiftedScan:
    """`nn.scan` with the signature of `jax.lax.scan`; an inner scan starts from the outer's body.

    The parameters are broadcast: the body reads its layers of the stacks, as the NNX one does.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, body: Callable[[Any, Any], Any], carry: Any, xs: Any) -> Any:
        outer = self.module

        def lifted(module: nn.Module, carry: Any, x: Any) -> Any:
            self.module = module
            try:
                return body(carry, x)
            finally:
                self.module = outer

        scan = nn.scan(lifted, variable_broadcast="params", split_rngs={"params": False})
        return scan(outer, carry, xs)


def to_linen(decoder: Any, layers: Layers | None = None) -> dict[str, Any]:
    """Return the variables of `linen.Decoder` that hold the weights of an NNX decoder.

    Weights are in "params", A and B of adapters in "lora", and what else those have, such as what
    B @ A is multiplied with, in "lora_constants"; all at the paths of the NNX decoder.

    Args:
        decoder: a `gemlax.Decoder`, such as `gemlax.load(...).decoder`; the arrays are shared.
    """
    if isinstance(decoder, blocks.Decoder):
        layers = decoder.layout
        decoder = nnx.state(decoder)
    boxed: dict[tuple[str, ...], Any] = {}
    for path, variable in nnx.to_flat_state(decoder):
        stacked = layers == "scan" and path[0] == "layers"
        axes = (*(("layers",) if stacked else ()), *variable.get_metadata()["axes"])
        collection = _COLLECTIONS.get(type(variable), "params")
        boxed[(collection, *_key(path))] = nn.LogicallyPartitioned(variable.get_value(), names=axes)
    return traverse_util.unflatten_dict(boxed)


def to_nnx(
    module: Decoder, variables: Mapping[str, Any], adapter: adapters.Adapter | None = None
) -> blocks.Decoder:
    """Return an NNX decoder that holds the parameters of `module`.

    Args:
        adapter: the record of what is in "lora", that `adapters.save` and `merge` need.
    """
    bound: Any = module.apply(variables, method=lambda bound: bound._decoder())
    bound.adapter = adapter
    return bound


def _put_adapters(decoder: Any, leaves: dict[tuple[str, ...], Any]) -> None:
    """Put the leaves of adapters on the projections that they are for."""
    if not leaves:
        return
    linears = {_key(p): m for p, m in nnx.iter_modules(decoder) if isinstance(m, Linear)}
    sites: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, leaf in leaves.items():
        sites.setdefault(path[:-1], {})[path[-1]] = leaf
    wrong = []
    for site, parts in sites.items():
        needed = {"a", "b", "scale"} | ({"dropout", "seed"} if "dropout" in parts else set())
        if site[-1] == "lora" and site[:-1] in linears and parts.keys() == needed:
            linears[site[:-1]].put_lora(**parts)
        else:
            wrong.append(f"{'/'.join(site)} has {', '.join(sorted(parts))}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:_SHOWN])
        raise CheckpointError(
            f"the adapter does not fit the decoder: {shown}; each projection needs lora/a and "
            'lora/b in "lora", and lora/scale in "lora_constants"'
        )


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Flatten to leaves by path; a weight held as codes is one leaf, boxes are opened."""
    flat = traverse_util.flatten_dict(unfreeze(meta.unbox(tree)))
    return {_key(path): leaf for path, leaf in flat.items()}


def _key(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(part) for part in path)


def _check(given: dict[tuple[str, ...], Any], expected: dict[tuple[str, ...], Any]) -> None:
    """Compare leaves with the shapes that are expected, by path."""
    wrong = [f"{'/'.join(path)} is missing" for path in expected.keys() - given.keys()]
    wrong += [f"{'/'.join(path)} is unknown" for path in given.keys() - expected.keys()]
    for path in expected.keys() & given.keys():
        got, want = given[path].shape, expected[path]
        if got != want:
            wrong.append(f"{'/'.join(path)} is {list(got)}, expected {list(want)}")
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            "the parameters do not fit the decoder's config, layers and dtype: "
            + "; ".join(sorted(wrong)[:_SHOWN])
            + more
        )
