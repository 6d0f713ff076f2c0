"""How layers are stacked and scanned: segments of a repeated period, one stack per kind."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gemlax.config.layer import Kind, LayerSpec

__all__ = ["Location", "Run", "Segment", "StackPlan"]


@dataclass(frozen=True)
class Run:
    """`count` equal layers in a row inside one period."""

    spec: LayerSpec
    count: int


@dataclass(frozen=True)
class Segment:
    """`repeats` copies of a period of runs, from layer `first` on.

    All layers of one kind in a segment are equal, so a segment holds one stack per kind.
    """

    first: int
    runs: tuple[Run, ...]
    repeats: int

    @property
    def period(self) -> int:
        """Layers in one period."""
        return sum(run.count for run in self.runs)

    @property
    def num_layers(self) -> int:
        """Layers in the segment."""
        return self.period * self.repeats

    def per_period(self, kind: Kind) -> int:
        """Layers of `kind` in one period."""
        return sum(run.count for run in self.runs if run.spec.kind == kind)

    @functools.cached_property
    def specs(self) -> dict[Kind, LayerSpec]:
        """The spec of each kind in the segment, in order of appearance."""
        return {run.spec.kind: run.spec for run in self.runs}


@dataclass(frozen=True)
class Location:
    """Where a layer lies: row `row` of the stack of `kind` in segment `segment`."""

    segment: int
    kind: Kind
    row: int


@dataclass(frozen=True)
class StackPlan:
    """Layers as segments of a repeated period: with the fewest layer bodies to compile."""

    layers: tuple[LayerSpec, ...]
    segments: tuple[Segment, ...]

    @classmethod
    @functools.cache
    def of(cls, layers: tuple[LayerSpec, ...]) -> "StackPlan":
        """Plan any sequence of layers (dynamic programming over where the next segment ends)."""
        best: dict[int, tuple[tuple[int, int], tuple[Segment, ...]]] = {len(layers): ((0, 0), ())}
        for first in reversed(range(len(layers))):
            options = []
            for runs, repeats in _periods(layers, first):
                segment = Segment(first, runs, repeats)
                (bodies, count), rest = best[first + segment.num_layers]
                options.append(((bodies + len(runs), count + 1), (segment, *rest)))
            best[first] = min(options, key=lambda option: (option[0], -option[1][0].num_layers))
        return cls(layers, best[0][1])

    def locate(self, layer: int) -> Location:
        """Return where layer `layer` lies."""
        for index, segment in enumerate(self.segments):
            offset = layer - segment.first
            if 0 <= offset < segment.num_layers:
                kind = self.layers[layer].kind
                before = self.layers[segment.first : layer]
                return Location(index, kind, sum(spec.kind == kind for spec in before))
        raise IndexError(f"layer {layer} of {len(self.layers)}")

    def donor(self, layer: int) -> int:
        """Return the layer whose keys and values layer `layer` reads: itself if it owns them."""
        kind = self.layers[layer].kind
        for i in range(layer, -1, -1):
            if self.layers[i].owns_kv and self.layers[i].kind == kind:
                return i
        raise ValueError(f"layer {layer} owns no K/V and no {kind} layer before it does")

    def cache_row(self, layer: int) -> int:
        """Return the row of `layer`'s donor in the stacked cache of its kind."""
        donor = self.donor(layer)
        kind = self.layers[donor].kind
        return sum(spec.kind == kind and spec.owns_kv for spec in self.layers[:donor])

    def cache_rows(self, kind: Kind) -> int:
        """Return how many layers of `kind` own keys and values."""
        return sum(spec.kind == kind and spec.owns_kv for spec in self.layers)


def _periods(layers: tuple[LayerSpec, ...], first: int) -> Iterator[tuple[tuple[Run, ...], int]]:
    """Yield (runs, repeats) of each segment that may start at `first`."""
    rest = layers[first:]
    for length in range(1, len(rest) + 1):
        period = rest[:length]
        if len({spec.kind for spec in period}) != len(set(period)):
            return  # a kind with two specs: it needs another segment
        runs: list[Run] = []
        for spec in period:
            if runs and runs[-1].spec == spec:
                runs[-1] = replace(runs[-1], count=runs[-1].count + 1)
            else:
                runs.append(Run(spec, 1))
        repeats = 1
        while rest[repeats * length : (repeats + 1) * length] == period:
            repeats += 1
        yield tuple(runs), repeats
