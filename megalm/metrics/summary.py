"""summary.json: a finished run in figures, for people and for scripts that compare runs.

Keys: ``steps``, ``samples``, ``tokens`` (whole run, resumes included), ``train_loss``, ``eval_loss``, ``eval_terms``
(nats), ``tokens_per_second``, ``seconds``, ``weights_sha256``, ``layout``, ``versions``, ``device``; where they are
known, ``baselines`` (name to nats), ``parameters``, ``plugins`` (name to facts) and ``warnings``. It is written last
and whole, so its presence says that the run ended well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm import files
from megalm.errors import DataError
from megalm.metrics import jsonl

NAME = "summary.json"


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary`` to the run folder atomically and return its path; NaN and infinities as in metrics.jsonl."""
    path = run_dir / NAME
    files.write_text(path, jsonl.dumps(summary, indent=2) + "\n")
    return path


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The summary of a run folder, empty where there is none. Raises DataError where it is not a JSON object."""
    path = run_dir / NAME
    try:
        found = jsonl.decode(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it and run again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(found).__name__}; remove it and run again")
    return found
