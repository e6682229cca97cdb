"""Commands that use a model on one process or, started by torchrun, on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from megalm.parallel.bootstrap import Place
    from megalm.parallel.mesh import ParallelContext

Job = TypeVar("Job")
TIMEOUT = 600.0
"""Seconds after which ranks that wait for each other give up."""


def on_ranks(
    prepare: Callable[[], tuple[Job, dict[str, Any]]],
    run: Callable[[Job, ParallelContext], None],
    place: Place,
    *,
    device: str,
    tp: int,
    pp: int,
    sp: bool = False,
) -> None:
    """``prepare()`` on every process: a job, and what of it must be the same everywhere; then ``run`` it on a layout
    whose remaining factor is data parallel. Several ranks end the program with their status.
    """
    from megalm import launch
    from megalm.parallel.bootstrap import Rendezvous
    from megalm.parallel.mesh import single_rank

    if place.world_size == 1:
        job, _ = prepare()
        where = launch.choose_device(device, place)
        launch.use_threads(launch.default_threads(place), where)
        run(job, single_rank(where))
        return
    launch.end_with_launcher()
    rendezvous = Rendezvous(place)
    job = launch.prepare_together(rendezvous, prepare)
    where = launch.choose_device(device, place)
    launch.use_threads(launch.default_threads(place), where)
    status = launch.run_rank(
        lambda parallel: run(job, parallel),
        rendezvous,
        where,
        tp=tp,
        pp=pp,
        dp=place.world_size // (tp * pp),
        sp=sp,
        timeout=TIMEOUT,
    )
    raise typer.Exit(status)
