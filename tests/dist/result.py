"""What a run leaves, to compare one that was interrupted with one that was not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """What must not depend on interruptions."""

    sha256: str
    records: list[dict[str, Any]]
    eval_loss: float

    @classmethod
    def read(cls, run: Path) -> Result:
        summary = json.loads((run / "summary.json").read_text())
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            record.pop("tokens_per_second", None)
        return cls(summary["weights_sha256"], records, summary["eval_loss"])
