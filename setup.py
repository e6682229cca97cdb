"""What pyproject.toml cannot say: the folder ``plugins/`` is the import package ``megalm_plugins``, and csrc/ is built.

This file must not import torch: an isolated build would have to download it. Where torch's headers, a compiler and
ninja are found, the libraries are built into the package; where not, the package goes without, and a program builds
them at its first use of them, if it can. MEGALM_NATIVE=off leaves them out here, ``require`` makes their lack an error.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # builds by PEP 517 leave it out

from megalm.native import build  # noqa: E402
from megalm.native.errors import BuildError  # noqa: E402


class BuildWithNative(build_py):
    """Beside the modules: csrc/, from which a program can build, and what could be built here."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "megalm"
        if not self.editable_mode:
            shutil.rmtree(package / "csrc", ignore_errors=True)
            shutil.copytree(ROOT / "csrc", package / "csrc")
        libraries = package / "native" / "lib"
        shutil.rmtree(libraries, ignore_errors=True)
        wanted = os.environ.get("MEGALM_NATIVE", "auto")
        if wanted == "off":
            return
        try:
            build.build_into(libraries)
        except (BuildError, OSError) as error:
            shutil.rmtree(libraries, ignore_errors=True)
            if wanted == "require":
                raise
            self.warn(f"megalm is installed without its native code: {error}")


class TaggedWheel(bdist_wheel):
    """A wheel for every platform, unless libraries were built for this one. They need no certain Python."""

    def run(self) -> None:
        self.run_command("build")
        folder = Path(self.get_finalized_command("build_py").build_lib)
        built = any((folder / "megalm" / "native" / "lib").glob("*.so"))
        self.root_is_pure = not built
        self.distribution.has_ext_modules = lambda: built  # setuptools asks where everything is put
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if not self.root_is_pure else (python, abi, platform)


setup(
    cmdclass={"build_py": BuildWithNative, "bdist_wheel": TaggedWheel},
    package_dir={"megalm": "megalm", "megalm_plugins": "plugins"},
    packages=[
        *find_packages(include=["megalm", "megalm.*"]),
        "megalm_plugins",
        *(f"megalm_plugins.{name}" for name in find_namespace_packages("plugins")),
    ],
)
