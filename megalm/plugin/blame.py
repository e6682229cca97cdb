"""Saying where an exception of a plugin came from: its type, its message and the file and line that raised it.

An import error names neither the plugin nor the file that failed; the person who reads it installed ten plugins.
"""

from __future__ import annotations

import traceback
from pathlib import Path

_OURS = str(Path(__file__).resolve().parent)


def location(error: BaseException) -> str | None:
    """``file:line`` of the deepest frame outside of the import machinery and the plugin manager; None without one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        machinery = frame.filename.startswith("<frozen") or "/importlib/" in frame.filename.replace("\\", "/")
        if not machinery and str(Path(frame.filename).parent) != _OURS:
            return f"{frame.filename}:{frame.lineno}"
    return None


def describe(error: BaseException) -> str:
    """``Type: message [file:line]`` on one line."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(message.split())
    where = location(error)
    return f"{type(error).__name__}{': ' + text if text else ''}{f' [{where}]' if where else ''}"
