"""Every fused operation, forward and with backward: memory bandwidth over a copy's, and time over that of its peers.

    python benchmarks/kernels.py [--device cuda|cpu] [--only NAME] [--rounds N] [--no-compile] [--write]

Peers are torch's own operation or composition (eager), torch.compile of it, and, on a GPU, Liger-Kernel, NVIDIA apex
and Transformer Engine where they are installed. All contenders of a case and a copy of as many bytes as the operation
must move run in turn, round by round; medians are reported. On a GPU values are bfloat16 and times are the device's; on
a CPU they are float32 and of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from kernel_cases import GROUPS, HERE, Case, Contender, Scale

from megalm.ops.native.library import Absent, library

SCALES = {
    "cuda": (torch.bfloat16, 1 << 27, (768, 1024, 2048, 4096, 8192, 16384), (32000, 65536, 131072)),
    "cpu": (torch.float32, 1 << 22, (768, 4096), (32000,)),
}
Row = dict[str, Any]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SCALES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="operations whose name has this in it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--write", action="store_true", help="write kernels-DEVICE-DATE.json")
    options = parser.parse_args()
    found = library()
    if isinstance(found, Absent) or (options.device == "cuda" and not found.cuda):
        print(f"kernels: {found.reason if isinstance(found, Absent) else found.without_cuda}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # torch.compile's
    torch.manual_seed(1)
    torch.set_num_threads(1)
    scale = Scale(torch.device(options.device), *SCALES[options.device])
    rows: list[Row] = []
    print(head())
    for group in GROUPS:
        for case in group(scale):
            if options.only and options.only not in case.operation:
                continue
            if options.no_compile:
                case.contenders.pop("compile", None)
            for row in measured(case, scale, options.rounds):
                rows.append(row)
                print(line(row), flush=True)
    if options.write:
        path = options.out / f"kernels-{options.device}-{datetime.now(UTC).date().isoformat()}.json"
        record = {**environment(options.device), "rounds": options.rounds, "rows": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nwritten to {path}")
    return 0


def measured(case: Case, scale: Scale, rounds: int) -> list[Row]:
    """Rows of a case: its forward, and the forward with the backward where it has one."""
    ways: list[tuple[str, Callable[[Contender], Callable[[], Any]], int]] = []
    if case.forward_bytes:  # where gradients are made with the losses, the forward alone compares with nothing
        ways.append(("forward", forward, case.forward_bytes))
    if case.contenders[HERE].inputs:
        total = case.forward_bytes + case.backward_bytes
        ways.append(("both", both, total))
    rows = []
    for way, make, moved in ways:
        calls = {name: make(contender) for name, contender in case.contenders.items()}
        failed = dict(case.missing)
        for name in list(calls):
            try:
                calls[name]()
            except Exception as error:  # a peer that cannot do this case is left out, and the record says why
                if name == HERE:
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                del calls[name]
        if moved:
            source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=scale.device)
            target = torch.empty_like(source)
            calls["copy"] = lambda target=target, source=source: target.copy_(source)
        times = interleaved(calls, rounds, scale.device)
        row = {"operation": case.operation, "size": case.size, "what": way, "bytes": moved, "seconds": times}
        rows.append(row | ({"failed": failed} if failed else {}))
    return rows


def forward(contender: Contender) -> Callable[[], Any]:
    """As in training: what the backward needs is kept."""
    return lambda: contender.run(*contender.inputs)


def both(contender: Contender) -> Callable[[], Any]:
    """Forward and backward, each time with the same random gradients of the outputs."""
    seeds: list[torch.Tensor] = []

    def call() -> Any:
        made = contender.run(*contender.inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        if not seeds:
            seeds.extend(torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs)
        return torch.autograd.grad(outputs, contender.inputs, seeds)

    return call


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each, in turn."""
    clock = on_gpu if device.type == "cuda" else on_cpu
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(clock(call))
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def on_cpu(call: Callable[[], Any]) -> float:
    """Seconds of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def on_gpu(call: Callable[[], Any], repeat: int = 5) -> float:
    """Seconds of the device. Several calls, so that the device does not wait for the host."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeat):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / repeat


PEERS = ("eager", "compile", "liger_kernel", "apex", "transformer_engine")


def head() -> str:
    """Of the table: a peer's column has megalm's time over its."""
    return f"{'operation':27} {'size':22} {'what':8} {'ms':>8} {'GB/s':>7} {'of copy':>7} " + " ".join(
        f"{'/ ' + peer[:8]:>10}" for peer in PEERS
    )


def line(row: Row) -> str:
    """Of the table."""
    seconds = row["seconds"]
    own = seconds[HERE]
    rate = f"{row['bytes'] / own / 1e9:7.1f} {seconds['copy'] / own:7.2f}" if row["bytes"] else f"{'':7} {'':7}"
    ratios = " ".join(f"{own / seconds[peer]:10.2f}" if peer in seconds else f"{'-':>10}" for peer in PEERS)
    return f"{row['operation']:27} {row['size']:22} {row['what']:8} {own * 1e3:8.3f} {rate} {ratios}"


def environment(device: str) -> dict[str, Any]:
    """What the results are of."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    cuda = device == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "device": torch.cuda.get_device_name() if cuda else f"{torch.backends.cpu.get_cpu_capability()}, one thread",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
