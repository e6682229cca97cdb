"""Sends and receives: complete, matched, never a deadlock, and a deadlock is found where one is planted."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from megalm.pipeline.deadlock import find_deadlock
from megalm.pipeline.forward import forward_order
from megalm.pipeline.lower import Exchange, LoweredOrder, Message, Step, inputs, lower, output
from megalm.pipeline.simulate import simulate
from megalm.pipeline.verify import verify
from megalm.plugin.contract.pipeline import (
    Action,
    ActionKind,
    Costs,
    PipelineOrder,
    PipelineShape,
    loop_placement,
    v_placement,
)

from .oracle import parts

Build = Callable[..., PipelineOrder]
Admitted = Callable[..., list[tuple[str, PipelineShape]]]


def random_costs(draw: random.Random, order: PipelineOrder) -> Costs:
    def cost() -> float:
        return draw.choice([0.0, 1.0, 1.0, 2.0, round(draw.random(), 3)])

    stages = tuple((cost(), cost(), cost()) for _ in range(order.stages)) if draw.random() < 0.5 else None
    return Costs(cost(), cost(), cost(), comm=cost(), stages=stages)


def wanted_messages(order: PipelineOrder) -> Counter[tuple[str, int, int, int]]:
    """(payload, from stage, to stage, microbatch) for each pair of neighbouring stages on two ranks."""
    found: Counter[tuple[str, int, int, int]] = Counter()
    for stage in range(order.stages - 1):
        if order.placement[stage] != order.placement[stage + 1]:
            for m in range(order.microbatches):
                found["activation", stage, stage + 1, m] += 1
                if order.training:
                    found["gradient", stage + 1, stage, m] += 1
    return found


def check(lowered: LoweredOrder) -> None:
    order = lowered.order
    sent: Counter[tuple[str, int, int, int]] = Counter()
    taken: Counter[tuple[str, int, int, int]] = Counter()
    for rank, steps in enumerate(lowered.steps):
        assert tuple(step for step in steps if isinstance(step, Action)) == order.ranks[rank]
        computed, arrived = set(), set()
        for step in steps:
            if isinstance(step, Exchange):
                assert step.transfers
                for direction, message, peer in step.transfers:
                    here, there = (message.source, message.target)[:: 1 if direction == "send" else -1]
                    assert (order.placement[here], order.placement[there]) == (rank, peer)
                    assert peer != rank
                    if direction == "send":
                        kinds = ("F",) if message.payload == "activation" else ("B", "BW")
                        assert any((here, kind, message.microbatch) in computed for kind in kinds)
                        sent[message.payload, message.source, message.target, message.microbatch] += 1
                    else:
                        arrived.add(message)
                        taken[message.payload, message.source, message.target, message.microbatch] += 1
            else:
                computed.add(parts(str(step)))
                assert arrived.issuperset(inputs(order, step)), "posted before it is used"
    assert sent == taken == wanted_messages(order)
    assert find_deadlock(lowered) is None


def test_every_schedule_with_costs_at_random(build: Build, admitted: Admitted, campaign_seed: int, full: bool) -> None:
    draw = random.Random(campaign_seed)
    cases = admitted(4, 6)
    for name, shape in draw.sample(cases, len(cases) if full else 60):
        order = build(name, shape.ranks, shape.microbatches, shape.virtual)
        check(lower(order))
        check(lower(order, random_costs(draw, order)))


@pytest.mark.parametrize("place", [loop_placement, v_placement])
def test_forwards_alone(place: Callable[[int, int], tuple[int, ...]]) -> None:
    for ranks in (1, 2, 4):
        for virtual in (1, 2, 3):
            for microbatches in (1, 2, 5, 8):
                order = forward_order(place(ranks, virtual), microbatches)
                check(verify(order).lowered)
                makespan = simulate(order, Costs()).makespan
                assert makespan <= virtual * (microbatches + ranks), "no rank waits for long"


def test_answers_come_after_what_they_answer(admitted: Admitted, build: Build) -> None:
    """An answer is received, and what it answers was sent before and used on the answering rank before it was made."""
    for name, shape in admitted(4, 6):
        lowered = verify(build(name, shape.ranks, shape.microbatches, shape.virtual)).lowered
        order = lowered.order
        used = {message: index for _, index, a in order.actions() for message in inputs(order, a)}
        made = {message: index for _, index, a in order.actions() if (message := output(order, a))}
        for rank, steps in enumerate(lowered.steps):
            sent: set[Message] = set()
            answered: Counter[Message] = Counter()
            for step in steps:
                if isinstance(step, Exchange):
                    sent.update(t.message for t in step.transfers if t.direction == "send")
                    continue
                for message in inputs(order, step):
                    for each in lowered.answers[rank][message]:
                        assert each in sent
                        assert order.placement[each.target] == order.placement[message.source]
                        assert used[each] <= made[message]
                        answered[each] += 1
            assert set(answered.values()) <= {1}


def test_buffers_do_not_grow_with_microbatches(build: Build) -> None:
    def most(name: str, microbatches: int) -> list[int]:
        return [peak.outbox for peak in verify(build(name, 4, microbatches)).peaks]

    assert most("1f1b", 8) == most("1f1b", 20) == [4, 4, 3, 2]
    for name in ("interleaved", "zb-h1", "zb-v"):
        assert most(name, 8) == most(name, 20)
    assert most("gpipe", 8) == [8] * 4, "nothing answers a gradient"


def test_one_rank_says_nothing(build: Build) -> None:
    for name in ("1f1b", "interleaved", "zb-v"):
        assert not list(verify(build(name, 1, 3)).lowered.exchanges(0))


def test_neighbours_that_would_both_send_first_exchange(build: Build) -> None:
    """With F = BW the two ranks of 1F1B end at the same moments: one sends down while the other sends up."""
    lowered = lower(build("1f1b", 2, 4), Costs(1, 0.5, 0.5))
    both = [e for e in lowered.exchanges(0) if {t.direction for t in e.transfers} == {"send", "recv"}]
    assert both
    assert {t.peer for e in both for t in e.transfers} == {1}
    one_by_one = [
        tuple(s for e in steps for s in ([Exchange((t,)) for t in e.transfers] if isinstance(e, Exchange) else [e]))
        for steps in lowered.steps
    ]
    problem = find_deadlock(LoweredOrder(lowered.order, tuple(one_by_one)))
    assert problem is not None, "posted one by one, both would send first"
    assert "rank 0 stands before send activation" in problem
    assert "rank 1 stands before send gradient" in problem


def moved(steps: tuple[Step, ...], wanted: Callable[[Exchange], bool], by: int) -> tuple[Step, ...]:
    """The first exchange that is wanted, some places later."""
    at = next(n for n, step in enumerate(steps) if isinstance(step, Exchange) and wanted(step))
    rest = [*steps[:at], *steps[at + 1 :]]
    return (*rest[: at + by], steps[at], *rest[at + by :])


def test_planted_mistakes_are_found(build: Build) -> None:
    lowered = verify(build("1f1b", 3, 4)).lowered
    assert find_deadlock(lowered) is None

    def with_rank(rank: int, steps: tuple[Step, ...]) -> LoweredOrder:
        return replace(lowered, steps=tuple(steps if r == rank else s for r, s in enumerate(lowered.steps)))

    lost = tuple(step for step in lowered.steps[1] if not isinstance(step, Exchange))
    assert "but the receiver expects nothing" in str(find_deadlock(with_rank(1, lost)))
    late = moved(lowered.steps[0], lambda e: e.transfers[0].message.payload == "gradient", 1)
    assert "rank 0 stands before 0BW0" in str(find_deadlock(with_rank(0, late)))
    first = next(lowered.exchanges(0))
    swapped = tuple(step for step in lowered.steps[0] if step != first)
    assert "message 1 of rank 0 to rank 1 is" in str(find_deadlock(with_rank(0, (*swapped, first))))


def test_messages_of_an_action() -> None:
    order = PipelineOrder(v_placement(2), ((), ()), 1)
    texts = {
        "0F0": ([], "activation 0->1 of microbatch 0"),
        "1F0": (["activation 0->1 of microbatch 0"], "None"),
        "2F0": ([], "activation 2->3 of microbatch 0"),
        "3B0": ([], "gradient 3->2 of microbatch 0"),
        "2BW0": (["gradient 3->2 of microbatch 0"], "None"),
        "1W0": ([], "None"),
        "0BW0": (["gradient 1->0 of microbatch 0"], "None"),
    }
    for text, (needs, gives) in texts.items():
        stage, kind, m = parts(text)
        action = Action(ActionKind(kind), stage, m)
        assert [str(message) for message in inputs(order, action)] == needs
        assert str(output(order, action)) == gives


def test_the_order_is_the_same_on_every_rank(build: Build) -> None:
    """A pure function of the order and the costs: what every rank computes for itself."""
    order = build("zb-v", 4, 8)
    assert lower(order) == lower(build("zb-v", 4, 8))
    assert lower(order, Costs()) == lower(order)
