"""Groups of commands whose module is imported when one of them is asked for.

``megalm --help`` must not pay for what ``megalm data`` needs.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_group


class LazyGroup(TyperGroup):
    """Stands for the ``typer.Typer`` called ``app`` in :attr:`module`. Use :func:`lazy_group`."""

    module: ClassVar[str]

    def _load(self) -> None:
        if not self.commands:
            app: typer.Typer = importlib.import_module(self.module).app
            self.commands.update(get_group(app).commands)

    def list_commands(self, ctx: Any) -> list[str]:
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._load()
        return super().get_command(ctx, cmd_name)


def lazy_group(module: str) -> type[LazyGroup]:
    """A class for ``add_typer(typer.Typer(cls=...))``."""
    return type("LazyGroup", (LazyGroup,), {"module": module})
