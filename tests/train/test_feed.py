"""The order that feeds give: the same for every layout and number of workers, one corpus or a blend."""

from __future__ import annotations

import os
import random
import resource
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.api import Needs, Objective, TensorSpec
from megalm.config.load import load_config
from megalm.data.sampler import SampleOrder
from megalm.errors import ConfigError, DataError
from megalm.parallel.sim import run_simulated
from megalm.testing.parity import assert_parity, gradients_of, loss_and_gradients
from megalm.testing.runs import load_run, make_store
from megalm.train.feed import TrainFeed, evaluation_rows
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared, prepare_run


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, manager: Any) -> list[Path]:
    return [
        make_store(tmp_path_factory.mktemp(f"blend-{n}"), documents=documents, seed=n, manager=manager)
        for n, documents in enumerate((40, 15, 60))
    ]


@pytest.fixture
def blended(tmp_path: Path, stores: list[Path], manager: Any) -> Any:
    """``blended(*overrides)``: a prepared run on the three stores."""

    def make(*overrides: str, entries: str = "", objective: str = "causal_lm", world: int = 1) -> Prepared:
        tables = entries or ", ".join(
            f'{{path = "{p}", weight = {w}, epochs = 0}}' for p, w in zip(stores, (3, 1, 0.5), strict=True)
        )
        architecture = "gpt2" if objective == "causal_lm" else "bert"
        load_run(tmp_path, stores[0], manager=manager, objective=objective, architecture=architecture)
        text = (tmp_path / "run.toml").read_text().replace(f'path = "{stores[0]}"', f"blend = [{tables}]")
        (tmp_path / "run.toml").write_text(text)
        return prepare_run(load_config(tmp_path / "run.toml", overrides, manager), manager, world, "cpu")

    return make


def rows_of(prepared: Prepared, first: int, steps: int, batch: int, dp: int, accumulation: int, workers: int) -> Any:
    """Every row of some steps, by its place in the run, gathered from all data-parallel ranks."""
    found: dict[int, bytes] = {}
    for index in range(dp):
        feed = TrainFeed(
            prepared.objective,
            prepared.train,
            seed=7,
            global_batch=batch,
            micro_batch=batch // dp // accumulation,
            dp_index=index,
            dp_size=dp,
            workers=workers,
        )
        for step in range(first, first + steps):
            for m, rows in enumerate(feed.step(step)):
                first_slot = (m * dp + index) * len(rows.slots)
                assert rows.slots == tuple(range(first_slot, first_slot + len(rows.slots)))
                for i, slot in enumerate(rows.slots):
                    place = step * batch + slot
                    assert place not in found
                    found[place] = b"".join(array[i].tobytes() for array in rows.batch.values())
        feed.close()
    assert sorted(found) == list(range(first * batch, (first + steps) * batch))
    return found


@pytest.mark.parametrize("objective", ["causal_lm", "mlm"])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_every_layout_and_worker_count_sees_the_same(
    blended: Any, objective: str, packing: str, campaign_seed: int
) -> None:
    prepared = blended(f"data.packing={packing}", "data.packing_window=4", objective=objective)
    batch, first, steps = 64, 5, 2
    expected = rows_of(prepared, first, steps, batch, 1, 1, 0)
    r = random.Random(campaign_seed)
    layouts = [(dp, acc, n) for dp in (1, 2, 8, 64) for acc in (1, 2, 8) for n in range(5) if dp * acc <= 64]
    for dp, accumulation, workers in [(64, 1, 1), (1, 8, 4), *r.sample(layouts, 6)]:
        assert rows_of(prepared, first, steps, batch, dp, accumulation, workers) == expected


@pytest.mark.parametrize("packing", ["true", "false"])
def test_batches_of_a_blend_are_those_of_its_rows(blended: Any, packing: str) -> None:
    """Rows of several corpora that come together, each built by itself, or many in one go."""
    objective = blended(f"data.packing={packing}", "data.packing_window=4").objective
    corpora = blended().train.corpora
    samples = [(corpora[place % 3 * (place > 4)], place, (7, "train", 0)) for place in range(12)]
    expected = objective.collate([objective.build(sample, corpus, at) for corpus, sample, at in samples])
    for some in (slice(None), slice(3), slice(5, 6)):
        found = objective.batch(samples[some])
        assert sorted(found) == sorted(expected)
        for name, array in found.items():
            assert array.flags.c_contiguous
            assert np.array_equal(array, expected[name][some])


