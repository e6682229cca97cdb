"""Mixed objectives: each cell has one, with the samples of a run of it alone, and what they add up to."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megalm.checkpoint.folders import folder_name
from megalm.checkpoint.manifest import read_manifest
from megalm.errors import CheckpointError, ConfigError, DataError
from megalm.metrics import jsonl
from megalm.metrics.summary import read_summary
from megalm.parallel.mesh import ParallelContext, single_rank
from megalm.parallel.sim import run_simulated
from megalm.pipeline.plan import make_pipeline
from megalm.plugin.manager import PluginManager
from megalm.testing.parity import LOSS, NORM, assert_parity, gradients_of, loss_and_gradients, make_model
from megalm.train.feed import Rows, TrainFeed, evaluation_rows
from megalm.train.language_scoring import language_objective
from megalm.train.mixed import MixedObjective
from megalm.train.prepare import Prepared
from megalm.train.run_folder import CHECKPOINTS, METRICS
from megalm.train.step import Losses, evaluate
from megalm.train.stored import find_checkpoint, open_stored
from megalm.train.task import attention_of
from megalm.train.trainer import Trainer

Make = Callable[..., Prepared]
BACKBONE = ("model.dropout=0.2", "model.attention_dropout=0.1", "model.token_types=2")
"""Alike for all: an objective that has token types gives everyone's tokens a type."""
MIXES: dict[str, tuple[str, dict[str, float], tuple[str, ...]]] = {
    "two ways of attending": ("gpt2", {"mlm": 0.7, "causal_lm": 0.3}, ()),
    "three": ("gpt2", {"causal_lm": 1.0, "denoise": 2.5, "mlm+nsp": 1.5}, ("train.sequence_length=40",)),
    "heads and auxiliary models": ("bert", {"rtd": 2.0, "mlm+sop": 1.0}, ("objective.rtd.generator_width=0.5",)),
    "coupled rows": ("bert", {"contrastive": 1.0, "mlm": 1.0}, ()),
}


def mix(shares: dict[str, float]) -> str:
    """As ``--set`` takes it."""
    return f"train.objective=[{', '.join(f'{{name={name!r}, share={share}}}' for name, share in shares.items())}]"


def mixed_run(prepare: Make, name: str, *overrides: str, cell: int = 4, batch: int = 24) -> Prepared:
    architecture, shares, more = MIXES[name]
    rows = (f"train.cell={cell}", f"train.micro_batch={cell}", f"train.global_batch={batch}", "eval.samples=36")
    return prepare("mlm", mix(shares), *rows, *BACKBONE, *more, *overrides, architecture=architecture)


def alone(prepare: Make, name: str, part: str, cell: int = 4) -> Prepared:
    """A run of one of a mix's objectives on the same model's backbone."""
    architecture, _, more = MIXES[name]
    own = [each for each in more if not each.startswith("objective.") or each.split(".")[1] in part]
    rows = [f"train.global_batch={cell}", f"train.micro_batch={cell}"]
    rows += [f"train.cell={cell}"] if part == "contrastive" else []
    return prepare(part, *rows, *BACKBONE, *own, architecture=architecture)


def feed_of(prepared: Prepared, **sizes: int) -> TrainFeed:
    train: Any = prepared.train
    settings = {"global_batch": prepared.resolved.config.train.global_batch, "dp_index": 0, "dp_size": 1}
    micro = prepared.resolved.config.train.micro_batch
    return TrainFeed(prepared.objective, train, seed=7, **({"micro_batch": micro} | settings | sizes))


def same_rows(found: Rows, expected: Rows) -> bool:
    batch = {name: array for name, array in found.batch.items() if name in expected.batch}
    return batch.keys() == expected.batch.keys() and all(
        np.array_equal(array, expected.batch[name]) for name, array in batch.items()
    )


