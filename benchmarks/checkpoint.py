"""Checkpoints' speed: saving, loading, resharding and verifying, beside safetensors, torch.save and torch's DCP.

    python benchmarks/checkpoint.py [--parameters 500e6] [--rounds 5] [--folder DIR] [--write]

The state is float32 matrices, as a transformer's: half of them divided by rows and half by columns under tensor
parallelism. Every contender fills preallocated tensors when it loads. Rounds interleave the contenders, each round
starts with another one, and medians are reported; the time of a round is that of its slowest rank.

Saving is timed twice: until the values are the operating system's ("written"; nobody syncs) and until they would
survive a power failure ("durable"; the files of those that do not sync are synced for them). megalm hashes in both, the
others never do. Loads come from the page cache, into which a contender's files are read before its turn: all of them
together need more memory than many a machine has. megalm's verification (the hash of every file) is a row of its own.
"blocked" is how long an asynchronous save holds up a step, beside one copy of the state from memory to memory.

safetensors and torch.save have one file a rank and do not reshard. DCP's planner exchanges pickles between ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed.checkpoint as dcp
from record import write_record
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DShard

from megalm.checkpoint.job import Retention
from megalm.checkpoint.load import load_state
from megalm.checkpoint.manifest import read_manifest, verify_files
from megalm.checkpoint.save import Saver
from megalm.checkpoint.state import TrainingState
from megalm.parallel.layout import Part, Piece, Shard, even_ranges
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.testing.processes import run_processes

SIDE = 4096
Case = tuple[str, Callable[[], object]]


class State:
    """A rank's shards of the matrices, and the same as every contender wants them."""

    def __init__(self, parallel: ParallelContext, parameters: int) -> None:
        self.parallel = parallel
        count = max(2, round(parameters / SIDE / SIDE))
        side = SIDE if count > 2 else max(2, round((parameters / count) ** 0.5))
        self.pieces, draw = [], torch.Generator().manual_seed(parallel.rank)
        for number in range(count):
            dim = number % 2
            part = Part((side, side), shard=Shard("tp", dim, even_ranges(side, parallel.tp.size)))
            held = part.held(parallel.indices)
            local = torch.randn([b - a for a, b in held], generator=draw)
            self.pieces.append(Piece(f"w{number:03d}", part, local, held, part.owned(parallel.indices)))
        self.training = TrainingState(self.pieces, [], {})
        self.tensors = {piece.name: piece.local for piece in self.pieces}
        self.bytes = sum(t.numel() * 4 for t in self.tensors.values())
        self.dtensors: dict[str, Any] = dict(self.tensors)
        if parallel.tp.size > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mesh = init_device_mesh("cpu", (parallel.tp.size,))
            for number, piece in enumerate(self.pieces):
                shape, stride = torch.Size(piece.part.shape), (side, 1)
                self.dtensors[piece.name] = DTensor.from_local(
                    piece.local, mesh, [DShard(number % 2)], run_check=False, shape=shape, stride=stride
                )

    def checksum(self) -> float:
        return sum(t.double().sum().item() for t in self.tensors.values())


