"""Labelled records from files: what is read, and how what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megalm.data.labelled.read import format_of, read_records
from megalm.data.labelled.records import Records, corpus_problems, label_names
from megalm.errors import DataError
from megalm.plugin.contract.records import FieldSpec

TEXT = {"text": FieldSpec("text", "the text"), "label": FieldSpec("class", "its label", label=True)}
PAIR = {
    "text": FieldSpec("text", "one"),
    "text_pair": FieldSpec("text", "other"),
    "value": FieldSpec("number", "how alike", label=True),
}
TAGS = {"words": FieldSpec("words", "the words"), "tags": FieldSpec("tags", "their tags", of="words", label=True)}
ANSWERS = {
    "question": FieldSpec("text", "what is asked"),
    "context": FieldSpec("text", "where it is answered"),
    "answers": FieldSpec("spans", "the answers", of="context", label=True),
}
MANY = {"text": FieldSpec("text", "the text"), "labels": FieldSpec("classes", "its labels", label=True)}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def read(folder: Path, name: str, text: str, fields: dict[str, FieldSpec], **more: Any) -> Records:
    return read_records([write(folder, name, text)], fields, **more)


def test_tsv_with_a_header(tmp_path: Path) -> None:
    found = read(tmp_path, "a.tsv", 'label\ttext\tx\nno\t"quoted, not closed\t1\n\nyes\tb\u2028c \t2\r\n', TEXT)
    assert found.rows == [{"text": '"quoted, not closed', "label": "no"}, {"text": "b\u2028c ", "label": "yes"}]
    assert found.where(1) == f"{tmp_path}/a.tsv: line 4"
    assert label_names(found, TEXT) == ("no", "yes")


def test_tsv_by_number_and_only_some_rows(tmp_path: Path) -> None:
    text = "train\tA\tone\ntest\tB\ttwo\n"
    columns = {"label": "2", "text": "3"}
    assert len(read(tmp_path, "a.tsv", text, TEXT, columns=columns)) == 2
    (row,) = read(tmp_path, "a.tsv", text, TEXT, columns=columns, only={"1": "test"})
    assert row == {"text": "two", "label": "B"}
    with pytest.raises(DataError, match="no records with 1=dev"):
        read(tmp_path, "a.tsv", text, TEXT, columns=columns, only={"1": "dev"})


def test_csv_as_rfc_4180_has_it(tmp_path: Path) -> None:
    text = 'a "b","c, d",2.5\r\n'.replace('a "b"', '"a ""b"""') + '"two\nlines",e,-1e-1\n'
    columns = {"text": "1", "text_pair": "2", "value": "3"}
    found = read(tmp_path, "s.csv", text, PAIR, columns=columns)
    assert found.rows == [
        {"text": 'a "b"', "text_pair": "c, d", "value": 2.5},
        {"text": "two\nlines", "text_pair": "e", "value": -0.1},
    ]
    assert found.where(1) == f"{tmp_path}/s.csv: lines 2-3"
    with pytest.raises(DataError, match=r"s.csv: line 2: not valid CSV"):
        read(tmp_path, "s.csv", 'a,b,1\n"open,b,1\n', PAIR, columns=columns)


def test_an_empty_cell_is_an_unknown_label(tmp_path: Path) -> None:
    found = read(tmp_path, "a.tsv", "text\tlabel\tid\nx\t\t7\ny\tno\t8\n", TEXT)
    assert found.rows == [{"text": "x", "id": "7"}, {"text": "y", "label": "no", "id": "8"}]
    bad, lines = corpus_problems(found, TEXT, ("no",))
    assert (bad, len(lines)) == (1, 1)
    assert lines[0].startswith(f"{tmp_path}/a.tsv: line 2: field 'label' is missing")
    assert read(tmp_path, "b.tsv", "text\nx\n", TEXT, labelled=False).rows == [{"text": "x"}]


