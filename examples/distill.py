"""A small GPT learns Shakespeare's plays from a larger one, and the same small GPT without it.

    python examples/distill.py

trains the quick start's model as the teacher, then the two students, for as many steps each on the same rows, and
prints the evaluation loss of all three. It is that of their term ``causal_lm``: the total of the student that is taught
has the divergence in it as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ALONE = ("parallel.tp=1", "parallel.sp=false", "eval.baselines=false", "sample.tokens=0", "log.every=100")
SMALL = ("model.layers=2", "model.hidden_size=64", "model.ffn_size=192")


def train(folder: Path, data: Path, *settings: str) -> dict[str, Any]:
    """Run the quick start's configuration with these settings, or go on with it; its summary."""
    every = [f'run.dir="{folder}"', f'data.path="{data}"', *ALONE, *settings]
    call("megalm.launch", str(HERE / "quickstart.toml"), *(part for each in every for part in ("--set", each)))
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def call(module: str, *arguments: str) -> None:
    """Run one of megalm's commands as a shell would."""
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print a table."""
    parser = argparse.ArgumentParser(description="Distil the quick start's model into a smaller one.")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=400, help="of each student")
    parser.add_argument("--teacher-steps", type=int, default=800, help="of the teacher")
    parser.add_argument("--hidden-weight", type=float, default=0.0, help="of the hidden vectors' term")
    asked = parser.parse_args(arguments)
    data = asked.out / "data"
    if not data.exists():
        text = HERE / "data" / "shakespeare.txt"
        call("megalm.cli", "data", "prepare", str(text), "--tokenizer", "byte", "--out", str(data))

    teacher = train(asked.out / "teacher", data, f"train.steps={asked.teacher_steps}")
    steps = f"train.steps={asked.steps}"
    alone = train(asked.out / "alone", data, steps, *SMALL)
    learning = [
        'train.objective="causal_lm+distill"',
        f'objective.distill.teacher="{asked.out / "teacher"}"',
        f"objective.distill.hidden_weight={asked.hidden_weight}",
    ]
    if asked.hidden_weight:
        learning.append("objective.distill.teacher_hidden_size=128")
    taught = train(asked.out / "taught", data, steps, *SMALL, *learning)

    lines = [f"\n{'model':<20}{'parameters':>12}{'steps':>8}{'evaluation loss':>18}"]
    for name, found in (("teacher", teacher), ("student alone", alone), ("student, taught", taught)):
        loss = found["eval_terms"]["causal_lm"]
        lines.append(f"{name:<20}{found['parameters']:>12,}{found['steps']:>8,}{loss:>18.4f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
