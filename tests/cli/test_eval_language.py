"""``megalm eval`` of language models: against transformers, a run's own evaluation, and itself under other layouts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner, Result

from megalm.cli.app import app
from megalm.data.store import TokenStore
from megalm.errors import CheckpointError, DataError, LayoutError, UsageError
from megalm.hf.exporting import export_hf
from megalm.metrics.summary import read_summary
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.plugin.contract.objective import IGNORE
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.language_scoring import LanguageScores, language_objective, score_language
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.trainer import Trainer

SETTINGS = ("model.layers=3", "model.dropout=0.1", "train.steps=2", "sample.tokens=0", "eval.final_samples=100000")


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("language"), manager=manager)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, store: Path, manager: PluginManager
) -> Callable[..., Path]:
    """``trained("mlm", "model.x=1")``: the folder of a run."""
    known: dict[tuple[str, ...], Path] = {}

    def run(objective: str, *overrides: str) -> Path:
        if (objective, *overrides) not in known:
            prepared = make_run(
                tmp_path_factory.mktemp("run"),
                store,
                objective=objective,
                architecture="gpt2" if "causal_lm" in objective else "bert",
                overrides=[*SETTINGS, *overrides],
                manager=manager,
            )
            Trainer(prepared, single_rank()).run()
            known[(objective, *overrides)] = prepared.run_dir
        return known[(objective, *overrides)]

    return run


def megalm(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def measured(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(megalm("eval", *arguments, "--json").stdout)
    return found


def in_transformers(run: Path, manager: PluginManager, out: Path, name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    export_hf(open_stored(find_checkpoint(run)[0], manager), out, dtype="float32", verify=False)
    return getattr(transformers, name).from_pretrained(out, dtype=torch.float64).eval()


def test_perplexity_of_a_causal_model(
    trained: Callable[..., Path], store: Path, manager: PluginManager, tmp_path: Path
) -> None:
    run = trained("causal_lm", "train.precision=float32")
    theirs = in_transformers(run, manager, tmp_path / "hf", "AutoModelForCausalLM")
    corpus = TokenStore.open(store, "validation")
    rows = (corpus.num_tokens - 1) // 16
    ids = torch.from_numpy(np.stack([corpus.stream(n * 16, n * 16 + 17) for n in range(rows)]).astype(np.int64))
    with torch.no_grad():
        losses = F.cross_entropy(theirs(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
    wide = ("--data", store, "--precision", "float64")
    found = measured(run, *wide, "--batch", 5)
    assert found["rows"] == rows
    assert found["scored"] == {"causal_lm": 16 * rows}
    assert found["terms"]["causal_lm"] == pytest.approx(losses.mean().item(), rel=1e-10)
    assert found["perplexity"]["causal_lm"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-10)
    # Some rows, and rows of other lengths.
    assert measured(run, *wide, "--samples", 3)["loss"] == pytest.approx(losses[:3].mean().item(), rel=1e-10)
    short = measured(run, *wide, "--length", 8, "--samples", 2)
    windows = torch.stack((ids[0, :9], ids[0, 8:17]))
    with torch.no_grad():
        expected = F.cross_entropy(theirs(windows[:, :-1]).logits.transpose(1, 2), windows[:, 1:])
    assert short["loss"] == pytest.approx(expected.item(), rel=1e-10)
    assert short["scored"] == {"causal_lm": 16}


def test_pseudo_perplexity_of_a_masked_model(
    trained: Callable[..., Path], store: Path, manager: PluginManager, tmp_path: Path
) -> None:
    run = trained("mlm", "train.precision=float32")
    theirs = in_transformers(run, manager, tmp_path / "hf", "AutoModelForMaskedLM")
    corpus = TokenStore.open(store, "validation")
    objective = open_stored(find_checkpoint(run)[0], manager).objective
    rows = objective.num_samples(corpus)
    batch = objective.collate([objective.build(n, corpus, (7, "validation", 0)) for n in range(rows)])
    tokens, labels = torch.from_numpy(batch["tokens"]), torch.from_numpy(batch["labels"])
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits[labels != IGNORE], labels[labels != IGNORE])
    found = measured(run, "--data", store, "--precision", "float64")
    assert found["scored"] == {"mlm": int((labels != IGNORE).sum())}
    assert found["perplexity"]["mlm"] == pytest.approx(math.exp(expected.item()), rel=1e-10)


@pytest.mark.parametrize("objective", ["causal_lm", "mlm+nsp", "rtd"])
def test_it_is_the_runs_own_evaluation(trained: Callable[..., Path], store: Path, objective: str) -> None:
    """Whatever is trained: the same rows, drawn alike, and the same sums."""
    settings = ("objective.rtd.generator_width=0.5",) if objective == "rtd" else ()
    run = trained(objective, *settings)
    summary, found = read_summary(run), measured(run, "--data", store, "--batch", 8)
    assert found["terms"] == summary["eval_terms"]
    assert found["loss"] == summary["eval_loss"]
    assert set(found["perplexity"]) == {"causal_lm", "mlm", "rtd_generator"} & set(found["terms"])


def test_packed_rows(trained: Callable[..., Path], store: Path) -> None:
    run = trained("causal_lm", "data.packing=true")
    assert measured(run, "--data", store, "--batch", 8)["loss"] == read_summary(run)["eval_loss"]


def test_a_student_is_measured_without_its_teacher(
    trained: Callable[..., Path], store: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    trained("causal_lm").rename(teacher)
    run = trained("causal_lm+distill", f'objective.distill.teacher="{teacher}"')
    teacher.rename(trained("causal_lm"))
    found = measured(run, "--data", store, "--batch", 8)
    assert found["objective"] == "causal_lm"
    assert found["terms"] == {"causal_lm": read_summary(run)["eval_terms"]["causal_lm"]}


def test_text_files(trained: Callable[..., Path], store: Path, tmp_path: Path) -> None:
    """Files are made a store of with the checkpoint's tokenizer; nothing is held back."""
    text = tmp_path / "text.txt"
    text.write_text("Some words of a text.\n\nAnd others, of another one.\n" * 3, encoding="utf-8")
    out = tmp_path / "found.json"
    result = megalm("eval", trained("causal_lm"), "--data", text, "--out", out)
    told = json.loads(out.read_text())
    length = len("Some words of a text.") + len("And others, of another one.") + 2  # with an end each
    assert told["rows"] == (3 * length - 1) // 16
    assert f"{told['perplexity']['causal_lm']:,.3f}" in result.stdout