@pytest.mark.parametrize("name", MIXES)
def test_an_objectives_cells_are_those_of_a_run_of_it_alone(prepare: Make, name: str) -> None:
    """Cell after cell, beyond the end of epochs; and each has its share to within one."""
    prepared, shares = mixed_run(prepare, name), MIXES[name][1]
    feed, cells = feed_of(prepared), [0] * len(shares)
    parts = [feed_of(alone(prepare, name, part)) for part in shares]
    sizes = [member.num_samples(prepared.train) for member in prepared.objective.members]
    steps = 3 + min(sizes) // 8
    for step in range(steps):
        for rows in feed.step(step):
            assert same_rows(rows, parts[rows.member].step(cells[rows.member])[0])
            cells[rows.member] += 1
            for number, share in enumerate(shares.values()):
                assert abs(cells[number] - sum(cells) * share / sum(shares.values())) < 1
    assert max(4 * n / size for n, size in zip(cells, sizes, strict=True)) > 1, "an epoch ended"


@pytest.mark.parametrize("name", MIXES)
def test_losses_and_gradients_add_up(prepare: Make, name: str) -> None:
    """A step is its objectives' steps over the same rows, each times its part of them."""
    prepared, shares = mixed_run(prepare, name), MIXES[name][1]
    rows = feed_of(prepared).step(2)
    found = gradients_of(prepared, single_rank(), rows, step=2)
    expected = {key: torch.zeros_like(value) for key, value in found.items()}
    for number, part in enumerate(shares):
        run = alone(prepare, name, part)
        known = run.objective.needs.tensors
        own = [
            Rows({key: array for key, array in each.batch.items() if key in known}, each.slots)
            for each in rows
            if each.member == number
        ]
        assert own
        factor = len(own) / len(rows)
        for key, value in gradients_of(run, single_rank(), own, step=2).items():
            if key != NORM:
                expected[key] += value * (factor if not key.startswith(f"{LOSS}.") else 1.0)
    gradients = [value.square().sum() for key, value in expected.items() if not key.startswith((LOSS, NORM))]
    expected[NORM] = torch.stack(gradients).sum().sqrt()
    assert_parity(found, expected, rtol=1e-10)


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "micro": 2},
    "tp2+sp dp2": {"tp": 2, "sp": True, "dp": 2, "micro": 2},
    "pp2 tp2": {"pp": 2, "tp": 2, "micro": 4},
    "zero bubble dp2": {"pp": 2, "dp": 2, "micro": 2, "schedule": "zb-v"},
    "small microbatches": {"dp": 2, "micro": 1},
}


def under(layout: dict[str, Any], prepared: Prepared, manager: PluginManager, compute: Any) -> list[Any]:
    """What simulated ranks compute with their pipeline."""
    world = {key: size for key, size in layout.items() if key in ("tp", "sp", "pp", "dp")}
    pipeline = None
    train = prepared.resolved.config.train
    if "pp" in world:
        microbatches = train.global_batch // (layout["micro"] * world.get("dp", 1))
        pipeline = make_pipeline(
            prepared.spec,
            manager,
            schedule=layout.get("schedule", "1f1b"),
            ranks=world["pp"],
            microbatches=microbatches,
            virtual=2 if "schedule" in layout else None,
        )
    return run_simulated(lambda parallel: compute(parallel, pipeline), **world)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MIXES)
def test_the_same_under_every_layout(prepare: Make, manager: PluginManager, name: str, layout: str) -> None:
    chosen = LAYOUTS[layout]
    if name == "coupled rows" and chosen["micro"] * chosen.get("dp", 1) != 4:
        pytest.skip("a coupled cell is one microbatch of all ranks")
    prepared = mixed_run(prepare, name, "model.layers=4", "model.heads=4" if "auxiliary" in name else "model.heads=6")
    expected = loss_and_gradients(prepared, single_rank())
    assert {f"{LOSS}.{term}" for term in prepared.objective.weights} <= set(expected)

    def compute(parallel: ParallelContext, pipeline: Any) -> Any:
        return loss_and_gradients(prepared, parallel, micro_batch=chosen["micro"], pipeline=pipeline)

    for found in under(chosen, prepared, manager, compute):
        assert_parity(found, expected, rtol=1e-10, label=f"{name} under {layout}")


