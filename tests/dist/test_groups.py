"""Process groups as the launch makes them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalm.parallel.mesh import ParallelContext, make_mesh
from megalm.testing.processes import run_processes

pytestmark = pytest.mark.dist


def test_every_group_has_the_configured_timeout() -> None:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        mesh = make_mesh(torch.device("cpu"), tp=2, timeout=7.0)
        found = {}
        for group in (mesh.tp, mesh.dp):
            assert isinstance(group._handle, dist.ProcessGroup)
            backend = group._handle._get_backend(torch.device("cpu"))
            found[group.axis] = torch.tensor(backend.options._timeout.total_seconds())
        return found

    for found in run_processes(rank, tp=2, dp=2):
        assert {axis: seconds.item() for axis, seconds in found.items()} == {"tp": 7.0, "dp": 7.0}


def test_what_ranks_tell_each_other_is_json_of_any_length() -> None:
    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        mine = {"rank": parallel.rank, "text": "é" * (10**parallel.rank)}
        told = parallel.world.gather_json(mine)
        assert told == [{"rank": r, "text": "é" * (10**r)} for r in range(4)]
        assert parallel.world.broadcast_json(mine, source=3)["rank"] == 3
        assert parallel.tp.gather_json(parallel.rank) == list(parallel.tp.ranks)
        return {}

    run_processes(rank, tp=2, dp=2)


def test_one_rank_exercises_the_backend_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALM_NO_SHORT_CIRCUIT", "1")

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        assert not parallel.tp.alone
        assert not parallel.dp.alone
        x = torch.arange(3.0)
        assert parallel.tp.all_gather(x) is not x
        assert torch.equal(parallel.tp.all_reduce(x.clone()), x)
        return {}

    run_processes(rank)