def test_cells_of_several_kinds(tmp_path: Path) -> None:
    assert read(tmp_path, "a.tsv", "text\tlabels\nx\ta, b\n", MANY).rows == [{"text": "x", "labels": ["a", "b"]}]
    spans = read(tmp_path, "b.tsv", "question\tcontext\tanswers\nq\tabc\t0:1,1:3\n", ANSWERS)
    assert spans[0]["answers"] == [[0, 1], [1, 3]]
    assert read(tmp_path, "c.tsv", "words\ttags\na b\tX Y\n", TAGS)[0] == {"words": ["a", "b"], "tags": ["X", "Y"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "txt\tlabel\nx\ty\n",
            r"a.tsv: line 1: no column 'text' for the field 'text', only 'txt', 'label'; did you mean",
        ),
        ("text\tlabel\nx\ty\nz\n", r"a.tsv: line 3: has 1 columns, but line 1 has 2"),
        ("text\ttext\tlabel\nx\ty\tz\n", r"line 1: two columns are called 'text'"),
        ("", r"a.tsv: is empty"),
        ("text\tlabel\n", r"a.tsv: no records"),
        ("text\tlabel\nx\x00\ty\n", r"a.tsv: line 2: holds a NUL byte"),
    ],
)
def test_tables_at_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.tsv", text, TEXT)


def test_bytes_and_cells_at_fault_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"text\tlabel\nx\ty\n\xff\tz\n")
    with pytest.raises(DataError, match=r"a.tsv: line 3: holds 0xff, which is not valid UTF-8"):
        read_records([path], TEXT)
    columns = {"text": "1", "text_pair": "2", "value": "3"}
    for cell in ("nan", "1,5", "inf", "1_0", "x"):
        with pytest.raises(DataError, match=r"n.tsv: line 1: column 3, field 'value': expected a number"):
            read(tmp_path, "n.tsv", f"a\tb\t{cell}\n", PAIR, columns=columns)
    with pytest.raises(DataError, match=r"a column is given for 'txt', which the head does not read.*mean \"text\""):
        read(tmp_path, "a.tsv", "x\ty\n", TEXT, columns={"txt": "1"})
    with pytest.raises(DataError, match=r"line 1: has 2 columns, but column 3 is asked for for the field 'label'"):
        read(tmp_path, "a.tsv", "x\ty\n", TEXT, columns={"text": "1", "label": "3"})


def test_rows_at_fault_can_be_skipped(tmp_path: Path) -> None:
    found = read(tmp_path, "a.tsv", "text\tlabel\nx\ty\nz\nw\ty\n", TEXT, skip=True)
    assert len(found) == 2
    assert found.skipped == {"another number of columns": 1}
    found = read(tmp_path, "a.jsonl", '{"text": "x"}\nnone\n[1]\n', TEXT, skip=True)
    assert len(found) == 1
    assert found.skipped == {"not valid JSON": 1, "not an object": 1}


