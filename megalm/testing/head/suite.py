"""The pytest class of a head's checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from megalm.plugin.contract.objective import Attention
from megalm.plugin.contract.records import Record
from megalm.testing.check import Suite
from megalm.testing.head.checks import CHECKS
from megalm.testing.head.subject import HeadSubject


class HeadSuite(Suite):
    """Prove an installed head; subclass it and name the head::

        class TestStance(HeadSuite):
            head = "stance"

    The environment variable ``MEGALM_PROOF=full`` asks for every layout of up to sixteen ranks, ``MEGALM_SEED`` for
    another seed.
    """

    checks = CHECKS
    head: ClassVar[str]
    """The component, or ``plugin:component``."""
    settings: ClassVar[Sequence[str]] = ()
    """``key=value`` pairs of the head's own, such as ``pooling=mean``."""
    records: ClassVar[Sequence[Record] | None] = None
    """At least twenty labelled records; default: made-up ones, as the head's fields ask for."""
    labels: ClassVar[Sequence[str] | None] = None
    """Names of the classes; default: some where a field holds labels."""
    attention: ClassVar[Attention] = "bidirectional"
    """Of the backbone."""
    tokenizer: ClassVar[str] = "byte"
    """A tokenizer that needs no training, or ``component:path``."""
    sample: ClassVar[int | None] = None
    """Without ``MEGALM_PROOF=full``, at most so many layouts, drawn from the quick set; default: all of that."""
    device: ClassVar[str] = "cpu"
    """Where ranks compute."""

    @classmethod
    def subject(cls) -> HeadSubject:
        torch.set_num_threads(1)  # simulated ranks share a core
        return HeadSubject(
            cls.head,
            settings=cls.settings,
            **cls.asked(),
            sample=cls.sample,
            records=cls.records,
            labels=cls.labels,
            attention=cls.attention,
            tokenizer=cls.tokenizer,
            device=cls.device,
        )
