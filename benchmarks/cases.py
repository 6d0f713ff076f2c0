"""A decoder with caches of one form, as other engines hold them, and its two programs.

Run: python benchmarks/cases.py [--preset gemma-3-270m] [--tiny] [--cache stacked|list|paged]
[--linen] [--layers scan|unroll] [--dtype float32] [--batch 1] [--capacity 512] [--depth 128]
Times decode steps of one form on random weights; the other scripts compare forms. What gemlax's own
engine takes is measured by `gemlax bench`. The last line is JSON.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemlax import linen, ops, preset, tiny
from gemlax.bench import memory, num_bytes, random_decoder, timed
from gemlax.cache import new_caches, new_list, new_pools
from gemlax.config import TextConfig
from gemlax.decoder import Decoder, Layers

CacheForm = Literal["stacked", "list", "paged"]
_BLOCK_SIZE = 16  # tokens in a page


class Program(NamedTuple):
    """A compiled program, and the seconds that tracing and compiling it took."""

    run: Any
    trace_s: float
    compile_s: float

    def memory(self) -> dict[str, int]:
        """Return the bytes of its arguments, of those that it writes in place, of temporaries."""
        return memory(self.run)


class Case:
    """One way to run a decoder: its weights, a form of cache, a batch and a capacity.

    Attributes:
        weights: what the programs take first.
        caches: what the last run left. What they hold changes no work, so a run may start at any
            position.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        batch: int = 1,
        capacity: int = 512,
        cache: CacheForm = "stacked",
        linen: bool = False,
    ):
        self.config: TextConfig = decoder.config
        self.dtype = decoder.dtype
        self.layers: Layers = decoder.layout
        self.batch, self.capacity, self.cache, self.linen = batch, capacity, cache, linen
        self._bind, self.weights = (_bind_linen if linen else _bind_nnx)(decoder)

    @functools.cached_property
    def caches(self) -> Any:
        """Empty caches, at first."""
        return self._new_caches()

    @functools.cached_property
    def decode_program(self) -> Program:
        """What `decode` runs."""
        return self.compile_decode()

    def compile_decode(self) -> Program:
        """Compile a loop of greedy steps: (weights, token [B, 1], caches, start, steps)."""

        def loop(weights: Any, token: Any, caches: Any, start: Any, steps: Any) -> Any:
            def step(carry: Any) -> Any:
                i, token, caches = carry
                model = self._bind(weights)
                hidden, caches = self._forward(model, token, caches, i, jnp.int32(1))
                best = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
                return i + 1, best, caches

            return jax.lax.while_loop(lambda c: c[0] < start + steps, step, (start, token, caches))

        return self._compile(loop, 1)

    def compile_prefill(self, width: int) -> Program:
        """Compile a chunk of a prompt: (weights, tokens [B, T], caches, start, count)."""

        def chunk(weights: Any, tokens: Any, caches: Any, start: Any, count: Any) -> Any:
            return self._forward(self._bind(weights), tokens, caches, start, count)[1]

        return self._compile(chunk, width)

    def decode(self, start: int, steps: int) -> Any:
        """Run `steps` steps from position `start` on; return what must be there at the end."""
        token = jnp.zeros((self.batch, 1), jnp.int32)
        at = (jnp.int32(start), jnp.int32(steps))
        self.caches = self.decode_program.run(self.weights, token, self.caches, *at)[2]
        return self.caches

    def prefill(self, program: Program, width: int, start: int, length: int) -> Any:
        """Run `length` tokens from position `start` on, in chunks of `width`."""
        tokens = jnp.zeros((self.batch, width), jnp.int32)
        for done in range(0, length, width):
            at = (jnp.int32(start + done), jnp.int32(min(width, length - done)))
            self.caches = program.run(self.weights, tokens, self.caches, *at)
        return self.caches

    def sizes(self) -> dict[str, int]:
        """Return the bytes of what is held."""
        return {
            "weight_bytes": num_bytes(self.weights),
            "cache_bytes": num_bytes(jax.eval_shape(self._new_caches)),
        }

    def _forward(self, model: Any, tokens: Any, caches: Any, start: Any, count: Any) -> Any:
        """Run the first `count` of the tokens [B, T] at positions from `start` on.

        In pages the tokens of all rows are adjacent; what is left over follows them.
        """
        batch, width = tokens.shape
        if self.cache != "paged":
            columns = jnp.arange(width, dtype=jnp.int32)
            at = jnp.where(columns < count, start + columns, ops.EMPTY)
            return model(tokens, jnp.broadcast_to(at, tokens.shape), caches)
        token = jnp.arange(batch * width, dtype=jnp.int32)
        blocks = jnp.arange(batch * self.capacity // _BLOCK_SIZE, dtype=jnp.int32)
        metadata = ops.AttentionMetadata(
            input_positions=jnp.where(token < batch * count, start + token % count, ops.EMPTY),
            block_tables=blocks.reshape(batch, -1),
            seq_lens=jnp.full((batch,), start + count),
            query_start_loc=jnp.arange(batch + 1, dtype=jnp.int32) * count,
            request_distribution=jnp.array([batch if width == 1 else 0, batch, batch], jnp.int32),
        )
        hidden, caches = model(tokens.reshape(-1), None, caches, metadata)
        return hidden.reshape(batch, width, -1), caches

    def _new_caches(self) -> Any:
        if self.cache == "stacked":
            return new_caches(self.config, self.batch, self.capacity, self.dtype)
        if self.cache == "paged":
            blocks = self.batch * self.capacity // _BLOCK_SIZE
            return new_pools(self.config, blocks, _BLOCK_SIZE, self.dtype)
        return new_list(self.config, self.batch, self.capacity, self.dtype)

    def _compile(self, function: Any, width: int) -> Program:
        """Compile a function from the shapes of what it takes; the caches are donated."""
        tokens = jax.ShapeDtypeStruct((self.batch, width), jnp.int32)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        args = (self.weights, tokens, jax.eval_shape(self._new_caches), number, number)
        ops.check_compiles("a benchmark")
        begin = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=2).lower(*args)
        traced = time.perf_counter()
        compiled = lowered.compile()
        return Program(compiled, traced - begin, time.perf_counter() - traced)


