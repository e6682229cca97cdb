"""``megalm predict`` and ``megalm eval`` on a tuned checkpoint: numbers, files, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megalm.cli.app import app
from megalm.config.load import load_config
from megalm.errors import UsageError
from megalm.parallel import rng
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.prepare import prepare_run
from megalm.train.trainer import Trainer

pytest.importorskip("sklearn")

RUN = """
[run]
dir = "{folder}/tuned"
[model]
architecture = "bert"
layers = 1
hidden_size = 24
heads = 6
init_std = 0.3
[data.records]
train = ["{folder}/train.tsv"]
[train]
head = "sequence_classification"
steps = 20
sequence_length = 16
global_batch = 8
micro_batch = 8
lr = 1e-2
[head.sequence_classification]
pooling = "mean"
[finetune]
method = "full"
[checkpoint]
load = "{folder}/base"
[launch]
threads = 1
device = "cpu"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained and a tuned run, and test.tsv."""
    folder, manager = tmp_path_factory.mktemp("eval"), PluginManager.for_launch(None)
    store = make_store(tmp_path_factory.mktemp("eval-store"), documents=60, manager=manager)
    common = [
        "train.precision=float32",
        "train.steps=1",
        "sample.tokens=0",
        f"run.dir={folder / 'base'}",
        "model.layers=1",
    ]
    base = make_run(folder, store, objective="mlm", architecture="bert", overrides=common, manager=manager)
    Trainer(base, single_rank()).run()
    draw = rng.generator("eval")
    texts = ["".join(draw.choice(list("ab"), size=9)) for _ in range(90)]
    rows = [f"{text}\t{'more' if text.count('a') > 4 else 'fewer'}\n" for text in texts]
    (folder / "train.tsv").write_text("text\tlabel\n" + "".join(rows[:70]))
    (folder / "test.tsv").write_text("text\tlabel\n" + "".join(rows[70:]))
    (folder / "tuned.toml").write_text(RUN.format(folder=folder))
    Trainer(prepare_run(load_config(folder / "tuned.toml", [], manager), manager, 1, "cpu"), single_rank()).run()
    return folder


def megalm(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_predictions_are_measured_as_the_model_is(folder: Path, tmp_path: Path) -> None:
    data = ["--data", folder / "test.tsv"]
    assert megalm("predict", folder / "tuned", *data, "--out", tmp_path / "p.jsonl", "--batch", 3).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows = [line.split("\t") for line in (folder / "test.tsv").read_text().splitlines()[1:]]
    assert [line["record"] for line in lines] == list(range(20))
    right = sum(line["prediction"]["label"] == label for line, (_, label) in zip(lines, rows, strict=True)) / 20
    one = json.loads(megalm("eval", folder / "tuned", *data, "--json").stdout)
    read = megalm(
        "eval", folder / "tuned", *data, "--json", "--predictions", tmp_path / "p.jsonl", "--out", tmp_path / "m"
    )
    other = json.loads(read.stdout)
    assert one["metrics"] == other["metrics"] == json.loads((tmp_path / "m").read_text())["metrics"]
    assert one["metrics"]["accuracy"] == pytest.approx(right)
    assert (one["records"], one["cut"], other["cut"]) == (20, 0, None)
    support = {name: row["support"] for name, row in one["report"]["labels"].items()}
    assert support == {label: sum(row[1] == label for row in rows) for label in ("fewer", "more")}
    shown = megalm("eval", folder / "tuned", *data).stdout
    assert "precision" in shown
    assert f"{right:.4f}" in shown


def test_texts_that_are_cut_are_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.tsv"
    path.write_text("text\tlabel\n" + "a" * 99 + "\tmore\nab\tfewer\n")
    result = megalm("eval", folder / "tuned", "--data", path, "--json")
    assert json.loads(result.stdout)["cut"] == 1
    assert "1 of 2 records are longer than 16 tokens and were cut" in result.stderr


def test_what_is_wrong_is_refused_with_file_and_line(folder: Path, tmp_path: Path) -> None:
    def refused(text: str, message: str, *more: object, command: str = "eval", checkpoint: str = "tuned") -> None:
        path = tmp_path / "t.tsv"
        path.write_text(text)
        out = ("--out", tmp_path / "never") if command == "predict" else ()
        with pytest.raises(UsageError, match=message):
            megalm(command, folder / checkpoint, "--data", path, *out, *more)
        assert not (tmp_path / "never").exists()

    refused(
        "text\tlabel\na\tmore\nb\tequal\n",
        r"t\.tsv: line 3: field 'label': expected one of 'fewer, more', found 'equal'",
    )
    refused("text\tlabel\na\t\n", r"t\.tsv: line 2: field 'label' is missing")
    refused("text\tlabel\n \tmore\n", r"t\.tsv: line 2: field 'text': expected text that is not blank")
    refused("text\nx\ty\n", r"t\.tsv: line 2: has 2 columns, but line 1 has 1", command="predict")
    refused("text\nx\n", r"t\.tsv: line 1: no column 'label'")
    refused("text\tlabel\na\tmore\n", r"--column text: expected NAME=VALUE", "--column", "text")
    refused("text\tlabel\na\tmore\n", r"--format xml: expected one of", "--format", "xml")
    refused("text\tlabel\na\tmore\n", r"has no head: it was trained with mlm", checkpoint="base")


def test_predictions_for_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    megalm("predict", folder / "tuned", "--data", folder / "test.tsv", "--out", tmp_path / "p.jsonl")
    head, *rows = (folder / "test.tsv").read_text().splitlines(keepends=True)

    def refused(data: str, message: str) -> None:
        (tmp_path / "t.tsv").write_text(data)
        with pytest.raises(UsageError, match=message):
            megalm("eval", folder / "tuned", "--data", tmp_path / "t.tsv", "--predictions", tmp_path / "p.jsonl")

    refused("".join([head, *rows[:-1]]), r"p\.jsonl: has 20 predictions, but the data has 19 records")
    refused(
        "".join([head, rows[1], rows[0], *rows[2:]]), r"p\.jsonl: line 1: is a prediction for record 0 of other data"
    )
    lines = (tmp_path / "p.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "p.jsonl").write_text("".join([*lines[:3], "{\n", *lines[4:]]))
    refused("".join([head, *rows]), r"p\.jsonl: line 4: not valid JSON")


def test_help_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys; from megalm.cli.app import main; sys.argv = ['megalm', 'eval', '--help']\n"
        "try: main()\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
