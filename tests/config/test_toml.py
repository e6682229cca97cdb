from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.keys import diff_configs, dotted
from megalm.config.toml import dumps

SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=12,
)
TABLES = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), VALUES, max_size=5)


@settings(max_examples=300, deadline=None)
@given(TABLES)
def test_what_is_written_reads_back(table):
    read = tomllib.loads(dumps(table))
    assert read == {key: value for key, value in table.items() if value != {}}


def test_none_is_left_out_of_tables_and_refused_in_lists():
    assert tomllib.loads(dumps({"a": None, "b": {"c": None, "d": {"e": None, "f": 1}}})) == {"b": {"d": {"f": 1}}}
    with pytest.raises(TypeError, match="None"):
        dumps({"a": [None]})


def test_dotted():
    assert dotted(("a", "b c", 2, "d-e")) == 'a."b c"[2].d-e'


def test_diff():
    old = {"train": {"lr": 0.001, "steps": 5, "gone": 1}, "x": {"same": [1], "none": None}, "flag": True}
    new = {"train": {"lr": 0.002, "steps": 5.0, "new": "a"}, "x": {"same": [1]}, "y": {}, "flag": 1}
    assert diff_configs(old, new) == [
        "flag: true -> 1",
        "train.gone: 1 -> (not set)",
        "train.lr: 0.001 -> 0.002",
        'train.new: (not set) -> "a"',
    ]
    assert diff_configs(old, old) == []
