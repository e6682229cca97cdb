"""Launches for tests: real ranks that run megalm.launch, either by torchrun or forked.

torchrun costs ten seconds a launch, nearly all of it importing torch anew. Forked ranks find the same environment
variables and the same key-value store as torchrun's (the test process holds it, as torchrun's agent would), run the
same ``main`` on real gloo, and need a fraction of a second. Nobody ends them when one of them fails: they must do so
alone. A function of a ParallelContext may take the place of the command line: it runs as the training would, under the
same watchdog.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalm.ops.native.library import library
from megalm.parallel.mesh import ParallelContext
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_store

TINY = """
[run]
dir = "run"
seed = 7
[model]
architecture = "{architecture}"
layers = 2
hidden_size = 24
heads = 6
[data]
path = "{data}"
[train]
objective = "{objective}"
steps = 3
sequence_length = 16
global_batch = 8
micro_batch = 4
lr = 1e-2
[launch]
threads = 1
device = "cpu"
collective_timeout = 60
[eval]
samples = 16
[sample]
tokens = 4
"""


@dataclass
class Ended:
    """How one rank ended."""

    code: int
    out: str
    err: str


@dataclass
class Forked:
    """Ranks under way."""

    folder: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def said(self) -> bool:
        """Whether rank 0 has written anything, which it does once all ranks are about to train."""
        return (self.folder / "0.out").exists() and (self.folder / "0.out").stat().st_size > 0

    def reached(self) -> bool:
        """Whether a rank stands at its :class:`Point`."""
        return (self.folder / "reached").exists()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """SIGKILL some ranks, or all."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes and (ranks is None or rank in ranks):
                os.kill(pid, signal.SIGKILL)

    def wait(self, timeout: float = 240.0, after_first: float = 10.0) -> list[Ended]:
        """How every rank ended. AssertionError where one lives longer than ``timeout``, or than ``after_first`` seconds
        after another failed."""
        deadline = time.monotonic() + timeout
        failed: float | None = None
        while not self.poll():
            now = time.monotonic()
            if failed is None and any(self.codes.values()):
                failed = now
            if now > deadline or (failed is not None and now > failed + after_first):
                left = sorted(set(range(len(self.pids))) - set(self.codes))
                for rank in left:
                    os.kill(self.pids[rank], signal.SIGUSR1)  # where it stands
                time.sleep(0.5)
                self.kill()
                while not self.poll():
                    time.sleep(0.005)
                raise AssertionError(f"ranks {left} did not end; output:\n{self.ended()}")
            time.sleep(0.005)
        return self.ended()

    def ended(self) -> list[Ended]:
        return [
            Ended(
                self.codes[rank],
                (self.folder / f"{rank}.out").read_text(encoding="utf-8"),
                (self.folder / f"{rank}.err").read_text(encoding="utf-8"),
            )
            for rank in range(len(self.pids))
        ]


