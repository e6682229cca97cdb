"""Real ranks for tests: processes forked from a warm parent, talking through gloo.

Forking takes a fraction of a second where spawning imports torch anew in every rank. The parent must not have started
torch's threads, so tests run with one thread. What a rank returns is JSON or tensors, written to a file; no pickle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megalm.parallel.bootstrap import start_file_process_group
from megalm.parallel.mesh import ParallelContext, make_mesh

Tensors = dict[str, torch.Tensor]


def run_processes(
    function: Callable[[ParallelContext], Tensors],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    sp: bool = False,
    timeout: float = 120.0,
) -> list[Tensors]:
    """Run ``function`` on tp * pp * dp forked gloo ranks; each rank's tensors, in rank order.

    RuntimeError with the first failing rank's traceback where one fails, or names those that did not end in time.
    """
    size = tp * pp * dp
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layout = {"tp": tp, "pp": pp, "sp": sp}
        children = [_fork(function, root, rank, size, layout, timeout) for rank in range(size)]
        try:
            _wait(children, root, timeout)
        finally:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return [load_file(root / f"{rank}.safetensors") for rank in range(size)]


def _fork(
    function: Callable[[ParallelContext], Tensors],
    root: Path,
    rank: int,
    size: int,
    layout: dict[str, Any],
    timeout: float,
) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        start_file_process_group(root / "store", rank, size, timeout)
        out = function(make_mesh(torch.device("cpu"), **layout))
        save_file({name: tensor.detach().contiguous() for name, tensor in out.items()}, root / f"{rank}.safetensors")
        status = 0
    except BaseException:
        (root / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(children: list[int], root: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    alive = dict(enumerate(children))
    while alive:
        for rank, pid in list(alive.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del alive[rank]
            if status:
                error = root / f"{rank}.error"
                raise RuntimeError(f"rank {rank} failed:\n{error.read_text() if error.exists() else status}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {', '.join(map(str, alive))} did not end within {timeout:.0f} s")
        time.sleep(0.005)
