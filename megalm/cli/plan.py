"""``megalm plan``: what a run will cost on a layout, before it is started."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalm.cli.options import Overrides, Plugins, names

if TYPE_CHECKING:
    import torch

    from megalm.config.schema import Config
    from megalm.plan.comm import AlikeRanks
    from megalm.plan.recording import Grid
    from megalm.train.prepare import Prepared


def plan(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", show_default=False)],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Ranks of the launch; default: parallel.tp * pp * dp.")
    ] = None,
    comm: Annotated[bool, typer.Option("--comm", help="Show what each rank sends in an optimizer step.")] = False,
    evaluation: Annotated[bool, typer.Option("--eval", help="With --comm: show an evaluation as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with exact bytes of every rank.")] = False,
    only: Plugins = None,
) -> None:
    """Show a run's layout and what it will cost; nothing is started, and no model is allocated."""
    from megalm.config.load import load_config
    from megalm.errors import UsageError
    from megalm.plugin.manager import PluginManager

    if evaluation and not comm:
        raise UsageError("megalm plan --eval adds an evaluation to --comm; give both")
    manager = PluginManager.for_launch(names(only))
    resolved = load_config(run, overrides or [], manager)
    size = _ranks(resolved.config, ranks)

    from megalm.plan.comm import Planner
    from megalm.plan.optimizer import PlannedOptimizer
    from megalm.plan.recording import Grid
    from megalm.train.prepare import prepare_run

    prepared = prepare_run(resolved, manager, size)
    layout = resolved.config.parallel
    grid = Grid(layout.tp, size // (layout.tp * layout.pp), layout.sp)
    volumes: dict[str, list[AlikeRanks]] = {}
    if comm and len(prepared.objective.members) > 1:
        raise UsageError(
            "megalm plan --comm knows steps of one objective, and train.objective mixes several; give each alone with "
            "--set train.objective=NAME and without train.cell, and take the shares of what they say"
        )
    if comm:
        train = resolved.config.train
        teacher = None if prepared.teacher is None else prepared.teacher.spec
        optimizer = PlannedOptimizer(prepared.optimizer, prepared.optimizer_settings)
        planner = Planner(
            prepared.spec, prepared.pipeline, grid, train.precision, train.adversarial, teacher, optimizer
        )
        volumes["step"] = planner.step(prepared.objective, lambda dp: _training(prepared, dp, grid.dp))
        if evaluation:
            from megalm.train.step import AT_ONCE

            volumes["evaluation"] = planner.evaluation(
                prepared.objective, lambda dp: _evaluation(prepared, dp, grid.dp), at_once=AT_ONCE
            )
    facts = _facts(prepared, grid)
    if json:
        from megalm.plan.report import communication

        said = {"communication": {name: communication(found) for name, found in volumes.items()}} if comm else {}
        typer.echo(jsonlib.dumps({**facts, **said}, indent=2))
        return
    from megalm.cli.show_plan import show_communication, show_facts

    show_facts(facts)
    for name, found in volumes.items():
        show_communication(name, found, layout.pp)
    if not comm:
        typer.echo("\n--comm shows what ranks send to each other in a step.")


def _ranks(config: Config, given: int | None) -> int:
    from megalm.errors import UsageError

    if given is not None:
        return given
    if config.parallel.dp is None:
        tp = config.parallel.tp * config.parallel.pp
        raise UsageError(
            f"megalm plan needs to know how many ranks there are: give --ranks N, a multiple of tp * pp = {tp}, "
            "or parallel.dp in RUN.toml or as --set parallel.dp=N"
        )
    return config.parallel.tp * config.parallel.pp * config.parallel.dp


def _facts(prepared: Prepared, grid: Grid) -> dict[str, Any]:
    from megalm.plan.parameters import held_parameters

    config, pipeline = prepared.resolved.config, prepared.pipeline
    stages = [
        {
            "stage": stage.number,
            "pp_place": pipeline.order.placement[stage.number],
            "layers": [stage.layers.start, stage.layers.stop],
        }
        for stage in pipeline.stages
    ]
    taught: dict[str, Any] = {}
    if prepared.teacher is not None:
        its = prepared.teacher.spec
        taught["teacher"] = {
            "checkpoint": str(prepared.teacher.stored.folder),
            "total": its.parameter_count(),
            "by_place": held_parameters(its, pipeline, grid, teacher=True),
        }
    return {
        "layout": {
            "ranks": grid.size * len(pipeline.order.ranks),
            "pp": len(pipeline.order.ranks),
            "tp": grid.tp,
            "sp": grid.sharded,
            "dp": grid.dp,
            "micro_batch": config.train.micro_batch,
            "microbatches": pipeline.order.microbatches,
        },
        "pipeline": {"schedule": pipeline.name, "stages": stages},
        "model": {
            "architecture": config.model.architecture,
            "objective": prepared.objective.name,
            "precision": config.train.precision,
        },
        "parameters": {
            "total": prepared.spec.parameter_count(),
            "by_place": held_parameters(prepared.spec, pipeline, grid),
        },
        **taught,
    }


def _training(prepared: Prepared, dp_index: int, dp_size: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """The microbatches of the first step."""
    import torch

    from megalm.parallel.mesh import single_rank
    from megalm.train.feed import TrainFeed
    from megalm.train.streamed import train_samples

    config = prepared.resolved.config
    feed = TrainFeed(
        prepared.objective,
        train_samples(prepared, single_rank()),
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        dp_index=dp_index,
        dp_size=dp_size,
    )
    return (rows.tensors(torch.device("cpu")) for rows in feed.step(0))


def _evaluation(prepared: Prepared, dp_index: int, dp_size: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """The microbatches of an evaluation while training."""
    import torch

    from megalm.train.feed import evaluation_rows

    config = prepared.resolved.config
    found = evaluation_rows(
        prepared.objective,
        prepared.validation,
        seed=config.run.seed,
        samples=config.eval.samples,
        micro_batch=config.train.micro_batch,
        dp_index=dp_index,
        dp_size=dp_size,
        cell=config.train.cell,
    )
    return (rows.tensors(torch.device("cpu")) for rows in found)
