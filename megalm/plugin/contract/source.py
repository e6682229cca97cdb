"""The data source contract: training text that no ``megalm data prepare`` has been over.

A stream gives documents one after the other, and nothing else can be asked of it. One rank of each data-parallel
replica reads it and tells the others, so it need not be readable everywhere, and a resumed run skips what was seen.
An addressed source answers for any place of its stream of tokens, as a token store does, and every rank opens it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from megalm.config.settings import Settings
from megalm.plugin.contract.objective import Corpus


class DataSource(ABC):
    """What ``[data] source`` may name. Subclass :class:`StreamSource` or :class:`AddressedSource`, and yield a
    ``Component`` from ``megalm_data_sources``."""

    Config: ClassVar[type[Settings]] = Settings
    """Validated model of ``[data_source.NAME]``."""

    def __init__(self, cfg: Any) -> None:
        """``cfg``: an instance of :attr:`Config`. Open nothing yet: every rank makes one, to compare identities."""
        self.cfg = cfg

    @property
    @abstractmethod
    def identity(self) -> str:
        """What decides the documents and their order, as text: ranks, and a run that goes on, must agree on it."""


class StreamSource(DataSource):
    """Documents in an order of their own, which must be the same each time."""

    @abstractmethod
    def documents(self, skip: int) -> Iterator[str]:
        """Texts from document ``skip`` on, to the end of an epoch; each call begins anew.

        Called on one rank of each replica, in a thread of its own. Use no collectives. Documents without text count
        too. DataError where it cannot be read.
        """


class AddressedSource(DataSource):
    """A corpus of ids, by address."""

    @abstractmethod
    def corpus(self, vocab_size: int) -> Corpus:
        """The training corpus, whose ids are below ``vocab_size``. Called once on every rank; read from several
        threads. DataError where it cannot be read."""
