"""Weights & Biases, online or offline (``wandb sync`` uploads an offline run later).

The run's identifier travels in the checkpoints, so that a resumed run goes on in the same chart. wandb's capture of
standard output is switched off: it would take the terminal from the engine's own progress view.
"""

from __future__ import annotations

from typing import Any, Literal

from megalm.api import Callback, RunInfo, Settings, UsageError, hookimpl

from .extra import require


class WandBConfig(Settings):
    """Settings of ``[callback.wandb]``."""

    project: str = "megalm"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; default: the one that is logged in."""
    name: str | None = None
    """What the run is called; default: the name of the run folder."""
    tags: list[str] = []
    """Labels of the run."""
    mode: Literal["online", "offline"] | None = None
    """Default: what WANDB_MODE says, else online."""


class WandB(Callback):
    """Logs each step's metrics as ``train/NAME`` and each evaluation's as ``eval/NAME``, on rank 0."""

    Config = WandBConfig

    def __init__(self, cfg: WandBConfig) -> None:
        super().__init__(cfg)
        require("wandb", "wandb", "wandb")
        self._run: Any = None
        self._id: str | None = None

    @hookimpl
    def megalm_load_state(self, run: RunInfo, meta: dict[str, Any]) -> None:
        self._id = meta.get("wandb", {}).get("id")

    @hookimpl
    def megalm_train_start(self, run: RunInfo) -> None:
        if run.rank != 0:
            return
        import wandb

        try:
            self._run = wandb.init(
                project=self.cfg.project,
                entity=self.cfg.entity,
                name=self.cfg.name or run.dir.resolve().name,
                tags=self.cfg.tags,
                mode=self.cfg.mode,
                dir=str(run.dir),
                config=run.config,
                id=self._id,
                resume="allow" if self._id else None,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except (wandb.Error, ValueError) as error:  # ValueError: settings and environment variables that it refuses
            raise UsageError(
                f"callback 'wandb' cannot start a run: {error}. "
                'Log in with `wandb login`, or set callback.wandb.mode = "offline"'
            ) from error
        self._id = self._run.id

    @hookimpl
    def megalm_log(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        self._add("train", step, metrics)

    @hookimpl
    def megalm_eval_end(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        self._add("eval", step, metrics)

    @hookimpl
    def megalm_save_state(self, run: RunInfo, meta: dict[str, Any]) -> None:
        if self._id is not None:
            meta["wandb"] = {"id": self._id}

    @hookimpl
    def megalm_train_end(self, run: RunInfo, error: BaseException | None) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def _add(self, part: str, step: int, metrics: dict[str, float]) -> None:
        if self._run is not None:
            self._run.log({f"{part}/{name}": value for name, value in metrics.items()}, step=step)
