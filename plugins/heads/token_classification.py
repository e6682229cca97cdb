"""Classification of words, such as named entities: a linear layer on each word's first token, (Devlin et al., 2019) and
where asked for a CRF, which chooses the tags of a row together. (Lample et al., 2016.)

Words are numbered, and the loss takes the vectors at their first tokens. So tags never travel along token positions,
and a row whose positions are split over ranks needs no thought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megalm.api import (
    IGNORE,
    Batch,
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
    Term,
    marks_spans,
)
from megalm_plugins.heads.measured import MeasuredHead, labels_config

if TYPE_CHECKING:
    import torch

    from megalm_plugins.heads.crf import Chain

_NAME = "token_classification"
_NOWHERE = -1


class TokenClassificationConfig(Settings):
    """Settings of the head."""

    separator: str = " "
    """What stands between words in the text; ``""`` for Chinese and the like."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of the words' vectors."""
    crf: bool = False
    """Score each row's tags as a path, with what each tag says of the next, instead of each word's tag alone."""
    metrics: tuple[str, ...] | None = None
    """Measures, the first of which chooses a checkpoint: ``span_f1``, ``span_precision``, ``span_recall`` (of tags in
    IOB2), ``f1_macro``, ``accuracy``. Default: ``f1_macro`` and ``accuracy``, after ``span_f1`` where tags are IOB2."""


