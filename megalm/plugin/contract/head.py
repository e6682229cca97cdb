"""The head contract: a task on top of a backbone, written once, which knows nothing of ranks.

A head is to labelled records what an objective is to a corpus: it builds rows, counts what it scores, and returns
*sums*, and the engine does the rest in the same way (see :mod:`megalm.plugin.contract.objective`). Besides, it owns a
module, predicts, and measures predictions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from megalm.config.settings import Settings
from megalm.errors import ConfigError, ObjectiveError
from megalm.plugin.contract.hugging_face import HuggingFaceHead
from megalm.plugin.contract.modules import BuildContext
from megalm.plugin.contract.objective import Attention, Batch, Example, LossContext, Needs, Term
from megalm.plugin.contract.records import FieldSpec, Record

if TYPE_CHECKING:
    import torch

    from megalm.plugin.contract.tokenizer import Tokenizer

Goal = Literal["max", "min"]


@dataclass(frozen=True)
class HeadEnv:
    """What a head may know of the run."""

    tokenizer: Tokenizer
    sequence_length: int
    """Most tokens of a row, special tokens included."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; empty where no field of the head holds labels."""
    attention: Attention = "bidirectional"
    """How the backbone was trained."""


class Head(ABC):
    """A task. Subclass, set ``Config``, and yield a ``Component`` from ``megalm_heads``."""

    Config: ClassVar[type[Settings]] = Settings
    """Validated model of the head's settings."""
    version: ClassVar[int] = 1
    """Raise on any change of meaning; stored in checkpoints and compared on resume."""

    def __init__(self, cfg: Any, env: HeadEnv) -> None:
        """Raise :class:`megalm.errors.ConfigError` for what the configuration cannot do with this tokenizer, length,
        attention or labels. :meth:`fields` works for any labels.
        """
        self.cfg = cfg
        self.env = env

    @abstractmethod
    def fields(self) -> Mapping[str, FieldSpec]:
        """What a record must have. The engine refuses records that lack it, before training, by field."""

    @abstractmethod
    def needs(self) -> Needs:
        """What the backbone must provide, as for an objective, its attention that of :attr:`HeadEnv.attention`. The
        module of :meth:`build` is added by the engine. Declare ``attention_mask``, since rows have padding.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term in the total."""

    @abstractmethod
    def build_example(self, record: Record) -> Example:
        """One row, without padding: a function of the record alone. Its keys are the tensors of :meth:`needs`;
        ``attention_mask`` may be left out.

        ``record`` has the fields of :meth:`fields`, checked. Those with ``label`` may be missing: such a row scores
        nothing and can be predicted. Text that is longer than :attr:`HeadEnv.sequence_length` is cut, and the key
        ``truncated`` is then true. DataError names the field and value of what cannot be encoded.
        """

    def parts(self, record: Record) -> Sequence[Record]:
        """What a record is read in, where it may be longer than a row: each part is a record of its own to
        :meth:`build_example` and :meth:`predict`, and in training. Default: the record itself.

        A part has the record's fields, and maybe keys of the head's own; a function of the record alone, never empty.
        """
        return (record,)

    def join(self, record: Record, predictions: Sequence[Any]) -> Any:
        """The prediction for a record, of those for its :meth:`parts`, in their order. The only part's by default."""
        (prediction,) = predictions
        return prediction

    def padding(self) -> Mapping[str, int | float | bool]:
        """What each tensor holds after a row's end; 0 where not named."""
        pad = self.env.tokenizer.special.pad
        return {"tokens": 0 if pad is None else pad}

    def collate(self, examples: Sequence[Example], length: int) -> Batch:
        """Stack rows into exactly the tensors of :meth:`needs`, padded with :meth:`padding`: dimension ``seq`` to
        ``length``, which the engine chooses and nothing may depend on, any other to the longest of these rows.

        This serves most heads. ``attention_mask`` follows from ``tokens`` where rows do not have one.
        """
        padding, batch = self.padding(), {}
        for name, spec in self.needs().tensors.items():
            rows = []
            for example in examples:
                given = example.get(name)
                if given is None and name == "attention_mask":
                    given = np.ones(len(example["tokens"]), dtype=bool)
                row = None if given is None else np.asarray(given, dtype=spec.dtype)
                if row is None or row.ndim != len(spec.dims) - 1:
                    found = "nothing" if row is None else f"an array of shape {list(row.shape)}"
                    raise ObjectiveError(
                        f"{type(self).__name__}.build_example: {name!r} is declared with dimensions "
                        f"({', '.join(spec.dims)}), but a row has {found} for it"
                    )
                rows.append(row)
            longest = np.max([row.shape for row in rows], axis=0)
            sizes = [length if dim == "seq" else int(n) for dim, n in zip(spec.dims[1:], longest, strict=True)]
            whole = np.full((len(rows), *sizes), padding.get(name, 0), dtype=spec.dtype)
            for number, row in enumerate(rows):
                filled: tuple[int | slice, ...] = (number, *(slice(n) for n in row.shape))
                whole[filled] = row
            batch[name] = whole
        return batch

    def length(self, example: Example) -> int:
        """Tokens of the longest row that an example gives: :meth:`collate` is called with no less. Override it where
        that gives more rows than ``tokens``."""
        return len(example["tokens"])

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """Items that each term scores in this batch, from data alone."""

    @abstractmethod
    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        """The head's module; every parameter of it comes from ``ctx``."""

    @abstractmethod
    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        """Sums of each term of :meth:`weights` over the batch; a term that scores nothing in it may be left out.

        ``batch`` holds the tensors whose spec says ``to="last"`` or ``"all"``.
        """

    @abstractmethod
    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        """A prediction for each example, as JSON values, from its rows alone. Label tensors say nothing here, and there
        is no cell to gather: ranks may have batches of different sizes and numbers.
        """

    @abstractmethod
    def truth(self, record: Record) -> Any:
        """The right prediction for a labelled record: what :meth:`metrics` reads of one is enough."""

    @abstractmethod
    def goals(self) -> Mapping[str, Goal]:
        """The metrics by name, and which way each gets better; the first is the one to choose a checkpoint by."""

    @abstractmethod
    def metrics(self, predictions: Sequence[Any], records: Sequence[Record]) -> dict[str, float]:
        """Each metric of :meth:`goals` over a whole data set, a finite number also where it is not defined. The records
        are whole: what was cut off a row counts as wrong.
        """

    def report(self, predictions: Sequence[Any], records: Sequence[Record]) -> Mapping[str, Any]:
        """More to tell of an evaluation, as JSON; for classes, ``{"labels": {NAME: {"precision", "recall", "f1-score",
        "support"}}, "averages": {NAME: ...}}``, which is shown as a table. Nothing by default.
        """
        return {}

    def hugging_face(self) -> HuggingFaceHead:
        """The head as Hugging Face's libraries have it, for ``megalm export hf``. ConfigError says what stands in the
        way; by default that no class of theirs is known.
        """
        raise ConfigError([f"{type(self).__name__}: Hugging Face's libraries have no model of this kind"])
