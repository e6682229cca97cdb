"""``megalm plan`` as people and scripts call it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalm.checkpoint.manifest import read_manifest
from megalm.cli.app import main
from megalm.cli.show_plan import human
from megalm.model.language_model import LanguageModel
from megalm.nn.module import materialise
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.sim import run_simulated
from megalm.testing.runs import TEMPLATE
from megalm.train.prepare import Prepared
from megalm.train.stored import find_checkpoint

Plan = Callable[..., tuple[int, str, str]]
PreparedRun = Callable[..., Prepared]


@pytest.fixture
def run_toml(tmp_path: Path, store: Path) -> Path:
    path = tmp_path / "run.toml"
    text = TEMPLATE.format(run=tmp_path / "run", architecture="llama", data=store, objective="causal_lm")
    path.write_text(text + "[parallel]\ntp = 2\n", encoding="utf-8")
    return path


@pytest.fixture
def plan(run_toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """``plan("--comm")``: exit status, output, errors."""

    def call(*arguments: str, path: Path = run_toml) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megalm", "plan", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def test_the_layout_alone(plan: Plan, run_toml: Path) -> None:
    status, out, _ = plan("--ranks", "2")
    assert status == 0
    assert "tp 2, dp 1: 2 rank(s)" in out
    assert "--comm shows" in out
    assert "all_reduce" not in out
    assert not (run_toml.parent / "run").exists()


def test_a_table(plan: Plan) -> None:
    status, out, _ = plan("--comm", "--set", "parallel.dp=2", "--set", "train.micro_batch=4")
    assert status == 0
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    # 2 layers, a microbatch of 4 rows: 2 all-reduces each of 4 * 16 * 24 * 8 bytes
    assert rows["attention"].split() == ["attention", "tp", "all_reduce", "4", "48.00", "KiB", "48.00", "KiB"]
    for item in ("embedding", "mlp", "loss statistics", "loss gradient", "data-parallel gradients", "gradient norm"):
        assert item in rows
    assert {"total tp", "total dp", "total"} <= set(rows)
    assert "first microbatches" in out


def test_json_has_exact_bytes_of_every_rank(plan: Plan) -> None:
    arguments = ("--comm", "--eval", "--json", "--ranks", "4", "--set", "train.micro_batch=2", "--set")
    status, out, _ = plan(*arguments, "model.vocab_size=301")
    assert status == 0
    found = json.loads(out)
    sizes = {"ranks": 4, "pp": 1, "tp": 2, "sp": False, "dp": 2}
    assert found["layout"] == {**sizes, "micro_batch": 2, "microbatches": 2}
    assert set(found["communication"]) == {"step", "evaluation"}
    first, second = found["communication"]["step"]["classes"]
    assert (first["ranks"], second["ranks"]) == ([0, 2], [1, 3])
    assert found["communication"]["step"]["largest_rank"] == 0
    for place, each in enumerate((first, second)):
        gradients = next(item for item in each["items"] if item["item"] == "data-parallel gradients")
        assert gradients["payload_bytes"] == found["parameters"]["by_place"][0][place] * 8
        for name in ("calls", "payload_bytes", "wire_bytes"):
            axes = [each["totals"][axis][name] for axis in ("tp", "dp")]
            assert sum(axes) == each["totals"]["all"][name] == sum(item[name] for item in each["items"])
    # One embedding row more: its gradient, and the untied head's.
    more = first["totals"]["dp"]["payload_bytes"] - second["totals"]["dp"]["payload_bytes"]
    assert more == 2 * 24 * 8


def test_one_rank_says_nothing(plan: Plan) -> None:
    status, out, _ = plan("--comm", "--ranks", "1", "--set", "parallel.tp=1")
    assert status == 0
    assert "nothing is communicated" in out
    status, out, _ = plan("--comm", "--json", "--ranks", "1", "--set", "parallel.tp=1")
    (only,) = json.loads(out)["communication"]["step"]["classes"]
    assert only == {"ranks": [0], "items": [], "totals": {"all": {"calls": 0, "payload_bytes": 0, "wire_bytes": 0}}}


def test_a_teacher(plan: Plan, teacher: Callable[[str], Path]) -> None:
    """Its parameters are told apart from those that are trained, and what it says is counted."""
    path = teacher("gpt2")
    arguments = ["--ranks", "4", "--comm", "--set", 'train.objective="causal_lm+distill"', "--set", "parallel.pp=2"]
    arguments += ["--set", f'objective.distill.teacher="{path}"', "--set", "train.micro_batch=4"]
    status, out, err = plan(*arguments)
    assert status == 0, err
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    total = sum(shape.numel() for shape in logical_sizes(path))
    assert rows["its parameters"].split() == ["its", "parameters", f"{total:,}"]
    # Two microbatches of 4 rows of 16 tokens, 36 features of 8 bytes, to the second stage.
    sent = rows["teacher's hidden vectors between stages"].split()
    assert sent[-7:-2] == ["pp", "send", "2", "36.00", "KiB"]
    status, out, _ = plan(*arguments, "--json")
    found = json.loads(out)["teacher"]
    assert found["total"] == total
    assert Path(found["checkpoint"]).is_relative_to(path)
    # Both stages hold the embedding that the head is tied to, in shards of the vocabulary's rows.
    assert sum(count for places in found["by_place"] for count in places) > total


def logical_sizes(path: Path) -> list[torch.Size]:
    """Shapes of all weights in a run's checkpoint."""
    folder, _ = find_checkpoint(path)
    return [torch.Size(record.shape) for record in read_manifest(folder).weights.values()]


PIPELINE = ("--ranks", "8", "--set", "parallel.pp=2", "--set", "train.micro_batch=2", "--set", "model.layers=5")


