"""Runs that read a stream: every layout the same, resumed by a skip, failures told to all ranks."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megalm.checkpoint.manifest import read_manifest
from megalm.config.load import load_config
from megalm.errors import ConfigError, DataError
from megalm.metrics import jsonl
from megalm.parallel import rng
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import load_run
from megalm.train.prepare import prepare_run
from megalm.train.run_folder import METRICS
from megalm.train.streamed import StreamedSamples, train_samples
from megalm.train.trainer import Trainer

BLOCK = 700
FUNCTION = "streamed_by_a_test:texts"


def drawn(count: int) -> list[str]:
    draw = rng.generator("streamed texts")
    return ["".join(draw.choice(list("abcdef "), size=int(n))) + "." for n in draw.integers(20, 90, size=count)]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that a configuration can name; ``calls`` counts its readers."""
    module = ModuleType("streamed_by_a_test")
    module.calls = 0  # type: ignore[attr-defined]

    def texts(count: int = 60, breaks: int = -1, unstable: bool = False) -> Iterator[str]:
        module.calls += 1  # type: ignore[attr-defined]
        mine = module.calls  # type: ignore[attr-defined]
        for number, text in enumerate(drawn(count)):
            if number == breaks:
                raise OSError("the line is cut")
            yield f"{text}{mine}" if unstable else text

    module.texts = texts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "streamed_by_a_test", module)
    return module


def train(
    folder: Path, store: Path, manager: PluginManager, *overrides: str, objective: str = "causal_lm", **layout: int
) -> list[float]:
    """Train in ``folder``; the losses of its steps."""
    folder.mkdir(exist_ok=True)
    settings = ["data.source=iterable", f"data_source.iterable.function={FUNCTION}", f"data.block={BLOCK}"]
    settings += ["train.sequence_length=32", "sample.tokens=0", "train.micro_batch=2", "train.steps=6", *overrides]
    architecture = "gpt2" if objective == "causal_lm" else "bert"
    load_run(folder, store, architecture=architecture, objective=objective, overrides=settings, manager=manager)
    settings += [f"parallel.{name}={size}" for name, size in layout.items()]
    resolved = load_config(folder / "run.toml", settings, manager)
    world = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1)

    def rank(parallel: ParallelContext) -> None:
        Trainer(prepare_run(resolved, manager, world, "cpu"), parallel).run()

    run_simulated(rank, **layout)
    return [record["loss"] for record in jsonl.read(folder / "run" / METRICS) if "loss" in record]


