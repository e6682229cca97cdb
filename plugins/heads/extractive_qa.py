"""Extractive question answering: the stretch of a context that answers a question. (Devlin et al., BERT, 2019.)

A context longer than a row is read in windows that overlap, each with the whole question. Training takes each window as
a row of its own, which is to say where the answer is or that it is not there; a prediction takes the best of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
)
from megalm_plugins.heads.measured import MeasuredHead
from megalm_plugins.heads.pieces import Pieces, read_pieces

if TYPE_CHECKING:
    import torch

_NOWHERE = -1
_WINDOW = "window"
_SAME = 10
"""So many pairs of tokens are looked at for each candidate: those of the same words are one."""


class ExtractiveQAConfig(Settings):
    """Settings of the head."""

    stride: int = Field(default=128, ge=0)
    """Tokens that two windows share; at most half of a window's."""
    max_question: int = Field(default=64, ge=1)
    """A question is cut to so many tokens, and to half of a row."""
    max_answer: int = Field(default=30, ge=1)
    """Tokens of the longest answer that is predicted."""
    n_best: int = Field(default=5, ge=1)
    """Candidates of a prediction."""
    no_answer: bool = False
    """Questions may have no answer in their context."""
    threshold: float = 0.0
    """With ``no_answer``: there is none where that scores higher than the best answer by more than this."""
    token_types: bool = True
    """Tell question and context apart by token types, as BERT does."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the tokens' vectors."""
    metrics: tuple[str, ...] | None = None
    """Measures, the first of which chooses a checkpoint: ``f1``, ``exact_match``."""


