"""What heads that say something of a whole text, or of a pair, share: rows, a vector for each, a linear layer on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from megalm.api import (
    BuildContext,
    ConfigError,
    DataError,
    Example,
    FieldSpec,
    HeadEnv,
    HuggingFaceHead,
    LossContext,
    Needs,
    Record,
    Settings,
    TensorSpec,
)
from megalm_plugins.heads.measured import MeasuredHead

if TYPE_CHECKING:
    import torch

FIRST, SECOND = "text", "text_pair"


class PooledConfig(Settings):
    """Settings of heads over whole texts."""

    pair: bool = False
    """Rows hold two texts, ``text`` and ``text_pair``, instead of one."""
    token_types: bool = True
    """Tell the texts of a pair apart by token types, as BERT does."""
    pooling: Literal["pooler", "cls", "mean", "last"] = "pooler"
    """The vector of a row: BERT's pooler (dense and tanh on the first token), the first token's, the mean over the
    row's tokens, or the last token's, which is the one for causal backbones."""
    bias: bool = True
    """The layer on that vector adds a bias. That of GPT-like models of transformers does not."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of that vector."""
    metrics: tuple[str, ...] | None = None
    """Measures, the first of which chooses a checkpoint; default: the head's."""


class PooledHead(MeasuredHead):
    """A row is [CLS] text [SEP], or [CLS] text [SEP] text_pair [SEP]; what the tokenizer lacks is left out.

    Longer texts are cut at their ends, of a pair first the longer one.
    """

    Config: ClassVar[type[Settings]] = PooledConfig
    cfg: PooledConfig

    def __init__(self, cfg: Any, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        special, problems = env.tokenizer.special, []
        first = cfg.pooling in ("pooler", "cls")
        if first and special.cls is None:
            problems.append(
                f'{self.kind}: pooling = "{cfg.pooling}" reads the cls token, and this tokenizer has none; '
                'choose pooling = "mean" or "last"'
            )
        if first and env.attention == "causal":
            problems.append(
                f'{self.kind}: pooling = "{cfg.pooling}" reads the first token, which under causal attention sees '
                'nothing of the text; choose pooling = "last" or "mean"'
            )
        if cfg.pair and special.sep is None:
            problems.append(f"{self.kind}: pair = true needs a tokenizer with a sep token, and this one has none")
        self._prefix = [] if special.cls is None else [special.cls]
        self._suffix = [] if special.sep is None else [special.sep]
        texts = 2 if cfg.pair else 1
        self._room = env.sequence_length - len(self._prefix) - texts * len(self._suffix)
        if self._room < texts:
            problems.append(f"{self.kind}: a sequence length of {env.sequence_length} leaves no room for text")
        if problems:
            raise ConfigError(problems)

    def text_fields(self) -> dict[str, FieldSpec]:
        """The fields with the texts."""
        if not self.cfg.pair:
            return {FIRST: FieldSpec("text", "the text")}
        return {FIRST: FieldSpec("text", "the first text"), SECOND: FieldSpec("text", "the second text")}

    def text_needs(self, label: str, spec: TensorSpec) -> Needs:
        """What the rows need, with the tensor that holds the label."""
        tensors = {"tokens": TensorSpec(), "attention_mask": TensorSpec(dtype="bool", to="all"), label: spec}
        typed = self.cfg.pair and self.cfg.token_types
        if typed:
            tensors["token_types"] = TensorSpec()
        if self.cfg.pooling == "last":
            tensors["last"] = TensorSpec(("batch", "place"), to="last")
        return Needs(self.env.attention, tensors, lm_head=False, token_types=2 if typed else 0, coupling="example")

    def encode(self, record: Record, fields: Sequence[str] = ()) -> Example:
        """The row without its label; of these fields, or of all that hold text."""
        names = list(fields or self.text_fields())
        texts = [self.env.tokenizer.encode_batch([record[name]])[0] for name in names]
        for name, ids in zip(names, texts, strict=True):
            if not ids:
                raise DataError(f"field {name!r}: the tokenizer has no token for anything in {record[name]!r}")
        whole = sum(map(len, texts))
        texts = self._cut(texts)
        tokens, types = list(self._prefix), [0] * len(self._prefix)
        for number, ids in enumerate(texts):
            tokens += [*ids, *self._suffix]
            types += [number] * (len(ids) + len(self._suffix))
        return {
            "tokens": np.array(tokens, dtype=np.int64),
            "token_types": np.array(types, dtype=np.int64),
            "last": np.array([len(tokens) - 1], dtype=np.int64),
            "truncated": sum(map(len, texts)) < whole,
        }

    def _cut(self, texts: Sequence[list[int]]) -> list[list[int]]:
        if len(texts) == 1:
            return [texts[0][: self._room]]
        first, second = texts
        keep = min(len(first), max(self._room - len(second), self._room - self._room // 2))
        return [first[:keep], second[: self._room - keep]]

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers for each row."""

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        from torch import nn

        parts = {"out": ctx.linear(hidden_size, self.outputs, bias=self.cfg.bias)}
        if self.cfg.pooling == "pooler":
            parts["pooler"] = ctx.linear(hidden_size, hidden_size)
        return nn.ModuleDict(parts)

    def hugging_face(self) -> HuggingFaceHead:
        names = list(self.text_fields())
        pooled = self.cfg.pooling == "pooler"
        return HuggingFaceHead(
            task="sequence_classification",
            scores=self.scores,
            rows=lambda record: [tuple(record[name] for name in names)],
            output="out",
            pooler="pooler" if pooled else None,
            pooling=self.cfg.pooling,
            prefix=tuple(self._prefix),
            suffix=tuple(self._suffix),
            typed=self.cfg.pair and self.cfg.token_types,
            config=self.hugging_face_config(),
        )

    def scores(
        self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, outputs), in the type that losses are computed in."""
        x = self.vectors(module, hidden, batch, ctx)
        return ctx.widen(module["out"](ctx.dropout(x, self.cfg.dropout, self.kind)))

    def vectors(
        self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, hidden): the vector of each row."""
        if self.cfg.pooling == "mean":
            x = ctx.pool(hidden, batch["attention_mask"])
        elif self.cfg.pooling == "last":
            x = ctx.take(hidden, batch["last"])[:, 0]
        else:
            x = ctx.pick(hidden, 0)
        if self.cfg.pooling == "pooler":
            x = module["pooler"](x).tanh()
        return x