def test_with_adversarial_training(prepare: Make, manager: PluginManager) -> None:
    prepared = mixed_run(prepare, "three", 'train.adversarial={method="fgm", epsilon=0.3}', "model.layers=4")
    expected, chosen = loss_and_gradients(prepared, single_rank()), LAYOUTS["zero bubble dp2"]

    def compute(parallel: ParallelContext, pipeline: Any) -> Any:
        return loss_and_gradients(prepared, parallel, micro_batch=chosen["micro"], pipeline=pipeline)

    for found in under(chosen, prepared, manager, compute):
        assert_parity(found, expected, rtol=1e-10)


def evaluated(prepared: Prepared, parallel: ParallelContext, micro: int, samples: int, pipeline: Any = None) -> Losses:
    rows = evaluation_rows(
        prepared.objective,
        prepared.validation,
        seed=7,
        samples=samples,
        micro_batch=micro,
        dp_index=parallel.dp.index,
        dp_size=parallel.dp.size,
        cell=prepared.resolved.config.train.cell,
    )
    return evaluate(make_model(prepared, parallel, pipeline, seed=2), prepared.objective, rows, pipeline)


def test_evaluations(prepare: Make, manager: PluginManager) -> None:
    """Each objective's rows are the first of an evaluation of it alone, under every layout."""
    name = "two ways of attending"
    prepared = mixed_run(prepare, name)
    expected = evaluated(prepared, single_rank(), 4, 34)  # 8 cells
    total = 0.0
    for part, cells in (("mlm", 6), ("causal_lm", 2)):
        own = evaluated(alone(prepare, name, part), single_rank(), 4, 4 * cells)
        assert expected.terms[part] == pytest.approx(own.total, rel=1e-12)
        total += own.total * cells / 8
    assert expected.total == pytest.approx(total, rel=1e-12)
    for layout in ("tp2+sp dp2", "pp2 tp2"):
        chosen = LAYOUTS[layout]

        def compute(parallel: ParallelContext, pipeline: Any, micro: int = chosen["micro"]) -> Losses:
            return evaluated(prepared, parallel, micro, 34, pipeline)

        for found in under(chosen, prepared, manager, compute):
            assert found.total == pytest.approx(expected.total, rel=1e-11)
            assert found.terms == pytest.approx(expected.terms, rel=1e-11)


def test_a_step_without_an_objective(prepare: Make) -> None:
    """It says nothing of its terms, and is no smaller than others."""
    prepared = mixed_run(prepare, "two ways of attending", batch=4)
    found = gradients_of(prepared, single_rank(), feed_of(prepared).step(0))
    terms = {key for key in found if key.startswith(f"{LOSS}.")}
    assert len(terms) == 1
    assert found[LOSS] == found[terms.pop()]


def train(prepared: Prepared) -> tuple[list[Any], str]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        Trainer(prepared, single_rank()).run()
    records = jsonl.read(prepared.run_dir / METRICS)
    timed = ("tokens_per_second", "seconds")
    return [
        {key: value for key, value in record.items() if key not in timed} for record in records
    ], read_summary(prepared.run_dir)["weights_sha256"]


