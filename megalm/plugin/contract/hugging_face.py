"""A head as Hugging Face's libraries have it: what its plugin says, so that an export can write and prove it.

The plugin names layers and says how texts become rows; which tensors that makes in which family of models, and which
class, is megalm's to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megalm.plugin.contract.objective import LossContext
from megalm.plugin.contract.records import Record

if TYPE_CHECKING:
    import torch

HuggingFaceTask = Literal["sequence_classification", "token_classification", "question_answering", "sentence_embedding"]
Pooling = Literal["pooler", "cls", "mean", "last"]


@dataclass(frozen=True)
class HuggingFaceHead:
    """What transformers, or for vectors of texts sentence-transformers, must compute to be this head."""

    task: HuggingFaceTask
    """``AutoModelFor...`` of this; ``sentence_embedding`` is a folder of sentence-transformers, whose vectors have
    length 1."""
    scores: Callable[[torch.nn.Module, torch.Tensor, Mapping[str, torch.Tensor], LossContext], torch.Tensor]
    """``scores(module, hidden, batch, ctx)``: (rows, outputs), or with :attr:`places` (rows, places, outputs)."""
    rows: Callable[[Record], Sequence[tuple[str, ...]]]
    """The texts of which the tokenizer makes each row of a record, one or two to a row."""
    output: str | None = ""
    """Path of the last linear layer in the head's module, ``""`` for the module itself; none where there is none."""
    pooler: str | None = None
    """Path of the dense layer before it, whose tanh is taken."""
    pooling: Pooling | None = None
    """Which vector of a row is read, where each row has one result."""
    places: str | None = None
    """The tensor of the batch, (rows, places), whose positions have results; -1 is none."""
    prefix: tuple[int, ...] = ()
    """Tokens before the first text."""
    suffix: tuple[int, ...] = ()
    """Tokens after each text."""
    typed: bool = False
    """The second text and the tokens after it are of token type 1."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What ``config.json`` says of the task, such as ``id2label``."""