@dataclass(frozen=True)
class Point:
    """A point of a rank's program at which it says so and stands still, until someone kills it.

    ``event``: an audit event of Python's (``open``, ``os.rename``), or ``call os.write`` for a function of ``os``,
    whose call is then half done: the first half of what is to be written, or before it.
    """

    rank: int
    event: str
    text: str
    """In one of the event's arguments."""
    count: int = 1
    """The so-manieth time."""

    def install(self, reached: Path) -> None:
        """In the rank's process."""
        left = [self.count]

        def meet(*arguments: object) -> bool:
            if left[0] and any(self.text in str(a) for a in arguments):
                left[0] -= 1
                return not left[0]
            return False

        def stand_still() -> None:
            left[0] = 0
            reached.touch()
            time.sleep(600)

        if self.event.startswith("call os."):
            name = self.event.removeprefix("call os.")
            call = getattr(os, name)

            def patched(handle: int, *arguments: Any) -> Any:
                if meet(os.readlink(f"/proc/self/fd/{handle}")):
                    if arguments:
                        call(handle, arguments[0][: len(arguments[0]) // 2])
                    stand_still()
                return call(handle, *arguments)

            setattr(os, name, patched)
            return

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event == self.event and meet(*arguments):
                stand_still()

        sys.addaudithook(hook)


Fork = Callable[..., Forked]
Program = Callable[[ParallelContext], None]


@pytest.fixture(scope="session", autouse=True)
def native_code() -> None:
    """Is built, or known to be absent, before the first launch: one that builds says so, which is not under test."""
    library()


@pytest.fixture(scope="session")
def key_value_store() -> dist.TCPStore:
    """One for all launches, and never closed: a fork that closes its copy would wait for a thread that it lacks."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def fork(tmp_path_factory: pytest.TempPathFactory, key_value_store: dist.TCPStore) -> Iterator[Fork]:
    """``fork(argv, ranks=2, cwd=folder)`` starts ranks of megalm.launch; all are gone when the test ends.

    ``fork(program, ranks=2, cwd=folder, tp=2, timeout=3, env={})`` starts ranks that run ``program(parallel)`` as the
    launch runs a training.
    """
    # What a first optimizer step and a first launch import, so that the ranks find it there.
    import torch._dynamo  # noqa: F401

    import megalm.launch
    import megalm.train.trainer  # noqa: F401

    started: list[Forked] = []

    def start(
        what: Sequence[object] | Program,
        *,
        ranks: int = 2,
        cwd: Path,
        tp: int = 1,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        point: Point | None = None,
    ) -> Forked:
        folder = tmp_path_factory.mktemp("ranks")
        sys.stdout.flush()
        sys.stderr.flush()
        pids = []
        # The store's thread, here in the parent, looks up the names of those who connect. A fork at that moment would
        # inherit the resolver's lock and wait for it for ever, so ranks begin when all of them exist.
        gate, opener = os.pipe()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.close(opener)
                os.read(gate, 1)
                os.close(gate)
                body = _launch([str(a) for a in what]) if isinstance(what, Sequence) else _alone(what, tp, timeout)
                if point is not None and rank == point.rank:
                    point.install(folder / "reached")
                _run_rank(body, rank, ranks, key_value_store.port, cwd, folder, env or {})
            pids.append(pid)
        os.close(opener)
        os.close(gate)
        launch = Forked(folder, pids)
        started.append(launch)
        return launch

    yield start
    for launch in started:
        launch.poll()
        launch.kill()
        while not launch.poll():
            time.sleep(0.005)


def _launch(argv: list[str]) -> Callable[[], int]:
    def body() -> int:
        from megalm.launch import main

        return main(argv)

    return body


def _alone(program: Program, tp: int, timeout: float) -> Callable[[], int]:
    def body() -> int:
        import torch

        from megalm.launch import run_rank
        from megalm.parallel.bootstrap import Place, Rendezvous

        rendezvous = Rendezvous(Place.from_environment())
        return run_rank(program, rendezvous, torch.device("cpu"), tp=tp, dp=None, sp=False, timeout=timeout)

    return body


def _run_rank(
    body: Callable[[], int], rank: int, ranks: int, port: int, cwd: Path, folder: Path, env: Mapping[str, str]
) -> None:
    """The life of a forked rank."""
    code = 99
    gc.freeze()  # what the parent left is not this process's to clear up
    try:
        for number, name in ((1, "out"), (2, "err")):
            target = os.open(folder / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(target, number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT=folder.name,  # keeps the launches' keys apart
        )
        os.environ.update(env)
        faulthandler.enable(sys.stderr)
        faulthandler.register(signal.SIGUSR1, sys.stderr)
        os.chdir(cwd)
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@pytest.fixture(scope="session")
def point_type() -> type[Point]:
    return Point


@pytest.fixture(scope="session")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    """A token store that no test may change."""
    return make_store(tmp_path_factory.mktemp("launch-store"), manager=manager)


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path, store: Path) -> WriteConfig:
    """``write_config(more, objective=, architecture=, data=)``: a tiny run's TOML in the test's folder."""

    def write(
        more: str = "", *, objective: str = "causal_lm", architecture: str = "gpt2", data: Path | None = None
    ) -> Path:
        path = tmp_path / "run.toml"
        text = TINY.format(data=data or store, objective=objective, architecture=architecture)
        path.write_text(text + more, encoding="utf-8")
        return path

    return write


Torchrun = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """``torchrun(argv, cwd=folder, env={...}, ranks=2)`` runs megalm.launch by torchrun and waits for its end."""

    def run(
        argv: Sequence[object], *, cwd: Path, env: dict[str, str] | None = None, ranks: int = 2, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return subprocess.run(
            [*command, "-m", "megalm.launch", *map(str, argv)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
