"""Everything private of torch that simulated groups stand on, and nothing else.

torch.distributed keeps one state per process: the default group, the names and ranks of all groups, and a registry in
C++. Ranks that are threads each need their own. So while a world is simulated, the module's state is replaced by a
proxy that finds the state of the rank whose thread asks, and the C++ registry is told to keep one per thread.

:func:`broken_hooks` says which of these things the installed torch does not have; it is asked before each first use.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megalm.parallel.sim.errors import HooksError
from megalm.parallel.sim.scheduler import RankThread, current_rank

BACKEND = "sim"
MakeGroup = Callable[[str, tuple[int, ...]], dist.ProcessGroup]
NoteGroup = Callable[[str, tuple[int, ...]], None]
_STATE: dict[str, Callable[[], Any]] = {
    "default_pg": lambda: None,
    "pg_map": dict,
    "pg_names": dict,
    "pg_group_ranks": dict,
    "pg_backend_config": dict,
    "group_count": lambda: 0,
    "tags_to_pg": dict,
    "pg_to_tag": dict,
    "pg_coalesce_state": dict,
    "comms": list,
}
"""What torch.distributed keeps for a process, and how it starts."""
_DERIVED = {"pg_config_info", "pg_default_device"}
"""Properties that torch computes from the others; the second is gone in some versions."""
_METHODS = (
    *("allreduce", "reduce", "broadcast", "allgather", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base"),
    *("gather", "scatter", "barrier", "send", "recv", "group_desc", "group_name"),
)
_one_world = threading.Lock()


class StorageReference(Protocol):
    """A weak reference to the memory of tensors."""

    cdata: int
    """Equal for tensors that share memory; not used anew while the reference lives."""

    def expired(self) -> bool:
        """Whether the memory has been freed."""


def storage_reference(tensor: torch.Tensor) -> StorageReference:
    """A weak reference to the memory under a tensor."""
    from torch.multiprocessing.reductions import StorageWeakRef

    reference: StorageReference = StorageWeakRef(tensor.untyped_storage())
    return reference


def broken_hooks() -> list[str]:
    """What this torch lacks or has anew of the private things used here, each as a line; best empty."""
    problems = []
    world = getattr(c10d, "_World", None)
    if world is None or not isinstance(getattr(c10d, "_world", None), world):
        problems.append("distributed_c10d._world is not a _World: the state of each rank cannot be kept apart")
    else:
        found = {name for name, value in vars(world).items() if isinstance(value, property)}
        problems += [f"distributed_c10d._World has no {name}" for name in sorted(set(_STATE) - found)]
        problems += [
            f"distributed_c10d._World has a new property {name}: is it state of a process, which each rank needs?"
            for name in sorted(found - set(_STATE) - _DERIVED)
        ]
    if not hasattr(torch._C._distributed_c10d, "_set_thread_isolation_mode"):
        problems.append("torch._C._distributed_c10d has no _set_thread_isolation_mode: group names would collide")
    problems += [
        f"distributed_c10d has no {name}: {why}"
        for name, why in (
            ("_get_default_group", "a foreign thread that communicates would not be found"),
            ("_process_group_name", "ranks that create other groups would not be found"),
        )
        if not hasattr(c10d, name)
    ]
    problems += [f"ProcessGroup has no {name}" for name in _METHODS if not hasattr(dist.ProcessGroup, name)]
    try:
        from torch.multiprocessing.reductions import StorageWeakRef

        if not {"cdata", "expired"} <= set(dir(StorageWeakRef)):
            problems.append("StorageWeakRef has neither cdata nor expired: shared storage cannot be found")
    except ImportError:
        problems.append("torch.multiprocessing.reductions has no StorageWeakRef: shared storage cannot be found")
    return [f"torch {torch.__version__}: {problem}" for problem in problems]


class _RankWorld(c10d._World):
    """torch.distributed's state for one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_state"] = {name: start() for name, start in _STATE.items()}


def _state_property(name: str) -> property:
    def read(self: _RankWorld) -> Any:
        return self.__dict__["_state"][name]

    def write(self: _RankWorld, value: Any) -> None:
        if "_state" in self.__dict__:  # torch's own constructor sets some before they are ours
            self.__dict__["_state"][name] = value

    return property(read, write)


for _name in _STATE:
    setattr(_RankWorld, _name, _state_property(_name))


