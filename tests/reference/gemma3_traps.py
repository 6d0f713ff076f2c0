"""The wrong variants of Gemma 3."""

from collections.abc import Callable

from reference.toys import GEMMA_3
from reference.traps import FULL, SLIDING, Change, Trap, every, layers, operations, text

from gemlax.config import GemmaConfig, RopeSpec

SCALED = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")  # rope factor 8; two K/V heads
UNEVEN = ("gemma-3-1b", "gemma-3-4b", "gemma-3-27b")  # the last period is cut short


def pattern(is_full: Callable[[int, int], bool]) -> Change:
    """Return the config with the kind of layer i of n decided by `is_full(i, n)`."""

    def apply(config: GemmaConfig) -> GemmaConfig:
        kinds = {False: config.text.first(SLIDING), True: config.text.first(FULL)}
        count = len(config.text.layers)
        return layers(lambda i, _: kinds[is_full(i, count)])(config)

    return apply


TRAPS: dict[str, Trap] = {
    "query scale head_dim ** -0.5": Trap(("gemma-3-27b",), every("", attention_scale=16**-0.5)),
    "query scale 1": Trap(GEMMA_3, every("", attention_scale=1.0)),
    "linear rope on sliding layers": Trap(SCALED, every(SLIDING, rope=RopeSpec(1e4, 8.0))),
    "rope factor dropped": Trap(SCALED, every(FULL, rope=RopeSpec(1e6))),
    "global theta on sliding layers": Trap(GEMMA_3, every(SLIDING, rope=RopeSpec(1e6))),
    "local theta on full layers": Trap(GEMMA_3, every(FULL, rope=RopeSpec(1e4))),
    "norms multiply by w": Trap(GEMMA_3, text(norm_offset=0.0)),
    "window one short": Trap(GEMMA_3, every(SLIDING, window=31)),
    "window one long": Trap(GEMMA_3, every(SLIDING, window=33)),
    "all layers sliding": Trap(GEMMA_3, pattern(lambda i, n: False)),
    "all layers full": Trap(GEMMA_3, pattern(lambda i, n: True)),
    "first of six full": Trap(GEMMA_3, pattern(lambda i, n: i % 6 == 0)),
    "last layer forced full": Trap(UNEVEN, pattern(lambda i, n: i % 6 == 5 or i == n - 1)),
    **operations(GEMMA_3, SCALED),
}
