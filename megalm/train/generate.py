"""Text from a causal model, with keys and values kept, under any layout.

A batch's prompts go through the model once, padded behind their ends; from then on each row adds one token a forward,
at its own position. With a pipeline the rows are divided into as many groups as there are ranks, so that no stage waits
for the group that another is at work on. The last stage chooses tokens and tells the other ranks.

Where a row outgrows the context, the model sees its last tokens only, from position 0 on; then nothing that was kept is
of use, and its group goes through the model anew for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from megalm.errors import UsageError
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.cache import KeyValueCache
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.train.sampling import Sampling
from megalm.train.stages import forward_only

OnToken = Callable[[int, int], None]
"""(number of the prompt, token), as soon as it is known."""


@dataclass
class Generated:
    """What followed a prompt."""

    ids: list[int] = field(default_factory=list)
    """The new tokens; a stop token is among them."""
    ended: Literal["stop", "length"] | None = None
    """By a stop token, or with the number of tokens that was asked for."""


@dataclass
class _Row:
    number: int
    """Of the prompt, among all."""
    ids: list[int]
    """The prompt, and what followed."""
    out: Generated = field(default_factory=Generated)


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    tokens: int,
    context: int,
    pipeline: Pipeline | None = None,
    batch: int = 16,
    stop: Collection[int] = (),
    vocabulary: int | None = None,
    on_token: OnToken | None = None,
    on_end: Callable[[int], None] | None = None,
) -> list[Generated]:
    """What follows each prompt (token ids, at least one): up to ``tokens`` tokens, less where a ``stop`` token comes.

    Every rank calls it and gets the same. ``context``: the most tokens that the model is to see; ``batch``: prompts at
    a time; ``vocabulary``: ids below it are drawn, by default all. ``pipeline``: the one that the model's stages were
    cut for; default: one stage. ``on_token`` and ``on_end`` (number of the prompt) are called on every
    rank. UsageError as :func:`check_prompts`.
    """
    check_prompts(model.spec, prompts, context)
    rows = [_Row(number, list(prompt)) for number, prompt in enumerate(prompts)]
    run = _Run(model, pipeline, sampling, tokens, context, frozenset(stop), vocabulary, on_token, on_end)
    for first in range(0, len(rows), batch):
        run.all(rows[first : first + batch])
    return [row.out for row in rows]


def check_prompts(spec: ModelSpec, prompts: Sequence[Sequence[int]], context: int) -> None:
    """UsageError where a model does not generate, or a prompt or the context does not fit it."""
    if not (spec.causal and spec.lm_head):
        raise UsageError("only a causal model with a language-modelling head generates text")
    limit = spec.max_positions - spec.cfg.position_offset
    if spec.cfg.position == "learned" and context > limit:
        raise UsageError(f"a context of {context} tokens: this model's position embedding has {limit}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {number} has no tokens; a model needs one to begin with")
        if bad := [i for i in prompt if not 0 <= i < spec.vocab_size]:
            raise UsageError(f"prompt {number} has the token {bad[0]}; the vocabulary has {spec.vocab_size}")


class _Group:
    """Rows that go through the model together."""

    def __init__(self, rows: list[_Row], unit: int) -> None:
        self.rows = rows
        self.padded = -(-len(rows) // unit) * unit
        """With empty rows, so that tokens can be divided over ``unit`` ranks."""
        self.cache: KeyValueCache | None = None

    def next(self, context: int, model: LanguageModel) -> tuple[Microbatch, list[int]]:
        """The next forward, and the place of each row's last token in it."""
        device = model.parallel.device
        longest = max(len(row.ids) for row in self.rows)
        fresh = self.cache is None or longest > context
        if fresh:
            self.cache = KeyValueCache(self.padded, device)
        assert self.cache is not None
        new = [row.ids[-context:] if fresh else row.ids[-1:] for row in self.rows]
        length = max(map(len, new))
        tokens = torch.zeros((self.padded, length), dtype=torch.int64)
        positions = torch.arange(length).repeat(self.padded, 1)
        for number, ids in enumerate(new):
            tokens[number, : len(ids)] = torch.tensor(ids)
            if not fresh:
                positions[number] = len(self.rows[number].ids) - 1
        self.cache.at(positions.to(device))
        batch = make_microbatch({"tokens": tokens.to(device)}, model.parallel, cache=self.cache)
        return batch, [len(ids) - 1 for ids in new]