class Views(Objective):
    """Two rows of each example."""

    def needs(self) -> Needs:
        return Needs("bidirectional", {"tokens": TensorSpec()}, lm_head=False)

    def weights(self) -> dict[str, float]:
        return {"views": 1.0}

    def num_samples(self, corpus: Any) -> int:
        return 1000

    def build_example(self, sample: int, corpus: Any, rng: Any) -> dict[str, Any]:
        return {"two": np.array([[sample, corpus[0]], [sample, corpus[0] + 1]])}

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"tokens": np.concatenate([example["two"] for example in examples])}

    def build_batch(self, samples: np.ndarray, corpus: Any) -> Any:
        return self.collate([self.build_example(sample, corpus, None) for sample in samples])

    def counts(self, batch: Any) -> dict[str, int]:
        return {}

    def loss(self, hidden: Any, batch: Any, ctx: Any) -> dict[str, Any]:
        return {}


def test_examples_of_several_rows_stay_together() -> None:
    objective = TrainingObjective({"views": Views(None, None)}, 100)  # type: ignore[arg-type]
    corpora = [10], [20]
    samples: Any = [(corpora[n % 2], n, (1, "train", 0)) for n in range(5)]
    expected = objective.collate([objective.build(at, corpus, where) for corpus, at, where in samples])
    assert np.array_equal(objective.batch(samples)["tokens"], expected["tokens"])


class OwnRows(Views):
    def build_example(self, sample: int, corpus: Any, rng: Any) -> dict[str, Any]:
        return {"two": np.array([[1, 2], [3, 4]])}


class OwnBatches(OwnRows):
    def build_batch(self, samples: np.ndarray, corpus: Any) -> Any:
        return super().build_batch(samples, corpus)


def test_a_derived_class_that_builds_other_rows_is_asked_for_each() -> None:
    for cls, at_once in ((Views, True), (OwnRows, False), (OwnBatches, True)):
        objective = TrainingObjective({"views": cls(None, None)}, 100)  # type: ignore[arg-type]
        assert objective.builds_batches == at_once
    found = TrainingObjective({"views": OwnRows(None, None)}, 100).batch([([10], 0, (1,))])  # type: ignore
    assert found["tokens"].tolist() == [[1, 2], [3, 4]]


def test_no_world_changes_what_stands_at_a_place(blended: Any, campaign_seed: int, full: bool) -> None:
    """Worlds of 1 to 64 ranks, each step cut in 1 to 8, 0 to 4 workers; also where the size of a step is another."""
    prepared = blended()
    expected = rows_of(prepared, 0, 1, 512, 1, 1, 0)
    every = [(dp, accumulation, workers) for dp in range(1, 65) for accumulation in range(1, 9) for workers in range(5)]
    for dp, accumulation, workers in every if full else random.Random(campaign_seed).sample(every, 4):
        found = rows_of(prepared, 0, 1, dp * accumulation, dp, accumulation, workers)
        assert found == {place: expected[place] for place in range(dp * accumulation)}, (dp, accumulation, workers)


def test_a_run_goes_on_with_the_next_sample_in_another_world(blended: Any, campaign_seed: int) -> None:
    """Stopped after any step, resumed with other ranks, accumulation and workers, three epochs and more."""
    prepared = blended()
    r = random.Random(campaign_seed)
    whole = rows_of(prepared, 0, 60, 8, 1, 1, 0)
    step, found = 0, {}
    while step < 60:
        steps = min(r.randint(1, 20), 60 - step)
        found.update(rows_of(prepared, step, steps, 8, r.choice([1, 2, 4]), r.choice([1, 2]), r.randint(0, 4)))
        step += steps
    assert found == whole


