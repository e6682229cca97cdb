"""The error of a build that cannot be made."""

from __future__ import annotations

from megalm.errors import MegalmError


class BuildError(MegalmError):
    """Native code cannot be built here; the message says what is missing, or what the compiler said."""