class _WorldOfThisThread:
    """Stands for ``distributed_c10d._world``."""

    def __init__(self, outside: Any, make_group: MakeGroup) -> None:
        self.__dict__["_outside"] = outside
        self.__dict__["make_group"] = make_group
        self.__dict__["_inside"] = {}

    def _here(self) -> Any:
        rank: RankThread | None = current_rank()
        if rank is None:
            return self.__dict__["_outside"]
        inside: dict[RankThread, _RankWorld] = self.__dict__["_inside"]
        if rank not in inside:
            inside[rank] = _RankWorld()
        return inside[rank]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._here(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._here(), name, value)


def _create(options: Any, _: Any) -> dist.ProcessGroup:
    """What torch.distributed calls for a new group of this backend, in the rank's thread."""
    ranks = options.global_ranks_in_group or range(options.group_size)
    group: dist.ProcessGroup = c10d._world.make_group(str(options.group_id), tuple(ranks))  # type: ignore[attr-defined]
    return group


@cache
def _outlive_ranks() -> None:
    """Have torch replace its CUDA device guard, where there is no CUDA device, in a thread that ends with the process.

    The first fake tensor of a process (DTensor and FSDP2 make them) does that. In torch 2.11 the new guard belongs to
    the thread of that tensor but serves all, so once a rank's thread has ended the process crashes (pytorch pull
    request 178950). A torch without a CUDA build, or without this function, has nothing to replace.

    The new guard claims devices, for which the first backward would start threads; a process that has such threads
    cannot be forked any more. So a first backward comes before.
    """
    replace = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if replace is None or not torch.backends.cuda.is_built() or torch.cuda.is_available():
        return
    with torch.inference_mode(False), torch.enable_grad():
        torch.ones((), device="cpu", requires_grad=True).backward()
    if threading.current_thread() is threading.main_thread():
        replace()
        return
    replaced = threading.Event()

    def stay() -> None:
        replace()
        replaced.set()
        threading.Event().wait()

    threading.Thread(target=stay, name="keeps torch's device guard", daemon=True).start()
    replaced.wait()


@contextmanager
def _watched(refuse: Callable[[], object], note_group: NoteGroup) -> Iterator[None]:
    """Have torch tell, inside the block, which threads ask for the default group, and which groups ranks name.

    Threads that were there before may use a default group of the caller's. (Asking whether there is one is free.)
    """
    known = weakref.WeakSet(threading.enumerate())
    get_group, get_name = c10d._get_default_group, c10d._process_group_name

    def get_default_group() -> Any:
        if current_rank() is None and (not dist.is_initialized() or threading.current_thread() not in known):
            refuse()
        return get_group()

    def process_group_name(ranks: Any, use_hashed_name: bool) -> Any:
        name = get_name(ranks, use_hashed_name)
        if ranks and not use_hashed_name and current_rank() is not None:
            note_group(str(name), tuple(ranks))
        return name

    c10d._get_default_group = get_default_group
    c10d._process_group_name = process_group_name
    try:
        yield
    finally:
        c10d._get_default_group, c10d._process_group_name = get_group, get_name


@contextmanager
def installed(make_group: MakeGroup, refuse: Callable[[], object], note_group: NoteGroup) -> Iterator[None]:
    """Simulate inside the block: a rank's new process groups come from ``make_group(name, world ranks)``.

    ``refuse`` is called, to raise, where a thread that is no rank asks for the default group. ``note_group(name, world
    ranks)`` is called in the thread of each rank that creates a group, whether it is in it or not; not for groups that
    their members create alone.

    One world at a time can be simulated in a process. HooksError where this torch lacks something.
    """
    if problems := broken_hooks():
        raise HooksError("simulated groups do not work with this torch:\n" + "\n".join(f"  {p}" for p in problems))
    if not _one_world.acquire(blocking=False):
        raise HooksError("another world is being simulated in this process: one at a time, and none inside another")

    outside, hook = c10d._world, sys.excepthook
    try:
        _outlive_ranks()
        if not hasattr(dist.Backend, BACKEND.upper()):
            dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
        c10d._world = _WorldOfThisThread(outside, make_group)  # type: ignore[assignment]
        torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
        with _watched(refuse, note_group):
            yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
        c10d._world = outside
        sys.excepthook = hook  # each init_process_group wraps it once more
        _one_world.release()


def start_rank(store: dist.Store, rank: int, world_size: int) -> None:  # type: ignore[name-defined]
    """Make the default process group of the rank whose thread this is. The caller keeps ``store`` alive."""
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=world_size)


def stop_rank() -> None:
    """Forget the rank's groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
