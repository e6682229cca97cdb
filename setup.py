"""Only what pyproject.toml cannot say: the folder ``plugins/`` is the import package ``megalm_plugins``.

This file must not import torch: an isolated build would have to download it.
"""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    package_dir={"megalm": "megalm", "megalm_plugins": "plugins"},
    packages=[
        *find_packages(include=["megalm", "megalm.*"]),
        "megalm_plugins",
        *(f"megalm_plugins.{name}" for name in find_namespace_packages("plugins")),
    ],
)
