"""What an objective cannot be examined without is made for it, as its class declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.plugin.manager import PluginManager
from megalm.testing.objective.checks import CHECKS
from megalm.testing.objective.companions import TEACHER_SIZE
from megalm.testing.objective.subject import ObjectiveSubject

RUN = {check.name: check.run for check in CHECKS}
GUIDED = """\
from megalm.api import Component, Needs, Settings, Teacher, Term, hookimpl
from megalm_plugins.objectives.causal_lm import CausalLM

MEGALM_API = (1, 0)

class GuidedConfig(Settings):
    guide: str | None = None
    "What is learnt from."

class Guided(CausalLM):
    "Builds its own rows, and draws hidden vectors of its own width to the guide's."
    Config = GuidedConfig
    checkpoints = ("guide",)
    wanted = 48

    def __init__(self, cfg, env):
        super().__init__(CausalLM.Config(), env)
        self.guide = cfg.guide

    def needs(self):
        return Needs("causal", super().needs().tensors, lm_head=False, teacher=Teacher(self.guide, self.wanted))

    def weights(self):
        return {"guided": 1.0}

    def counts(self, batch):
        return {"guided": batch["labels"].size}

    def loss(self, hidden, batch, ctx):
        everywhere = batch["labels"] == batch["labels"]
        own, its = ctx.select(hidden, everywhere), ctx.teacher_hidden(everywhere)
        return {"guided": Term((own.sum(1) - its.sum(1)).square().sum())}

class Wider(Guided):
    wanted = 64

@hookimpl
def megalm_objectives():
    for cls in (Guided, Wider):
        yield Component(cls.__name__.lower(), f"guides:{cls.__name__}", "learns from another model")
"""


@pytest.fixture
def subject(
    fake_dist: Callable[..., Path], campaign_seed: int
) -> Iterator[Callable[..., ObjectiveSubject]]:
    fake_dist("guides", {"guides": "guides"}, {"guides.py": GUIDED})
    manager = PluginManager.for_launch(None)
    made: list[ObjectiveSubject] = []

    def make(name: str, *settings: str) -> ObjectiveSubject:
        made.append(ObjectiveSubject(name, manager=manager, seed=campaign_seed, sample=1, settings=settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_checkpoint_is_made(subject: Callable[..., ObjectiveSubject]) -> None:
    """Of the objective's kind of attention, with an objective of megalm's own where nothing else is trained."""
    made = subject("guided")
    teacher = made.prepared().teacher
    assert teacher is not None
    assert teacher.stored.objective.name == "causal_lm"
    assert teacher.spec.cfg.hidden_size == TEACHER_SIZE != made.prepared().spec.cfg.hidden_size
    for name in ("terms", "counts", "sums", "microbatches", "scopes", "layouts"):
        RUN[name](made)


def test_a_checkpoint_that_is_named_is_taken(subject: Callable[..., ObjectiveSubject]) -> None:
    teacher = subject("guided").prepared().teacher
    assert teacher is not None
    named = subject("guided", f'objective.guided.guide="{teacher.stored.folder}"').prepared().teacher
    assert named is not None
    assert named.identity == teacher.identity


def test_of_another_width(subject: Callable[..., ObjectiveSubject]) -> None:
    with pytest.raises(ConfigError, match=r"the teacher .*: has model\.hidden_size = 48, but wider was told of 64"):
        subject("wider").prepared()


def test_rows_of_another(subject: Callable[..., ObjectiveSubject]) -> None:
    """What scores alone is joined with the first that it names; the teacher is trained as the rest is."""
    made = subject("distill", "objective.mlm.mask_prob=0.4")
    prepared = made.prepared()
    assert made.name == "distill"
    assert prepared.objective.name == "distill+mlm"
    assert prepared.teacher is not None
    assert prepared.teacher.stored.objective.name == "mlm"
    assert prepared.teacher.stored.objective.parts["mlm"].rates()["mask_prob"] == 0.4
    paired = subject("causal_lm+distill").prepared()
    assert paired.objective.name == "causal_lm+distill"
    assert paired.spec.causal