def _bind_nnx(decoder: Decoder) -> tuple[Callable[[Any], Any], Any]:
    graphdef, state = nnx.split(decoder)
    return lambda weights: nnx.merge(graphdef, weights), state


def _bind_linen(decoder: Decoder) -> tuple[Callable[[Any], Any], Any]:
    """Hold the same arrays as the variables of the Linen decoder."""
    module = linen.Decoder(
        decoder.config,
        layers=decoder.layout,
        read=decoder.read,
        dtype=decoder.dtype,
    )
    return module.bind, linen.to_linen(decoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--tiny", action="store_true", help="its layers at toy width")
    parser.add_argument("--cache", choices=["stacked", "list", "paged"], default="stacked")
    parser.add_argument("--linen", action="store_true", help="the Linen decoder")
    parser.add_argument("--layers", choices=["scan", "unroll"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, default in (("batch", 1), ("capacity", 512), ("depth", 128), ("steps", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = tiny(preset(args.preset)) if args.tiny else preset(args.preset)
    decoder = random_decoder(config.text, dtype=args.dtype, layers=args.layers)
    case = Case(decoder, batch=args.batch, capacity=args.capacity, cache=args.cache,
                linen=args.linen)  # fmt: skip
    times = timed({"step": lambda: case.decode(args.depth, args.steps)}, args.rounds)["step"]
    program = case.decode_program
    print(json.dumps({
        **vars(args), **times.report("step", "ms", args.steps), **case.sizes(), **program.memory(),
        "compile_s": round(program.trace_s + program.compile_s, 3),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
