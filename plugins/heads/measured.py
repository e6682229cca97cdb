"""What heads share that are measured by name: the measures of their settings, over what is predicted and right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from megalm.api import Head, HeadEnv, MeasureKind, Measures, Record


def labels_config(labels: Sequence[str]) -> dict[str, Any]:
    """What transformers' ``config.json`` says of labels."""
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


class MeasuredHead(Head):
    """Subclasses name their kind and default measures; the setting ``metrics`` chooses others of the kind."""

    kind: ClassVar[str]
    """The head's name, for messages."""
    measured: MeasureKind

    def __init__(self, cfg: Any, env: HeadEnv) -> None:
        """ConfigError where the setting ``metrics`` names none of the kind's measures."""
        super().__init__(cfg, env)
        chosen = self.default_measures() if cfg.metrics is None else cfg.metrics
        self.measures = Measures(self.measured, chosen, where=f"{self.kind}: metrics")

    @abstractmethod
    def default_measures(self) -> tuple[str, ...]:
        """Those of a run that asks for none; a checkpoint is chosen by the first."""

    @abstractmethod
    def value(self, prediction: Any) -> Any:
        """What is measured of a prediction."""

    @abstractmethod
    def right(self, record: Record) -> Any:
        """What is right for a record."""

    def hugging_face_config(self) -> Mapping[str, Any]:
        """What transformers' ``config.json`` says of the task."""
        return {}

    def goals(self) -> Mapping[str, Literal["max", "min"]]:
        return self.measures.goals()

    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        return self.measures([self.value(each) for each in predictions], [self.right(each) for each in records])

    def report(self, predictions: Sequence[Any], records: Sequence[Record]) -> Mapping[str, Any]:
        return self.measures.report([self.value(each) for each in predictions], [self.right(each) for each in records])
