"""Objectives with one mistake each, and the same without it. Loaded as an installed plugin by test_gallery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megalm.api import (
    IGNORE,
    Batch,
    Component,
    Corpus,
    Example,
    HeadSpec,
    Needs,
    Objective,
    TensorSpec,
    Term,
    hookimpl,
    stream_windows,
)

MEGALM_API = (1, 0)


class Windows(Objective):
    """Next-token prediction over windows, right in every respect."""

    def needs(self) -> Needs:
        return Needs("causal", {"tokens": TensorSpec(to="all"), "labels": TensorSpec(to="last")})

    def weights(self) -> Mapping[str, float]:
        return {"next": 1.0}

    def num_samples(self, corpus: Corpus) -> int:
        return (corpus.num_tokens - 1) // self.env.sequence_length

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        start = sample * self.env.sequence_length
        window = corpus.stream(start, start + self.env.sequence_length + 1)
        labels = window[1:].copy()
        labels[self.hidden(rng, len(labels))] = IGNORE
        return {"tokens": window[:-1], "labels": labels}

    def hidden(self, rng: np.random.Generator, length: int) -> Any:
        """Positions that are not scored."""
        return rng.random(length) < 0.25

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.stack([example[name] for example in examples]) for name in ("tokens", "labels")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next": int((batch["labels"] != IGNORE).sum())}

    def losses(self, hidden: Any, batch: Any, ctx: Any) -> Any:
        return ctx.lm_loss(hidden, batch["labels"], where=batch["labels"] != IGNORE)

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        return {"next": Term(self.losses(hidden, batch, ctx).sum())}


class MeanOfMeans(Windows):
    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        losses = self.losses(hidden, batch, ctx)
        return {"next": Term(losses.mean() * losses.numel() ** 0 * self.counts_of(batch))}

    def counts_of(self, batch: Any) -> float:
        """What a mean over the microbatch has to be multiplied with, to be a sum."""
        return 1.0


class SumOfMean(MeanOfMeans):
    def counts_of(self, batch: Any) -> float:
        return float((batch["labels"] != IGNORE).sum())


class DividesByNothing(Windows):
    """The sum over a microbatch without labels is 0 * NaN."""

    guard = 0.0

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        losses, scored = self.losses(hidden, batch, ctx), (batch["labels"] != IGNORE).sum()
        return {"next": Term(losses.sum() / scored.clamp(min=self.guard) * scored)}


class Guarded(DividesByNothing):
    guard = 1.0


class ShiftsInLoss(Windows):
    """The next token of a shard's last position lies on another rank."""

    shift_early = False

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        example = super().build_example(sample, corpus, rng)
        if not self.shift_early:
            example["labels"] = np.where(example["labels"] == IGNORE, IGNORE, example["tokens"])
            example["labels"][0] = IGNORE  # nothing predicts the first token
        return example

    def losses(self, hidden: Any, batch: Any, ctx: Any) -> Any:
        import torch

        labels = batch["labels"]
        if not self.shift_early:
            labels = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1)
        return ctx.lm_loss(hidden, labels, where=labels != IGNORE)


class ShiftsEarly(ShiftsInLoss):
    shift_early = True


class TokenTermOfRows(Windows):
    """A term over whole rows that says it is split over positions."""

    scope: Any = "token"

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "label": TensorSpec(("batch",), to="last")}
        return Needs("causal", tensors, lm_head=False, heads=(HeadSpec("parity", 2),), coupling="example")

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        tokens = super().build_example(sample, corpus, rng)["tokens"]
        return {"tokens": tokens, "label": tokens.sum() % 2}

    def collate(self, examples: list[Example]) -> Batch:
        return {name: np.stack([example[name] for example in examples]) for name in ("tokens", "label")}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next": len(batch["label"])}

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = ctx.head("parity", ctx.pick(hidden, 20))
        return {"next": Term(F.cross_entropy(logits, batch["label"], reduction="sum"), scope=self.scope)}


class RowTermOfRows(TokenTermOfRows):
    scope = "example"


class RowTermOfTokens(Windows):
    """The other way round."""

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        return {"next": Term(self.losses(hidden, batch, ctx).sum(), scope="example")}


