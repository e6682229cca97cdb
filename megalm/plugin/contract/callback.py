"""Callbacks: objects whose ``@hookimpl`` methods (``megalm_step_end``, ...) run while they are configured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megalm.config.settings import Settings


@dataclass(frozen=True)
class RunInfo:
    """What event hooks learn of the run. Metrics that they receive are plain floats, reduced over ranks."""

    dir: Path
    """Run folder."""
    config: dict[str, Any]
    """The resolved configuration."""
    rank: int
    world_size: int
    start_step: int
    """Steps already done when the run started; above 0 after a resume."""
    total_steps: int


class Callback:
    """Base of callbacks. Built on every rank; a hook says on which ranks it is called."""

    Config: ClassVar[type[Settings]] = Settings

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
