"""Every fused operation, forward, backward and both: memory bandwidth over a copy's, and time over that of its peers.

    python benchmarks/kernels.py [--device cuda|cpu] [--dtype NAME ...] [--shape ROWSxCOLUMNS ...] [--only NAME]
                                 [--rounds N] [--compile all|first|none] [--native] [--write]

What is measured is what ``auto`` of ``[kernels]`` takes, with ``--native`` megalm's kernels also where that is torch's.
Peers are torch's own operation or composition (eager), torch.compile of it, and, on a GPU, Liger-Kernel, NVIDIA apex
and Transformer Engine where they are installed. All contenders of a case and a copy of as many bytes as the operation
must move run in turn, round by round, each round in another order; they get the same values and the same gradients.
Medians are reported. On a GPU values are bfloat16 and times are the device's; on a CPU they are those of one thread, in
each dtype.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from kernel_cases import EAGER, GROUPS, HERE, Case, Contender, Scale
from record import RESULTS, write_record

from megalm.ops.choose import Decision, choose_kernels
from megalm.ops.kernels import Kernels
from megalm.ops.native.activation import Activations
from megalm.ops.native.cross_entropy import CrossEntropies
from megalm.ops.native.dropout import Dropouts
from megalm.ops.native.library import Absent, library
from megalm.ops.native.norm import Norms
from megalm.ops.native.rope import Rope
from megalm.ops.native.softmax import Softmaxes
from megalm.plugin.contract.kernels import OPERATIONS, KernelRequest

GPU_WIDTHS, GPU_VOCABULARIES = (768, 1024, 2048, 4096, 8192, 16384), (32000, 65536, 131072)
ELEMENTS = 1 << 27
"""Of a large tensor on a GPU."""
SHAPES = {
    "cuda": tuple((ELEMENTS // width, width) for width in GPU_WIDTHS),
    "cpu": ((2048, 1024), (16, 768), (512, 768), (4096, 4096)),
}
LOGITS = {"cuda": tuple((ELEMENTS // size, size) for size in GPU_VOCABULARIES), "cpu": ((256, 32000),)}
DTYPES = {"cuda": ("bfloat16",), "cpu": ("float32", "bfloat16", "float16")}
CLOCKS = {"cuda": "the device's", "cpu": "the thread's, of the processor"}
PACKAGES = ("liger-kernel", "apex", "transformer-engine")
WAYS = ("forward", "backward", "both")
Row = dict[str, Any]
Seconds = tuple[float, ...]
"""Of a forward, and of the backward after it where there is one."""


def main() -> int:
    """Measure, print, write."""
    options = arguments()
    built = library()
    if isinstance(built, Absent) or (options.device == "cuda" and not built.cuda):
        print(f"kernels: {built.reason if isinstance(built, Absent) else built.without_cuda}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # torch.compile's
    torch.manual_seed(1)
    torch.set_num_threads(1)
    rows: list[Row] = []
    chosen: dict[str, Any] = {}
    shapes, compiled = shapes_of(options)
    print(head())
    for dtype in options.dtype or DTYPES[options.device]:
        kernels, decisions = measured_kernels(options, dtype)
        chosen[dtype] = {decision.operation: decision.as_dict() for decision in decisions}
        scale = Scale(
            torch.device(options.device), getattr(torch, dtype), shapes, LOGITS[options.device], kernels, compiled
        )
        for case in cases(scale, options.only):
            for row in measured(case, scale, options.rounds):
                rows.append({"dtype": dtype, **row})
                print(line(rows[-1]), flush=True)
    for row in slower(rows):
        print(f"slower than torch: {line(row)}")
    if options.write:
        found = {"clock": CLOCKS[options.device], "rounds": options.rounds, "chosen": chosen, "rows": rows}
        write_record(f"kernels-{options.device}", found, device=options.device, peers=PACKAGES, folder=options.out)
    return 0


def arguments() -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES["cpu"], help="may be given again; all of the device")
    parser.add_argument("--shape", action="append", help="rows x columns, such as 2048x1024; may be given again")
    parser.add_argument("--only", help="operations whose name has this in it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--compile",
        choices=("all", "first", "none"),
        help="shapes at which torch.compile is a peer; on a CPU the first, since each takes it half a minute, else all",
    )
    parser.add_argument("--native", action="store_true", help="megalm's kernels, also where auto takes torch's")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write kernels-DEVICE-DATE.json")
    return parser.parse_args()


def shapes_of(options: argparse.Namespace) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...] | None]:
    """All shapes, and those at which torch.compile is measured too (none for all)."""
    shapes = SHAPES[options.device]
    if options.shape:
        shapes = tuple((int(rows), int(columns)) for rows, columns in (text.split("x") for text in options.shape))
    wanted = options.compile or ("first" if options.device == "cpu" else "all")
    return shapes, {"all": None, "first": shapes[:1], "none": ()}[wanted]


def measured_kernels(options: argparse.Namespace, dtype: str) -> tuple[Kernels, tuple[Decision, ...]]:
    """What ``auto`` takes, or megalm's own kernels."""
    requests = [KernelRequest(operation, options.device, dtype) for operation in OPERATIONS]  # type: ignore[arg-type]
    kernels, decisions = choose_kernels(requests, {}, None)
    return (native_kernels() if options.native else kernels), decisions


