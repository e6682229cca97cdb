"""Runs mypy --strict over ``megalm`` and ``megalm_plugins``.

The plugins are the folder ``plugins/`` but the import package ``megalm_plugins``, which mypy cannot be told; so it is
shown a folder, inside its cache, where links have the names that imports use.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCES = {"megalm": "megalm", "megalm_plugins": "plugins"}


def main() -> int:
    """Return mypy's exit status. Further arguments go to mypy."""
    root = Path(__file__).resolve().parent.parent
    links = root / ".mypy_cache" / "sources"
    links.mkdir(parents=True, exist_ok=True)
    for package, folder in SOURCES.items():
        link = links / package
        if not link.is_symlink() or link.resolve() != root / folder:
            link.unlink(missing_ok=True)
            link.symlink_to(root / folder, target_is_directory=True)
    command = [sys.executable, "-m", "mypy", f"--config-file={root / 'pyproject.toml'}"]
    command += [f"--cache-dir={root / '.mypy_cache'}"]
    for package in SOURCES:
        command += ["-p", package]
    env = os.environ | {"MYPYPATH": str(links)}
    return subprocess.run([*command, *sys.argv[1:]], cwd=links, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
