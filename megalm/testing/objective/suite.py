"""The pytest class of an objective's checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch

from megalm.testing.check import Suite
from megalm.testing.objective.checks import CHECKS
from megalm.testing.objective.subject import ObjectiveSubject


class ObjectiveSuite(Suite):
    """Prove an installed objective; subclass it and name the objective::

        class TestShuffled(ObjectiveSuite):
            objective = "shuffled"

    The environment variable ``MEGALM_PROOF=full`` asks for every layout of up to sixteen ranks, ``MEGALM_SEED`` for
    another seed.
    """

    checks = CHECKS
    objective: ClassVar[str]
    """What ``train.objective`` would say; ``a+b`` for a joint objective."""
    settings: ClassVar[Sequence[str]] = ()
    """``key=value`` overrides, such as ``objective.shuffled.window=4``."""
    tokenizer: ClassVar[str] = "byte"
    """A tokenizer that needs no training, or ``component:path``."""
    text: ClassVar[Path | None] = None
    """What to train on; default: a made-up text."""
    sample: ClassVar[int | None] = None
    """Without ``MEGALM_PROOF=full``, at most so many layouts, drawn from the quick set; default: all of that."""
    device: ClassVar[str] = "cpu"
    """Where ranks compute."""

    @classmethod
    def subject(cls) -> ObjectiveSubject:
        torch.set_num_threads(1)  # simulated ranks share a core
        return ObjectiveSubject(
            cls.objective,
            settings=cls.settings,
            **cls.asked(),
            sample=cls.sample,
            tokenizer=cls.tokenizer,
            text=cls.text,
            device=cls.device,
        )