@pytest.mark.parametrize("packing", ["true", "false"])
def test_three_epochs_show_each_sample_three_times(prepare: Any, packing: str) -> None:
    prepared = prepare("causal_lm", "train.sequence_length=64", f"data.packing={packing}")
    samples = prepared.objective.num_samples(prepared.train)
    batch = 4
    steps = -(-3 * samples // batch)
    rows = list(rows_of(prepared, 0, steps, batch, 2, 1, 2).values())
    shown = Counter(rows[: 3 * samples])
    once = Counter(
        b"".join(array[0].tobytes() for array in prepared.objective.collate([example]).values())
        for example in (prepared.objective.build(n, prepared.train, (0, "", 0)) for n in range(samples))
    )
    assert shown == Counter({row: 3 * count for row, count in once.items()})


def test_a_blend_draws_each_corpus_apart(blended: Any, stores: list[Path]) -> None:
    """The same sample of the same text in two corpora is masked differently."""
    twice = ", ".join(f'{{path = "{stores[0]}", weight = 1, epochs = 0}}' for _ in range(2))
    prepared = blended(entries=twice, objective="mlm")
    rows = rows_of(prepared, 0, 60, 8, 1, 1, 0)
    assert len(set(rows.values())) > 0.9 * len(rows), "only rows without a choice are alike"


def test_more_corpora_than_files_may_be_open_by_default(blended: Any, stores: list[Path]) -> None:
    """A run asks for more, as far as it may; else it says what to do."""
    entries = ", ".join(f'{{path = "{stores[n % 3]}", epochs = 0}}' for n in range(60))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = len(os.listdir("/proc/self/fd")) + 100
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        assert len(blended(entries=entries).train.corpora) == 60
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megalm.train.prepare.make_room", lambda corpora: None)
            with pytest.raises(DataError, match=r"Too many open files; allow more with ulimit -n"):
                blended(entries=entries)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_evaluation_of_a_blend(blended: Any) -> None:
    """Each corpus's validation part in its own order, as far as none is seen twice, however ranks divide it."""
    prepared = blended("eval.samples=100000")
    sizes = [prepared.objective.num_samples(store) for store in prepared.validation.corpora]
    total = min(int(size * 4.5 / weight) for size, weight in zip(sizes, (3, 1, 0.5), strict=True))

    def rows(dp: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for index in range(dp):
            for each in evaluation_rows(
                prepared.objective,
                prepared.validation,
                seed=7,
                samples=10**9,
                micro_batch=3,
                dp_index=index,
                dp_size=dp,
            ):
                found.update({slot: each.batch["tokens"][i].tobytes() for i, slot in enumerate(each.slots)})
        return found

    one = rows(1)
    assert sorted(one) == list(range(total))
    assert rows(4) == one
    texts = [
        prepared.objective.build(n, store, (7, "", 0))["tokens"].tobytes()
        for store, size in zip(prepared.validation.corpora, sizes, strict=True)
        for n in range(size)
    ]
    assert not Counter(one.values()) - Counter(texts)


class TestExhaustion:
    def test_a_corpus_that_runs_out_is_named(self, blended: Any, stores: list[Path]) -> None:
        entries = ", ".join(f'{{path = "{path}", weight = {w}}}' for path, w in zip(stores, (1, 8, 1), strict=True))
        with pytest.raises(DataError) as caught:
            blended("train.steps=40", entries=entries)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"data.blend[1]: {stores[1]} runs out after step ")
        wanted = int(line.split("set its epochs = ")[1].split(" ")[0])
        assert wanted > 1
        good = entries.replace("weight = 8", f"weight = 8, epochs = {wanted}")
        blended("train.steps=40", entries=good)
        with pytest.raises(DataError, match="runs out"):
            blended("train.steps=40", entries=good.replace(f"epochs = {wanted}", f"epochs = {wanted - 1}"))
        blended("train.steps=40", entries=good.replace(f"epochs = {wanted}", "epochs = 0"))

    def test_the_step_is_the_last_that_has_enough(self, blended: Any, stores: list[Path]) -> None:
        entries = ", ".join(f'{{path = "{path}", weight = {w}}}' for path, w in zip(stores, (1, 8, 1), strict=True))
        with pytest.raises(DataError) as caught:
            blended("train.steps=40", entries=entries)
        last = int(str(caught.value).split("runs out after step ")[1].split(":")[0])
        blended(f"train.steps={last}", entries=entries)
        with pytest.raises(DataError, match="runs out"):
            blended(f"train.steps={last + 2}", entries=entries)

    def test_one_store_with_epochs(self, prepare: Any) -> None:
        with pytest.raises(DataError, match=r"data\.path: .*runs out after step .*data\.epochs = \d+"):
            prepare("causal_lm", "train.steps=5000", "data.epochs=1")
        prepare("causal_lm", "train.steps=5000")

    def test_a_share_too_small_to_be_served(self, blended: Any, stores: list[Path]) -> None:
        entries = ", ".join(f'{{path = "{path}", weight = {w}}}' for path, w in zip(stores, (1, 1e-8, 1), strict=True))
        with pytest.raises(ConfigError, match="less than one in"):
            blended(entries=entries)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("overrides", "text"),
        [
            (["data.path=x"], "exclude each other"),
            (["data.epochs=2"], "epochs of its own"),
            (["eval.baselines=true"], "baselines"),
        ],
    )
    def test_what_excludes_each_other(self, blended: Any, overrides: list[str], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            blended(*overrides)

    def test_all_have_weights_or_none(self, blended: Any, stores: list[Path]) -> None:
        with pytest.raises(ConfigError, match="all a weight, or none"):
            blended(entries=f'{{path = "{stores[0]}", weight = 1}}, {{path = "{stores[1]}"}}')

    def test_without_weights_all_last_equally_long(self, blended: Any, stores: list[Path]) -> None:
        entries = ", ".join(f'{{path = "{path}"}}' for path in stores)
        prepared = blended(entries=entries)
        total = sum(prepared.objective.num_samples(store) for store in prepared.train.corpora)
        blended(f"train.steps={total}", "train.global_batch=1", "train.micro_batch=1", entries=entries)
        with pytest.raises(DataError, match=r"blend\[0\](?s:.*)blend\[1\](?s:.*)blend\[2\]"):
            blended(f"train.steps={total + 30}", "train.global_batch=1", "train.micro_batch=1", entries=entries)

    def test_the_identity_tells_weights_and_packing(self, blended: Any, stores: list[Path], prepare: Any) -> None:
        def entries(*weights: float) -> str:
            pairs = zip(stores, weights, strict=True)
            return ", ".join(f'{{path = "{path}", weight = {weight}, epochs = 0}}' for path, weight in pairs)

        known = {blended(entries=entries(*w)).data_identity for w in ((1, 1, 1), (1, 2, 1))}
        known |= {blended("data.packing=true").data_identity, blended().data_identity}
        known |= {prepare("causal_lm").data_identity, prepare("causal_lm", "data.packing=true").data_identity}
        assert len(known) == 6

    def test_an_objective_that_cannot_pack_says_so(self, prepare: Any) -> None:
        with pytest.raises(ConfigError, match=r"data\.packing: nsp cannot pack"):
            prepare("mlm+nsp", "data.packing=true")
        assert not Objective.packs


@pytest.mark.parametrize("workers", [0, 3])
def test_simulated_ranks_with_workers(blended: Any, workers: int) -> None:
    """Threads of loaders beside simulated ranks: the gradient is one rank's, and none is left over."""
    prepared = blended("data.packing=true")
    expected = run_simulated(lambda parallel: loss_and_gradients(prepared, parallel, step=3), dp=1)[0]

    def rank(parallel: Any) -> Any:
        feed = TrainFeed(
            prepared.objective,
            prepared.train,
            seed=7,
            global_batch=8,
            micro_batch=2,
            dp_index=parallel.dp.index,
            dp_size=parallel.dp.size,
            workers=workers,
        )
        try:
            rows = [feed.step(step) for step in range(4)][-1]
            return gradients_of(prepared, parallel, rows, step=3)
        finally:
            feed.close()

    for found in run_simulated(rank, dp=2, tp=2):
        assert_parity(found, expected, rtol=1e-10)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("megalm-rows")]


def test_an_error_in_a_worker_ends_the_run(prepare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare("causal_lm")
    (part,) = prepared.objective.parts.values()
    good = part.build_batch

    def bad(samples: np.ndarray, corpus: Any) -> Any:
        if seen[20] in samples.tolist():
            raise DataError("offset 4711 holds token 99999")
        return good(samples, corpus)

    feed = TrainFeed(
        prepared.objective, prepared.train, seed=7, global_batch=8, micro_batch=2, dp_index=0, dp_size=1, workers=2
    )
    order = SampleOrder(7, prepared.objective.num_samples(prepared.train))
    seen = [order.at(place)[1] for place in range(24)]
    monkeypatch.setattr(part, "build_batch", bad)
    feed.step(0)
    feed.step(1)
    with pytest.raises(DataError, match="offset 4711"):
        feed.step(2)
