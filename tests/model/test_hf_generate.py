"""Greedy generation equals transformers', token for token, for prompts of unequal length in one batch."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from megalm.model.hf.names import tensor_map
from megalm.model.language_model import LanguageModel
from megalm.nn.module import fill_from_logical, materialise
from megalm.parallel.mesh import single_rank
from megalm.train.generate import generate
from megalm.train.sampling import Sampling

from .hf_case import Case, make_case
from .test_hf import NAMED, drawn

TOKENS = 20


def prompts_of(case: Case, draw: random.Random) -> list[list[int]]:
    vocab = case.hf.config.vocab_size
    return [[draw.randrange(vocab) for _ in range(draw.randint(1, 10))] for _ in range(4)]


def transformers_greedy(hf: Any, prompts: list[list[int]]) -> list[list[int]]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = hf.generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0, eos_token_id=None
    )
    return out[:, longest:].tolist()


def megalm_greedy(case: Case, prompts: list[list[int]]) -> list[list[int]]:
    spec, one = case.spec(), single_rank()
    model = LanguageModel(spec, one)
    materialise(model, one, 0, torch.float32)
    fill_from_logical(model, one, tensor_map(case.family, spec).to_logical(case.hf.state_dict()))
    found = generate(model, prompts, Sampling(0.0), tokens=TOKENS, context=32)
    return [each.ids for each in found]


@pytest.mark.parametrize("name", [name for name, (family, _) in NAMED.items() if "bert" not in family])
def test_greedy_equals_transformers(name: str) -> None:
    family, settings = NAMED[name]
    case = make_case(family, 8, torch.float32, **settings)
    prompts = prompts_of(case, random.Random(8))
    assert megalm_greedy(case, prompts) == transformers_greedy(case.hf, prompts)


def test_drawn_models_greedy_equals_transformers(campaign_seed: int, full: bool) -> None:
    draw, cases = random.Random(campaign_seed + 2), drawn(campaign_seed + 3, 80 if full else 10)
    for number, (family, settings) in enumerate(cases):
        if "bert" in family:
            continue
        case = make_case(family, campaign_seed + number, torch.float32, **settings)
        prompts = prompts_of(case, draw)
        expected = transformers_greedy(case.hf, prompts)
        assert megalm_greedy(case, prompts) == expected, f"{family} {settings} (seed {campaign_seed})"
