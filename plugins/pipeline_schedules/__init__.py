"""First-party pipeline schedules: orders that the literature has, and orders that are read from a file."""

from __future__ import annotations

from collections.abc import Iterable

from megalm.api import Component, hookimpl

MEGALM_API = (1, 2)
_HERE = "megalm_plugins.pipeline_schedules"


@hookimpl
def megalm_pipeline_schedules() -> Iterable[Component]:
    yield Component("gpipe", f"{_HERE}.fused:GPipe", "all forwards, then all backwards (Huang et al., 2019)")
    yield Component("1f1b", f"{_HERE}.fused:OneForwardOneBackward", "forwards and backwards by turns (PipeDream-Flush)")
    yield Component("interleaved", f"{_HERE}.fused:Interleaved", "1F1B with several stages a rank (Megatron-LM, 2021)")
    yield Component("zb-h1", f"{_HERE}.zero_bubble:ZeroBubbleH1", "1F1B, weight gradients in its bubbles (Qi et al.)")
    yield Component("zb-v", f"{_HERE}.zero_bubble:ZeroBubbleV", "no bubble in 1F1B's memory (Qi et al., 2023)")
    yield Component("csv", f"{_HERE}.from_file:FromFile", "csv:FILE, an order from a table")
