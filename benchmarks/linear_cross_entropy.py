"""Time and memory of the chunked linear cross-entropy, against F.linear and F.cross_entropy, on one CPU thread.

    python benchmarks/linear_cross_entropy.py [--tokens 8192] [--hidden 768] [--vocab 32000] [--rounds 3] [--write]

Each measurement is a forward and backward in a process of its own, because a process's peak of resident memory never
falls: what is reported is that peak over what the process held when input and weight were there and their product had
been warmed up. Both include the gradients. Processes are interleaved; medians and ratios are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from record import write_record

from megalm.ops.cross_entropy import REFERENCE, CrossEntropyKernels
from megalm.ops.linear_cross_entropy import linear_cross_entropy
from megalm.ops.native.cross_entropy import CrossEntropies
from megalm.ops.native.library import Absent, library

VARIANTS = ("unfused", "reference", "native")


def _resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _kernels(variant: str) -> CrossEntropyKernels:
    if variant == "reference":
        return REFERENCE
    found = library()
    if isinstance(found, Absent):
        raise SystemExit(f"the operations were not built: {found.reason}")
    return CrossEntropies("megalm").kernels()


def measure(variant: str, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and peak bytes of one forward and backward, in this process."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=draw, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=draw, dtype=dtype) * 0.02).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=draw)
    kernels = None if variant == "unfused" else _kernels(variant)

    def run(rows: int) -> torch.Tensor:
        if kernels is None:
            # Named by nothing, so that torch may free the logits as soon as it can.
            loss = F.cross_entropy(F.linear(h[:rows], weight), labels[:rows])
        else:
            losses = linear_cross_entropy(h[:rows], weight, labels[:rows], vocab_size=vocab, kernels=kernels)
            loss = losses.sum() / rows
        loss.backward()
        return loss.detach()

    run(8)
    h.grad = weight.grad = None
    before, wall, cpu = _resident("VmRSS"), time.perf_counter(), time.thread_time()
    loss = run(tokens)
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.thread_time() - cpu}
    assert h.grad is not None
    assert weight.grad is not None
    check = {"loss": loss.item(), "h": h.grad.double().norm().item(), "weight": weight.grad.double().norm().item()}
    return {**seconds, "peak_bytes": _resident("VmHWM") - before, **check}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/linear_cross_entropy-DATE.json")
    parser.add_argument("--one", choices=VARIANTS, help="measure once, here, and print JSON")
    options = parser.parse_args()
    if options.one is not None:
        dtype = getattr(torch, options.dtype)
        print(json.dumps(measure(options.one, options.tokens, options.hidden, options.vocab, dtype)))
        return
    shape = [f"--{name}={getattr(options, name)}" for name in ("tokens", "hidden", "vocab", "dtype")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for _ in range(options.rounds):
        for name in options.variants:
            command = [sys.executable, __file__, "--one", name, *shape]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode != 0:
                raise SystemExit(child.stderr)
            found[name].append(json.loads(child.stdout))
    report(found)
    if options.write:
        sizes = {name: getattr(options, name) for name in ("tokens", "hidden", "vocab", "dtype")}
        write_record("linear_cross_entropy", {**sizes, "runs": found})


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and ratios to the first variant's of the same round."""
    first = next(iter(found.values()))
    print(f"{'variant':10} {'CPU s':>7} {'of unfused':>10} {'peak MiB':>9} {'of unfused':>10} {'loss':>9}")
    for name, runs in found.items():
        ratios = {
            key: statistics.median(run[key] / base[key] for run, base in zip(runs, first, strict=True))
            for key in ("cpu_seconds", "peak_bytes")
        }
        seconds, peak = (statistics.median(run[key] for run in runs) for key in ("cpu_seconds", "peak_bytes"))
        print(
            f"{name:10} {seconds:7.2f} {ratios['cpu_seconds']:10.3f} {peak / 2**20:9.0f} {ratios['peak_bytes']:10.3f} "
            f"{runs[0]['loss']:9.5f}"
        )


if __name__ == "__main__":
    main()