class Peers:
    """One rank's contenders, with their files below a folder."""

    def __init__(self, state: State, root: Path) -> None:
        self.state, self.root = state, root
        self.rank, self.alone = state.parallel.rank, state.parallel.world_size == 1

    def file(self, name: str) -> Path:
        return self.root / f"{name}-{self.rank}"

    def savers(self) -> list[Case]:
        return [
            ("megalm", self.save_megalm),
            ("safetensors", lambda: save_file(self.state.tensors, self.file("safetensors"))),
            ("torch.save", lambda: torch.save(self.state.tensors, self.file("torch"))),
            ("dcp", lambda: dcp.save(self.state.dtensors, checkpoint_id=self.root / "dcp", no_dist=self.alone)),
        ]

    def save_megalm(self) -> None:
        Saver(self.root / "megalm", self.state.parallel, Retention(1)).save(1, self.state.training, {})

    def loaders(self, root: Path | None = None) -> list[Case]:
        """Of the files below ``root``; of another layout's those that can."""
        where = root or self.root
        megalm = where / "megalm/step-00000001"

        def copied(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                self.state.tensors[name].copy_(tensor)

        resharding: list[Case] = [
            ("megalm", lambda: load_state(megalm, read_manifest(megalm), self.state.training)),
            ("dcp", lambda: dcp.load(self.state.dtensors, checkpoint_id=where / "dcp", no_dist=self.alone)),
        ]
        if root is not None:
            return resharding
        return [
            *resharding,
            ("safetensors", lambda: copied(load_file(self.file("safetensors")))),
            ("torch.save", lambda: copied(torch.load(self.file("torch"), mmap=True, weights_only=True))),
        ]

    def warm(self, name: str, root: Path | None = None) -> None:
        """Bring what a contender has written into the page cache."""
        where = root or self.root
        block = bytearray(1 << 22)
        for path in [where / name, *(where / name).rglob("*"), *where.glob(f"{name}-*")]:
            if path.is_file():
                with path.open("rb", buffering=0) as file:
                    while file.readinto(block):
                        pass

    def clear(self) -> None:
        """Remove every contender's files; all ranks call it."""
        self.state.parallel.world.barrier()
        if self.rank == 0:
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.mkdir(parents=True)
        self.state.parallel.world.barrier()

    def save_all(self) -> None:
        """Leave every contender's files."""
        self.clear()
        for _, act in self.savers():
            act()

    def sync(self) -> None:
        """For those that do not do it themselves."""
        for path in (self.file("safetensors"), self.file("torch")):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


@contextlib.contextmanager
def nobody_syncs(off: bool) -> Iterator[None]:
    """Make fsync do nothing, for all alike."""
    before = os.fsync
    if off:
        os.fsync = lambda handle: None
    try:
        yield
    finally:
        os.fsync = before


def timed(parallel: ParallelContext, act: Callable[[], object]) -> float:
    """Seconds of the slowest rank."""
    parallel.world.barrier()
    began = time.perf_counter()
    act()
    took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    return parallel.world.all_reduce(took, op="max").item()


def turned(cases: list[Case], number: int) -> list[Case]:
    """In another order every round."""
    return cases[number % len(cases) :] + cases[: number % len(cases)]


def measure(parallel: ParallelContext, parameters: int, rounds: int, home: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round by row and contender. Leaves this layout's files, loads the other's if they are there."""
    state = State(parallel, parameters)
    mine, other = home / f"ranks-{parallel.world_size}", home / f"ranks-{3 - parallel.world_size}"
    peers = Peers(state, mine)
    out: dict[str, dict[str, list[float]]] = {}

    def note(row: str, name: str, seconds: float) -> None:
        out.setdefault(row, {}).setdefault(name, []).append(seconds)

    for number in range(rounds):
        for row, off in (("save, written", True), ("save, durable", False)):
            for name, act in turned(peers.savers(), number):
                peers.clear()

                def save(act: Callable[[], object] = act, off: bool = off) -> None:
                    with nobody_syncs(off):
                        act()
                    if not off:
                        peers.sync()

                note(row, name, timed(parallel, save))
    peers.save_all()
    expected = state.checksum()
    folder = mine / "megalm/step-00000001"
    share = (parallel.rank, parallel.world_size)
    copies = {name: torch.empty_like(tensor).fill_(0) for name, tensor in state.tensors.items()}
    saver = Saver(home / f"async-{parallel.world_size}", parallel, Retention(1), asynchronous=True)
    saver.reserve(state.training)
    for number in range(rounds):
        for name, act in turned(peers.loaders(), number):
            for tensor in state.tensors.values():
                tensor.zero_()
            peers.warm(name.replace("torch.save", "torch"))
            note("load", name, timed(parallel, act))
            assert state.checksum() == expected, f"{name} has not loaded what was saved"
        note("verify", "megalm", timed(parallel, lambda: verify_files(folder, read_manifest(folder), share)))
        if (other / "dcp").exists():
            for name, act in turned(peers.loaders(other), number):
                peers.warm(name, other)
                note("load, other layout", name, timed(parallel, act))
            peers.warm("megalm")
            note("load, other layout", "megalm, same layout", timed(parallel, peers.loaders()[0][1]))
        for name, tensor in copies.items():  # the first touch is over
            tensor.copy_(state.tensors[name])
        note("blocked", "one copy", timed(parallel, lambda: [c.copy_(state.tensors[n]) for n, c in copies.items()]))
        note("blocked", "megalm", timed(parallel, lambda step=number + 1: saver.save(step, state.training, {})))
        saver.finish()
    return out


def two_ranks(parameters: int, rounds: int, home: Path) -> dict[str, dict[str, list[float]]]:
    """The same on two processes."""

    def rank(parallel: ParallelContext) -> dict[str, torch.Tensor]:
        found = measure(parallel, parameters, rounds, home)
        if parallel.rank == 0:
            (home / "two.json").write_text(json.dumps(found))
        return {"done": torch.zeros(1)}

    run_processes(rank, tp=2, timeout=3600)
    found: dict[str, dict[str, list[float]]] = json.loads((home / "two.json").read_text())
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=500e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--write", action="store_true", help="record the figures in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    home = Path(tempfile.mkdtemp(prefix="megalm-checkpoint-", dir=arguments.folder))
    parameters = int(arguments.parameters)
    need = 4 * parameters * 12
    if shutil.disk_usage(home).free < need:
        home.rmdir()
        sys.exit(f"this needs {need / 1e9:.0f} GB free below {home.parent}; use --folder or fewer --parameters")
    try:
        measure(single_rank(), min(parameters, 1_000_000), 1, home / "warm-up")
        Peers(State(single_rank(), parameters), home / "ranks-1").save_all()
        figures = {"2 ranks": two_ranks(parameters, arguments.rounds, home)}
        figures["1 rank"] = measure(single_rank(), parameters, arguments.rounds, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    medians = {
        f"{ranks}: {row}": {name: statistics.median(seconds) for name, seconds in found.items()}
        for ranks, rows in figures.items()
        for row, found in rows.items()
    }
    for row, found in medians.items():
        print(f"{row:32}" + "  ".join(f"{name} {seconds:.3f} s" for name, seconds in sorted(found.items())))
    if arguments.write:
        found = {"parameters": parameters, "rounds": arguments.rounds, "seconds": medians}
        write_record("checkpoint", found, peers=("safetensors", "xxhash"))


if __name__ == "__main__":
    main()
