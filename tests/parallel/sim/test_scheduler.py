"""Turns, without torch: one rank at a time, switches only at waits, and the order a function of the seed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megalm.parallel.sim.errors import DeadlockError
from megalm.parallel.sim.scheduler import Scheduler


@dataclass
class Flag:
    done: bool = False


def scheduler(size: int, schedule: str = "round_robin", seed: int = 0) -> Scheduler:
    return Scheduler(
        size,
        schedule,  # type: ignore[arg-type]
        seed,
        save=lambda: None,
        restore=lambda state: None,
        stalled=lambda: DeadlockError("nobody"),
    )


def log_of(schedule: str, seed: int) -> list[tuple[int, int]]:
    turns, log, count = scheduler(4, schedule, seed), [], [0]
    flags = [Flag() for _ in range(6)]

    def main(rank: int) -> None:
        for number, flag in enumerate(flags):
            log.append((rank, number))
            count[0] += 1
            if count[0] == 4 * (number + 1):
                flag.done = True
            turns.wait([flag])

    turns.run(main, timeout=30)
    return log


def test_round_robin_goes_in_order() -> None:
    log = log_of("round_robin", 0)
    assert log[:4] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert log == log_of("round_robin", 7)


def test_random_schedules_repeat_and_differ() -> None:
    logs = {seed: log_of("random", seed) for seed in range(6)}
    assert all(log_of("random", seed) == log for seed, log in logs.items())
    assert len({tuple(log) for log in logs.values()}) > 3
    assert all(sorted(log) == sorted(logs[0]) for log in logs.values())


def test_nothing_runs_between_waits() -> None:
    turns, inside, flag = scheduler(3), [0], Flag()

    def main(rank: int) -> None:
        for _ in range(2000):
            inside[0] += 1
            assert inside[0] == 1
            inside[0] -= 1
        if rank == 2:
            flag.done = True
        turns.wait([flag])

    turns.run(main, timeout=30)


def test_waiting_for_nothing_keeps_the_turn() -> None:
    turns, log = scheduler(2), []

    def main(rank: int) -> None:
        for _ in range(3):
            log.append(rank)
            turns.wait([Flag(done=True)])

    turns.run(main, timeout=30)
    assert log == [0, 0, 0, 1, 1, 1]
    assert turns.switches == 1


def test_a_rank_that_steps_aside_runs_when_no_other_can() -> None:
    turns, log, flag = scheduler(3), [], Flag()

    def main(rank: int) -> None:
        if rank == 0:
            turns.step_aside()
            flag.done = True
        log.append(rank)
        turns.wait([flag])
        log.append(rank)

    turns.run(main, timeout=30)
    assert log == [1, 2, 0, 0, 1, 2]


def test_nobody_can_run() -> None:
    turns = scheduler(2)
    with pytest.raises(DeadlockError, match="nobody"):
        turns.run(lambda rank: turns.wait([Flag()]), timeout=30)
