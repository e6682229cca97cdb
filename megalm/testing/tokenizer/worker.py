"""The part of a tokenizer's checks that runs in a fresh process: other hash seeds, other threads, and files so damaged
that reading them may crash.

A job comes as a JSON file and its answer goes to another, so that what a plugin prints cannot disturb it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.errors import TokenizerError
from megalm.plugin.contract.tokenizer import Tokenizer
from megalm.testing.fresh import FreshProcessError, run_fresh

_CODE = "from megalm.testing.tokenizer.worker import main; main()"


def describe(tokenizer: Tokenizer, probes: Sequence[str]) -> dict[str, Any]:
    """What two tokenizers must have in common to be the same, as JSON."""
    special = tokenizer.special
    return {
        "identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "special": {role: index for role, index in vars(special).items() if index is not None},
        "ids": [list(map(int, found)) for found in tokenizer.encode_batch(list(probes))],
    }


def trained_elsewhere(
    target: str, settings: str, texts: Sequence[str], saved: Path, probes: Sequence[str], folder: Path, hash_seed: int
) -> dict[str, Any]:
    """In a process of another hash seed: train again, and load ``saved``; ``{"trained": ..., "loaded": ...}``, each as
    :func:`describe` says. ``settings`` is JSON; ``folder`` an empty folder. Raises FreshProcessError."""
    job = {"target": target, "settings": settings, "texts": list(texts), "saved": str(saved), "probes": list(probes)}
    env = {"PYTHONHASHSEED": str(hash_seed % 2**32), "RAYON_NUM_THREADS": str(1 + hash_seed % 3)}
    return dict(_run("train", job, folder, env))


def loaded_elsewhere(target: str, folders: Sequence[Path], probes: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Load each of ``folders``: as :func:`describe` says, or ``{"refused": message}`` where a TokenizerError says why,
    ``{"raised": "Type: message"}`` for another exception. Where the process dies of one, ``{"crashed": how}`` is the
    last answer."""
    progress = folder / "progress"
    progress.touch()
    job = {"target": target, "folders": list(map(str, folders)), "probes": list(probes), "progress": str(progress)}
    try:
        return list(_run("load", job, folder, {}))
    except FreshProcessError as error:
        done = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()]
        return [*done, {"crashed": str(error)}]


def _run(what: str, job: dict[str, Any], folder: Path, env: dict[str, str]) -> Any:
    (folder / "job.json").write_text(json.dumps({"what": what, **job}), encoding="utf-8")
    run_fresh(_CODE, [str(folder / "job.json"), str(folder / "answer.json")], env)
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def main() -> None:
    """Do the job of the file that the first argument names; the answer goes to the second."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    module, _, attribute = job["target"].partition(":")
    cls: Any = importlib.import_module(module)
    for part in attribute.split("."):
        cls = getattr(cls, part)
    answer = _train(cls, job) if job["what"] == "train" else _load(cls, job)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def _train(cls: Any, job: dict[str, Any]) -> dict[str, Any]:
    trained = cls.train(iter(job["texts"]), cls.Config.model_validate_json(job["settings"]))
    return {
        "trained": describe(trained, job["probes"]),
        "loaded": describe(cls.load(Path(job["saved"])), job["probes"]),
    }


def _load(cls: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    answers = []
    with Path(job["progress"]).open("w", encoding="utf-8") as progress:
        for folder in job["folders"]:
            answers.append(_try_load(cls, Path(folder), job["probes"]))
            progress.write(json.dumps(answers[-1]) + "\n")
            progress.flush()
    return answers


def _try_load(cls: Any, folder: Path, probes: Sequence[str]) -> dict[str, Any]:
    try:
        tokenizer = cls.load(folder)
        identity = tokenizer.identity
    except TokenizerError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    try:
        return describe(tokenizer, probes)
    except Exception as error:  # the engine refuses another identity before it encodes anything
        return {"identity": identity, "unusable": f"{type(error).__name__}: {error}"}