class _Run:
    def __init__(
        self,
        model: LanguageModel,
        pipeline: Pipeline | None,
        sampling: Sampling,
        tokens: int,
        context: int,
        stop: frozenset[int],
        vocabulary: int | None,
        on_token: OnToken | None,
        on_end: Callable[[int], None] | None,
    ) -> None:
        self.on_end = on_end
        self.model, self.pipeline, self.sampling = model, pipeline, sampling
        self.tokens, self.context, self.stop = tokens, context, stop
        self.vocabulary, self.on_token = vocabulary, on_token

    def all(self, rows: list[_Row]) -> None:
        parallel = self.model.parallel
        count = min(parallel.pp.size, len(rows))
        unit = parallel.tp.size if parallel.sp else 1
        groups = [_Group(rows[n::count], unit) for n in range(count)]
        for number in range(self.tokens):
            if not (groups := [group for group in groups if any(row.out.ended is None for row in group.rows)]):
                break
            chosen = self.choose(groups, number)
            for row, token in zip((row for group in groups for row in group.rows), chosen, strict=True):
                self.take(row, token)

    def choose(self, groups: list[_Group], number: int) -> list[int]:
        """The next token of every row, the same on every rank; of rows that have ended, any."""
        parallel = self.model.parallel
        steps = [group.next(self.context, self.model) for group in groups]
        found: dict[int, list[int]] = {}

        def draw(place: int, hidden: torch.Tensor, batch: Microbatch) -> None:
            ends = steps[place][1]
            at = torch.tensor(ends + [0] * (batch.rows - len(ends)), device=parallel.device)
            logits = self.model.logits(batch, hidden, at)[: len(ends), : self.vocabulary].double().cpu().numpy()
            rows = groups[place].rows
            found[place] = [
                0 if row.out.ended else self.sampling.choose(each, row.number, number)
                for row, each in zip(rows, logits, strict=True)
            ]

        forward_only(self.model, [batch for batch, _ in steps], draw, self.pipeline)
        count = sum(len(group.rows) for group in groups)
        told = torch.zeros(count, dtype=torch.int64, device=parallel.device)
        if found:
            told.copy_(torch.tensor([token for place in range(len(groups)) for token in found[place]]))
        # Ranks that computed the same logits may have rounded them differently: one of them has the say.
        parallel.tp.broadcast(told)
        last = 0 if self.pipeline is None else self.pipeline.last_rank
        chosen: list[int] = parallel.pp.broadcast(told, last).tolist()
        return chosen

    def take(self, row: _Row, token: int) -> None:
        if row.out.ended is not None:
            return  # its last token is computed again, and nobody looks
        row.ids.append(token)
        row.out.ids.append(token)
        if token in self.stop:
            row.out.ended = "stop"
        elif len(row.out.ids) == self.tokens:
            row.out.ended = "length"
        if self.on_token is not None:
            self.on_token(row.number, token)
        if row.out.ended is not None and self.on_end is not None:
            self.on_end(row.number)


def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    pipeline: Pipeline | None = None,
    *,
    prompt: str,
    tokens: int,
    context: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """The prompt and ``tokens`` more tokens as text; an end-of-document token shows as an empty line."""
    ids = tokenizer.encode_batch([prompt])[0] or [tokenizer.special.eos or 0]
    (found,) = generate(
        model,
        [ids],
        Sampling(temperature, top_k, seed=seed),
        tokens=tokens,
        context=context,
        pipeline=pipeline,
        vocabulary=tokenizer.vocab_size,
    )
    return documents_text(tokenizer, ids + found.ids)


def documents_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of tokens in which documents may end, with an empty line between them."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.special.eos:
            documents.append([])
        else:
            documents[-1].append(token)
    return "\n\n".join(tokenizer.decode(document) for document in documents)
