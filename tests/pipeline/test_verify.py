"""Valid schedules pass, and of broken ones the first offending action is named with a reason that is true."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from megalm.errors import ScheduleError
from megalm.pipeline.faults import find_fault
from megalm.pipeline.verify import verify
from megalm.plugin.contract.pipeline import Action, ActionKind, PipelineOrder, PipelineShape

from .oracle import comes_to_the_end, complete, peaks, rows_of, valid

Build = Callable[..., PipelineOrder]
Admitted = Callable[..., list[tuple[str, PipelineShape]]]


def order(placement: list[int], rows: list[str], microbatches: int) -> PipelineOrder:
    def action(text: str) -> Action:
        stage, kind, m = text.partition(next(k for k in ("BW", "B", "W", "F") if k in text))
        return Action(ActionKind(kind), int(stage), int(m))

    return PipelineOrder(tuple(placement), tuple(tuple(map(action, row.split())) for row in rows), microbatches)


def test_every_small_schedule_is_valid_by_both(build: Build, admitted: Admitted) -> None:
    for name, shape in admitted(4, 6):
        found = build(name, shape.ranks, shape.microbatches, shape.virtual)
        assert valid(found.placement, rows_of(found), shape.microbatches), (name, shape)
        verify(found)


def test_peaks_equal_those_by_intervals(build: Build, admitted: Admitted, full: bool) -> None:
    for name, shape in admitted(6, 12) if full else admitted(4, 7):
        verified = verify(build(name, shape.ranks, shape.microbatches, shape.virtual))
        for rank, row in enumerate(rows_of(verified.order)):
            found = verified.peaks[rank]
            assert (found.activations, found.until_weights) == peaks(row), (name, shape, rank)


def test_peaks_by_hand() -> None:
    split = order([0, 1], ["0F0 0F1 0B0 0B1 0W0 0W1", "1F0 1B0 1W0 1F1 1BW1"], 2)
    first, second = verify(split).peaks
    assert (first.activations, first.until_weights) == (2, 2)
    assert (second.activations, second.until_weights) == (1, 1)
    late = order([0], ["0F0 0B0 0F1 0B1 0F2 0B2 0W0 0W1 0W2"], 3)
    assert (verify(late).peaks[0].activations, verify(late).peaks[0].until_weights) == (1, 3)


def test_forwards_alone_hold_nothing(build: Build) -> None:
    found = verify(build("interleaved", 3, 6).forward_only())
    assert {(p.activations, p.until_weights) for p in found.peaks} == {(1, 1)}
    assert {a.kind for _, _, a in found.order.actions()} == {ActionKind.F}


@pytest.mark.parametrize(
    ("name", "peaks_of"),
    [
        ("gpipe", lambda p, m, r: m),
        ("1f1b", lambda p, m, r: min(m, p - r)),
        ("zb-h1", lambda p, m, r: min(m, p)),
        ("zb-v", lambda p, m, r: min(2 * m, 2 * p)),
    ],
)
def test_what_a_schedule_holds_is_what_its_paper_says(
    build: Build, name: str, peaks_of: Callable[[int, int, int], int]
) -> None:
    for p in range(1, 7):
        for m in (2 * p - 1, 2 * p, 4 * p):
            found = verify(build(name, p, m)).peaks
            assert [peak.until_weights for peak in found] == [peaks_of(p, m, r) for r in range(p)], (p, m)


def corrupt(draw: random.Random, found: PipelineOrder) -> tuple[str, PipelineOrder, Action, int]:
    """A drop, a duplicate or a swap on one rank: what was done, the order, an action it was done to, and its rank."""
    what = draw.choice(("drop", "duplicate", "swap"))
    rank = draw.randrange(len(found.ranks))
    row = list(found.ranks[rank])
    i = draw.randrange(len(row))
    action = row[i]
    if what == "drop":
        del row[i]
    elif what == "duplicate":
        row.insert(draw.randrange(len(row) + 1), action)
    else:
        near = [n for n in (i - 1, i + 1) if 0 <= n < len(row)]
        j = draw.choice(draw.choice((near, [n for n in range(len(row)) if n != i])) or [i])
        row[i], row[j] = row[j], row[i]
    ranks = tuple(tuple(row) if r == rank else actions for r, actions in enumerate(found.ranks))
    return what, replace(found, ranks=ranks), action, rank


def reason_is_true(broken: PipelineOrder) -> None:
    """What the verifier says of a broken order, checked against the order itself."""
    fault = find_fault(broken)
    assert fault is not None
    rows = rows_of(broken)
    row, action = rows[fault.rank], str(fault.action)
    stage, m = fault.action.stage, fault.action.microbatch
    if fault.kind == "missing":
        gone = [k for k in "FBW" if not {f"{stage}{k}{m}", f"{stage}BW{m}" if k != "F" else ""} & set(row)]
        assert gone
        assert any(f"{stage}{k}{m}" in fault.reason for k in gone), fault.reason
    elif fault.kind == "duplicate":
        covered = [a for a in row if a in (f"{stage}F{m}", f"{stage}B{m}", f"{stage}W{m}", f"{stage}BW{m}")]
        letters = "".join(a.strip("0123456789") for a in covered)
        assert len(letters) > len(set(letters))
        assert row[fault.index] == action
        assert row.index(action) < fault.index or action not in row[: fault.index]
    elif fault.kind == "order":
        before = f"{stage}{'B' if fault.action.kind is ActionKind.W else 'F'}{m}"
        assert row.index(action) == fault.index < row.index(before)
        assert before in fault.reason
    else:
        assert fault.kind == "circle"
        assert complete(broken.placement, rows, broken.microbatches)
        assert not comes_to_the_end(broken.placement, rows)
        assert row[fault.index] == action
        assert "waits for" in fault.reason


def test_corruptions(build: Build, admitted: Admitted, campaign_seed: int, full: bool) -> None:
    """Drops and duplicates are all refused; a swap exactly where the brute-force executor cannot run it."""
    draw = random.Random(campaign_seed)
    cases = admitted(4, 6)
    seen: dict[tuple[str, bool], int] = {}
    for _ in range(2000 if full else 200):
        name, shape = draw.choice(cases)
        what, broken, action, rank = corrupt(draw, build(name, shape.ranks, shape.microbatches, shape.virtual))
        runs = valid(broken.placement, rows_of(broken), broken.microbatches)
        assert what == "swap" or not runs
        fault = find_fault(broken)
        label = f"{what} of {action} on rank {rank} of {name} {shape}"
        assert (fault is None) == runs, label
        if fault is None:
            verify(broken)
        else:
            with pytest.raises(ScheduleError) as error:
                verify(broken)
            assert fault.reason in str(error.value)
            assert broken.where(fault.rank, fault.index) in str(error.value)
            if what in ("drop", "duplicate"):
                assert fault.kind in {"drop": ("missing",), "duplicate": ("duplicate", "order")}[what], label
                assert fault.rank == rank
                assert fault.action.stage == action.stage
                assert fault.action.microbatch == action.microbatch
            reason_is_true(broken)
        seen[what, runs] = seen.get((what, runs), 0) + 1
    assert {what for what, _ in seen} == {"drop", "duplicate", "swap"}
    assert seen["swap", True] > 2
    assert seen["swap", False] > 5


FAULTS = [
    ([0, 1], ["0F0 0BW0", "1F0 1BW0 2F0"], "wrong", "rank 1, action 3: 2F0 is of stage 2; the stages are 0 to 1"),
    ([0, 1], ["0F0 0BW0", "1F0 1F1 1BW0"], "wrong", "rank 1, action 2: 1F1 is of microbatch 1; they are 0 to 0"),
    ([0, 1], ["0F0 1F0 0BW0", "1BW0"], "wrong", "rank 0, action 2: 1F0 is on rank 0, but stage 1 belongs to rank 1"),
    ([0, 5], ["0F0 0BW0", "1F0 1BW0"], "wrong", "stage 1 is placed on rank 5, but there are 2 ranks"),
    ([0], ["0F0 0F0 0BW0"], "twice", "rank 0, action 2: 0F0 is there twice; the first is at rank 0, action 1"),
    ([0], ["0F0 0B0 0BW0"], "twice", "rank 0, action 3: 0BW0 repeats what 0B0 at rank 0, action 2 has computed"),
    ([0], ["0F0 0BW0 0W0"], "twice", "rank 0, action 3: 0W0 repeats what 0BW0 at rank 0, action 2 has computed"),
    (
        [0],
        ["0BW0 0F0"],
        "early",
        "rank 0, action 1: 0BW0 comes before the forward that it needs, 0F0, at rank 0, action 2",
    ),
    ([0], ["0F0 0W0 0B0"], "early", "rank 0, action 2: 0W0 comes before the input gradient that it needs, 0B0, at"),
    ([0], ["0B0 0W0"], "gone", "rank 0, action 1: 0B0 is there, but the forward that it needs, 0F0, is missing"),
    ([0], ["0F0 0W0"], "gone", "rank 0, action 2: 0W0 is there, but the input gradient that it needs, 0B0, is missing"),
    ([0], ["0F0 0B0"], "gone", "rank 0, at the end: 0W0, the weight gradients of microbatch 0 on stage 0, is missing"),
    ([0], ["0F0"], "gone", "rank 0, at the end: 0B0, the input gradient of microbatch 0 on stage 0, is missing"),
    (
        [0, 1],
        ["0F0 0BW0 0F1 0BW1", "1F1 1BW1 1F0 1BW0"],
        "circle",
        "rank 0, action 2: 0BW0 can never run: 0BW0 (rank 0, action 2) waits for 1BW0 (rank 1, action 4), which comes "
        "after 1F1; 1F1 (rank 1, action 1) waits for 0F1 (rank 0, action 3), which comes after 0BW0",
    ),
]


@pytest.mark.parametrize(("placement", "rows", "_", "message"), FAULTS)
def test_faults_are_named(placement: list[int], rows: list[str], _: str, message: str) -> None:
    microbatches = 2 if "0BW1" in rows[0] else 1
    with pytest.raises(ScheduleError) as error:
        verify(order(placement, rows, microbatches))
    assert message in str(error.value)


def test_a_circle_on_one_rank() -> None:
    """Two stages of one rank that wait for each other: no message is involved."""
    with pytest.raises(ScheduleError, match=r"1F0 can never run: 1F0 .* waits for 0F0 .*, which comes after 1F0"):
        verify(order([0, 0], ["1F0 0F0 1BW0 0BW0"], 1))


def test_an_order_of_forwards_only_has_no_backward() -> None:
    broken = replace(order([0], ["0F0 0BW0"], 1), training=False)
    with pytest.raises(ScheduleError, match="0BW0 is of kind BW; this order is of forwards only"):
        verify(broken)
