"""Moments on a GPU are those at which its work begins and ends, by the host's clock, and reading them stops nothing."""

from __future__ import annotations

import time

import pytest
import torch

from megalm.pipeline.clocks import Stopwatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_events_are_on_the_host_s_clock() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    began = time.perf_counter()
    watch = Stopwatch(device)
    for _ in range(4):
        watch.mark()
        for _ in range(20):
            x @ x
        watch.mark()
    queued = time.perf_counter()
    moments = watch.moments()
    ended = time.perf_counter()
    assert moments == sorted(moments)
    assert began - 1e-3 < moments[0]
    assert moments[-1] < ended + 1e-3
    assert queued < moments[-1], "marks do not wait"
    # Work is back to back, so that it lasts as long as the host waits for it.
    busy = sum(end - start for start, end in zip(moments[::2], moments[1::2], strict=True))
    assert busy == pytest.approx(ended - began, rel=0.2)
