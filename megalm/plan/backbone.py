"""What the backbone says for a microbatch: a closed formula over the ways into and out of its tensor regions.

Every message is the activations of all tokens of the microbatch. With the tensor-parallel axis alone a way in costs an
all-reduce in backward and a way out one in forward; under sequence parallelism each costs an all-gather on one side
and a reduce-scatter on the other, which is as many bytes on a ring. (Korthikanti et al., "Reducing activation
recomputation", 2022.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from megalm.model.spec import ModelSpec
from megalm.model.stages import Stage
from megalm.nn.embedding import VocabParallelEmbedding
from megalm.nn.linear import ColumnParallelLinear, RowParallelLinear
from megalm.plan.entries import Entry, entry
from megalm.plan.recording import Grid

LAYER = ("attention", "mlp")
_NORM = re.compile(r"layers\.\d+\.(attention|mlp)_norm")
# (way, sequence parallelism) -> operation of forward, of backward
_SAYS = {
    ("in", False): (None, "all_reduce"),
    ("in", True): ("all_gather", "reduce_scatter"),
    ("out", False): ("all_reduce", None),
    ("out", True): ("reduce_scatter", "all_gather"),
}


@dataclass(frozen=True)
class Way:
    """A way into or out of a tensor region."""

    item: str
    """The part of the model that it belongs to: ``embedding``, ``attention``, ``mlp``."""
    way: str
    features: int
    flows: bool = True
    """A gradient comes back through it: something before it, or in it, trains."""
    again: bool = True
    """Its layer has a backward, and so is computed again where layers are."""


def ways(backbone: nn.Module, stage: Stage, *, post: bool, followed: bool = False) -> Counter[Way]:
    """The ways of one of the backbone's stages, and how many are alike. ``post``: norms come after their blocks.
    ``followed``: the gradient of the token vectors is wanted, whatever trains.

    An embedding that a later stage has for its head alone looks nothing up, so it says nothing here. Modules stand in
    the order in which they compute, but for a layer's norms, which may come after their block. Into a later stage a
    gradient always flows: the stage before is to get it.
    """
    found: Counter[Way] = Counter()
    flowing, alive, entered, behind = not stage.first, True, -1, False
    for path, module in backbone.named_modules():
        place, _, rest = path.partition(".")
        number = int(rest.partition(".")[0]) if place == "layers" and rest else -1
        if not (number in stage.layers if number >= 0 else stage.first) or not path or path == "layers":
            continue
        if number != entered:
            flowing, behind = flowing or behind, False
            entered, alive = number, flowing or _trains(module.parameters())
        own = dict(module.named_parameters(recurse=False))
        trains = _trains(own.values())
        item = next((name for name in path.split(".") if name != "layers" and not name.isdigit()), path)
        if isinstance(module, ColumnParallelLinear):
            found[Way(item, "in", module.weight.shape[1], flowing, alive)] += 1
        elif isinstance(module, RowParallelLinear):
            # The bias is added outside.
            product = flowing or _trains(p for name, p in own.items() if name != "bias")
            found[Way(item, "out", module.weight.shape[0], product, alive)] += 1
        elif isinstance(module, VocabParallelEmbedding):
            found[Way(item, "out", module.weight.shape[1], trains)] += 1
            flowing = flowing or followed
        if _NORM.fullmatch(path) and post:
            flowing, behind = flowing or behind, trains
        else:
            flowing = flowing or trains
    return found


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def backbone_entries(found: Counter[Way], grid: Grid, *, tokens: int, itemsize: int, backward: bool) -> Iterator[Entry]:
    """Forward of ``tokens`` tokens in elements of ``itemsize`` bytes, and where gradients flow, backward."""
    if grid.tp == 1:
        return
    for way, calls in found.items():
        forward, back = _SAYS[way.way, grid.sharded]
        for operation in (forward, back if backward and way.flows else None):
            if operation is not None:
                yield entry(way.item, "tp", operation, grid.tp, tokens * way.features * itemsize, calls)


def recompute_entries(
    found: Counter[Way], spec: ModelSpec, grid: Grid, *, tokens: int, itemsize: int
) -> Iterator[Entry]:
    """What layers say once more where they are computed again in backward.

    That ends with the last thing that backward asks for: the way out of the MLP comes after it, unless its dropout or
    a norm behind it keeps something.
    """
    if grid.tp == 1 or not spec.recompute:
        return
    ends_early = spec.cfg.norm_placement == "pre" and spec.cfg.dropout == 0
    for way, calls in found.items():
        forward, _ = _SAYS[way.way, grid.sharded]
        last = ends_early and (way.item, way.way) == ("mlp", "out")
        if forward is not None and way.item in LAYER and way.again and not last:
            yield entry("recompute", "tp", forward, grid.tp, tokens * way.features * itemsize, calls)
