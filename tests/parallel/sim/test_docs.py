"""The examples of docs/simulation.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megalm.parallel.sim.errors import DeadlockError, SimulationError

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "simulation.md").read_text(encoding="utf-8")


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    first, faults, trace = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert capsys.readouterr().out == "[6.0, 6.0, 6.0, 6.0]\n"
    exec(trace, names)
    with pytest.raises(DeadlockError, match="culprit: rank 1 was dropped"):
        exec(faults, names)


def test_every_error_is_described() -> None:
    import megalm.parallel.sim.errors as errors

    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, SimulationError)}
    described = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert kinds - {"SimulationError", "InjectedFault", "HooksError"} <= described