def cases(scale: Scale, only: str | None) -> Iterator[Case]:
    """All, or those with a word in their name."""
    for group in GROUPS:
        for case in group(scale):
            if only is None or only in case.operation:
                yield case


def measured(case: Case, scale: Scale, rounds: int) -> list[Row]:
    """Rows of a case: its forward, its backward, and both."""
    calls: dict[str, Callable[[], Seconds]] = {}
    failed = dict(case.missing)
    seeds = Seeds()
    for name, contender in case.contenders.items():
        call = timed(contender, case.before, seeds, scale.device)
        try:
            call()
        except Exception as error:  # a peer that cannot do this case is left out, and the record says why
            if name == HERE:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        calls[name] = call
    moved = (case.forward_bytes, case.backward_bytes) if case.contenders[HERE].inputs else (case.forward_bytes,)
    if case.forward_bytes:
        calls["copy"] = copies(moved, scale.device)
    times = interleaved(calls, rounds)
    rows = []
    for number, way in enumerate(WAYS if len(moved) == 2 else WAYS[:1]):
        if not case.apart and way != "both":
            continue
        seconds = {name: taken[number] for name, taken in times.items()}
        total = sum(moved) if way == "both" else moved[number]
        row = {"operation": case.operation, "size": case.size, "what": way, "bytes": total, "seconds": seconds}
        rows.append(row | ({"failed": failed} if failed else {}))
    return rows


class Seeds:
    """Random gradients of the outputs, the same for all contenders."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return [self._of(number, output) for number, output in enumerate(outputs)]

    def _of(self, number: int, output: torch.Tensor) -> torch.Tensor:
        key = (number, output.shape, output.dtype)
        if key not in self._kept:
            self._kept[key] = torch.randn_like(output) if output.dim() else torch.ones_like(output)
        return self._kept[key]


def timed(
    contender: Contender, before: Callable[[], object] | None, seeds: Seeds, device: torch.device
) -> Callable[[], Seconds]:
    """A call that takes the times of a forward, which keeps what its backward needs, and of that backward."""
    # On a GPU several, so that the device does not wait for the host.
    repeat = 5 if device.type == "cuda" else 1
    clock = Events() if device.type == "cuda" else Thread()

    def call() -> Seconds:
        clock.start()
        for _ in range(repeat):
            if before is not None:
                before()
            clock.mark()
            made = contender.run(*contender.inputs)
            clock.mark()
            if not contender.inputs:
                continue
            outputs = made if isinstance(made, tuple) else (made,)
            gradients = seeds.of(outputs)
            clock.mark()
            grown = torch.autograd.grad(outputs, contender.inputs, gradients)
            clock.mark()
            del made, outputs, grown
        return clock.intervals(repeat)

    return call


def copies(moved: tuple[int, ...], device: torch.device) -> Callable[[], Seconds]:
    """The same for copies that read and write as many bytes together."""
    sources = [torch.empty(max(1, size // 2), dtype=torch.uint8, device=device) for size in moved]
    targets = [torch.empty_like(source) for source in sources]
    each = [
        timed(Contender(lambda t=t, s=s: t.copy_(s), ()), None, Seeds(), device)
        for s, t in zip(sources, targets, strict=True)
    ]
    return lambda: tuple(call()[0] for call in each)


class Thread:
    """Seconds of this thread, which do not count what others do to the machine but for its caches."""

    def start(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.thread_time())

    def intervals(self, repeat: int) -> Seconds:
        return intervals([last - first for first, last in pairs(self._marks)], repeat)


class Events:
    """Seconds of the device."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals(self, repeat: int) -> Seconds:
        self._marks[-1].synchronize()
        return intervals([first.elapsed_time(last) / 1e3 for first, last in pairs(self._marks)], repeat)


