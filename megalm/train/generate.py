"""Plain sampling from a causal model: a full forward for each token, under any layout, drawn by address."""

from __future__ import annotations

import numpy as np
import torch

from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import make_microbatch
from megalm.parallel import rng
from megalm.plugin.contract.tokenizer import Tokenizer


@torch.no_grad()
def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
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
        logits = model.logits(batch, model(batch), len(window) - 1)[0, : tokenizer.vocab_size].double().cpu().numpy()
        ids.append(_draw(logits, temperature, top_k, rng.uniform(key, len(logits), (number, 0, 0))))
    return _decode(tokenizer, ids)


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