def test_a_run_that_is_resumed(prepare: Make, manager: PluginManager) -> None:
    """The same bits; not with other shares or cells; and what it trained can be opened."""
    name, more = "two ways of attending", ("train.steps=4", "checkpoint.every=2", "eval.every=2", "sample.tokens=3")
    prepared = mixed_run(prepare, name, *more, batch=12)
    expected = train(prepared)
    steps = [record for record in expected[0] if "lr" in record]
    assert len(steps) == 4
    assert all(set(record["terms"]) <= {"mlm", "causal_lm"} for record in steps)
    stored = open_stored(find_checkpoint(prepared.run_dir)[0], manager)
    assert stored.spec == prepared.spec
    with pytest.raises(CheckpointError, match="of which each cell had one"):
        language_objective(stored, manager, length=16)
    # A head reads whole rows, as mlm did.
    assert attention_of(read_manifest(find_checkpoint(prepared.run_dir)[0]), manager) == "bidirectional"
    shutil.rmtree(prepared.run_dir / CHECKPOINTS / folder_name(4))
    (prepared.run_dir / "summary.json").unlink()
    loose = ("run.allow_changed_config=true",)
    other = mix({"mlm": 0.5, "causal_lm": 0.5})
    for changed, what in (((other,), "objective"), (("train.cell=6", "train.micro_batch=6"), "cell")):
        with pytest.raises(CheckpointError, match=what):
            train(mixed_run(prepare, name, *more, *loose, *changed, batch=12))
    assert train(mixed_run(prepare, name, *more, batch=12)) == expected


TWO = mix({"mlm": 0.7, "causal_lm": 0.3})
ROWS = ("train.cell=4", "train.micro_batch=4")


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ((TWO,), ConfigError, r"mix of mlm and causal_lm has one objective for each cell; give train\.cell = 8"),
        ((TWO, "train.cell=4"), ConfigError, r"not a multiple of train\.micro_batch \* dp = 8 \* 1.*lower micro_batch"),
        ((TWO, "train.cell=3", "train.micro_batch=1"), ConfigError, r"batch = 8 is not a multiple of train\.cell"),
        ((TWO, *ROWS, "eval.samples=8"), ConfigError, r"eval\.samples = 8: .*8 of mlm, 0 of causal_lm; raise it"),
        ((TWO, *ROWS, "eval.baselines=true"), ConfigError, "baselines"),
        ((TWO, *ROWS, "data.packing=true"), ConfigError, r"mlm needs bidirectional.*leave data\.packing"),
        ((TWO, *ROWS, "data.epochs=1", "train.steps=150"), DataError, r"for mlm and data\.epochs = 1"),
        ((mix({"mlm": 1.0}), *ROWS), ConfigError, "at least two"),
        ((mix({"mlm": 1.0, "mlm+nsp": 1.0}), *ROWS), ConfigError, 'names "mlm" twice'),
        ((mix({"mlm": 1.0, "nope": 1.0}), *ROWS), ConfigError, r'objective\[1\]\.name: unknown objective "nope"'),
        ((mix({"mlm": 0.0, "nsp": 1.0}), *ROWS), ConfigError, r"objective\[0\]\.share: expected a number greater"),
        ((mix({"mlm": 1e-9, "nsp": 1.0}), *ROWS), ConfigError, "a share is less than one in"),
        (
            (mix({"mlm": 1.0, "causal_lm+distill": 1.0}), *ROWS, 'objective.distill.teacher="runs/large"'),
            ConfigError,
            r"causal_lm\+distill has a teacher, and cannot be mixed",
        ),
        ((mix({"mlm": 1.0, "contrastive": 1.0}), "train.cell=8", "train.micro_batch=4"), ConfigError, "must equal"),
    ],
    ids=str,
)
def test_what_cannot_be_mixed(prepare: Make, overrides: tuple[str, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        prepare("mlm", *overrides, architecture="gpt2")
    if isinstance(caught.value, ConfigError) and "objective[" in says:
        assert len(caught.value.problems) == 1


def test_packed_objectives_of_one_kind(prepare: Make) -> None:
    """Packing is no matter of mixing where attention is alike."""
    prepared = prepare("mlm", TWO, *ROWS, architecture="gpt2")
    assert isinstance(prepared.objective, MixedObjective)
    assert prepared.objective.needs.attention == "prefix"
    alike = prepare("mlm", mix({"mlm": 1.0, "nsp": 1.0}), *ROWS)
    assert alike.objective.needs.attention == "bidirectional"
