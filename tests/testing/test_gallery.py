"""The gallery of mistakes: each is caught by the check that is meant to catch it, and passes where it is repaired.

The mistakes of objectives are made in broken_objectives.py, which is installed as a plugin; those of the engine are
made in the engine itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalm.errors import ObjectiveError
from megalm.nn.microbatch import Microbatch
from megalm.ops.dropout import DropoutAddress, dropout_add
from megalm.ops.kernels import Kernels
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.parallel.sim.errors import DeadlockError, MismatchError
from megalm.plugin.manager import PluginManager
from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.layouts import RankLayout
from megalm.testing.objective.checks import CHECKS
from megalm.testing.objective.parity import assert_layout_parity, layouts_for
from megalm.testing.objective.subject import ObjectiveSubject

FakeDist = Callable[..., Path]
SOURCE = Path(__file__).with_name("broken_objectives.py")
RUN = {check.name: check.run for check in CHECKS}


@pytest.fixture
def subject(fake_dist: FakeDist, campaign_seed: int) -> Iterator[Callable[[str], ObjectiveSubject]]:
    fake_dist("gallery", {"gallery": "broken_gallery"}, {"broken_gallery.py": SOURCE.read_text()})
    manager = PluginManager.for_launch(None)
    made: list[ObjectiveSubject] = []

    def make(name: str) -> ObjectiveSubject:
        made.append(ObjectiveSubject(name, manager=manager, seed=campaign_seed))
        return made[-1]

    yield make
    for each in made:
        each.close()


OBJECTIVES = [
    ("MeanOfMeans", "SumOfMean", "sums", r"term 'next' of 8 rows is .* add up to .* \(a mean\?\)"),
    ("MeanOfMeans", "Windows", "microbatches", r"microbatches of 1 rows: \d+ values change\s+loss"),
    ("DividesByNothing", "Guarded", "microbatches", "a microbatch with nothing to score"),
    ("ShiftsInLoss", "ShiftsEarly", "scopes", r"shift labels in collate\(\)"),
    ("TokenTermOfRows", "RowTermOfRows", "scopes", 'scope="example"'),
    ("RowTermOfTokens", "Windows", "scopes", 'scope="token"'),
    ("LastPosition", "FixedPosition", "padding", r"more columns of padding: \d+ values change\s+loss"),
    ("MasksByWorkerOrder", "Windows", "rows", "differs in labels.*draw from no other generator"),
    ("MasksByInstance", "Windows", "rows", "keep no state between rows"),
    ("MasksByHash", "Windows", "rows", "built in a new process.* differs in labels"),
    ("BatchesWithoutDraws", "BatchesOfNothing", "rows", r"build_batch\(\) of the samples .* differs in labels"),
    ("DropsFromStream", "Windows", "steps", r"loss.* differs from one time to the next. Dropout is ctx\.dropout"),
    ("CountsInPlace", "Windows", "steps", r"counts\(\) changes the tensor 'labels' of the batch in place"),
    ("Casts", "Windows", "steps", "the term 'next' is float32 in a float64 run"),
    ("ReadsFirstStage", "Windows", "terms", r"reads the tensor 'tokens', which needs\(\) sends to the first stage"),
    ("KeepsGlobalState", "KeepsNothing", "resume", "other metrics"),
    ("CallsOnlyWhereScored", "Windows", "trace", "Make the same calls on ctx"),
    ("CountsEverything", "Windows", "counts", r"the term 'next' scores 576 items in 12 rows, but the loss of"),
    ("Declares", "DeclaresRightly", "rates", "the rate 'hidden' is declared as 0.15, but"),
    ("DetachedGather", "Pairs", "layouts", "the loss is right, these gradients are not"),
]
ONLY_IN_PIPELINES = [
    ("KeepsForBackward", "Reweighs", r"tp2\+sp pp2 dp1, schedule.*the loss is right, these gradients are not"),
    ("LogsOverAllRanks", "Windows", r"all_reduce.*missing: rank.*under the layout tp2\+sp pp2 dp1, schedule"),
    ("CountsWhereBuilt", "OwnModule", r"tp2\+sp pp2 dp1, schedule.*loss: differs"),
    ("ReadsBuilt", "OwnModule", r"no attribute 'module'.*under the layout tp2\+sp pp2 dp1, schedule"),
]


@pytest.mark.parametrize(("broken", "repaired", "check", "message"), OBJECTIVES, ids=lambda x: str(x)[:24])
def test_objectives(
    subject: Callable[[str], ObjectiveSubject], broken: str, repaired: str, check: str, message: str
) -> None:
    with pytest.raises((CheckFailed, ObjectiveError), match=f"(?s){message}"):
        RUN[check](subject(broken))
    RUN[check](subject(repaired))


@pytest.mark.parametrize(("broken", "repaired", "message"), ONLY_IN_PIPELINES, ids=lambda x: str(x)[:24])
def test_objectives_that_only_a_pipeline_breaks(
    subject: Callable[[str], ObjectiveSubject], broken: str, repaired: str, message: str
) -> None:
    """Every other check passes, and layouts of one stage do."""
    examined = subject(broken)
    first = next(layout for layout in layouts_for(examined, full=False) if layout.pp > 1)
    for name in ("terms", "rows", "steps", "counts", "sums", "microbatches", "padding", "scopes"):
        with contextlib.suppress(NotApplicable):
            RUN[name](examined)
    assert_layout_parity(examined, [RankLayout(tp=2), RankLayout(dp=3, micro_batch=2)])
    with pytest.raises((CheckFailed, DeadlockError, AttributeError), match=f"(?s){message}"):
        assert_layout_parity(examined, [first])
    assert_layout_parity(subject(repaired), [first])


def test_what_is_repaired_is_right_in_every_respect(subject: Callable[[str], ObjectiveSubject]) -> None:
    """Else a mistake might have been caught by accident."""
    from megalm.testing.check import run_checks

    for name in ("Windows", "Pairs", "ShiftsEarly", "RowTermOfRows", "RowMeans", "OwnModule"):
        results = list(run_checks(CHECKS, subject(name)))
        assert not [result for result in results if result.status == "failed"], name


def replace_dropout(monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., torch.Tensor]) -> None:
    """Have every model compute the dropout of its branches by ``wrong``."""
    correct = Microbatch.dropout_add

    def dropout_add(
        self: Microbatch, x: torch.Tensor, residual: torch.Tensor, p: float, site: str, kernels: Kernels
    ) -> torch.Tensor:
        return correct(self, x, residual, p, site, replace(kernels, dropout_add=wrong))

    monkeypatch.setattr(Microbatch, "dropout_add", dropout_add)


class TestEngines:
    """Mistakes of an engine, each seen in a layout that has it and not in one that has not."""

    @pytest.fixture
    def joint(self, campaign_seed: int) -> Iterator[ObjectiveSubject]:
        with ObjectiveSubject("mlm+nsp", seed=campaign_seed) as subject:
            yield subject

    def caught(self, subject: ObjectiveSubject, layout: RankLayout, match: str) -> None:
        with pytest.raises(CheckFailed, match=f"(?s){match}"):
            assert_layout_parity(subject, [layout])

    def test_gradients_of_token_shards_not_summed(
        self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ParallelContext, "token_partial", property(lambda self: ()))
        self.caught(joint, RankLayout(tp=2, sp=True), "the loss is right.*embedding.norm.weight")
        assert_layout_parity(joint, [RankLayout(tp=2)])
        monkeypatch.undo()
        assert_layout_parity(joint, [RankLayout(tp=2, sp=True)])

    def test_vocabulary_shard_off_by_one(self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        import megalm.model.heads as heads

        correct = heads.linear_cross_entropy

        def off(*args: Any, first_row: int, **kwargs: Any) -> torch.Tensor:
            return correct(*args, first_row=first_row + (args[3].size > 1), **kwargs)

        monkeypatch.setattr(heads, "linear_cross_entropy", off)
        self.caught(joint, RankLayout(tp=3), "loss.mlm: differs")
        assert_layout_parity(joint, [RankLayout(dp=3, micro_batch=4)])

    def test_dropout_from_a_stream(self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each rank starts with the same generator and draws for the rows it has."""

        def stream(x_TF: torch.Tensor, residual_TF: torch.Tensor, p: float, *_: object) -> torch.Tensor:
            return residual_TF + torch.nn.functional.dropout(x_TF, p)

        replace_dropout(monkeypatch, stream)
        self.caught(joint, RankLayout(tp=2, sp=True), "loss: differs")

    def test_dropout_by_rank(self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        def by_rank(
            x_TF: torch.Tensor, residual_TF: torch.Tensor, p: float, address: DropoutAddress, site: str
        ) -> torch.Tensor:
            spans = tuple(replace(s, start=0, stop=s.stop - s.start) for s in address.spans)
            return dropout_add(x_TF, residual_TF, p, replace(address, spans=spans), site)

        replace_dropout(monkeypatch, by_rank)
        self.caught(joint, RankLayout(tp=2, sp=True, micro_batch=1), "loss: differs")
        assert_layout_parity(joint, [RankLayout(tp=2)])

    def test_a_microbatch_normalised_by_itself(self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch) -> None:
        import megalm.train.step as step

        def own(objective: Any, microbatches: list[Any], parallel: ParallelContext) -> dict[str, int]:
            counts = objective.counts(microbatches[0].batch)
            return {name: max(1, n * len(microbatches) * parallel.dp.size) for name, n in counts.items()}

        monkeypatch.setattr(step, "sum_counts", own)
        self.caught(joint, RankLayout(dp=2, micro_batch=2), "embedding.tokens.weight")

    def test_a_result_that_depends_on_who_ran_first(
        self, joint: ObjectiveSubject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ranks that share a list take their numbers in the order in which they come."""
        import megalm.train.step as step

        correct, queue = step.sum_counts, []

        def first_come(objective: Any, microbatches: Any, parallel: ParallelContext) -> dict[str, int]:
            parallel.world.barrier()
            queue.append(parallel.rank)
            counts = correct(objective, microbatches, parallel)
            return {name: n + queue[-parallel.world_size :].index(parallel.rank) for name, n in counts.items()}

        monkeypatch.setattr(step, "sum_counts", first_come)
        self.caught(joint, RankLayout(dp=4, micro_batch=3), "other bits when ranks run in another order")

    def test_a_collective_that_one_rank_skips(self) -> None:
        def program(parallel: ParallelContext, repaired: bool) -> None:
            if repaired or parallel.tp.index == 0:
                parallel.tp.all_reduce(torch.ones(2))
            parallel.world.all_reduce(torch.ones(3))

        with pytest.raises(DeadlockError, match=r"(?s)rank 0: waits in all_reduce.*shape \[2\].*missing: rank 1"):
            run_simulated(lambda parallel: program(parallel, False), tp=2, dp=2)
        run_simulated(lambda parallel: program(parallel, True), tp=2, dp=2)

    def test_two_ranks_that_both_send_first(self) -> None:
        def program(parallel: ParallelContext, repaired: bool) -> None:
            x, peer = torch.ones(2), 1 - parallel.rank
            first = repaired and parallel.rank == 1
            calls = [dist.send, dist.recv]
            for call in reversed(calls) if first else calls:
                call(x, peer)

        with pytest.raises(DeadlockError, match=r"cycle: rank 0 -> rank 1 -> rank 0"):
            run_simulated(lambda parallel: program(parallel, False), dp=2)
        run_simulated(lambda parallel: program(parallel, True), dp=2)

    def test_another_dtype_on_one_rank(self) -> None:
        def program(parallel: ParallelContext, dtype: torch.dtype) -> None:
            parallel.world.all_reduce(torch.ones(2, dtype=dtype if parallel.rank == 2 else torch.float32))

        with pytest.raises(MismatchError, match="bfloat16"):
            run_simulated(lambda parallel: program(parallel, torch.bfloat16), dp=3)
        run_simulated(lambda parallel: program(parallel, torch.float32), dp=3)


def test_the_plugin_is_really_a_plugin() -> None:
    assert "broken_gallery" not in sys.modules, "the fixture takes it away again"