class LastPosition(TokenTermOfRows):
    """Reads what stands at the end of a row, which is padding where there is some."""

    scope = "example"
    position = -1

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        import torch.nn.functional as F

        logits = ctx.head("parity", ctx.pick(hidden, self.position))
        return {"next": Term(F.cross_entropy(logits, batch["label"], reduction="sum"), scope="example")}


class FixedPosition(LastPosition):
    position = 40


class MasksByWorkerOrder(Windows):
    """Draws from the generator that whoever builds rows shares."""

    def hidden(self, rng: np.random.Generator, length: int) -> Any:
        return np.random.random(length) < 0.25


class MasksByInstance(Windows):
    """A generator of its own remembers which rows were built before."""

    def hidden(self, rng: np.random.Generator, length: int) -> Any:
        if not hasattr(self, "_rng"):
            self._rng = np.random.default_rng(0)
        return self._rng.random(length) < 0.25


class MasksByHash(Windows):
    """hash() of a text is another one in every process."""

    def hidden(self, rng: np.random.Generator, length: int) -> Any:
        return np.random.default_rng(hash(f"row {rng.integers(1 << 30)}") & 0xFFFF).random(length) < 0.25


class BatchesWithoutDraws(Windows):
    """What builds many rows at once leaves out what is drawn of each."""

    def build_batch(self, samples: np.ndarray, corpus: Corpus) -> Batch:
        length = self.env.sequence_length
        found = stream_windows(corpus, length * samples, length + 1)
        return {"tokens": found[:, :-1].copy(), "labels": found[:, 1:].copy()}


class BatchesOfNothing(Windows):
    def build_batch(self, samples: np.ndarray, corpus: Corpus) -> Batch | None:
        return None


class DropsFromStream(Windows):
    """Dropout that is drawn from torch's generator."""

    def losses(self, hidden: Any, batch: Any, ctx: Any) -> Any:
        import torch

        return torch.nn.functional.dropout(super().losses(hidden, batch, ctx), 0.2)


class CountsInPlace(Windows):
    def counts(self, batch: Batch) -> dict[str, int]:
        count = super().counts(batch)
        batch["labels"][:, 0] = IGNORE
        return count


class Casts(Windows):
    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        return {"next": Term(self.losses(hidden, batch, ctx).float().sum())}


class ReadsFirstStage(Windows):
    def needs(self) -> Needs:
        return Needs("causal", {"tokens": TensorSpec(), "labels": TensorSpec(to="last")})

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        assert batch["tokens"].dim() == 2
        return super().loss(hidden, batch, ctx)


class RowMeans(Windows):
    """Right, if unusual: each row's loss is its own mean, and rows are counted."""

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "labels": TensorSpec(to="last")}
        return Needs("causal", {**tensors, "share": TensorSpec(dtype="float64", to="last")})

    def collate(self, examples: list[Example]) -> Batch:
        batch = super().collate(examples)
        scored = batch["labels"] != IGNORE
        return {**batch, "share": scored / np.maximum(scored.sum(axis=1, keepdims=True), 1)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next": int((batch["labels"] != IGNORE).any(axis=1).sum())}

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        scored = batch["labels"] != IGNORE
        return {"next": Term((self.losses(hidden, batch, ctx) * batch["share"][scored]).sum())}


SEEN: list[int] = []


class KeepsGlobalState(Windows):
    """Weighs a step by how many came before it in this process."""

    remember = True

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        total = self.losses(hidden, batch, ctx).sum()
        if self.remember and ctx.__class__.__name__ == "ModelLossContext":
            SEEN.append(1)
        return {"next": Term(total * (1.0 + 0.01 * len(SEEN)))}


class KeepsNothing(KeepsGlobalState):
    remember = False

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        return {"next": Term(self.losses(hidden, batch, ctx).sum())}


class Reweighs(Windows):
    """Right, if unusual: every position's gradient has a factor of its own."""

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        losses = ctx.lm_loss(hidden, batch["labels"])
        self.factor = factor = 1.0 + (batch["labels"].reshape(-1) % 3).to(losses.dtype)
        if losses.requires_grad:
            losses.register_hook(lambda gradient: gradient * self.remembered(factor))
        return {"next": Term(losses.sum())}

    def remembered(self, factor: Any) -> Any:
        return factor


class KeepsForBackward(Reweighs):
    """Looks for a microbatch's factors where the latest forward left its own."""

    def remembered(self, factor: Any) -> Any:
        return self.factor


class LogsOverAllRanks(Windows):
    """Stages before the last have no loss, and never make this call."""

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        import torch.distributed as dist

        total = self.losses(hidden, batch, ctx).sum()
        if dist.is_initialized():
            dist.all_reduce(total.detach().clone())
        return {"next": Term(total)}


class OwnModule(RowTermOfRows):
    """Classifies rows by a module of its own, which is on the last stage."""

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "label": TensorSpec(("batch",), to="last")}
        return Needs("causal", tensors, lm_head=False, modules={"parity": self.build}, coupling="example")

    def build(self, hidden_size: int, ctx: Any) -> Any:
        self.module = ctx.linear(hidden_size, 2)
        return self.module

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        import torch.nn.functional as F

        scores = ctx.widen(ctx.module("parity")(ctx.pick(hidden, self.env.sequence_length - 1)))
        return {"next": Term(F.cross_entropy(scores, batch["label"], reduction="sum"), scope=self.scope)}