class ExtractiveQA(MeasuredHead):
    """The cross-entropies of the answer's first and last token, half of each, over the tokens of the context and the
    place that says "not here": the row's first token, or its last where attention is causal.

    An answer is what its words are: one that begins or ends within a word is widened to it. Of several, the first is
    trained on. Predictions: ``{"text", "span", "score", "candidates": [{"text", "span", "score"}]}``, where a span is
    ``[start, stop]`` in characters of the context, and a score the sum of two logits; with ``no_answer`` that of there
    being none as ``"no_answer"``, and a span may be None.
    """

    Config = ExtractiveQAConfig
    cfg: ExtractiveQAConfig
    kind = "extractive_qa"
    measured = "answers"

    def __init__(self, cfg: ExtractiveQAConfig, env: HeadEnv) -> None:
        super().__init__(cfg, env)
        special = env.tokenizer.special
        self._prefix = [] if special.cls is None else [special.cls]
        self._suffix = [] if special.sep is None else [special.sep]
        self._room = env.sequence_length - len(self._prefix) - 2 * len(self._suffix)
        if self._room < 2:
            raise ConfigError([f"{self.kind}: a sequence length of {env.sequence_length} leaves no room for text"])

    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            "question": FieldSpec("text", "the question"),
            "context": FieldSpec("text", "the text that answers it"),
            "answers": FieldSpec("spans", "where the context answers it", of="context", label=True),
        }

    def needs(self) -> Needs:
        place = ("batch", "place")
        tensors = {
            "tokens": TensorSpec(),
            "attention_mask": TensorSpec(dtype="bool"),
            "places": TensorSpec(place, to="last"),
            "from_character": TensorSpec(place, to="last"),
            "to_character": TensorSpec(place, to="last"),
            "start": TensorSpec(("batch",), to="last"),
            "end": TensorSpec(("batch",), to="last"),
        }
        if self.cfg.token_types:
            tensors["token_types"] = TensorSpec()
        types = 2 if self.cfg.token_types else 0
        return Needs(self.env.attention, tensors, lm_head=False, token_types=types, coupling="example")

    def weights(self) -> Mapping[str, float]:
        return {"start": 0.5, "end": 0.5}

    def padding(self) -> Mapping[str, int | float | bool]:
        return {**super().padding(), "places": _NOWHERE}

    def _question(self, record: Record) -> tuple[list[int], bool]:
        """The question's tokens, and whether it was cut."""
        ids = self.env.tokenizer.encode_batch([record["question"]])[0]
        if not ids:
            raise DataError(f"field 'question': the tokenizer has no token for anything in {record['question']!r}")
        most = min(self.cfg.max_question, self._room // 2)
        return ids[:most], len(ids) > most

    def _context(self, record: Record) -> Pieces:
        pieces = read_pieces(self.env.tokenizer, record["context"])
        if not len(pieces):
            raise DataError(f"field 'context': the tokenizer has no token for anything in {record['context']!r}")
        return pieces

    def _windows(self, record: Record) -> list[tuple[Pieces, int, int]]:
        """The windows over the context: its tokens in them, and where the answer is, as places from 1, or 0, 0."""
        pieces = self._context(record)
        size = self._room - len(self._question(record)[0])
        step = size - min(self.cfg.stride, size // 2)
        answer = self._answer(record, pieces)
        windows = []
        for first in range(0, max(1, len(pieces) - size + step), step):
            inside = answer is not None and first <= answer[0] and answer[1] <= first + size
            start, end = (answer[0] - first + 1, answer[1] - first) if answer is not None and inside else (0, 0)
            windows.append((pieces.part(first, first + size), start, end))
        return windows

    def _answer(self, record: Record, pieces: Pieces) -> tuple[int, int] | None:
        """Tokens [first, last) of the answer; none where there is none or it is not known."""
        if not record.get("answers"):
            return None
        start, stop = record["answers"][0]
        found = pieces.covering(start, stop)
        if found is None:
            answer = record["context"][start:stop]
            raise DataError(f"field 'answers': the tokenizer has no token for anything in {answer!r}")
        return found

    def parts(self, record: Record) -> Sequence[Record]:
        windows = self._windows(record)
        return [record] if len(windows) == 1 else [{**record, _WINDOW: window} for window in windows]

    def build_example(self, record: Record) -> Example:
        question, cut = self._question(record)
        if _WINDOW in record:
            pieces, start, end = record[_WINDOW]
        else:
            windows = self._windows(record)
            (pieces, start, end), cut = windows[0], cut or len(windows) > 1
        known = "answers" in record
        before = [*self._prefix, *question, *self._suffix]
        tokens = [*before, *pieces.ids.tolist(), *self._suffix]
        absent = len(tokens) - 1 if self.env.attention == "causal" else 0
        return {
            "tokens": np.array(tokens, dtype=np.int64),
            "token_types": np.array([0] * len(before) + [1] * (len(tokens) - len(before)), dtype=np.int64),
            "places": np.array([absent, *range(len(before), len(before) + len(pieces))], dtype=np.int64),
            "from_character": np.append(0, pieces.starts),
            "to_character": np.append(0, pieces.stops),
            "start": start if known else IGNORE,
            "end": end if known else IGNORE,
            "truncated": cut,
        }

    def hugging_face(self) -> HuggingFaceHead:
        return HuggingFaceHead(
            task="question_answering",
            scores=self._scores,
            rows=lambda record: [(record["question"], record["context"].rstrip())],
            places="places",
            prefix=tuple(self._prefix),
            suffix=tuple(self._suffix),
            typed=self.cfg.token_types,
        )

    def counts(self, batch: Batch) -> dict[str, int]:
        return {name: int((batch[name] != IGNORE).sum()) for name in ("start", "end")}

    def build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        return ctx.linear(hidden_size, 2)

    def _scores(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> torch.Tensor:
        """(batch, places, 2): of beginning and end; - infinity where there is no place."""
        x = ctx.take(hidden, batch["places"].clamp(min=0))
        scores = ctx.widen(module(ctx.dropout(x, self.cfg.dropout, self.kind)))
        return scores.masked_fill(batch["places"][..., None] == _NOWHERE, float("-inf"))

    def loss(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> dict[str, Term]:
        import torch.nn.functional as F

        scores = self._scores(module, hidden, batch, ctx)
        terms = {}
        for column, name in enumerate(("start", "end")):
            total = F.cross_entropy(scores[..., column], batch[name], reduction="sum", ignore_index=IGNORE)
            terms[name] = Term(total, scope="example")
        return terms

    def predict(
        self, module: torch.nn.Module, hidden: torch.Tensor, batch: Mapping[str, torch.Tensor], ctx: LossContext
    ) -> list[Any]:
        import torch.nn.functional as F

        scores = self._scores(module, hidden, batch, ctx)
        absent = scores[:, 0].sum(dim=-1).tolist()
        starts, ends = scores[:, 1:, 0], scores[:, 1:, 1]
        # Column d is the score of an end d tokens after the start, of all starts at once.
        longest = min(self.cfg.max_answer, starts.shape[1])
        later = F.pad(ends, (0, longest - 1), value=float("-inf")).unfold(1, longest, 1)
        both = (starts[..., None] + later).flatten(1)
        found, index = both.topk(min(self.cfg.n_best * _SAME, both.shape[1]), dim=1)
        first, last = index // longest + 1, index // longest + index % longest + 1
        from_character = batch["from_character"].gather(1, first)
        to_character = batch["to_character"].gather(1, last.clamp(max=batch["places"].shape[1] - 1))
        rows = zip(found.tolist(), from_character.tolist(), to_character.tolist(), strict=True)
        return [
            {
                "no_answer": none,
                "candidates": self._candidates(zip(*row, strict=True)),
            }
            for none, row in zip(absent, rows, strict=True)
        ]

    def _candidates(self, found: Iterable[tuple[float, int, int]]) -> list[dict[str, Any]]:
        """The best of (score, start, stop), each span once, in this order."""
        best: dict[tuple[int, int], float] = {}
        for score, start, stop in found:
            if score > float("-inf"):
                best[start, stop] = max(score, best.get((start, stop), score))
        order = sorted(best, key=lambda span: (-best[span], span))[: self.cfg.n_best]
        return [{"span": list(span), "score": best[span]} for span in order]

    def join(self, record: Record, predictions: Sequence[Any]) -> Any:
        every = (each for part in predictions for each in part["candidates"])
        best = self._candidates((each["score"], *each["span"]) for each in every)
        candidates = [{"text": record["context"][slice(*each["span"])], **each} for each in best]
        found = {**candidates[0], "candidates": candidates}
        if self.cfg.no_answer:
            absent = min(part["no_answer"] for part in predictions)
            found["no_answer"] = absent
            if absent - found["score"] > self.cfg.threshold:
                found |= {"text": "", "span": None, "score": absent}
        return found

    def truth(self, record: Record) -> Any:
        if not record["answers"]:
            return {"text": "", "span": None}
        start, stop = record["answers"][0]
        return {"text": record["context"][start:stop], "span": [start, stop]}

    def default_measures(self) -> tuple[str, ...]:
        return ("f1", "exact_match")

    def value(self, prediction: Any) -> Any:
        return prediction["text"]

    def right(self, record: Record) -> Any:
        return [record["context"][start:stop] for start, stop in record["answers"]]
