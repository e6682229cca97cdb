"""Rows built in a process of their own, with other hash seeds: what sets and ``hash()`` of texts decide differs there.

Run as a program it needs no torch, and so starts in a moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.load import load_config
from megalm.data.store import TOKENIZER_FOLDER, TokenStore
from megalm.data.tokenizer import load_tokenizer
from megalm.plugin.contract.objective import Corpus, ObjectiveEnv
from megalm.plugin.manager import PluginManager
from megalm.testing.fresh import run_fresh
from megalm.train.build import build_objective
from megalm.train.objective import TrainingObjective

Digests = dict[str, str]
"""Of each tensor of a row, by name."""


def digests(
    objective: TrainingObjective, corpus: Corpus, seed: int, numbers: Iterable[int]
) -> Iterator[tuple[int, Digests]]:
    """(sample, digests) of rows of the first epoch."""
    for number in numbers:
        example = objective.build(number, corpus, (seed, "train", 0))
        yield number, {key: _digest(value) for key, value in example.items()}


def _digest(value: Any) -> str:
    array = np.asarray(value)
    return sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def built_elsewhere(
    toml: str, plugins: Iterable[str], numbers: Iterable[int], folder: Path, hash_seed: int
) -> list[tuple[int, Digests]]:
    """Digests from a fresh process, for the run that ``toml`` configures. Raises FreshProcessError."""
    config, answer = folder / "rows.toml", folder / "rows.json"
    config.write_text(toml, encoding="utf-8")
    code = f"from {__name__} import main; main()"
    wanted = json.dumps({"plugins": list(plugins), "numbers": list(numbers)})
    run_fresh(code, [str(config), wanted, str(answer)], {"PYTHONHASHSEED": str(hash_seed % 2**32)})
    return [(number, found) for number, found in json.loads(answer.read_text(encoding="utf-8"))]


def main() -> None:
    """Build rows as the command line says, and write their digests."""
    config, wanted, answer = sys.argv[1:]
    job = json.loads(wanted)
    manager = PluginManager.for_launch(job["plugins"])
    resolved = load_config(Path(config), [], manager)
    data, train = Path(resolved.config.data.paths[0]), resolved.config.train
    _, tokenizer = load_tokenizer(data / TOKENIZER_FOLDER, manager.tokenizer_class)
    objective = build_objective(resolved, manager, ObjectiveEnv(tokenizer, train.sequence_length))
    corpus = TokenStore.open(data, "train")
    found = list(digests(objective, corpus, resolved.config.run.seed, job["numbers"]))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
