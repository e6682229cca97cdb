"""The best evaluation of a fine-tuning run so far: its checkpoint stays, and a run that gets no better ends.

What is best is read from the recorded evaluations, and stored nowhere else. So a run that was killed and goes on from
an earlier checkpoint knows what it knew there, and one that was asked to end and evaluates later comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalm.config.schema import Config
from megalm.metrics import jsonl
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.plugin.contract.head import Goal


def selects(config: Config) -> bool:
    """Whether evaluations are compared."""
    return config.finetune.method != "none" and config.eval.every > 0


def selection_problems(config: Config, terms: Iterable[str], goals: Mapping[str, Goal]) -> list[str]:
    """What of the configuration contradicts itself. ``terms``: of the loss; ``goals``: of the head's metrics."""
    tune, problems = config.finetune, []
    if tune.patience and tune.method == "none":
        problems.append("finetune.patience is for fine-tuning; give finetune.method")
    elif tune.patience and not config.eval.every:
        problems.append("finetune.patience counts evaluations; give eval.every")
    known = ["loss", *(f"terms.{name}" for name in terms), *(f"metrics.{name}" for name in goals)]
    if tune.metric not in (None, *known):
        problems.append(f"finetune.metric: evaluations have no {tune.metric}, but {', '.join(known)}")
    return problems


class Best:
    """What evaluations come to. Every rank has one, and is told the same."""

    def __init__(self, config: Config, goals: Mapping[str, Goal]) -> None:
        """``goals``: of the head's metrics; none of an objective."""
        named = config.finetune.metric
        self.metric = named or next((f"metrics.{name}" for name in goals), "loss")
        """What is compared."""
        self.goal: Goal = config.finetune.goal or goals.get(self.metric.partition(".")[2], "min")
        self._active = selects(config)
        self._tune = config.finetune
        self._skipped = config.train.steps if config.eval.final_samples not in (None, config.eval.samples) else None
        """The last evaluation is of other rows, and not to be compared."""
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0
        """Evaluations since."""

    @property
    def kept(self) -> int | None:
        """The step whose checkpoint is to stay."""
        return self.step if self._tune.keep_best else None

    @property
    def stop(self) -> str | None:
        """Why the run is to end, if it is."""
        if not self._tune.patience or self.waited < self._tune.patience:
            return None
        return (
            f"{self.metric} has not become better than {self.value:.6g} of step {self.step} in {self.waited} "
            f"evaluation{'s' * (self.waited > 1)} (finetune.patience)"
        )

    def see(self, step: int, evaluation: Mapping[str, Any]) -> bool:
        """Compare an evaluation as it is recorded; whether its checkpoint is to be saved as the best."""
        if not self._active or step == self._skipped:
            return False
        value = metric_of(evaluation, self.metric)
        if self._better(value):
            self.step, self.value, self.waited = step, value, 0
            return self._tune.keep_best
        self.waited += 1
        return False

    def recall(self, path: Path, done: int, parallel: ParallelContext) -> None:
        """Know again what was known after ``done`` steps, from rank 0's metrics file."""
        if not self._active:
            return
        with phase("recall evaluations"):
            recorded = jsonl.read(path) if parallel.rank == 0 and path.is_file() else []
            own = [record for record in recorded if "eval" in record and record["step"] <= done]
            for record in parallel.world.broadcast_json(own):
                self.see(record["step"], record["eval"])

    def facts(self) -> dict[str, Any]:
        """For the run's summary; nothing where evaluations are not compared."""
        if self.step is None:
            return {}
        return {"best": {"step": self.step, "metric": self.metric, "value": self.value}}

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.value is None:
            return True
        gain = value - self.value if self.goal == "max" else self.value - value
        return gain > self._tune.min_delta


def metric_of(evaluation: Mapping[str, Any], name: str) -> float:
    """``loss``, ``terms.mlm`` or ``metrics.accuracy`` of a recorded evaluation."""
    found: Any = evaluation
    for key in name.split(".", 1):
        found = found[key]
    return float(found)


def flat_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's figures by dotted names."""
    flat: dict[str, float] = {}
    for key, value in evaluation.items():
        inner = {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, Mapping) else {key: value}
        flat.update(inner)
    return flat