@pytest.mark.parametrize("objective", ["causal_lm", "mlm+nsp"])
def test_layouts(trained: Callable[..., Path], store: Path, manager: PluginManager, objective: str) -> None:
    stored = open_stored(find_checkpoint(trained(objective))[0], manager)
    own = language_objective(stored, manager, length=16)
    corpus = TokenStore.open(store, "validation")

    def score(parallel: ParallelContext, pp: int = 1) -> LanguageScores:
        pipeline = make_pipeline(stored.spec, manager, schedule="gpipe", ranks=pp, microbatches=pp) if pp > 1 else None
        stages = None if pipeline is None else pipeline.stages_of(parallel.pp.index)
        model = stored.model(parallel, "float64", stages)
        return score_language(model, own, corpus, seed=7, samples=45, micro_batch=4, pipeline=pipeline)

    expected = score(single_rank())
    for world in ({"tp": 2, "sp": True}, {"tp": 3, "dp": 2}, {"pp": 3}, {"tp": 2, "pp": 2, "dp": 2}):
        for found in run_simulated(lambda parallel, w=world: score(parallel, w.get("pp", 1)), **world):  # type: ignore[misc]
            assert found.scored == expected.scored
            assert found.terms == pytest.approx(expected.terms, rel=1e-11)
            assert found.total == pytest.approx(expected.total, rel=1e-11)


def test_processes(trained: Callable[..., Path], store: Path, tmp_path: Path) -> None:
    """Several ranks print one answer."""
    out = tmp_path / "found.json"
    arguments = ["-m", "megalm.cli", "eval", trained("causal_lm"), "--data", store, "--tp", 2, "--sp", "--out", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *arguments]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1
    assert json.loads(out.read_text())["loss"] == pytest.approx(measured(trained("causal_lm"), "--data", store)["loss"])


def test_refused(trained: Callable[..., Path], store: Path, tmp_path: Path) -> None:
    run = trained("causal_lm")
    with pytest.raises(UsageError, match=r"--column and --skip: for a head's records, and this checkpoint has a"):
        megalm("eval", run, "--data", store, "--column", "text=a", "--skip")
    with pytest.raises(UsageError, match=r"--part test: expected validation or train"):
        megalm("eval", run, "--data", store, "--part", "test")
    with pytest.raises(UsageError, match=r"--length 17: the model has 16 positions"):
        megalm("eval", run, "--data", store, "--length", 17)
    with pytest.raises(LayoutError, match=r"1 rank\(s\) cannot be divided"):
        megalm("eval", run, "--data", store, "--tp", 2)
    with pytest.raises(UsageError, match=r"a prepared store is measured alone"):
        megalm("eval", run, "--data", store, "--data", store)
    with pytest.raises(UsageError, match=r"--precision half"):
        megalm("eval", run, "--data", store, "--precision", "half")
    cells = trained("contrastive", "train.cell=8", "eval.samples=8", "eval.final_samples=8")
    with pytest.raises(CheckpointError, match=r"the loss of contrastive depends on the rows of a cell"):
        megalm("eval", cells, "--data", store)
    rare = trained("mlm", "objective.mlm.mask_prob=0.002")
    with pytest.raises(DataError, match=r"mlm scores nothing in the first 1 rows"):
        megalm("eval", rare, "--data", store, "--samples", 1)
    for name in ("rows.tsv", "tags.conllu.gz"):
        with pytest.raises(UsageError, match=rf"{name}: holds records, but .* has no head"):
            megalm("eval", run, "--data", tmp_path / name)
    small = tmp_path / "small.txt"
    small.write_text("few", encoding="utf-8")
    with pytest.raises(UsageError, match=r"causal_lm needs more than"):
        megalm("eval", run, "--data", small)
