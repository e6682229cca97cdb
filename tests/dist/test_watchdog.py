"""Hangs of real ranks: each becomes one report that names the culprit, and every rank ends with a failure.

Nobody ends a forked rank when another fails, so all that these ranks do they do themselves.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase

pytestmark = pytest.mark.dist
TIMEOUT = 1.5
SLACK = 6.0
"""Seconds from the timeout to the end of the last rank: answers are waited for, and the machine may be busy."""
TIMED_OUT = "megalm: a collective has not completed within 1.5 s (launch.collective_timeout)"
Hang = Callable[..., str]


@pytest.fixture
def hang(fork: Any, tmp_path: Path) -> Hang:
    """``hang(program, ranks=2, tp=1)``: the report of a program that cannot end. Every rank exits 1, and one speaks."""

    def run(program: Callable[[ParallelContext], None], ranks: int = 2, tp: int = 1, speaker: int = 0) -> str:
        began = time.monotonic()
        ended = fork(program, ranks=ranks, cwd=tmp_path, tp=tp, timeout=TIMEOUT).wait(after_first=SLACK)
        assert time.monotonic() - began < TIMEOUT + SLACK
        assert [rank.code for rank in ended] == [1] * ranks, ended
        assert [number for number, rank in enumerate(ended) if rank.err] == [speaker], ended
        report = ended[speaker].err
        assert report.count("megalm: ") == 1
        assert "Traceback" not in report
        return report

    return run


def of_rank(rank: int, report: str) -> str:
    """What a report says of one rank."""
    found = re.search(rf"^  (?:rank {rank}|ranks [\d, ]*\b{rank}\b[\d, ]*): .*\n(?:      .*\n)*", report, re.MULTILINE)
    assert found, report
    return found[0]


def stand_still() -> None:
    time.sleep(1000)


def loop_forever() -> None:
    while True:
        pass


@pytest.mark.parametrize("how", [stand_still, loop_forever])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_never_comes(hang: Hang, how: Callable[[], None], culprit: int) -> None:
    def program(parallel: ParallelContext) -> None:
        with phase("step 3"):
            for _ in range(2):
                parallel.dp.all_reduce(torch.ones(4))
            with phase("loss"):
                if parallel.rank == culprit:
                    how()
                parallel.dp.all_reduce(torch.ones(2, 3, dtype=torch.float64), op="max")

    report = hang(program)
    assert report.startswith(TIMED_OUT)
    other = 1 - culprit
    assert f"culprit: rank {culprit} is in no collective, but rank {other} waits for it in all_reduce, call 3" in report
    stuck = of_rank(other, report)
    assert "waits in all_reduce(reduction max, dtype float64, shape [2, 3]), call 3 of group dp [0, 1], for 1." in stuck
    assert f"missing: rank {culprit}; there: rank {other}" in stuck
    assert "during: step 3 > loss\n" in stuck
    assert re.search(r"at test_watchdog.py:\d+ program < ", stuck)
    lost = of_rank(culprit, report)
    assert "is in no collective" in lost
    assert "its last in dp [0, 1]: call 2, over since " in lost
    assert "all_reduce(reduction sum, dtype float32, shape [4])" in lost
    assert "during: step 3 > loss\n" in lost
    assert re.search(rf"at test_watchdog.py:\d+ {how.__name__} < test_watchdog.py:\d+ program < ", lost)


def test_a_rank_that_skips_one_and_goes_on(hang: Hang) -> None:
    """The calls that follow meet the wrong ones; the report finds where the ranks parted."""

    def program(parallel: ParallelContext) -> None:
        for step in range(6):
            with phase(f"step {step}"):
                if (parallel.rank, step) != (1, 2):
                    parallel.world.all_reduce(torch.ones(2))
        if parallel.rank == 1:
            stand_still()

    report = hang(program)
    assert "culprit: rank 1 is in no collective, but rank 0 waits for it in all_reduce, call 6 of group world" in report
    parted = next(line for line in report.splitlines() if "parted" in line)
    assert "at call 3 of group world [0, 1]: rank 0 in" in parted
    assert parted.count("during step 2") == parted.count("during step 3") == 1


def test_ranks_in_different_operations(hang: Hang) -> None:
    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 0:
            parallel.dp.all_gather(torch.ones(3))
        else:
            parallel.dp.all_reduce(torch.ones(3))

    report = hang(program)
    assert (
        "culprit: ranks 0, 1 are in different operations at call 1 of group dp [0, 1]: rank 0 in all_gather(dtype "
        "float32, shape [3]); rank 1 in all_reduce(reduction sum, dtype float32, shape [3])"
    ) in report
    for rank in range(2):
        assert "missing" not in of_rank(rank, report)


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (3, 70_000), (70_000, 3)], ids=str)
def test_shapes_that_differ(fork: Any, tmp_path: Path, sizes: tuple[int, int]) -> None:
    """gloo lets one of them through or not; it waits, raises an error, or throws in a thread where nobody catches."""

    def program(parallel: ParallelContext) -> None:
        parallel.dp.all_reduce(torch.ones(sizes[parallel.rank]))
        stand_still()

    ended = fork(program, cwd=tmp_path, timeout=TIMEOUT).wait(after_first=SLACK)
    assert [rank.code for rank in ended] == [1, 1], ended
    report = one_report("".join(rank.err for rank in ended))
    assert "culprit: ranks 0, 1 are in different operations at call 1" in report
    for size in sizes:
        assert f"shape [{size}]" in report


def test_a_cycle_of_groups(hang: Hang) -> None:
    """tp [0, 1] waits for 1, which is in dp [1, 3], which waits for 3, and so on round the square."""

    def program(parallel: ParallelContext) -> None:
        first, second = (parallel.tp, parallel.dp) if parallel.rank in (0, 3) else (parallel.dp, parallel.tp)
        first.all_reduce(torch.ones(1))
        second.all_reduce(torch.ones(1))

    report = hang(program, ranks=4, tp=2)
    assert "cycle: rank 0 -> rank 1 -> rank 3 -> rank 2 -> rank 0 (each waits for the next)" in report
    assert "culprit" not in report
    assert "call 1 of group tp [2, 3]" in of_rank(3, report)
    assert "missing: rank 2; there: rank 3" in of_rank(3, report)


def test_those_who_wait_for_a_waiting_rank_are_no_culprits(hang: Hang) -> None:
    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 3:
            stand_still()
        if parallel.rank in (1, 3):
            parallel.dp.all_reduce(torch.ones(1))
        parallel.tp.all_reduce(torch.ones(1))

    report = hang(program, ranks=4, tp=2)
    assert [line.split(" is in")[0] for line in report.splitlines() if "culprit" in line] == ["  culprit: rank 3"]
    assert "ranks 1, 2 wait for it" in report
    assert "missing: rank 1; there: rank 0" in of_rank(0, report)


@pytest.mark.parametrize("call", ["barrier", "gather_json", "broadcast_json"])
def test_what_is_made_of_collectives(hang: Hang, call: str) -> None:
    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        if parallel.rank == 0:
            stand_still()
        elif call == "barrier":
            parallel.world.barrier()
        else:
            getattr(parallel.world, call)({"x": 1})

    report = hang(program)
    assert "culprit: rank 0 is in no collective, but rank 1 waits for it" in report
    assert re.search(r"at test_watchdog.py:\d+ program", of_rank(1, report))


def test_a_rank_that_has_ended(fork: Any, tmp_path: Path) -> None:
    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        if parallel.rank == 0:
            parallel.world.barrier()

    ended = fork(program, cwd=tmp_path, timeout=TIMEOUT).wait()
    assert [rank.code for rank in ended] == [1, 0]  # rank 1 has done all that it was to do
    assert "culprit: rank 1 has ended, but rank 0 waits for it" in ended[0].err
    assert ended[1].err == ""


def test_a_rank_that_failed_by_itself(fork: Any, tmp_path: Path) -> None:
    """Its own message is enough: the others leave without one."""

    def program(parallel: ParallelContext) -> None:
        if parallel.rank == 1:
            raise ValueError("the disk of rank 1 is full")
        parallel.world.barrier()

    ended = fork(program, ranks=3, cwd=tmp_path, timeout=60).wait(after_first=2)
    assert [rank.code for rank in ended] == [1, 1, 1]
    assert "the disk of rank 1 is full" in ended[1].err
    assert ended[0].err == ended[2].err == ""


def test_a_killed_rank(fork: Any, tmp_path: Path) -> None:
    """gloo says that a peer is gone, and the report says which."""

    def program(parallel: ParallelContext) -> None:
        with phase("step 1"):
            parallel.world.all_reduce(torch.ones(1))
            if parallel.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            parallel.world.all_reduce(torch.ones(1))

    ended = fork(program, ranks=3, cwd=tmp_path, timeout=60).wait(after_first=30)
    assert [rank.code for rank in ended] == [1, -signal.SIGKILL, 1]
    assert [bool(rank.err) for rank in ended] == [True, False, False]
    report = ended[0].err
    assert report.startswith("megalm: a collective failed on rank ")
    assert "culprit: rank 1 does not answer, but rank" in report
    assert re.search(r"rank 1: does not answer \(process \d+ on \S+\): it is gone", report)
    failed = of_rank(0, report) + of_rank(2, report)
    assert "all_reduce(reduction sum, dtype float32, shape [1]), call 2 of group world [0, 1, 2]" in failed
    assert "error: " in failed
    assert "during: step 1" in failed


def test_a_launcher_that_ends_the_others_at_once(fork: Any, tmp_path: Path) -> None:
    """As torchrun does when it finds one rank dead: what they saw is told all the same, and they are no culprits."""

    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        (tmp_path / f"ready-{parallel.rank}").touch()
        group = parallel.tp if parallel.rank in (2, 3) else parallel.dp
        while True:
            group.all_reduce(torch.ones(1))
            time.sleep(0.05)

    launch = fork(program, ranks=4, cwd=tmp_path, tp=2, timeout=60)
    # Ranks 2 and 3 have nothing to do with 0 and 1; rank 1 waits for 3 in vain, and 0 for 2.
    while len(list(tmp_path.glob("ready-*"))) < 4:
        time.sleep(0.005)
    time.sleep(0.2)
    os.kill(launch.pids[3], signal.SIGKILL)
    for rank in range(3):
        os.kill(launch.pids[rank], signal.SIGTERM)
    ended = launch.wait()
    assert [rank.code for rank in ended] == [1, 1, 1, -signal.SIGKILL]
    report = ended[0].err
    assert [line for line in report.splitlines() if "culprit: " in line and "does not answer" in line] == [
        "  culprit: rank 3 does not answer, but ranks 1, 2 wait for it"
    ]
    assert "rank 0: waits in all_reduce" in report
    assert ended[1].err == ended[2].err == ""


def test_ranks_that_are_told_to_end(fork: Any, tmp_path: Path) -> None:
    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        (tmp_path / f"ready-{parallel.rank}").touch()
        if parallel.rank == 0:
            loop_forever()
        parallel.world.barrier()

    launch = fork(program, cwd=tmp_path, timeout=60)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.005)
    for pid in launch.pids:
        os.kill(pid, signal.SIGTERM)
    ended = launch.wait(after_first=2)
    assert [rank.err for rank in ended] == ["", ""]
    assert ended[0].code == -signal.SIGTERM
    assert ended[1].code in (-signal.SIGTERM, 1)  # its peer may have gone a moment before


@pytest.mark.parametrize("own_store", [False, True], ids=["the launcher's store", "the store of rank 0"])
def test_rank_0_is_killed(fork: Any, tmp_path: Path, own_store: bool) -> None:
    """With it the store may go, so that the others cannot confer: each tells what it knows."""

    def program(parallel: ParallelContext) -> None:
        parallel.world.all_reduce(torch.ones(1))
        if parallel.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with phase("step 1"):
            parallel.world.all_reduce(torch.ones(7))

    env = {}
    if own_store:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = {"MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ended = fork(program, ranks=3, cwd=tmp_path, timeout=60, env=env).wait(after_first=30)
    assert [rank.code for rank in ended] == [-signal.SIGKILL, 1, 1]
    if not own_store:
        assert "culprit: rank 0 does not answer, but rank" in ended[1].err
        assert ended[2].err == ""
        return
    assert "key-value store does not answer" in ended[1].err + ended[2].err
    for rank in (1, 2):
        if ended[rank].err:
            assert "all_reduce(reduction sum, dtype float32, shape [7]), call 2 of group world" in ended[rank].err
            assert "needs: ranks 0," in ended[rank].err
            assert "during: step 1" in ended[rank].err


def test_a_rank_that_dies_before_the_groups_exist(fork: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import megalm.parallel.bootstrap as bootstrap

    started = bootstrap.start_process_group

    def start(launch: Any, *arguments: Any) -> None:
        if launch.place.rank == 1:
            stand_still()
        started(launch, *arguments)

    monkeypatch.setattr(bootstrap, "start_process_group", start)
    ended = fork(lambda parallel: None, cwd=tmp_path, timeout=TIMEOUT).wait(after_first=SLACK)
    assert [rank.code for rank in ended] == [1, 1]
    assert "waits in start_process_groups(), call 1 of group launch [0, 1]" in ended[0].err
    assert re.search(r"rank 1: waits in start_process_groups.*\n(?: .*\n)*      at .*stand_still", ended[0].err)


@pytest.mark.parametrize("suspended", [0, 1])
def test_a_suspended_rank(fork: Any, tmp_path: Path, suspended: int) -> None:
    def program(parallel: ParallelContext) -> None:
        for _ in range(10_000):
            parallel.world.all_reduce(torch.ones(1))
            time.sleep(0.01)

    launch = fork(program, cwd=tmp_path, timeout=TIMEOUT)
    time.sleep(1.5)
    os.kill(launch.pids[suspended], signal.SIGSTOP)
    other = 1 - suspended
    deadline = time.monotonic() + TIMEOUT + SLACK
    while not launch.poll() and other not in launch.codes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert launch.codes == {other: 1}
    report = launch.folder / f"{other}.err"
    assert f"culprit: rank {suspended} does not answer, but rank {other} waits for it" in report.read_text()
    assert re.search(rf"rank {suspended}: does not answer \(.*\): it is suspended", report.read_text())
    os.kill(launch.pids[suspended], signal.SIGCONT)
    ended = launch.wait(after_first=SLACK)
    assert ended[suspended].code == 1
    assert ended[suspended].err == ""  # all has been said


def test_a_suspended_job_goes_on(fork: Any, tmp_path: Path) -> None:
    """Rank 0 waits in a collective all the while, and not for too long by any rank's reckoning."""

    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        (tmp_path / f"ready-{parallel.rank}").touch()
        if parallel.rank == 1:
            time.sleep(0.9)
        parallel.world.barrier()
        parallel.world.barrier()

    launch = fork(program, cwd=tmp_path, timeout=TIMEOUT)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.005)
    for pid in launch.pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(TIMEOUT + 2.5)
    for pid in launch.pids:
        os.kill(pid, signal.SIGCONT)
    ended = launch.wait()
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 2


