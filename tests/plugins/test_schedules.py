"""Learning rates in closed form, and the optimizer's groups."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.errors import ConfigError
from megalm_plugins.lr_schedules import Cosine, DecayConfig, Linear, WarmupStableDecay, WarmupStableDecayConfig
from megalm_plugins.optimizers.adamw import AdamW, AdamWConfig

PEAK, STEPS, WARMUP, FINAL = 2e-3, 110, 10, 0.1


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (Cosine(DecayConfig(warmup_steps=WARMUP, final=FINAL), PEAK, STEPS), lambda x: (1 + math.cos(math.pi * x)) / 2),
        (Linear(DecayConfig(warmup_steps=WARMUP, final=FINAL), PEAK, STEPS), lambda x: 1 - x),
        (
            WarmupStableDecay(WarmupStableDecayConfig(warmup_steps=WARMUP, final=FINAL, decay_steps=20), PEAK, STEPS),
            lambda x: min(1.0, (1 - x) * 100 / 20),
        ),
    ],
    ids=["cosine", "linear", "wsd"],
)
def test_closed_forms(schedule, shape) -> None:  # type: ignore[no-untyped-def]
    for step in range(WARMUP):
        assert schedule.at(step) == pytest.approx(PEAK * (step + 1) / (WARMUP + 1), rel=1e-12)
    assert schedule.at(WARMUP) == pytest.approx(PEAK, rel=1e-12), "step warmup_steps has the peak"
    for step in range(WARMUP, STEPS + 1):
        fraction = (step - WARMUP) / (STEPS - WARMUP)
        assert schedule.at(step) == pytest.approx(PEAK * (FINAL + (1 - FINAL) * shape(fraction)), rel=1e-9), step
    rates = [schedule.at(step) for step in range(STEPS + 1)]
    assert rates[WARMUP:] == sorted(rates[WARMUP:], reverse=True)
    assert rates[STEPS] == pytest.approx(PEAK * FINAL)


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_no_warmup_starts_at_the_peak_and_may_end_at_zero(kind: type[Cosine]) -> None:
    schedule = kind(DecayConfig(final=0.0), PEAK, 4)
    assert schedule.at(0) == PEAK
    assert schedule.at(4) == pytest.approx(0.0, abs=1e-18)
    assert schedule.at(99) == pytest.approx(0.0, abs=1e-18)


def test_wsd_falls_over_a_tenth_by_default() -> None:
    schedule = WarmupStableDecay(WarmupStableDecayConfig(final=0.0), PEAK, 100)
    assert schedule.at(90) == PEAK
    assert schedule.at(95) == pytest.approx(PEAK / 2)


def test_more_warmup_than_steps_never_passes_the_peak() -> None:
    schedule = Cosine(DecayConfig(warmup_steps=50), PEAK, 10)
    assert all(0 < schedule.at(step) < PEAK for step in range(10))


def test_adamw_decays_matrices_only() -> None:
    """With zero gradients AdamW only decays: matrices shrink by 1 - lr * weight_decay, vectors stay."""
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 4), "b": torch.randn(4), "norm": torch.ones(3)}
    before = {name: p.clone() for name, p in params.items()}
    optimizer = AdamW.build(params, 0.1, AdamWConfig(weight_decay=0.5))
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(params["w"], before["w"] * (1 - 0.1 * 0.5))
    assert torch.equal(params["b"], before["b"])
    assert torch.equal(params["norm"], before["norm"])


def test_adamw_by_its_formula() -> None:
    cfg = AdamWConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    torch.manual_seed(1)
    p = torch.randn(2, 3, dtype=torch.float64)
    expected, m, v = p.clone(), torch.zeros_like(p), torch.zeros_like(p)
    optimizer = AdamW.build({"w": p}, 0.01, cfg)
    for step in range(1, 4):
        gradient = torch.randn_like(p)
        p.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        expected = expected * (1 - 0.01 * 0.3) - 0.01 * update
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)


def test_wsd_needs_room_for_its_phases() -> None:
    settings = WarmupStableDecayConfig(warmup_steps=5, decay_steps=10)
    WarmupStableDecay(settings, PEAK, 15)
    with pytest.raises(ConfigError, match=r"5 warm-up and 10 decay steps are more than train\.steps = 14"):
        WarmupStableDecay(settings, PEAK, 14)
