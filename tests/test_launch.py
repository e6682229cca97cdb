"""What ranks compare before they start."""

from __future__ import annotations

from typing import Any

from megalm.launch import _disagreements


def facts(**changes: Any) -> dict[str, Any]:
    same = {"configuration": {"train": {"lr": 0.1, "steps": 4}}, "versions": {"torch": "2.13.0"}, "data": "ab"}
    return {**same, **changes}


def test_ranks_that_agree() -> None:
    assert _disagreements([facts()] * 4) == []


def test_each_difference_is_named_with_both_values() -> None:
    other = facts(configuration={"train": {"lr": 0.2, "steps": 4}}, versions={"torch": "2.11.0"}, data="cd")
    head, *lines = _disagreements([facts(), facts(), other])
    assert "rank 2 differs from rank 0" in head
    assert lines == [
        "  configuration: train.lr: 0.1 -> 0.2",
        '  versions: torch: "2.13.0" -> "2.11.0"',
        "  data: ab -> cd",
    ]