def test_slow_ranks_are_left_alone(fork: Any, tmp_path: Path) -> None:
    """Waits that are long, but within the timeout; and work between collectives that nobody waits for."""

    def program(parallel: ParallelContext) -> None:
        for number in range(3):
            if parallel.rank == number % 2:
                time.sleep(0.5 * TIMEOUT)
            parallel.world.barrier()
        time.sleep(2 * TIMEOUT)
        parallel.world.barrier()

    ended = fork(program, cwd=tmp_path, timeout=TIMEOUT).wait()
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")] * 2


def test_one_rank_that_exercises_the_backend(fork: Any, tmp_path: Path) -> None:
    def program(parallel: ParallelContext) -> None:
        parallel.world.barrier()
        time.sleep(0.5)

    env = {"MEGALM_NO_SHORT_CIRCUIT": "1"}
    ended = fork(program, ranks=1, cwd=tmp_path, timeout=0.2, env=env).wait()
    assert [(rank.code, rank.err) for rank in ended] == [(0, "")]


SKIPPING = """
import os
from megalm.api import Component, Term, hookimpl
from megalm_plugins.objectives.causal_lm import CausalLM
MEGALM_API = (1, 0)

@hookimpl
def megalm_objectives():
    return [Component("forgetful", "forgetful_plugin:Forgetful", "forgets the loss of some rows")]

class Forgetful(CausalLM):
    def weights(self):
        return {"forgetful": 1.0}
    def counts(self, batch):
        return {"forgetful": super().counts(batch)["causal_lm"]}
    calls = 0
    def loss(self, hidden, batch, ctx):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 4:
            return {"forgetful": Term((0 * hidden).sum().double(), "token")}
        return {"forgetful": super().loss(hidden, batch, ctx)["causal_lm"]}
"""
LOOPING = """
from megalm.api import Callback, Component, hookimpl
MEGALM_API = (1, 0)

@hookimpl
def megalm_callbacks():
    return [Component("looping", "looping_plugin:Looping", "never returns")]

class Looping(Callback):
    @hookimpl
    def megalm_step_end(self, run, step, metrics):
        while run.rank == 0 and step == 2:
            pass
"""