class CountsWhereBuilt(OwnModule):
    """Says one thing where build() has been called, which is on the last stage, and another elsewhere."""

    def counts(self, batch: Batch) -> dict[str, int]:
        count = super().counts(batch)["next"]
        return {"next": count if hasattr(self, "module") else 2 * count}


class ReadsBuilt(OwnModule):
    """Reads in counts(), on every rank, a module that only the last stage has."""

    def counts(self, batch: Batch) -> dict[str, int]:
        assert self.module.weight.dim() == 2
        return super().counts(batch)


class CallsOnlyWhereScored(Windows):
    """Says nothing to the other ranks where its rows score nothing."""

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        if not (batch["labels"] != IGNORE).any():
            return {}
        return super().loss(hidden, batch, ctx)


class CountsEverything(Windows):
    def counts(self, batch: Batch) -> dict[str, int]:
        return {"next": int(batch["labels"].size)}


class Declares(Windows):
    declared = 0.15

    def rates(self) -> Mapping[str, float]:
        return {"hidden": self.declared}

    def observe(self, example: Example) -> Mapping[str, tuple[int, int]]:
        return {"hidden": (int((example["labels"] == IGNORE).sum()), len(example["labels"]))}


class DeclaresRightly(Declares):
    declared = 0.25


class Pairs(Objective):
    """Each window finds its own second half among those of the cell."""

    detach = False

    def needs(self) -> Needs:
        tensors = {"tokens": TensorSpec(), "attention_mask": TensorSpec(dtype="bool", to="all")}
        return Needs("bidirectional", tensors, lm_head=False, coupling="cell")

    def weights(self) -> Mapping[str, float]:
        return {"pairs": 1.0}

    def num_samples(self, corpus: Corpus) -> int:
        return corpus.num_tokens // (2 * self.env.sequence_length)

    def build_example(self, sample: int, corpus: Corpus, rng: np.random.Generator) -> Example:
        length = self.env.sequence_length
        start = sample * 2 * length
        return {"tokens": corpus.stream(start, start + 2 * length).reshape(2, length)}

    def collate(self, examples: list[Example]) -> Batch:
        tokens = np.concatenate([example["tokens"] for example in examples])
        return {"tokens": tokens, "attention_mask": np.ones(tokens.shape, dtype=bool)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": len(batch["tokens"]) // 2}

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Term]:
        import torch
        import torch.nn.functional as F

        vectors = F.normalize(ctx.pool(hidden, batch["attention_mask"]), dim=-1)
        anchors, positives = vectors[0::2], vectors[1::2]
        everyone, first = ctx.gather(positives)
        if self.detach:
            own = everyone.detach().clone()
            own[first : first + len(positives)] = positives
            everyone = own
        target = first + torch.arange(len(anchors), device=anchors.device)
        loss = F.cross_entropy(anchors @ everyone.t() / 0.1, target, reduction="sum")
        return {"pairs": Term(loss, scope="example")}


class DetachedGather(Pairs):
    detach = True


@hookimpl
def megalm_objectives() -> Iterable[Component]:
    for value in list(globals().values()):
        if isinstance(value, type) and issubclass(value, Objective) and value is not Objective:
            yield Component(value.__name__, f"{__name__}:{value.__name__}", "for the gallery")
