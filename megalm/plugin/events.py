"""Calling event hooks so that an exception names the plugin that raised it.

pluggy calls implementations anonymously. Wrapping each one would cost a call a hook on every step; instead the
traceback is searched, after the fact, for the implementation's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

from megalm.errors import MegalmError
from megalm.plugin.blame import describe

if TYPE_CHECKING:
    from pluggy import HookCaller, HookImpl


class HookError(MegalmError):
    """An implementation of an event hook raised an error. The original is its cause."""


class EventHooks:
    """``hooks.megalm_step_end(run=..., step=..., metrics=...)``: arguments by name; returns the results.

    Results that are None are left out. A UsageError (or any other error of megalm's) that an implementation raises
    passes with a note that names the plugin; any other exception becomes a :class:`HookError` that does.
    """

    def __init__(self, callers: dict[str, HookCaller], owner: Callable[[str], str]) -> None:
        """``callers``: hooks by name. ``owner``: from the name of a registration to how a message should call it."""
        self._callers = callers
        self._owner = owner

    def implemented(self, name: str) -> bool:
        """Whether anything implements the hook; the same on every rank, as plugins and callbacks are."""
        return bool(self._callers[name].get_hookimpls())

    def __getattr__(self, name: str) -> Callable[..., list[Any]]:
        if name not in self._callers:
            raise AttributeError(f"no event hook {name!r}; there are: {', '.join(sorted(self._callers))}")
        caller = self._callers[name]

        def call(**arguments: Any) -> list[Any]:
            try:
                results: list[Any] = caller(**arguments)
            except Exception as error:
                raised_by = self._find(caller, error)
                if raised_by is None:
                    raise
                if isinstance(error, MegalmError):
                    error.add_note(f"raised by {raised_by} in {name}")
                    raise
                raise HookError(f"{raised_by} failed in {name}: {describe(error)}") from error
            return results

        self.__dict__[name] = call
        return call

    def _find(self, caller: HookCaller, error: Exception) -> str | None:
        implementations = {_code(impl): impl.plugin_name for impl in caller.get_hookimpls()}
        for code in _codes(error):
            if code in implementations:
                return self._owner(implementations[code])
        return None


def _code(impl: HookImpl) -> CodeType | None:
    return getattr(impl.function, "__code__", None)


def _codes(error: BaseException) -> Iterator[CodeType]:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame.f_code
        step = step.tb_next
