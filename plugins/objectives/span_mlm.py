"""Masked spans and their boundaries. (Joshi et al., "SpanBERT", 2020.)

Spans of whole words, of geometrically distributed lengths, hold ``mask_prob`` of a row's words. A span as a whole is
replaced by mask tokens, by random tokens, or stays. Every token of a span is predicted twice: at its position, as in
masked language modelling, and from the tokens on either side of the span with the token's place in it, so that these
come to stand for what is between them.

Spans are placed in one go, lengths first and then the gaps between them, so that nothing has to be drawn again where
spans would meet. Two spans always have a word between them. A span that would go on beyond a special token is two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from megalm.api import (
    IGNORE,
    Batch,
    BuildContext,
    ConfigError,
    Corpus,
    Example,
    LossContext,
    Needs,
    Objective,
    ObjectiveEnv,
    Settings,
    TensorSpec,
    Term,
    TokenMasking,
)

from .windows import TextWindows

if TYPE_CHECKING:
    import torch

_BOUNDARY = ("boundary_left", "boundary_right", "boundary_place", "boundary_labels")
"""Of each token that is predicted from its span's boundary: the neighbours' positions, its place in the span, its
id."""


class SpanMaskedLMConfig(Settings):
    """Settings of ``[objective.span_mlm]``."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term of masked positions in the total."""
    boundary_weight: float = Field(default=1.0, ge=0)
    """Weight of the term that predicts from the span's boundary; 0 leaves it out, with its module."""
    mask_prob: float = Field(default=0.15, gt=0, le=0.5)
    """Share of the words that lie in spans."""
    length_prob: float = Field(default=0.2, gt=0, lt=1)
    """A span's length in words is geometric with this probability, without what exceeds max_length."""
    max_length: int = Field(default=10, ge=1)
    """Most words of a span."""
    whole_word: bool = True
    """Spans begin and end with words; otherwise every token counts as one."""
    mask_share: float = Field(default=0.8, ge=0, le=1)
    """Share of the spans whose tokens are replaced by mask tokens."""
    random_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the spans whose tokens are each replaced by another, random token."""
    boundary_places: int = Field(default=20, ge=1)
    """Tokens of a span that are predicted from its boundary: those further from its start are not."""
    place_size: int = Field(default=200, ge=1)
    """Features of the embedding of a place in a span."""

    @model_validator(mode="after")
    def _shares(self) -> SpanMaskedLMConfig:
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share + random_share must not exceed 1")
        return self


class SpanMaskedLM(Objective):
    """Alone, samples are windows of the stream, between the cls and sep tokens where there are such."""

    Config = SpanMaskedLMConfig
    cfg: SpanMaskedLMConfig
    perplexities = ("span_mlm", "span_boundary")

    def __init__(self, cfg: SpanMaskedLMConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        self._windows = TextWindows("span_mlm", env)
        self._mask, self._ordinary = self._windows.mask, self._windows.ordinary
        if len(self._ordinary) < 2:
            raise ConfigError(["train.objective: span_mlm needs a tokenizer with two ordinary tokens at least"])
        starts = env.tokenizer.word_starts() if cfg.whole_word else None
        self._words = TokenMasking(self._mask, self._ordinary, cfg.mask_prob, 1.0, 0.0, starts).words
        weights = (1 - cfg.length_prob) ** np.arange(cfg.max_length)
        self._lengths = np.cumsum(weights / weights.sum())[:-1]

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        if not self.cfg.boundary_weight:
            return Needs("bidirectional", tensors)
        tensors |= dict.fromkeys(_BOUNDARY, TensorSpec(("batch", "target"), to="last"))
        return Needs("bidirectional", tensors, coupling="example", modules={"span_boundary": self._build})

    def _build(self, hidden_size: int, ctx: BuildContext) -> torch.nn.Module:
        from .span_boundary import SpanBoundary

        return SpanBoundary(hidden_size, self.cfg.boundary_places, self.cfg.place_size, ctx)

    def weights(self) -> Mapping[str, float]:
        boundary = {"span_boundary": self.cfg.boundary_weight} if self.cfg.boundary_weight else {}
        return {"span_mlm": self.cfg.weight, **boundary}

    def check_corpus(self, corpus: Corpus) -> None:
        self._windows.check(corpus)

    def num_samples(self, corpus: Corpus) -> int:
        return self._windows.count(corpus)

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        return self.extend_example(self._windows.row(sample, corpus), rng)

    def extend_example(self, example: Example, rng: np.random.Generator) -> Example:
        original = example["tokens"]
        spans = self._spans(original, example["special"], rng)
        tokens, labels = original.copy(), np.full(len(original), IGNORE)
        kinds = rng.random(len(spans))
        for (start, stop), kind in zip(spans, kinds.tolist(), strict=True):
            labels[start:stop] = original[start:stop]
            if kind < self.cfg.mask_share:
                tokens[start:stop] = self._mask
            elif kind < self.cfg.mask_share + self.cfg.random_share:
                tokens[start:stop] = self._others(original[start:stop], rng)
        extended = {**example, "tokens": tokens, "labels": labels, "spans": np.array(spans, np.int64).reshape(-1, 2)}
        if self.cfg.boundary_weight:
            extended |= self._boundaries(spans, original, example.get("attention_mask"))
        return extended

    def _spans(self, tokens: np.ndarray, special: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Positions [start, stop) of spans, from left to right."""
        places, words = self._words(tokens, special)
        count = int(words[-1]) + 1 if len(words) else 0
        budget = int(count * self.cfg.mask_prob + rng.random())
        if not budget:
            return []
        lengths = 1 + np.searchsorted(self._lengths, rng.random(budget), side="right")
        ends = np.cumsum(lengths)
        number = int(np.searchsorted(ends, budget)) + 1
        before = np.concatenate(([0], ends[: number - 1]))
        lengths = np.minimum(ends[:number], budget) - before
        # What is left over goes between the spans, at least a word each, and before and after them. At most half of the
        # words lie in spans, so there are enough.
        slack = count - budget - (number - 1)
        first = np.sort(rng.choice(slack + number, number, replace=False)) + before
        edges = np.append(np.flatnonzero(np.diff(words, prepend=-1)), len(places))
        spans = []
        for a, b in zip(edges[first].tolist(), edges[first + lengths].tolist(), strict=True):
            inside = places[a:b]
            for piece in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1):
                spans.append((int(piece[0]), int(piece[-1]) + 1))
        return spans

    def _others(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random ordinary token for each, which is not the one that was there."""
        drawn = rng.integers(len(self._ordinary) - 1, size=len(tokens))
        return self._ordinary[drawn + (drawn >= np.searchsorted(self._ordinary, tokens))]

    def _boundaries(
        self, spans: list[tuple[int, int]], original: np.ndarray, present: np.ndarray | None
    ) -> dict[str, np.ndarray]:
        """What is predicted from boundaries; a span at an end of the row has none there."""
        found: list[np.ndarray] = []
        for start, stop in spans:
            if start == 0 or stop == len(original) or (present is not None and not present[[start - 1, stop]].all()):
                continue
            place = np.arange(min(stop - start, self.cfg.boundary_places), dtype=np.int64)
            left, right = np.full_like(place, start - 1), np.full_like(place, stop)
            found.append(np.stack((left, right, place, original[start + place])))
        items = np.concatenate(found, axis=1) if found else np.empty((len(_BOUNDARY), 0), np.int64)
        return dict(zip(_BOUNDARY, items, strict=True))

    def rates(self) -> Mapping[str, float]:
        shares = {"mask_share": self.cfg.mask_share, "random_share": self.cfg.random_share}
        return {"mask_prob": self.cfg.mask_prob, **shares}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        tokens, labels, spans = example["tokens"], example["labels"], example["spans"]
        original = tokens.copy()
        original[labels != IGNORE] = labels[labels != IGNORE]
        places, words = self._words(original, example["special"])
        first = places[np.flatnonzero(np.diff(words, prepend=-1))]
        masked = sum(bool((tokens[a:b] == self._mask).all()) for a, b in spans)
        kept = sum(bool((tokens[a:b] == labels[a:b]).all()) for a, b in spans)
        return {
            "mask_prob": (int((labels[first] != IGNORE).sum()), len(first)),
            "mask_share": (masked, len(spans)),
            "random_share": (len(spans) - masked - kept, len(spans)),
        }

    def collate(self, examples: list[Example]) -> Batch:
        batch = {name: np.stack([example[name] for example in examples]) for name in ("tokens", "labels")}
        if not self.cfg.boundary_weight:
            return batch
        most = max(1, *(len(example[_BOUNDARY[0]]) for example in examples))
        for name in _BOUNDARY:
            batch[name] = np.full((len(examples), most), IGNORE if name == "boundary_labels" else 0)
            for row, example in zip(batch[name], examples, strict=True):
                row[: len(example[name])] = example[name]
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        counts = {"span_mlm": int((batch["labels"] != IGNORE).sum())}
        if self.cfg.boundary_weight:
            counts["span_boundary"] = int((batch["boundary_labels"] != IGNORE).sum())
        return counts

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        import torch

        labels = batch["labels"]
        terms = {"span_mlm": Term(ctx.lm_loss(hidden, labels, where=labels != IGNORE).sum())}
        if self.cfg.boundary_weight:
            left, right, place, labels = (batch[name] for name in _BOUNDARY)
            # One call, since each may gather the sequence.
            around = ctx.take(hidden, torch.cat((left, right), dim=1))
            vectors = ctx.module("span_boundary")(*around.chunk(2, dim=1), place)
            losses = ctx.vocabulary_loss(vectors, labels, where=labels != IGNORE)
            terms["span_boundary"] = Term(losses.sum(), scope="example")
        return terms
