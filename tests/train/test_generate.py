"""Generation with kept keys and values: what a model without a cache gives, under every layout and batch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megalm.config.schema import ModelConfig
from megalm.errors import UsageError
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import materialise
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.manager import PluginManager
from megalm.train.generate import Generated, generate
from megalm.train.sampling import Sampling

GPT = {"position": "learned", "norm": "layer_norm"}
LLAMA = {"position": "rope", "norm": "rms_norm", "gated": True, "activation": "silu", "qkv_bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt2-offset": {**GPT, "position_offset": 3, "tie_embeddings": False},
    "llama": {**LLAMA, "heads": 6, "kv_heads": 2},
    "one-kv-head": {**LLAMA, "heads": 6, "kv_heads": 1, "qk_norm": True},
    "stretched": {**LLAMA, "heads": 3, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_positions": 16},
}
VOCAB = 53


def make_spec(**settings: Any) -> ModelSpec:
    sizes = {"architecture": "test", "layers": 4, "hidden_size": 24, "heads": 4, "init_std": 0.4, "ffn_size": 30}
    c = ModelConfig(**{**sizes, **settings})
    return ModelSpec(
        cfg=c,
        vocab_size=VOCAB,
        kv_heads=c.kv_heads or c.heads,
        head_dim=c.hidden_size // c.heads,
        ffn_size=30,
        max_positions=40 + c.position_offset,
        token_types=0,
        causal=True,
        lm_head=True,
        heads=(),
    )


def build(spec: ModelSpec, parallel: ParallelContext, pipeline: Pipeline | None = None) -> LanguageModel:
    model = LanguageModel(spec, parallel, None if pipeline is None else pipeline.stages_of(parallel.pp.index))
    materialise(model, parallel, 7, torch.float64)
    return model


def draw_prompts(seed: int, count: int = 5) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))] for _ in range(count)]


@torch.no_grad()
def without_cache(
    spec: ModelSpec, prompts: list[list[int]], sampling: Sampling, tokens: int, context: int
) -> list[list[int]]:
    """Each prompt alone, its window through the whole model for every token."""
    model, found = build(spec, single_rank()), []
    for prompt_number, prompt in enumerate(prompts):
        ids = list(prompt)
        for number in range(tokens):
            window = ids[-context:]
            batch = make_microbatch({"tokens": torch.tensor([window])}, model.parallel)
            logits = model.logits(batch, model(batch), torch.tensor([len(window) - 1]))
            ids.append(sampling.choose(logits[0].double().numpy(), prompt_number, number))
        found.append(ids[len(prompt) :])
    return found


def ids_of(found: list[Generated]) -> list[list[int]]:
    return [each.ids for each in found]


@pytest.mark.parametrize("context", [40, 12])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(name: str, context: int, campaign_seed: int) -> None:
    """Also where rows outgrow the context, one after the other."""
    spec, prompts = make_spec(**MODELS[name]), draw_prompts(campaign_seed)
    for sampling in (Sampling(0.0), Sampling(0.9, top_k=20, top_p=0.9, seed=campaign_seed)):
        expected = without_cache(spec, prompts, sampling, 14, context)
        for batch in (2, 16):
            found = generate(
                build(spec, single_rank()), prompts, sampling, tokens=14, context=context, batch=batch
            )
            assert ids_of(found) == expected, f"{name}, batch {batch} (seed {campaign_seed})"


LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tp": 2}, {}),
    ({"tp": 3}, {}),
    ({"tp": 3, "sp": True}, {}),
    ({"pp": 2}, {"schedule": "1f1b"}),
    ({"pp": 2}, {"schedule": "interleaved", "virtual": 2}),
    ({"pp": 2}, {"schedule": "zb-v"}),
    ({"pp": 4, "dp": 2}, {"schedule": "gpipe"}),
    ({"tp": 2, "pp": 2, "sp": True}, {"schedule": "interleaved", "virtual": 2}),
]


@pytest.mark.parametrize("name", ["gpt2", "one-kv-head"])
def test_every_layout_gives_the_same(name: str, campaign_seed: int) -> None:
    spec, prompts, manager = make_spec(**MODELS[name]), draw_prompts(campaign_seed, 3), PluginManager.for_launch(None)
    sampling = Sampling(1.0, top_p=0.95, seed=campaign_seed)
    stop = {campaign_seed % VOCAB, 5, 6}
    settings: dict[str, Any] = {"tokens": 8, "context": 14, "stop": stop}
    expected = generate(build(spec, single_rank()), prompts, sampling, **settings)
    for layout, schedule in LAYOUTS:
        pipeline = None
        if layout.get("pp", 1) > 1:
            pipeline = make_pipeline(spec, manager, ranks=layout["pp"], microbatches=4, **schedule)

        def rank(parallel: ParallelContext, pipeline: Pipeline | None = pipeline) -> list[Generated]:
            return generate(build(spec, parallel, pipeline), prompts, sampling, pipeline=pipeline, **settings)

        for found in run_simulated(rank, **layout):
            assert found == expected, f"{layout} {schedule} (seed {campaign_seed})"


def test_tokens_are_told_as_they_come_and_stop_tokens_end_a_row() -> None:
    spec, prompts, heard = make_spec(**GPT), draw_prompts(3), []
    model = build(spec, single_rank())
    free = generate(model, prompts, Sampling(1.0, seed=3), tokens=9, context=40)
    assert [each.ended for each in free] == ["length"] * 5
    stop = free[1].ids[4]
    found = generate(
        model,
        prompts,
        Sampling(1.0, seed=3),
        tokens=9,
        context=40,
        stop=[stop],
        on_token=lambda number, token: heard.append((number, token)),
    )
    for number, (short, long) in enumerate(zip(found, free, strict=True)):
        cut = long.ids.index(stop) + 1 if stop in long.ids else 9
        assert short.ids == long.ids[:cut]
        assert short.ended == ("stop" if stop in short.ids else "length")
        assert [token for heard_of, token in heard if heard_of == number] == short.ids
    assert found[1].ended == "stop"


def test_prompts_are_drawn_by_their_number_and_the_seed() -> None:
    model = build(make_spec(**GPT), single_rank())
    same = generate(model, [[1, 2, 3]] * 3, Sampling(1.0, seed=4), tokens=12, context=40)
    assert len({tuple(each.ids) for each in same}) == 3
    again = generate(model, [[1, 2, 3]], Sampling(1.0, seed=4), tokens=12, context=40)
    assert again[0] == same[0]
    other = generate(model, [[1, 2, 3]], Sampling(1.0, seed=5), tokens=12, context=40)
    assert other[0] != same[0]


def test_what_cannot_be_generated_is_named() -> None:
    model = build(make_spec(**GPT), single_rank())
    for prompts, context, words in (
        ([[1], []], 8, "prompt 1 has no tokens"),
        ([[VOCAB]], 8, f"prompt 0 has the token {VOCAB}"),
        ([[1]], 41, "position embedding has 40"),
    ):
        with pytest.raises(UsageError, match=words):
            generate(model, prompts, Sampling(), tokens=1, context=context)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_draws_follow_the_distribution() -> None:
    """Frequencies of 5,000 draws against the probabilities that the settings leave, to four standard deviations."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = np.log(p)
    cases: list[tuple[dict[str, Any], np.ndarray]] = [
        ({}, p),
        ({"temperature": 0.5}, p**2),
        ({"top_k": 2}, p * [1, 1, 0, 0, 0]),
        ({"top_p": 0.7}, p * [1, 1, 0, 0, 0]),
        ({"top_p": 0.71}, p * [1, 1, 1, 0, 0]),
        ({"top_k": 4, "top_p": 0.8}, p * [1, 1, 1, 0, 0]),
    ]
    count = 5_000
    for settings, weights in cases:
        expected = weights / weights.sum()
        sampling = Sampling(**settings, seed=11)
        drawn = np.bincount([sampling.choose(logits, 0, n) for n in range(count)], minlength=5) / count
        assert (drawn[expected == 0] == 0).all(), settings
        assert (abs(drawn - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)).all(), settings
