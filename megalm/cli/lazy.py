"""Groups of commands whose module is imported when one of them is asked for, and which make that one alone.

``megalm --help`` must not pay for what ``megalm data`` needs, nor ``megalm data prepare`` for its neighbours.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_command_name, get_group


class LazyGroup(TyperGroup):
    """Stands for the ``typer.Typer`` called ``app`` in :attr:`module`. Use :func:`lazy_group`."""

    module: ClassVar[str]

    def _app(self) -> typer.Typer:
        app: typer.Typer = importlib.import_module(self.module).app
        return app

    def list_commands(self, ctx: Any) -> list[str]:
        self.commands.update(get_group(self._app()).commands)
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        for info in self._app().registered_commands if cmd_name not in self.commands else ():
            if info.callback is not None and cmd_name == (info.name or get_command_name(info.callback.__name__)):
                one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
                one.registered_commands.append(info)
                self.commands[cmd_name] = get_command(one)
        return super().get_command(ctx, cmd_name)


def lazy_group(module: str) -> type[LazyGroup]:
    """A class for ``add_typer(typer.Typer(cls=...))``."""
    return type("LazyGroup", (LazyGroup,), {"module": module})