def held_in_training(prepared_run: PreparedRun, *overrides: str) -> dict[tuple[int, int], int]:
    """Elements of the weights that simulated ranks allocate, by place on the pipeline and the tensor-parallel axis."""
    prepared = prepared_run("llama", *overrides, "train.micro_batch=2", world_size=8)

    def count(parallel: ParallelContext) -> tuple[tuple[int, int], int]:
        model = LanguageModel(prepared.spec, parallel, prepared.pipeline.stages_of(parallel.pp.index))
        materialise(model, parallel, 0, torch.float64)
        return (parallel.pp.index, parallel.tp.index), sum(p.numel() for p in model.parameters())

    return dict(run_simulated(count, pp=2, tp=2, dp=2))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.vocab_size=301", "parallel.pp_split=[1,4]"),
        ("model.tie_embeddings=true", "model.vocab_size=301"),
        ("parallel.pp_schedule='interleaved'", "parallel.pp_virtual=2"),
        ("parallel.pp_schedule='zb-v'",),
    ],
    ids=str,
)
def test_each_rank_of_a_pipeline_has_what_it_will_hold(
    plan: Plan, prepared_run: PreparedRun, overrides: tuple[str, ...]
) -> None:
    more = [word for override in overrides for word in ("--set", override)]
    status, out, err = plan("--json", *PIPELINE, *more)
    assert status == 0, err
    found = json.loads(out)
    held = held_in_training(prepared_run, "model.layers=5", "parallel.pp=2", "parallel.tp=2", *overrides)
    assert {(p, t): n for p, row in enumerate(found["parameters"]["by_place"]) for t, n in enumerate(row)} == held
    layout = found["layout"]
    assert (layout["ranks"], layout["pp"], layout["tp"], layout["dp"], layout["microbatches"]) == (8, 2, 2, 2, 2)
    layers = [number for stage in found["pipeline"]["stages"] for number in range(*stage["layers"])]
    assert layers == [0, 1, 2, 3, 4]


def test_without_tensor_parallelism_pipeline_ranks_add_up_to_the_model(plan: Plan) -> None:
    status, out, _ = plan("--json", *PIPELINE, "--set", "parallel.tp=1")
    assert status == 0
    parameters = json.loads(out)["parameters"]
    assert sum(only for (only,) in parameters["by_place"]) == parameters["total"]


def test_a_pipeline_is_shown_stage_by_stage(plan: Plan) -> None:
    more = ("--set", "parallel.pp_schedule=zb-v", "--set", "parallel.pp_split=[2,1,1,1]")
    status, out, _ = plan(*PIPELINE, *more)
    assert status == 0
    assert "pp 2, tp 2, dp 2: 8 rank(s)" in out
    assert "2 microbatch(es) of 2 row(s)" in out
    assert "Pipeline schedule zb-v, 4 stages" in out
    rows = {line.split()[0]: line.split("  ") for line in out.splitlines() if line[:2] in ("0 ", "1 ")}
    cells = {place: [cell.strip() for cell in row if cell.strip()][:3] for place, row in rows.items()}
    assert cells == {"0": ["0", "0, 3", "0-1, 4"], "1": ["1", "1, 2", "2, 3"]}


def test_the_communication_of_a_pipeline(plan: Plan) -> None:
    """The table is of the ranks that send most; beside it, what each pipeline rank sends."""
    more = ("--set", "model.tie_embeddings=true", "--set", "parallel.pp_split=[4,1]", "--comm")
    status, out, err = plan(*PIPELINE, *more, "--json")
    assert status == 0, err
    classes = json.loads(out)["communication"]["step"]["classes"]
    sent = {rank: each["totals"]["all"]["wire_bytes"] for each in classes for rank in each["ranks"]}
    assert set(sent) == set(range(8))
    items = {item["item"] for each in classes for item in each["items"]}
    assert {"hidden vectors between stages", "gradients between stages", "tied embedding at both ends"} <= items

    status, out, err = plan(*PIPELINE, *more)
    assert status == 0, err
    rows = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    start = next(n for n, row in enumerate(cells) if row[:2] == ["pp rank", "wire tp"])
    assert cells[start] == ["pp rank", "wire tp", "wire pp", "wire dp", "wire ends", "wire in all"]
    for place, row in enumerate(cells[start + 1 : start + 3]):
        assert row[0] == str(place)
        assert row[-1] == human(max(sent[rank] for rank in range(4 * place, 4 * place + 4)))
    # The first pipeline rank has four of five layers, and sends two microbatches of 2 * 16 tokens of 24 float64.
    assert cells[start + 1][2] == human(2 * 2 * 16 * 24 * 8 + 8 * 2)


MISTAKES = [
    ((), "give --ranks N, a multiple of tp * pp = 2"),
    (("--ranks", "3"), "parallel.tp = 2 does not divide the 3 rank(s)"),
    (("--ranks", "8", "--set", "parallel.dp=2"), "is 4 ranks, but the launch has 8"),
    (("--ranks", "0"), "--ranks"),
    (("--ranks", "two"), "--ranks"),
    (("--ranks", "2", "--set", "train.micro_batch=3"), "train.global_batch = 8 is not a multiple"),
    (("--ranks", "2", "--set", "data.path=nowhere"), "nowhere"),
    (("--ranks", "2", "--eval"), "give both"),
    (("--ranks", "2", "--com"), "--com"),
    (("--ranks", "2", "--plugins", "nosuch"), "nosuch"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=str)
def test_mistakes_are_one_message(plan: Plan, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = plan(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err


def test_no_such_file(plan: Plan, tmp_path: Path) -> None:
    status, _, err = plan("--ranks", "2", path=tmp_path / "none.toml")
    assert status == 2
    assert "none.toml" in err
