"""From the launcher's environment to process groups, and what ranks tell each other before there are any.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and the address of a key-value store. Before any process group exists the
store carries each rank's report of its preparations as JSON, so that a mistake seen by one rank ends them all with
one message. Without torchrun the process is one rank and there is no store.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    DistStoreError,
    FileStore,
    HashStore,
    PrefixStore,
    Store,
    rendezvous,
)

from megalm.errors import MegalmError
from megalm.parallel.board import Board, BoardGone
from megalm.parallel.comm import exercise_backend


class RendezvousError(MegalmError):
    """A rank did not report in time."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in the launch."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read torchrun's variables; one rank where there are none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
        )


class Rendezvous:
    """The launch's key-value store; none for one rank, unless it is to exercise a backend all the same."""

    def __init__(self, place: Place, timeout: float = 600.0) -> None:
        self.place = place
        self._timeout = timedelta(seconds=timeout)
        self._store: Store | None = None
        if place.world_size > 1:
            store, _, _ = next(
                rendezvous("env://", rank=place.rank, world_size=place.world_size, timeout=self._timeout)
            )
            # A restarted job finds the keys of its former life in the same store.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"megalm/{attempt}", store)
        elif exercise_backend():
            self._store = HashStore()

    @property
    def store(self) -> Store | None:
        """The store itself, for ``init_process_group``."""
        return self._store

    def board(self) -> Board:
        """The watchdogs' notice board in the store, over a connection of its own. BoardGone where there is no store."""
        if self._store is None:
            raise BoardGone
        return Board(self._store, "watchdog")

    def exchange(self, topic: str, value: Any, timeout: float | None = None) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank. RendezvousError names a rank that does not report."""
        if self._store is None:
            return [value]
        limit = self._timeout if timeout is None else timedelta(seconds=timeout)
        self._store.set(f"{topic}/{self.place.rank}", json.dumps(value))
        found = []
        for rank in range(self.place.world_size):
            try:
                self._store.wait([f"{topic}/{rank}"], limit)
            except DistStoreError as error:
                raise RendezvousError(
                    f"rank {rank} did not report ({topic}) within {limit.total_seconds():.0f} s; "
                    "look for its own message above, or whether its host is up"
                ) from error
            found.append(json.loads(self._store.get(f"{topic}/{rank}")))
        return found

    def first(self, topic: str) -> bool:
        """True on the first rank that asks, and where the store is gone; false on later ones."""
        try:
            return self._store is None or self._store.add(topic, 1) == 1
        except RuntimeError:
            return True


def start_process_group(launch: Rendezvous, device: torch.device, timeout: float) -> None:
    """Initialise the default process group: NCCL for CUDA, gloo for the CPU. Nothing for one rank."""
    if launch.store is None:
        return
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("process-group", launch.store),
        rank=launch.place.rank,
        world_size=launch.place.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )


def stop_process_group() -> None:
    """Tear the default process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start_file_process_group(path: Path, rank: int, world_size: int, timeout: float) -> None:
    """A gloo process group over a file that the ranks share, for tests without a launcher."""
    store = FileStore(str(path), world_size)
    dist.init_process_group(
        backend="gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
