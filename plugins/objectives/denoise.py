"""Continue text, or restore what was done to it, with one causal backbone. (Tay et al., "UL2", 2023; Lewis et al.,
"BART", 2020; Du et al., "GLM", 2022.)

A row is what is given and then what is to be written. All positions attend to what is given, in both directions; what
is to be written is predicted token by token. Each sample is of one of five kinds:

========= ============================ ========================================================
kind      given                        to be written
========= ============================ ========================================================
prefix    the first part of a text     the rest (UL2's S)
mask      a text whose short spans     the spans in their order (UL2's R)
          are each a mask token
extreme   the same with long spans,    the same (UL2's X)
          half of the text
delete    a text that lacks tokens     the whole text
permute   a text with the sentences    the whole text
          of each document shuffled
========= ============================ ========================================================

UL2 names the kind with a token of its own. Here the last token that is given tells it, so that any tokenizer with mask
and sep serves: text itself where it goes on, the mask token where spans follow, each after such a token, and sep where
the whole text follows. What is to be written ends with sep, except after a prefix, whose text just goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from megalm.api import (
    IGNORE,
    Batch,
    ConfigError,
    Corpus,
    DataError,
    Example,
    LossContext,
    Needs,
    Objective,
    ObjectiveEnv,
    Settings,
    TensorSpec,
    Term,
)

if TYPE_CHECKING:
    import torch

KINDS = ("prefix", "mask", "extreme", "delete", "permute")


class DenoiseConfig(Settings):
    """Settings of ``[objective.denoise]``. The shares are of their sum."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the term in the total."""
    prefix_share: float = Field(default=2.0, ge=0)
    """Share of the samples whose text is to be continued."""
    mask_share: float = Field(default=1.0, ge=0)
    """Share of those whose short spans are to be restored."""
    extreme_share: float = Field(default=1.0, ge=0)
    """Share of those whose long or many spans are to be restored."""
    delete_share: float = Field(default=0.5, ge=0)
    """Share of those that lack tokens."""
    permute_share: float = Field(default=0.5, ge=0)
    """Share of those whose sentences are shuffled. Where no document has two, tokens are left out instead."""
    mask_prob: float = Field(default=0.15, gt=0, le=0.5)
    """Share of the tokens that lie in short spans."""
    mask_span: float = Field(default=3.0, ge=1)
    """Mean length of short spans in tokens."""
    extreme_prob: float = Field(default=0.5, gt=0, le=0.9)
    """Share of the tokens that lie in long spans."""
    extreme_span: float = Field(default=16.0, ge=1)
    """Mean length of long spans in tokens."""
    delete_prob: float = Field(default=0.15, gt=0, lt=1)
    """Probability that a token is left out."""

    @model_validator(mode="after")
    def _any_share(self) -> DenoiseConfig:
        if not any(self.shares):
            raise ValueError(f"one of {', '.join(f'{kind}_share' for kind in KINDS)} must be above 0")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each of :data:`KINDS`."""
        return self.prefix_share, self.mask_share, self.extreme_share, self.delete_share, self.permute_share


class Denoise(Objective):
    """Samples are places in the stream, a row's length apart; a text that leaves room for more begins at a drawn place
    of that stretch."""

    Config = DenoiseConfig
    cfg: DenoiseConfig
    perplexities = ("denoise",)

    def __init__(self, cfg: DenoiseConfig, env: ObjectiveEnv) -> None:
        super().__init__(cfg, env)
        special, length = env.tokenizer.special, env.sequence_length
        if special.mask is None or special.sep is None:
            raise ConfigError(["train.objective: denoise needs a tokenizer with mask and sep tokens"])
        self._mask, self._sep = (np.array([mark]) for mark in (special.mask, special.sep))
        self._pad = 0 if special.pad is None else special.pad
        self._rates = {"mask": (cfg.mask_prob, cfg.mask_span), "extreme": (cfg.extreme_prob, cfg.extreme_span)}
        self._shares = np.array(cfg.shares) / sum(cfg.shares)
        # Given and to be written together are one token more than the row, whose last is only a label.
        whole = (length - 1) // 2
        sizes = {"prefix": length + 1, "delete": whole, "permute": whole}
        self._sizes = sizes | {kind: _longest(length, *rate) for kind, rate in self._rates.items()}
        chosen = [kind for kind, share in zip(KINDS, cfg.shares, strict=True) if share]
        if short := [kind for kind in chosen if self._sizes[kind] < 2]:
            raise ConfigError([f"train.sequence_length = {length} leaves denoise no room for the kind {short[0]!r}"])

    def needs(self) -> Needs:
        tensors = {
            "tokens": TensorSpec(),
            "labels": TensorSpec(to="last"),
            "prefix": TensorSpec(("batch",), to="all"),
        }
        return Needs("prefix", tensors)

    def weights(self) -> Mapping[str, float]:
        return {"denoise": self.cfg.weight}

    def check_corpus(self, corpus: Corpus) -> None:
        if self.num_samples(corpus) < 1:
            raise DataError(
                f"denoise needs more than train.sequence_length = {self.env.sequence_length} tokens, "
                f"but the corpus has {corpus.num_tokens}"
            )

    def num_samples(self, corpus: Corpus) -> int:
        return (corpus.num_tokens - 1) // self.env.sequence_length

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        number = int(np.searchsorted(np.cumsum(self._shares)[:-1], rng.random(), side="right"))
        kind, length = KINDS[number], self.env.sequence_length
        size = self._sizes[kind]
        start = sample * length + int(rng.integers(length + 2 - size))
        text = corpus.stream(start, start + size)
        deleted = (0, 0)
        if kind == "prefix":
            cut = int(rng.integers(1, size))
            given, wanted = text[:cut], text[cut:]
        elif kind in self._rates:
            given, wanted = self._masked(text, *self._rates[kind], rng)
        else:
            order = self._shuffled(corpus, start, size, rng) if kind == "permute" else None
            if order is None:
                order = np.flatnonzero(rng.random(size) >= self.cfg.delete_prob)
                deleted = (size - len(order), size)
            given, wanted = np.concatenate((text[order], self._sep)), np.concatenate((text, self._sep))
        return {**self._row(given, wanted), "kind": number, "deleted": np.array(deleted)}

    def _row(self, given: np.ndarray, wanted: np.ndarray) -> Example:
        length = self.env.sequence_length
        whole = np.concatenate((given, wanted))
        tokens, labels = np.full(length, self._pad), np.full(length, IGNORE)
        tokens[: len(whole) - 1] = whole[:-1]
        labels[len(given) - 1 : len(whole) - 1] = wanted
        return {"tokens": tokens, "labels": labels, "prefix": len(given)}

    def _masked(
        self, text: np.ndarray, prob: float, span: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        noise, number = _spans(len(text), prob, span)
        lengths = _parts(noise, number, rng)
        gaps = _parts(len(text) - noise + 2, number + 1, rng)
        gaps[[0, -1]] -= 1  # the text may begin and end with a span
        given, wanted, at = [], [], 0
        for gap, length in zip(gaps.tolist(), lengths.tolist(), strict=False):
            given += [text[at : at + gap], self._mask]
            wanted += [self._mask, text[at + gap : at + gap + length]]
            at += gap + length
        return np.concatenate((*given, text[at:], wanted[0])), np.concatenate((*wanted[1:], self._sep))

    def _shuffled(self, corpus: Corpus, start: int, size: int, rng: np.random.Generator) -> np.ndarray | None:
        """An order of the tokens of a window with the sentences of each document shuffled; none where no document has
        two of them there. What is in no sentence stays."""
        document, sentence = corpus.document_at(start), corpus.sentence_at(start)
        order: list[np.ndarray] = []
        at, stop, shuffled = start, start + size, False
        while at < stop:
            _, last = corpus.document_sentences(document)
            pieces = []
            while at < stop and sentence < last:
                end = min(corpus.sentence(sentence)[1], stop)
                sentence += 1
                if at < end:
                    pieces.append(np.arange(at - start, end - start))
                    at = end
            shuffled |= len(pieces) > 1
            order += [pieces[n] for n in rng.permutation(len(pieces))]
            end = min(corpus.document(document)[1], stop)
            order.append(np.arange(at - start, end - start))
            at, document, sentence = end, document + 1, last
        return np.concatenate(order) if shuffled else None

    def rates(self) -> Mapping[str, float]:
        rates = {f"{kind}_share": float(share) for kind, share in zip(KINDS, self._shares, strict=True)}
        return rates | ({"delete_prob": self.cfg.delete_prob} if self.cfg.delete_share else {})

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        seen = {f"{kind}_share": (int(example["kind"] == number), 1) for number, kind in enumerate(KINDS)}
        if self.cfg.delete_share:
            hits, trials = example["deleted"].tolist()
            seen["delete_prob"] = (hits, trials)
        return seen

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.stack([example[name] for example in examples]) for name in self.needs().tensors}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"denoise": int((batch["labels"] != IGNORE).sum())}

    def loss(self, hidden: Any, batch: Mapping[str, torch.Tensor], ctx: LossContext) -> dict[str, Term]:
        labels = batch["labels"]
        return {"denoise": Term(ctx.lm_loss(hidden, labels, where=labels != IGNORE).sum())}


def _spans(size: int, prob: float, span: float) -> tuple[int, int]:
    """Tokens of a text that lie in spans, and the number of spans: as near to what is asked as a span and a token
    between two of them allow."""
    noise = min(max(round(size * prob), 1), size)
    return noise, min(max(round(noise / span), 1), size - noise + 1)


def _longest(length: int, prob: float, span: float) -> int:
    """The longest text whose row has room: each span costs a mask token where it was and one before it is written, and
    sep comes last, which is only a label."""
    size = length
    while size > 0 and size + 2 * _spans(size, prob, span)[1] > length:
        size -= 1
    return size


def _parts(total: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """``number`` sizes of at least 1 that add up to ``total``, each choice as likely as any other."""
    cuts = np.sort(rng.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
