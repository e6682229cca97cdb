"""``csv:FILE``: an order made by hand or by another tool. ``megalm schedule ... --csv FILE`` writes such tables."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from megalm.api import PipelineOrder, PipelineSchedule, PipelineShape, ScheduleError, order_from_csv


class FromFile(PipelineSchedule):
    """The order of a table, whose shape is the only one that is admitted."""

    reference = "the file's author"
    argument_name: ClassVar[str | None] = "FILE"

    def __init__(self, cfg: Any, argument: str | None = None) -> None:
        super().__init__(cfg, argument)
        self.path = Path(argument or "")

    @cached_property
    def order(self) -> PipelineOrder:
        try:
            text = self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise ScheduleError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ScheduleError(f"{self.path}: is not text in UTF-8: byte {error.start} is {error.reason}") from error
        return order_from_csv(text, str(self.path))

    @property
    def fixed_shape(self) -> PipelineShape:
        return PipelineShape(len(self.order.ranks), self.order.microbatches, self.order.stages_per_rank)

    def objection(self, shape: PipelineShape) -> str | None:
        return None if shape == self.fixed_shape else f"the table is of {self.fixed_shape}"

    def build(self, shape: PipelineShape) -> PipelineOrder:
        return self.order
