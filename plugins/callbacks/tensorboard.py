"""TensorBoard events, written with tensorboard's own writer, which needs no torch.

A resumed run repeats steps that an interrupted one has recorded already. TensorBoard has a mark for that: a START event
at a step makes its reader drop what an earlier file holds from that step on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import Field

from megalm.api import Callback, RunInfo, Settings, UsageError, hookimpl

from .extra import require


class TensorBoardConfig(Settings):
    """Settings of ``[callback.tensorboard]``."""

    dir: str = "tensorboard"
    """Folder of the event files, relative to the run folder."""
    steps_per_flush: int = Field(default=100, ge=1)
    """Steps between flushes to disk. A checkpoint or an evaluation flushes too."""


class TensorBoard(Callback):
    """Writes each step's metrics as ``train/NAME`` and each evaluation's as ``eval/NAME``, on rank 0."""

    Config = TensorBoardConfig

    def __init__(self, cfg: TensorBoardConfig) -> None:
        super().__init__(cfg)
        require("tensorboard", "tensorboard", "tensorboard")
        self._writer: Any = None

    @hookimpl
    def megalm_train_start(self, run: RunInfo) -> None:
        if run.rank != 0:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = Path(run.dir) / self.cfg.dir
        try:
            self._writer = EventFileWriter(str(folder))
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot hold event files: {error.strerror or error}; set callback.tensorboard.dir"
            ) from error
        if run.start_step > 0:
            mark = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=run.start_step + 1, wall_time=time.time(), session_log=mark))

    @hookimpl
    def megalm_log(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        self._add("train", step, metrics)
        if self._writer is not None and step % self.cfg.steps_per_flush == 0:
            self._writer.flush()

    @hookimpl
    def megalm_eval_end(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        self._add("eval", step, metrics)
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def megalm_save_state(self, run: RunInfo, meta: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.flush()

    @hookimpl
    def megalm_train_end(self, run: RunInfo, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, part: str, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=f"{part}/{name}", simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
