"""How many parameters each rank holds, by its places on the pipeline and on the tensor-parallel axis.

A rank's model is made as training makes it, of its own stages, but on the meta device. So what stages hold besides
their layers is counted too: the embedding, the heads, and the second copy of an embedding that both ends share.
"""

from __future__ import annotations

import math

from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.module import layouts
from megalm.pipeline.plan import Pipeline
from megalm.plan.gradients import local_shapes
from megalm.plan.recording import Grid, recording_context


def held_parameters(spec: ModelSpec, pipeline: Pipeline, grid: Grid, *, teacher: bool = False) -> list[list[int]]:
    """Elements that a rank holds: a list for each pipeline rank, with a number for each tensor-parallel place.

    ``grid``: the ranks that share a pipeline stage. ``teacher``: ``spec`` is not the model that the pipeline was cut
    for, but one that it learns from.
    """
    found = []
    for rank in range(len(pipeline.order.ranks)):
        stages = pipeline.stages_for(spec, rank) if teacher else pipeline.stages_of(rank)
        model = LanguageModel(spec, recording_context(grid, []), stages)
        declared = layouts(model)
        own = {name: declared[name] for name, _ in model.named_parameters()}
        found.append([sum(math.prod(shape) for shape in local_shapes(own, place)) for place in range(grid.tp)])
    return found