class TokenClassification(MeasuredHead):
    """The cross-entropy of each word's tag, over the words of a row that have tokens; with a CRF that of the row's path
    of tags, over the same words, which is counted as one item a word, so that its size is alike.

    The words, joined by the separator, are encoded as one text; a word's first token speaks for it. A word without
    tokens, and those after the place where a row is cut, have the tag None in predictions, which is never right.
    Predictions: ``{"tags": [NAME or None, ...]}``, one for each word.
    """

    Config = TokenClassificationConfig
    cfg: TokenClassificationConfig
    kind = _NAME
    measured = "tags"

    def __init__(self, cfg: TokenClassificationConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        if len(env.labels) < 2:
            raise ConfigError([f"{_NAME} needs at least two labels; found {list(env.labels)}"])
        of_spans = [name for name in self.measures.names if name.startswith("span_")]
        if of_spans and not marks_spans(env.labels):
            raise ConfigError(
                [
                    f"{_NAME}: metrics: {', '.join(of_spans)} counts spans that tags in IOB2 mark (O, B-x, I-x), but "
                    f"the labels are {', '.join(env.labels)}"
                ]
            )
        special = env.tokenizer.special
        self._prefix = [] if special.cls is None else [special.cls]
        self._suffix = [] if special.sep is None else [special.sep]
        self._room = env.sequence_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise ConfigError([f"{_NAME}: a sequence length of {env.sequence_length} leaves no room for text"])
        self._gap = env.tokenizer.encode_batch([cfg.separator])[0] if cfg.separator else []

    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            "words": FieldSpec("words", "the words of the text"),
            "tags": FieldSpec("tags", "the label of each word", of="words", label=True),
        }

    def needs(self) -> Needs:
        word = ("batch", "word")
        tensors = {
            "tokens": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool"),
            "first_tokens": TensorSpec(word, to="last"),
            "tags": TensorSpec(word, to="last"),
            "words": TensorSpec(("batch",), to="last"),
        }
        return Needs(self.env.attention, tensors, lm_head=False, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {_NAME: 1.0}

    def padding(self) -> Mapping[str, int | float | bool]:
        return {**super().padding(), "first_tokens": _NOWHERE, "tags": IGNORE}

    def build_example(self, record: Record) -> Example:
        words = record["words"]
        segments = [words[0], *(self.cfg.separator + word for word in words[1:])]
        pieces = self.env.tokenizer.encode_segments([segments])[0]
        text = [token for piece in pieces for token in piece]
        if not text:
            raise DataError(f"field 'words': the tokenizer has no token for anything in {words!r}")
        first, at = np.full(len(words), _NOWHERE, dtype=np.int64), 0
        for number, piece in enumerate(pieces):
            start = at + self._gap_in(piece) if number else at
            if piece and start < self._room:
                first[number] = len(self._prefix) + start
            at += len(piece)
        tags = np.full(len(words), IGNORE, dtype=np.int64)
        if "tags" in record:
            known = np.array([self.env.labels.index(tag) for tag in record["tags"]])
            tags = np.where(first == _NOWHERE, IGNORE, known)
        return {
            "tokens": np.array([*self._prefix, *text[: self._room], *self._suffix], dtype=np.int64),
            "first_tokens": first,
            "tags": tags,
            "words": len(words),
            "truncated": len(text) > self._room,
        }

    def _gap_in(self, piece: list[int]) -> int:
        """Tokens of the separator alone, where the tokenizer keeps them apart from the word's."""
        gap = len(self._gap)
        return gap if gap < len(piece) and piece[:gap] == self._gap else 0

    def hugging_face(self) -> HuggingFaceHead:
        if self.cfg.crf:
            raise ConfigError([f"{_NAME}: crf = true: transformers has no model with a CRF; train with crf = false"])
        return HuggingFaceHead(
            task="token_classification",
            scores=self._scores,
            rows=lambda record: [(self.cfg.separator.join(record["words"]),)],
            places="first_tokens",
            prefix=tuple(self._prefix),
            suffix=tuple(self._suffix),
            config=labels_config(self.env.labels),
        )

    def counts(self, batch: Batch) -> dict[str, int]:
        return {_NAME: int((batch["tags"] != IGNORE).sum())}

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        from torch import nn

        labels = len(self.env.labels)
        out = ctx.linear(hidden_size, labels)
        if not self.cfg.crf:
            return out
        chain = nn.ParameterDict({"start": ctx.parameter((labels,)), "end": ctx.parameter((labels,))})
        chain["step"] = ctx.parameter((labels, labels))
        return nn.ModuleDict({"out": out, "chain": chain})

    def _scores(self, module: Any, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> Any:
        """(batch, words, labels); of words without tokens, something that nothing reads."""
        x = ctx.take(hidden, batch["first_tokens"].clamp(min=0))
        out = module["out"] if self.cfg.crf else module
        return ctx.widen(out(ctx.dropout(x, self.cfg.dropout, _NAME)))

    def _chain(self, module: Any, ctx: LossContext) -> Chain:
        from megalm_plugins.heads.crf import Chain

        chain = module["chain"]
        return Chain(ctx.widen(chain["start"]), ctx.widen(chain["step"]), ctx.widen(chain["end"]))

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch.nn.functional as F

        if self.cfg.crf:
            return {_NAME: Term(self._path_loss(module, hidden, batch, ctx), scope="example")}
        logits = self._scores(module, hidden, batch, ctx)
        total = F.cross_entropy(logits.flatten(0, 1), batch["tags"].flatten(), reduction="sum", ignore_index=IGNORE)
        return {_NAME: Term(total, scope="example")}

    def _path_loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """- log of the probability of each labelled row's path, summed."""
        import torch

        from megalm_plugins.heads.crf import log_partition, path_score

        order, mask = _places(batch["first_tokens"])
        scores = self._scores(module, hidden, batch, ctx)
        scores = scores.gather(1, order[..., None].expand_as(scores))
        tags, chain = batch["tags"].gather(1, order), self._chain(module, ctx)
        path = path_score(scores, mask, chain, tags.clamp(min=0))
        each = log_partition(scores, mask, chain) - path
        return torch.where((tags != IGNORE).any(dim=1), each, 0.0).sum()

    def _best(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, words): the tags to predict; of words without tokens, something that nothing reads."""
        scores = self._scores(module, hidden, batch, ctx)
        if not self.cfg.crf:
            best: torch.Tensor = scores.argmax(dim=-1)
            return best
        from megalm_plugins.heads.crf import best_path

        order, mask = _places(batch["first_tokens"])
        path = best_path(scores.gather(1, order[..., None].expand_as(scores)), mask, self._chain(module, ctx))
        return path.scatter(1, order, path)

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        best = self._best(module, hidden, batch, ctx)
        best = best.masked_fill(batch["first_tokens"] == _NOWHERE, _NOWHERE)
        rows = zip(best.tolist(), batch["words"].tolist(), strict=True)
        labels = [*self.env.labels, None]  # _NOWHERE is the last
        return [{"tags": [labels[tag] for tag in row[:words]]} for row, words in rows]

    def truth(self, record: Record) -> Any:
        return {"tags": list(record["tags"])}

    def default_measures(self) -> tuple[str, ...]:
        return (*(("span_f1",) if marks_spans(self.env.labels) else ()), "f1_macro", "accuracy")

    def value(self, prediction: Any) -> Any:
        return prediction["tags"]

    def right(self, record: Record) -> Any:
        return record["tags"]


def _places(first_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of each row with those that have tokens first, in their order, and which places those are."""
    order = (first_tokens == _NOWHERE).to(first_tokens.dtype).argsort(dim=1, stable=True)
    return order, first_tokens.gather(1, order) != _NOWHERE
