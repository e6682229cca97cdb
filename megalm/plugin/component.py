"""Records by which plugins offer what they have, without importing it.

A component hook yields :class:`Component` records; only the one that a configuration names is ever imported. So listing
plugins is fast, needs no torch, and a broken component cannot disturb a run that does not use it.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "objectives",
    "tokenizers",
    "heads",
    "architectures",
    "optimizers",
    "lr_schedules",
    "data_sources",
    "callbacks",
    "kernels",
    "pipeline_schedules",
    "exporters",
    "importers",
)
"""Kinds of component, each with a hook ``megalm_<kind>``. A config names one in the singular."""


@dataclass(frozen=True)
class PluginInfo:
    """Where a plugin comes from."""

    name: str
    """Name of the entry point."""
    dist: str
    """Distribution that ships it."""
    version: str
    """Version of that distribution."""
    target: str
    """``module`` or ``module:attr`` of the entry point."""

    def __str__(self) -> str:
        return f"{self.name} ({self.dist} {self.version})"


@dataclass(frozen=True)
class Component:
    """One objective, tokenizer, ... that a plugin provides."""

    name: str
    """What configurations call it."""
    target: str
    """``package.module:attribute``, imported when the component is chosen."""
    summary: str = ""
    """One line for ``megalm plugins``."""
    plugin: PluginInfo | None = None
    """Filled in by the manager."""
