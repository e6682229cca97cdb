"""Learning-rate schedules: warm-up, then cosine, linear, or stable and decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import Field

from megalm.api import Component, ConfigError, LRSchedule, Settings, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_lr_schedules() -> Iterable[Component]:
    yield Component("cosine", "megalm_plugins.lr_schedules:Cosine", "warm-up, then half a cosine")
    yield Component("linear", "megalm_plugins.lr_schedules:Linear", "warm-up, then a straight line down")
    yield Component("wsd", "megalm_plugins.lr_schedules:WarmupStableDecay", "warm-up, plateau, then a line down")


class DecayConfig(Settings):
    """Settings of ``[lr_schedule.cosine]`` and ``[lr_schedule.linear]``."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises to its peak, which step ``warmup_steps`` has."""
    final: float = Field(default=0.1, ge=0, le=1)
    """Rate that the schedule falls towards, as a share of the peak: what a step after the last would have."""


class WarmupStableDecayConfig(DecayConfig):
    """Settings of ``[lr_schedule.wsd]``."""

    decay_steps: int = Field(default=0, ge=0)
    """Steps at the end over which the rate falls; 0: a tenth of all steps."""


class _Schedule(LRSchedule):
    """Warm-up, then the peak times a shape that falls from 1 to 0, above the final rate."""

    def at(self, step: int) -> float:
        warmup: int = self.cfg.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        final: float = self.cfg.final
        return self.lr * (final + (1.0 - final) * self.shape(step))

    def progress(self, step: int) -> float:
        """Share of the steps after warm-up that are done."""
        warmup: int = self.cfg.warmup_steps
        return min(1.0, (step - warmup) / max(1, self.steps - warmup))

    def shape(self, step: int) -> float:
        raise NotImplementedError


class Cosine(_Schedule):
    """Half a cosine from the peak to the final rate. (Loshchilov and Hutter, SGDR, 2017.)"""

    Config = DecayConfig

    def shape(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * self.progress(step)))


class Linear(_Schedule):
    """A straight line from the peak to the final rate."""

    Config = DecayConfig

    def shape(self, step: int) -> float:
        return 1.0 - self.progress(step)


class WarmupStableDecay(_Schedule):
    """The peak until the last steps, then a straight line. (Hu et al., MiniCPM, 2024.)"""

    Config = WarmupStableDecayConfig

    def __init__(self, cfg: WarmupStableDecayConfig, lr: float, steps: int) -> None:
        super().__init__(cfg, lr, steps)
        self.decay_steps = cfg.decay_steps or max(1, steps // 10)
        if cfg.warmup_steps + self.decay_steps > steps:
            raise ConfigError(
                [
                    f"lr_schedule.wsd: {cfg.warmup_steps} warm-up and {self.decay_steps} decay steps "
                    f"are more than train.steps = {steps}"
                ]
            )

    def shape(self, step: int) -> float:
        return max(0.0, min(1.0, (self.steps - step) / self.decay_steps))