def one_report(stderr: str) -> str:
    """The one report of a launch; torchrun's own words follow."""
    ours = re.search(r"^megalm: .*\n(?:  .*\n)*", stderr, re.MULTILINE)
    assert ours is not None, stderr
    assert stderr.count("megalm: ") == 1, stderr
    return ours[0]


def test_an_objective_skips_collectives_on_one_rank(
    torchrun: Any, write_config: Any, fake_dist: Any, tmp_path: Path
) -> None:
    """Step 2, second microbatch: rank 1 leaves out the loss, and goes on to what it takes for the next operation."""
    root = fake_dist("megalm-forgetful", {"forgetful": "forgetful_plugin"}, {"forgetful_plugin.py": SKIPPING})
    settings = ["parallel.tp=2", "parallel.sp=true", "launch.collective_timeout=3", "train.steps=100"]
    began = time.monotonic()
    done = torchrun(
        [write_config(objective="forgetful"), "--set", *settings], cwd=tmp_path, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 1
    assert time.monotonic() - began < 60  # most of them to import torch twice
    statuses = re.findall(r"exitcode\s+: (-?\d+) ", done.stderr)
    assert len(statuses) == 2, done.stderr
    assert "0" not in statuses
    report = one_report(done.stderr)
    assert re.search(
        r"(culprit: ranks 0, 1 are in different operations|parted:) at call \d+ of group tp \[0, 1\]", report
    )
    assert "step 2 > microbatch 1 > loss" in of_rank(0, report)


def test_a_callback_loops_on_rank_0(fork: Any, write_config: Any, fake_dist: Any, tmp_path: Path) -> None:
    fake_dist("megalm-looping", {"looping": "looping_plugin"}, {"looping_plugin.py": LOOPING})
    settings = ["parallel.tp=2", "launch.collective_timeout=2", 'log.callbacks=["looping"]', "train.steps=100"]
    ended = fork([write_config(), "--set", *settings], cwd=tmp_path).wait(after_first=SLACK)
    assert [rank.code for rank in ended] == [1, 1]
    assert ended[1].err == ""
    report = one_report(ended[0].err)
    assert "culprit: rank 0 is in no collective, but rank 1 waits for it in all_reduce" in report
    assert re.search(r"during: step 2\n      at looping_plugin.py:\d+ megalm_step_end < ", of_rank(0, report))
    assert "during: step 2 > was a rank asked to end" in of_rank(1, report)
