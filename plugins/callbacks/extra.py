"""Optional packages: a callback that needs one says so on every rank while the run is being built, before it starts."""

from __future__ import annotations

import importlib.util

from megalm.api import PluginError


def require(package: str, callback: str, extra: str) -> None:
    """Raise PluginError, naming the extra to install, where ``package`` is not installed. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise PluginError(
            f"callback {callback!r} needs the package {package!r}, which is not installed: "
            f"pip install 'megalm[{extra}]', or leave {callback!r} out of log.callbacks"
        )