def pairs(marks: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The beginnings and ends of intervals."""
    return zip(marks[::2], marks[1::2], strict=True)


def intervals(taken: list[float], repeat: int) -> Seconds:
    """Means over repetitions of the intervals that each has."""
    kinds = len(taken) // repeat
    return tuple(statistics.fmean(taken[kind::kinds]) for kind in range(kinds))


SHORT = 2e-3
"""Seconds of a call on a CPU below which there are more rounds, for the median of many is what is measured then."""


def interleaved(calls: dict[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[float]]:
    """Median seconds of each, in turn: of the forward, and of the backward and of both where there is one."""
    for call in calls.values():
        call()
    longest = max(sum(call()) for call in calls.values())
    taken: dict[str, list[Seconds]] = {name: [] for name in calls}
    order, dice = list(calls), random.Random(1)
    for _ in range(rounds if longest > SHORT else 8 * rounds):
        dice.shuffle(order)
        for name in order:
            taken[name].append(calls[name]())
    return {name: medians(samples) for name, samples in taken.items()}


def medians(samples: list[Seconds]) -> list[float]:
    """Of each interval and, where there are two, of their sums."""
    each = [statistics.median(values) for values in zip(*samples, strict=True)]
    return [*each, statistics.median(map(sum, samples))] if len(each) == 2 else each


NOISE = 1.03
"""A ratio below which times are called equal."""


def slower(rows: list[Row]) -> list[Row]:
    """Those whose time is above torch's own by more than noise."""
    return [row for row in rows if row["seconds"][HERE] > NOISE * row["seconds"].get(EAGER, float("inf"))]


PEERS = ("eager", "compile", "liger_kernel", "apex", "transformer_engine")


def head() -> str:
    """Of the table: a peer's column has megalm's time over its."""
    return f"{'dtype':8} {'operation':27} {'size':18} {'what':8} {'ms':>8} {'GB/s':>7} {'of copy':>7} " + " ".join(
        f"{'/ ' + peer[:8]:>10}" for peer in PEERS
    )


def line(row: Row) -> str:
    """Of the table."""
    seconds = row["seconds"]
    own = seconds[HERE]
    rate = f"{row['bytes'] / own / 1e9:7.1f} {seconds['copy'] / own:7.2f}" if row["bytes"] else f"{'':7} {'':7}"
    ratios = " ".join(f"{own / seconds[peer]:10.2f}" if peer in seconds else f"{'-':>10}" for peer in PEERS)
    return f"{row['dtype']:8} {row['operation']:27} {row['size']:18} {row['what']:8} {own * 1e3:8.3f} {rate} {ratios}"


def native_kernels() -> Kernels:
    """All of megalm's."""
    norms, activations, dropouts = Norms(HERE), Activations(HERE), Dropouts(HERE)
    losses = CrossEntropies(HERE)
    return Kernels(
        rms_norm=norms.rms_norm,
        add_rms_norm=norms.add_rms_norm,
        layer_norm=norms.layer_norm,
        add_layer_norm=norms.add_layer_norm,
        gated=activations.gated,
        bias_activation=activations.bias_activation,
        rope=Rope(HERE).rope,
        masked_softmax=Softmaxes(HERE).masked_softmax,
        dropout=dropouts.dropout,
        dropout_add=dropouts.dropout_add,
        statistics=losses.statistics,
        gradient_=losses.gradient_,
    )


if __name__ == "__main__":
    sys.exit(main())
