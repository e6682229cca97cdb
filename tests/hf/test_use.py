"""What an import is for: training on, generating, and handing on what was trained. On real ranks too."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.cli.app import app
from megalm.config.load import load_config
from megalm.config.schema import KernelsConfig
from megalm.errors import TokenizerError
from megalm.hf import files
from megalm.hf.exporting import export_hf
from megalm.hf.importing import import_hf
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_store
from megalm.train.prepare import prepare_run
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.trainer import Trainer

from .conftest import Folder, draw_settings, own_tokenizer

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def imported(folder: Folder, tmp_path: Path, manager: PluginManager, kind: str) -> Path:
    model, settings = draw_settings(kind, random.Random(9))
    source = folder("source", "BertForMaskedLM" if kind == "bert" else model, settings)
    import_hf(source, tmp_path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    return source


def train(tmp_path: Path, manager: PluginManager, *overrides: str) -> Path:
    """Train on from the import as its run.toml says, for two steps; the run's folder."""
    data = make_store(tmp_path, documents=120, manager=manager, tokenizer=str(tmp_path / "in"))
    settings = {
        "run.dir": str(tmp_path / "run"),
        "data.path": str(data),
        "train.steps": "2",
        "train.sequence_length": "16",
        "train.global_batch": "4",
        "train.micro_batch": "4",
        "train.lr": "1e-3",
        "launch.threads": "1",
        "sample.tokens": "4",
    }
    # Nothing is built for a test that is not about kernels.
    settings |= {f"kernels.{operation}": "reference" for operation in KernelsConfig.model_fields}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    resolved = load_config(tmp_path / "in" / "run.toml", [*pairs, *overrides], manager)
    Trainer(prepare_run(resolved, manager, 1, "cpu"), single_rank()).run()
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_on_and_handing_on(kind: str, folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    """Two steps from the imported weights, and an export that transformers loads as what was trained."""
    source = imported(folder, tmp_path, manager, kind)
    run = train(tmp_path, manager)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len([record for record in losses if "grad_norm" in record]) == 2
    folder_of_last, _ = find_checkpoint(run)
    stored = open_stored(folder_of_last, manager)
    exported = export_hf(stored, tmp_path / "out")
    assert exported.agreements
    mine, theirs = files.read_tensors(tmp_path / "out"), files.read_tensors(source)
    assert mine.keys() == theirs.keys()
    moved = [name for name, tensor in theirs.items() if not torch.equal(mine[name], tensor)]
    # Adam's first step moves an element by the learning rate at most; weights that were not loaded would be far off.
    assert moved
    assert all((mine[name] - theirs[name]).abs().max() < 0.02 for name in moved)
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "out"))
    assert before["max_position_embeddings"] == after["max_position_embeddings"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_run_without_an_import_is_exported_with_its_tokenizer(tmp_path: Path, manager: PluginManager) -> None:
    """A model that was trained from the start, with byte tokens: transformers gets a tokenizer of the same ids."""
    from megalm.testing.runs import make_run

    data = make_store(tmp_path, documents=60, manager=manager)
    prepared = make_run(tmp_path, data, architecture="llama", manager=manager)
    Trainer(prepared, single_rank()).run()
    stored = open_stored(find_checkpoint(prepared.run_dir)[0], manager)
    assert export_hf(stored, tmp_path / "out").agreements
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve \n\t 東京 \x07 <eo"
    assert theirs(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert theirs.decode(list(text.encode())) == text
    assert theirs.eos_token_id == stored.tokenizer.special.eos
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == stored.tokenizer.special.eos


def command(*arguments: str, ranks: int = 1) -> list[str]:
    start = [sys.executable] if ranks == 1 else [*RANKS, str(ranks)]
    return [*start, "-m", "megalm.cli", *arguments]


def output(line: list[str]) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.dist
def test_generation_on_the_command_line_and_on_ranks(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    imported(folder, tmp_path, manager, "llama")
    (tmp_path / "prompts.txt").write_text("second\n\nand third\n")
    line = ["generate", str(tmp_path / "in"), "--prompt", "The first", "--prompt-file", str(tmp_path / "prompts.txt")]
    line += ["--tokens", "9", "--seed", "4", "--device", "cpu", "--ignore-end", "--json"]
    alone = [json.loads(row) for row in output(command(*line)).splitlines()]
    assert [row["prompt"] for row in alone] == ["The first", "second", "and third"]
    assert [len(row["ids"]) for row in alone] == [9, 9, 9]
    for ranks, layout in ((2, ["--tp", "2"]), (2, ["--pp", "2"])):
        found = [json.loads(row) for row in output(command(*line, *layout, ranks=ranks)).splitlines()]
        assert found == alone, layout


def run_cli(*arguments: str) -> Any:
    from typer.testing import CliRunner

    return CliRunner().invoke(app, list(arguments))


def test_text_is_shown_in_the_order_of_the_prompts(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    imported(folder, tmp_path, manager, "gpt2")
    shown = run_cli("generate", str(tmp_path / "in"), "--prompt", "One", "--prompt", "Two", "--tokens", "5")
    assert shown.exit_code == 0, shown.output
    first, second = shown.stdout.split("\n[2]\n")
    assert first.startswith("[1]\nOne")
    assert second.startswith("Two")
    again = run_cli("generate", str(tmp_path / "in"), "--prompt", "One", "--tokens", "5")
    assert again.stdout == first.removeprefix("[1]\n")


def test_mistakes_on_the_command_line(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    source = imported(folder, tmp_path, manager, "gpt2")
    made = str(tmp_path / "in")
    cases: list[tuple[list[str], str]] = [
        (["generate", made], "needs something to continue"),
        (["generate", str(source), "--prompt", "a"], "neither a checkpoint nor a run folder"),
        (["generate", made, "--prompt", "a", "--top-p", "0"], "top_p must be above 0"),
        (["generate", made, "--prompt", "a", "--tp", "2"], r"--tp 2 times --pp 1 is 2 rank\(s\), but there are 1"),
        (["generate", made, "--prompt", "a", "--context", "49"], "this model's position embedding has 48"),
        (["generate", made, "--prompt", "a", "--stop", "no such token"], "is no single token"),
        (["export", "hf", made, str(tmp_path / "out"), "--max-shard-size", "big"], "is no size"),
    ]
    for arguments, words in cases:
        failed = run_cli(*arguments)
        assert failed.exit_code != 0
        assert re.search(words, str(failed.exception)), failed.exception
    byte = manager.load_class("tokenizers", "byte").load(Path())
    with pytest.raises(TokenizerError, match="was made with a tokenizer of identity"):
        open_stored(Path(made), manager, ("byte", byte))
