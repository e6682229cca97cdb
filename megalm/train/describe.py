"""A run in words, for its console: what trains what on which ranks."""

from __future__ import annotations

import math
from typing import Any

from megalm.data.stream import Stream
from megalm.model.language_model import trained_shapes
from megalm.parallel.mesh import ParallelContext
from megalm.train.prepare import Prepared


def heading(prepared: Prepared, parallel: ParallelContext) -> dict[str, object]:
    """What is shown when the run starts."""
    pipeline = prepared.pipeline
    layout = f"tp {parallel.tp.size}{' + sp' * parallel.sp}, dp {parallel.dp.size} on {parallel.device}"
    if parallel.pp.size > 1:
        layout = f"pp {parallel.pp.size} ({pipeline.name}, {len(pipeline.stages)} stages), {layout}"
    return {
        "run": prepared.run_dir,
        "objective": prepared.objective.name,
        "model": _model(prepared),
        "layout": layout,
        "kernels": ", ".join(f"{d.operation} {d.implementation}" for d in prepared.kernels),
        "data": _data(prepared),
    }


def layout_words(layout: dict[str, Any]) -> str:
    """``tp 2 + sp, pp 2, dp 1``."""
    sp = " + sp" if layout["sp"] else ""
    return ", ".join(f"{axis} {size}{sp if axis == 'tp' else ''}" for axis, size in layout.items() if axis != "sp")


def _model(prepared: Prepared) -> str:
    spec = prepared.spec
    text = f"{prepared.resolved.config.model.architecture}, {spec.parameter_count():,} parameters"
    if spec.tuning.method == "none":
        return text
    moving = sum(math.prod(shape) for shape in trained_shapes(spec).values())
    return f"{text}, {moving:,} of which train ({spec.tuning.method})"


def _data(prepared: Prepared) -> str:
    train, source, task = prepared.train, prepared.source, prepared.task
    if task is not None:
        return f"{len(task.train):,} records to train on, {len(task.validation):,} to evaluate on"
    if isinstance(train, Stream):
        return f"stream {train.source.identity}"
    if source is not None:
        return f"{train.num_tokens:,} training tokens of {source.identity}"
    paths = prepared.resolved.config.data.paths
    shown = paths if len(paths) < 4 else (*paths[:2], f"and {len(paths) - 2} more")
    return f"{train.num_tokens:,} training tokens in {', '.join(shown)}"
