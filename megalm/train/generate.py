"""Plain sampling from a causal model: a full forward for each token, under any layout, drawn by address."""

from __future__ import annotations

import numpy as np
import torch

from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import Microbatch, make_microbatch
from megalm.parallel import rng
from megalm.pipeline.plan import Pipeline
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.train.stages import forward_only


@torch.no_grad()
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
    """The prompt and ``tokens`` more tokens as text; an end-of-document token shows as an empty line.

    Every rank computes the same logits and draws the same tokens: the Gumbel noise of token n is a function of (seed,
    n).
    """
    ids = tokenizer.encode_batch([prompt])[0] or [tokenizer.special.eos or 0]
    key = rng.key(seed, "sample")
    for number in range(tokens):
        window = ids[-context:]
        # Padding on the right is harmless under causal attention, and lets tokens be sharded evenly; tp divides the
        # context then, so that it never exceeds it.
        padded = window + [0] * (-len(window) % (model.parallel.tp.size if model.parallel.sp else 1))
        batch = make_microbatch({"tokens": torch.tensor([padded], device=model.parallel.device)}, model.parallel)
        whole = next_logits(model, batch, len(window) - 1, pipeline)
        logits = whole[0, : tokenizer.vocab_size].double().cpu().numpy()
        ids.append(_draw(logits, temperature, top_k, rng.uniform(key, len(logits), (number, 0, 0))))
    return _decode(tokenizer, ids)


def next_logits(model: LanguageModel, batch: Microbatch, position: int, pipeline: Pipeline | None) -> torch.Tensor:
    """Whole logits (rows, V) of one position of each row, on every rank; without gradients."""
    parallel = model.parallel
    found: list[torch.Tensor] = []

    def keep(number: int, hidden: torch.Tensor, rows: Microbatch) -> None:
        found.append(model.logits(rows, hidden, position).contiguous())

    forward_only(model, [batch], keep, pipeline)
    shape, dtype = (batch.rows, model.spec.vocab_size), next(model.parameters()).dtype
    logits = found[0] if found else torch.empty(shape, dtype=dtype, device=parallel.device)
    return parallel.pp.broadcast(logits, 0 if pipeline is None else pipeline.last_rank)


def _draw(logits: np.ndarray, temperature: float, top_k: int, noise: np.ndarray) -> int:
    if temperature == 0:
        return int(logits.argmax())
    scores = logits / temperature
    if 0 < top_k < len(scores):
        scores = np.where(scores >= np.partition(scores, -top_k)[-top_k], scores, -np.inf)
    return int((scores - np.log(-np.log(noise))).argmax())


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.special.eos:
            documents.append([])
        else:
            documents[-1].append(token)
    return "\n\n".join(tokenizer.decode(document) for document in documents)
