"""A library of one C file, so that what surrounds a compiler can be tested in no time; and compilers that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDER = """\
import sys
from pathlib import Path
from megalm.native import build
from megalm.native.errors import BuildError
from megalm.native.targets import Step, Target

source = Path(sys.argv[1])

def choose(tools, csrc):
    command = (tools.cxx, "-x", "c++", "-fPIC")
    return [Target("_small", (Step(source, command),), (tools.cxx, "-shared"), ())]

try:
    print(build.cached(choose))
except BuildError as error:
    print("BuildError:", error)
"""


def fake_compiler(folder: Path, script: str) -> Path:
    """A compiler that runs ``script``, where ``$REAL`` is the true one, and counts what it compiles in ``count``."""
    path = folder / "compiler"
    path.write_text(
        "#!/bin/bash\n"
        f"REAL={os.environ.get('CXX', 'g++')}; HERE={folder}\n"
        'if [ "$1" = --version ]; then echo fake 1; exit 0; fi\n'
        'case " $* " in *" -c "*) echo $$ >> $HERE/count;; *) exec $REAL "$@";; esac\n' + script
    )
    path.chmod(0o755)
    return path


def compiled(folder: Path) -> int:
    """How often the fake compiler was asked to compile."""
    count = folder / "count"
    return len(count.read_text().splitlines()) if count.exists() else 0


def start_builder(folder: Path, **variables: str) -> subprocess.Popen[str]:
    """A process that builds ``folder/small.cpp`` with the fake compiler there, into a cache there."""
    script, source = folder / "builder.py", folder / "small.cpp"
    if not script.exists():
        script.write_text(BUILDER)
        source.write_text('extern "C" int small() { return 7; }\n')
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CXX": str(folder / "compiler"),
        "MEGALM_CACHE": str(folder / "cache"),
        **variables,
    }
    pipe = subprocess.PIPE
    command = [sys.executable, str(script), str(source)]
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
