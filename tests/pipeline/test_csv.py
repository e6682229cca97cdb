"""Tables: written, read back, and refused with row and column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.api import order_from_csv, order_to_csv
from megalm.errors import ScheduleError
from megalm.pipeline.choose import choose
from megalm.pipeline.verify import verify
from megalm.plugin.contract.pipeline import PipelineOrder, PipelineShape
from megalm.plugin.manager import PluginManager

from .conftest import NAMES

Build = Callable[..., PipelineOrder]
GOOD = "0F0,0F1,0BW0,0BW1\n1F0,1BW0,1F1,1BW1\n"


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(build: Build, name: str) -> None:
    for ranks, microbatches in ((1, 1), (2, 3), (4, 8)):
        order = build(name, ranks, microbatches)
        again = order_from_csv(order_to_csv(order), "x.csv")
        assert again == order
        verify(again)


def test_what_people_and_spreadsheets_write() -> None:
    """Empty cells for idle moments, comments, empty lines, spaces, quotes, a byte-order mark, foreign line ends."""
    text = '\ufeff# by hand, with a comma\r\n\r\n0F0, 0F1,,,0BW0,0BW1\r\n,"1F0",1BW0,1F1,1BW1,\r\n,,\r\n'
    assert order_from_csv(text, "x.csv") == order_from_csv(GOOD, "y.csv")


def test_the_placement_is_where_the_actions_are() -> None:
    order = order_from_csv("0F0,3F0,3BW0,0BW0\n1F0,2F0,2BW0,1BW0\n", "v.csv")
    assert order.placement == (0, 1, 1, 0)
    verify(order)


BAD = [
    ("0F0,0BW0,\n1F0,1XX0\n", "t.csv, row 2, column 2: '1XX0' is no action; expected stage, kind (F, B, W or BW) and"),
    ("0F0,-1BW0\n", "t.csv, row 1, column 2: '-1BW0' is no action"),
    ("0F0,0bw0\n", "row 1, column 2: '0bw0' is no action"),
    ("0F0," + "x" * 500 + "\n", "row 1, column 2: '" + "x" * 37 + "...' is no action"),
    ("0F9999999,0BW0\n", "row 1, column 1: 0F9999999: stages and microbatches are numbers below 1,000,000"),
    ("# none\n\n", "t.csv: no action; expected a row for each rank"),
    ("", "t.csv: no action"),
    (
        "0F0,0BW0\n1F0,1BW0\n0F1,0BW1\n",
        "row 3, column 1: 0F1 is on rank 2, but stage 0 belongs to rank 0, which has it at row 1, column 1",
    ),
    ("0F0,0BW0\n2F0,2BW0\n", "t.csv: there is a stage 2, but no action of stage 1"),
    ('0F0,"0BW0\n', "t.csv, row 1: not CSV"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_no_table_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        order_from_csv(text, "t.csv")
    assert message in str(error.value)


WRONG = [
    (
        "# note\n0F0,0F1,0BW0,0BW1\n1F0,,1BW0,1F1,1BW1,1F1\n",
        "t.csv, row 3, column 6: 1F1 is there twice; the first is at t.csv, row 3, column 4",
    ),
    ("0F0,0F1,0BW0,0BW1\n1F0,1BW0,1BW1\n", "t.csv, row 2, column 3: 1BW1 is there, but the forward that it needs, 1F1"),
    ("0F0,0BW0,0F1\n1F0,1BW0,1F1,1BW1\n", "t.csv, after row 1, column 3: 0B1, the input gradient of microbatch 1"),
    (
        "0F0,0BW0,0F1,0BW1\n1F1,1BW1,1F0,1BW0\n",
        "t.csv, row 1, column 2: 0BW0 can never run: 0BW0 (t.csv, row 1, "
        "column 2) waits for 1BW0 (t.csv, row 2, column 4), which comes after 1F1",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_cannot_run_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ScheduleError) as error:
        verify(order_from_csv(text, "t.csv"))
    assert message in str(error.value)


def test_a_file_is_a_schedule(tmp_path: Path, manager: PluginManager) -> None:
    path = tmp_path / "a:b.csv"
    path.write_text(GOOD)
    chosen = choose(f"csv:{path}", manager)
    assert chosen.shape(None, None, None) == PipelineShape(2, 2, 1)
    assert chosen.build(PipelineShape(2, 2)) == order_from_csv(GOOD, "")
    assert choose(f"pipeline_schedules:csv:{path}", manager).build(PipelineShape(2, 2)) == order_from_csv(GOOD, "")
    with pytest.raises(ScheduleError) as error:
        chosen.build(chosen.shape(4, None, None))
    assert "does not admit P=4, M=2, V=1: the table is of P=2, M=2, V=1" in str(error.value)
    assert "what it admits: P=2, M=2, V=1" in str(error.value)