@pytest.mark.parametrize(
    ("objective", "more"),
    [("causal_lm", ()), ("mlm", ()), ("causal_lm", ("data.packing=true",)), ("mlm+nsp", ("data.sentences=true",))],
)
def test_layouts_and_workers_change_nothing(
    objective: str, more: tuple[str, ...], tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    """Blocks of some 21 samples, eight a step: steps lie across blocks, and the second epoch begins in the run."""
    whole = train(tmp_path / "whole", store, manager, "data.workers=0", *more, objective=objective)
    assert source.calls == 1
    assert train(tmp_path / "ahead", store, manager, "data.workers=3", *more, objective=objective) == whole
    for layout in ({"dp": 4}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2, "dp": 2}):
        source.calls = 0
        folder = tmp_path / "-".join(layout)
        losses = train(folder, store, manager, "data.workers=1", *more, objective=objective, **layout)
        assert losses == pytest.approx(whole, rel=1e-9), layout
        # One rank of each replica reads.
        assert source.calls == layout.get("dp", 1), layout


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_resumed_run_skips_what_was_seen(
    step: int, tmp_path: Path, store: Path, manager: PluginManager, source: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ("checkpoint.every=1", "checkpoint.keep=9", "data_source.iterable.arguments={count=20}")
    whole = train(tmp_path, store, manager, "data.workers=2", *kept)
    run = tmp_path / "run"
    for later in range(step + 1, 7):
        shutil.rmtree(run / "checkpoints" / f"step-{later:08d}")
    (run / "summary.json").unlink()
    state = read_manifest(run / "checkpoints" / f"step-{step:08d}").state["stream"]
    capsys.readouterr()
    resumed = train(tmp_path, store, manager, "data.workers=1", *kept, dp=2)
    assert resumed == pytest.approx(whole, rel=1e-9)
    assert f"after {state['documents']:,} documents of epoch {state['epoch'] + 1}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_is_skipped_is_not_encoded(tmp_path: Path, store: Path, manager: PluginManager, source: Any) -> None:
    train(tmp_path, store, manager, "checkpoint.every=1", "checkpoint.keep=9")
    states = [
        read_manifest(folder).state["stream"] for folder in sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    ]
    places = [(state["epoch"], state["documents"], state["place"]) for state in states]
    assert places == sorted(places)
    assert len(set(places)) > 2
    for number, state in enumerate(states, 1):
        assert 0 <= 8 * number - state["place"] < 2 * BLOCK // 32


def test_replicas_that_read_different_texts_are_found(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    with pytest.raises(DataError, match="gave other documents to another data-parallel replica"):
        train(tmp_path, store, manager, "data_source.iterable.arguments={unstable=true}", dp=2)


def test_a_source_that_breaks_ends_the_run_on_all_ranks(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    with pytest.raises(DataError, match="cannot be read: OSError: the line is cut"):
        train(tmp_path, store, manager, "data_source.iterable.arguments={breaks=25}", tp=2, dp=2)


def test_a_stream_ends_after_its_epochs(tmp_path: Path, store: Path, manager: PluginManager, source: Any) -> None:
    count = ("data_source.iterable.arguments={count=12}", "data.epochs=2")
    with pytest.raises(DataError, match=r"ended after \d+ samples, in 2 epochs; raise data.epochs"):
        train(tmp_path, store, manager, *count, "train.steps=30", "checkpoint.every=1")
    done = [record for record in jsonl.read(tmp_path / "run" / METRICS) if "loss" in record]
    assert len(done) >= 4


def test_epochs_may_be_raised_when_a_run_goes_on(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    kept = ("data_source.iterable.arguments={count=12}", "train.steps=10", "checkpoint.every=1")
    whole = train(tmp_path / "whole", store, manager, *kept, "data.epochs=0")
    with pytest.raises(DataError, match=r"in 1 epochs; raise data.epochs"):
        train(tmp_path / "again", store, manager, *kept, "data.epochs=1")
    assert train(tmp_path / "again", store, manager, *kept, "data.epochs=9") == pytest.approx(whole, rel=1e-9)


def test_a_streams_thread_ends_with_what_holds_it(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    settings = ["data.source=iterable", f"data_source.iterable.function={FUNCTION}", f"data.block={BLOCK}"]
    settings += ["train.sequence_length=32", "data.epochs=0"]
    load_run(tmp_path, store, overrides=settings, manager=manager)
    prepared = prepare_run(load_config(tmp_path / "run.toml", settings, manager), manager, 1, "cpu")
    before = set(threading.enumerate())
    samples = train_samples(prepared, single_rank())
    assert isinstance(samples, StreamedSamples)
    samples.reach(0, 8)
    (thread,) = set(threading.enumerate()) - before
    del samples
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.mark.parametrize("dp", [2, 4])
def test_all_ranks_know_that_a_stream_has_ended(
    dp: int, tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    """Also those whose own rows are still there: else they would wait for the others' gradients."""
    for count in range(9, 14):
        texts = (f"data_source.iterable.arguments={{count={count}}}", "data.epochs=1")
        with pytest.raises(DataError, match=r"ended after \d+ samples, in 1 epochs"):
            train(tmp_path / str(count), store, manager, *texts, "train.steps=30", dp=dp)


def test_a_stream_without_a_sample_is_refused(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    short = ("data.block=20", "train.sequence_length=128", "data_source.iterable.arguments={count=3}")
    with pytest.raises(DataError, match=r"gave causal_lm no sample in a whole epoch; raise data\.block = 20,"):
        train(tmp_path, store, manager, *short, dp=2)


def test_a_block_that_an_objective_cannot_use_is_left_out(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    """Sentence pairs are drawn from two documents, and some of these blocks have one."""
    losses = train(tmp_path, store, manager, "data.block=100", "train.steps=12", objective="nsp")
    assert len(losses) == 12


def test_a_run_from_a_checkpoint_with_another_batch_goes_on_behind_it(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any
) -> None:
    """The samples behind those that were seen, as the run with the old batch takes them."""
    whole = train(tmp_path / "whole", store, manager, "checkpoint.every=1", "checkpoint.keep=9")
    load = f"checkpoint.load={tmp_path / 'whole' / 'run' / 'checkpoints' / 'step-00000003'}"
    small = train(tmp_path / "small", store, manager, load, "train.global_batch=4", "train.steps=4")
    large = train(tmp_path / "large", store, manager, load, "train.global_batch=16", "train.steps=4")
    assert len(small) == len(large) == 1
    # The first loss is of the same weights: that of eight rows is the mean of that of its halves.
    assert whole[3] != small[0] != large[0]
    again = train(tmp_path / "again", store, manager, load)
    assert again == pytest.approx(whole[3:], rel=1e-9)


def test_a_stream_that_changed_is_not_gone_on_with(
    tmp_path: Path, store: Path, manager: PluginManager, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, store, manager, "checkpoint.every=1", "checkpoint.keep=9")
    run = tmp_path / "run"
    for step in (5, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "summary.json").unlink()
    texts = source.texts
    monkeypatch.setattr(source, "texts", lambda: (text + "!" for text in texts()))
    with pytest.raises(DataError, match=r"has other documents after number \d+ of epoch 1 than when the checkpoint"):
        train(tmp_path, store, manager, "checkpoint.every=1", "checkpoint.keep=9", dp=2)
    monkeypatch.setattr(source, "texts", lambda: iter([]))
    with pytest.raises(DataError, match=r"has no documents|has other documents"):
        train(tmp_path, store, manager, "checkpoint.every=1", "checkpoint.keep=9")


def test_a_function_that_is_not_there_is_named(tmp_path: Path, store: Path, manager: PluginManager) -> None:
    with pytest.raises((ConfigError, DataError), match="No module named 'nothing_here'"):
        train(tmp_path, store, manager, "data_source.iterable.function=nothing_here:texts")


def test_hugging_face_datasets(tmp_path: Path, store: Path, manager: PluginManager, source: Any) -> None:
    pytest.importorskip("datasets")
    whole = train(tmp_path / "whole", store, manager)
    rows = [json.dumps({"body": text}) for text in drawn(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    hf = ["data.source=hf_datasets", "data_source.hf_datasets.path=json", "data_source.hf_datasets.column=body"]
    hf.append(f"data_source.hf_datasets.data_files={tmp_path / 'rows.jsonl'}")
    assert train(tmp_path / "streaming", store, manager, *hf) == whole
    assert train(tmp_path / "table", store, manager, *hf, "data_source.hf_datasets.streaming=false") == whole
    with pytest.raises(DataError, match="has no column 'text', only body"):
        train(tmp_path / "none", store, manager, *hf, "data_source.hf_datasets.column=text")
