"""Documents that a Python function yields: the shortest way from data of one's own to training."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import Field

from megalm.api import ConfigError, Settings, StreamSource


class IterableConfig(Settings):
    """Settings of ``[data_source.iterable]``."""

    function: str
    """``package.module:function``, importable on every rank. Called with ``arguments``, it returns an iterable of
    texts: the same ones in the same order each time."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments."""


class IterableSource(StreamSource):
    """What is to be skipped is asked for and thrown away."""

    Config = IterableConfig
    cfg: IterableConfig

    @property
    def identity(self) -> str:
        return f"{self.cfg.function} {json.dumps(self.cfg.arguments, sort_keys=True)}"

    def documents(self, skip: int) -> Iterator[str]:
        texts: Iterable[str] = self._function()(**self.cfg.arguments)
        return itertools.islice(texts, skip, None)

    def _function(self) -> Callable[..., Iterable[str]]:
        module, colon, name = self.cfg.function.partition(":")
        where = f"data_source.iterable.function = {self.cfg.function!r}"
        if not colon:
            raise ConfigError([f"{where}: expected package.module:function"])
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError([f"{where}: {error}; it has to be importable where megalm is (PYTHONPATH)"]) from None
        if not callable(function):
            raise ConfigError([f"{where}: is of type {type(function).__name__}, expected a function"])
        found: Callable[..., Iterable[str]] = function
        return found
