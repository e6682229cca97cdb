"""Which layers stand on which pipeline stage.

A stage is a run of layers; the first also has the embedding and the last the final norm and the heads. Stages are
cut so that the slowest is as fast as can be: a layer costs its matrix products, the head the vocabulary's, and the
embedding a lookup. ``[parallel] pp_split`` cuts by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megalm.model.spec import ModelSpec


@dataclass(frozen=True)
class Stage:
    """Consecutive layers, and whether the embedding or the heads are with them."""

    number: int
    layers: range
    first: bool
    last: bool


def whole_model(spec: ModelSpec) -> Stage:
    """The only stage of a model that is not cut."""
    return Stage(0, range(spec.cfg.layers), first=True, last=True)


def cut_stages(spec: ModelSpec, count: int, split: Sequence[int] | None = None) -> list[Stage]:
    """``count`` stages; ``split`` gives each its number of layers, which must add up (see :func:`split_problems`)."""
    sizes = list(split) if split is not None else _even_split(_costs(spec), count)
    stages, start = [], 0
    for number, size in enumerate(sizes):
        stages.append(Stage(number, range(start, start + size), first=number == 0, last=number == count - 1))
        start += size
    return stages


def split_problems(spec: ModelSpec, count: int, split: Sequence[int] | None) -> list[str]:
    """Why the layers cannot be cut so, each under the key that says so; empty where they can."""
    layers = spec.cfg.layers
    if split is None:
        if layers < count:
            return [f"parallel.pp: the pipeline has {_stages(count)}, but model.layers is {layers}"]
        return []
    if len(split) != count:
        return [f"parallel.pp_split: it is for {_stages(len(split))}, but the pipeline has {_stages(count)}"]
    if sum(split) != layers:
        return [f"parallel.pp_split: the sum of {list(split)} is {sum(split)}, but model.layers is {layers}"]
    return []


def _stages(count: int) -> str:
    return "1 stage" if count == 1 else f"{count} stages"


def layer_cost(spec: ModelSpec) -> int:
    """Multiplications for a token in one layer's matrices."""
    c = spec.cfg
    q, kv = c.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return c.hidden_size * (2 * q + 2 * kv) + c.hidden_size * spec.ffn_size * (3 if c.gated else 2)


def _costs(spec: ModelSpec) -> list[int]:
    """Of each layer, the embedding's added to the first and the head's to the last."""
    c = spec.cfg
    costs = [layer_cost(spec)] * c.layers
    costs[0] += c.hidden_size
    if spec.lm_head:
        costs[-1] += c.hidden_size * (spec.vocab_size + c.lm_head_transform * c.hidden_size)
    return costs


def _even_split(costs: list[int], count: int) -> list[int]:
    """Sizes of ``count`` runs, none empty, whose largest sum is as small as can be; earlier runs take what is over."""
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)

    @cache
    def best(start: int, runs: int) -> tuple[int, int]:
        """(largest sum, first size, negated) of the best cut of what follows ``start``."""
        if runs == 1:
            return total[-1] - total[start], start - len(costs)
        found = (
            (max(total[stop] - total[start], best(stop, runs - 1)[0]), start - stop)
            for stop in range(start + 1, len(costs) - runs + 2)
        )
        return min(found)

    sizes, start = [], 0
    for runs in range(count, 0, -1):
        sizes.append(-best(start, runs)[1])
        start += sizes[-1]
    return sizes