def test_jsonl(tmp_path: Path) -> None:
    text = '{"sentence": "a", "label": "x", "id": 3}\n\n{"sentence": "b", "label": null}\n'
    found = read(tmp_path, "a.jsonl", text, TEXT, columns={"text": "sentence"})
    assert found.rows == [{"text": "a", "label": "x", "id": 3}, {"text": "b"}]
    assert found.where(1).endswith("line 3")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_records([packed], TEXT, columns={"text": "sentence"}).rows == found.rows
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b.jsonl.gz: cannot be read"):
        read_records([packed], TEXT)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a.jsonl: line 2: column 2: not valid JSON"),
        ('{"sentence": NaN}', r"line 2: not usable JSON: NaN is no number"),
        ('"x"', "line 2: expected an object, found str"),
        ('{"sentance": "a"}', r"line 2: no key 'sentence' for the field 'text', only 'sentance'; did you mean"),
        (r'{"sentence": "\ud800"}', "line 2: character 0 .* is half of a surrogate pair"),
    ],
)
def test_jsonl_at_fault(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.jsonl", f'{{"sentence": "ok"}}\n{line}\n', TEXT, columns={"text": "sentence"})


def test_conll(tmp_path: Path) -> None:
    text = "-DOCSTART-\tO\n\n# split = dev\n# a note\nAnn\tB-PER\n#tag\tO\n\t\n# split=test\nin\tO\n\ufeff\n"
    found = read(tmp_path, "a.conll", text, TAGS)
    assert found.rows == [{"words": ["Ann", "#tag"], "tags": ["B-PER", "O"]}, {"words": ["in"], "tags": ["O"]}]
    assert found.where(0) == f"{tmp_path}/a.conll: lines 5-6"
    assert read(tmp_path, "a.conll", text, TAGS, only={"split": "test"})[0]["words"] == ["in"]
    spaced = read(tmp_path, "b.conll", "# # I-NP O\nEly NNP I-NP B-LOC\n", TAGS)
    assert spaced.rows == [{"words": ["#", "Ely"], "tags": ["O", "B-LOC"]}]
    middle = read(tmp_path, "b.conll", "Ely NNP I-NP B-LOC\n", TAGS, columns={"tags": "2"})
    assert middle[0]["tags"] == ["NNP"]
    assert read(tmp_path, "c.conll", "Ann\nBob\n", TAGS, labelled=False).rows == [{"words": ["Ann", "Bob"]}]


def test_conll_at_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.conll: line 4: has 1 columns, but line 1 has 2"):
        read(tmp_path, "a.conll", "a\tO\n\nb\tO\nc\n", TAGS)
    with pytest.raises(DataError, match=r"CoNLL has words and tags, but this head reads text, label"):
        read(tmp_path, "a.conll", "a\tO\n", TEXT)
    with pytest.raises(DataError, match=r"line 1: has 2 columns, but column 5 is asked for"):
        read(tmp_path, "a.conll", "a\tO\n", TAGS, columns={"tags": "5"})
    with pytest.raises(DataError, match=r"line 1: has 1 columns, but column -1 is asked for.* beside the words"):
        read(tmp_path, "a.conll", "a\n", TAGS)
    found = read(tmp_path, "a.conll", "a\tO\nb\tX\n", TAGS)
    _, lines = corpus_problems(found, TAGS, ("O",))
    assert lines[0].startswith(f"{tmp_path}/a.conll: lines 1-2: field 'tags': ")


def squad(*answers: dict[str, Any], context: str = "Ely is in the Fens, Ely!") -> str:
    question = {"id": "q1", "question": "Where?", "answers": list(answers)}
    return json.dumps({"version": 1, "data": [{"paragraphs": [{"qas": [question], "context": context}]}]}, indent=1)


def test_squad(tmp_path: Path) -> None:
    right = {"text": "the Fens", "answer_start": 10}
    found = read(tmp_path, "a.json", squad(right, right), ANSWERS)
    assert found[0]["answers"] == [[10, 18]]
    assert found[0]["id"] == "q1"
    assert found.where(0) == f"{tmp_path}/a.json: line 8, data[0].paragraphs[0].qas[0]"
    assert not found.mended
    shifted = read(tmp_path, "a.json", squad({"text": " Ely ", "answer_start": 15}), ANSWERS)
    assert shifted[0]["answers"] == [[20, 23]]
    assert sum(shifted.mended.values()) == 1
    assert read(tmp_path, "a.json", squad(), ANSWERS)[0]["answers"] == []
    flat = {"question": "q", "context": "ab cd", "answers": {"text": ["cd"], "answer_start": [3]}}
    assert read(tmp_path, "f.jsonl", json.dumps(flat), ANSWERS)[0]["answers"] == [[3, 5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            squad({"text": "Paris", "answer_start": 0}),
            r"line 8, data\[0\].paragraphs\[0\].qas\[0\]: the answer 'Paris'",
        ),
        (squad({"text": "Ely"}), r"line 8, .*: expected the character where 'Ely' begins, found None"),
        (squad({"text": "", "answer_start": 0}), r"expected an answer's text, found ''"),
        ('{"data": [{"paragraphs": [\n{"context": 3}]}]}', r"line 2, data\[0\].paragraphs\[0\]: expected 'context'"),
        ('{"data": 3}', r"a.json: line 1: expected 'data' with a list, found int"),
        ("[]", r"a.json: line 1: expected 'data' with a list, found nothing"),
        ('{"data":\n[}', r"a.json: line 2, column 2: not valid JSON"),
    ],
)
def test_squad_at_fault(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.json", text, ANSWERS)


def test_formats_by_name(tmp_path: Path) -> None:
    assert format_of(Path("x.v2.tsv.gz")) == "tsv"
    with pytest.raises(DataError, match=r"x.txt: the name does not tell the format; give one of tsv"):
        format_of(Path("x.txt"))
    assert len(read(tmp_path, "x.txt", "text\tlabel\na\tb\n", TEXT, format="tsv")) == 1
