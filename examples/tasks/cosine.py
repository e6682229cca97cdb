"""What vectors of a Hugging Face model know before training, computed by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from steps import table
from transformers import AutoModel, AutoTokenizer

STS_COLUMNS = ("--column", "text=1", "--column", "text_pair=2", "--no-header")


@torch.no_grad()
def vectors(model: Path, texts: Sequence[str]) -> np.ndarray:
    """(texts, hidden): the mean over each text's tokens, of length 1."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
    found = []
    for start in range(0, len(texts), 64):
        chosen = [texts[index] for index in order[start : start + 64]]
        batch = tokenizer(chosen, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        mean = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        found.append(torch.nn.functional.normalize(mean, dim=-1))
    out: np.ndarray = torch.cat(found).numpy()[np.argsort(order)]
    return out


def likeness(model: Path, data: Path) -> float:
    """Spearman's correlation of the cosine with the scores of the STS benchmark."""
    first, second, scores = zip(*table(data, ","), strict=True)
    cosines = (vectors(model, first) * vectors(model, second)).sum(1)
    return float(spearmanr(cosines, [float(score) for score in scores]).statistic)
