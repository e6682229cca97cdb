"""What rows of span_mlm, denoise and contrastive hold, told from the rows and the text alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalm.errors import ConfigError, DataError, ObjectiveError
from megalm.nn.microbatch import make_microbatch
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE, Needs, TensorSpec
from megalm.plugin.manager import PluginManager
from megalm.testing.runs import make_run, make_store
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared

Prepare = Callable[..., Prepared]
LENGTH = 64


@pytest.fixture(scope="module")
def manager() -> PluginManager:
    return PluginManager.for_launch(None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, manager: PluginManager) -> Path:
    return make_store(tmp_path_factory.mktemp("rows"), documents=150, manager=manager)


@pytest.fixture
def prepare(tmp_path: Path, store: Path, manager: PluginManager) -> Prepare:
    def make(objective: str, *overrides: str, text: str | None = None) -> Prepared:
        data = store
        if text is not None:
            (tmp_path / "in.txt").write_text(text, encoding="utf-8")
            data = make_store(tmp_path, manager=manager, text=tmp_path / "in.txt")
        more = [f"train.sequence_length={LENGTH}"]
        more += ["train.cell=8", "train.micro_batch=8"] if objective == "contrastive" else []
        architecture = "gpt2" if objective == "denoise" else "bert"
        given = [*more, *overrides]
        return make_run(
            tmp_path, data, objective=objective, architecture=architecture, overrides=given, manager=manager
        )

    return make


def rows(prepared: Prepared, epochs: int = 1) -> list[dict[str, Any]]:
    count = prepared.objective.num_samples(prepared.train)
    return [prepared.objective.build(n, prepared.train, (7, "train", e)) for e in range(epochs) for n in range(count)]


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Maximal [start, stop) where flags are true."""
    edges = np.flatnonzero(np.diff(flags.astype(int), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


class TestSpans:
    def test_lengths_are_geometric(self, prepare: Prepare) -> None:
        """In rows that are long beside a span, whose last span alone is cut short."""
        overrides = ["train.sequence_length=1000", "objective.span_mlm.whole_word=false"]
        prepared = prepare("span_mlm", *overrides)
        found = Counter(stop - start for row in rows(prepared, 20) for start, stop in runs(row["labels"] != IGNORE))
        total = sum(found.values())
        weights = 0.8 ** np.arange(10)
        expected = weights / weights.sum()
        assert max(found) == 10
        share = np.array([found[n + 1] for n in range(10)]) / total
        assert total > 4000
        # One span of some forty in a row is cut.
        assert np.abs(share - expected).max() < 0.02 + 5 * np.sqrt(expected * (1 - expected) / total).max()

    @pytest.mark.parametrize("name", ["span_mlm", "sop+span_mlm"])
    def test_spans_are_words_and_stay_apart(self, prepare: Prepare, name: str) -> None:
        prepared = prepare(name, "objective.span_mlm.mask_prob=0.5")
        starts = prepared.tokenizer.word_starts()
        for row in rows(prepared):
            scored = row["labels"] != IGNORE
            assert not (scored & row["special"]).any()
            original = np.where(scored, row["labels"], row["tokens"])
            assert [tuple(span) for span in row["spans"].tolist()] == runs(scored)
            for start, stop in runs(scored):
                assert starts[original[start]] or row["special"][start - 1]
                assert row["special"][stop] or starts[original[stop]]

    def test_a_span_is_replaced_as_a_whole(self, prepare: Prepare) -> None:
        prepared = prepare("span_mlm")
        kinds: Counter[str] = Counter()
        for row in rows(prepared, 8):
            for start, stop in runs(row["labels"] != IGNORE):
                tokens, labels = row["tokens"][start:stop], row["labels"][start:stop]
                masked, kept = tokens == prepared.tokenizer.special.mask, tokens == labels
                assert masked.all() or kept.all() or not (masked | kept).any()
                kinds["masked" if masked.all() else "kept" if kept.all() else "random"] += 1
        total = sum(kinds.values())
        assert total > 400
        assert abs(kinds["masked"] / total - 0.8) < 5 * (0.16 / total) ** 0.5
        assert abs(kinds["random"] / total - 0.1) < 5 * (0.09 / total) ** 0.5

    def test_half_of_few_words(self, prepare: Prepare) -> None:
        """Rows of any number of words, with as many spans as there is room for."""
        text = "\n\n".join(" ".join("ab" for _ in range(n)) for n in range(1, 90))
        settings = ["objective.span_mlm.mask_prob=0.5", "objective.span_mlm.max_length=1"]
        for row in rows(prepare("sop+span_mlm", *settings, text=text), 3):
            scored, ordinary = row["labels"] != IGNORE, ~row["special"]
            original = np.where(scored, row["labels"], row["tokens"])
            assert scored.any() or ordinary.sum() < 6
            assert original[ordinary].max() < 256

    def test_no_boundary_term(self, prepare: Prepare) -> None:
        objective = prepare("span_mlm", "objective.span_mlm.boundary_weight=0.0").objective
        assert set(objective.weights) == {"span_mlm"}
        assert not objective.needs.modules


class TestDenoising:
    KINDS = ("prefix", "mask", "extreme", "delete", "permute")

    def only(self, kind: str) -> list[str]:
        return [f"objective.denoise.{each}_share={float(each == kind)}" for each in self.KINDS]

    def parts(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        """What is given and what is to be written, told from labels alone."""
        scored = np.flatnonzero(row["labels"] != IGNORE)
        assert scored.tolist() == list(range(scored[0], scored[-1] + 1)), "one stretch"
        assert row["prefix"] == scored[0] + 1, "what is given, its last token included, is seen by all"
        wanted = row["labels"][scored]
        np.testing.assert_array_equal(row["tokens"][scored[1:]], wanted[:-1])
        return row["tokens"][: row["prefix"]].tolist(), wanted.tolist()

    def stream(self, prepared: Prepared) -> str:
        return "".join(map(chr, prepared.train.stream(0, prepared.train.num_tokens)))

    def text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def test_prefix(self, prepare: Prepare) -> None:
        prepared = prepare("denoise", *self.only("prefix"))
        stream, cuts = self.stream(prepared), set()
        for row in rows(prepared, 3):
            given, wanted = self.parts(row)
            assert self.text(given + wanted) in stream
            assert len(given + wanted) == LENGTH + 1
            cuts.add(len(given))
        assert {min(cuts), max(cuts)} <= {*range(1, 5), *range(LENGTH - 4, LENGTH + 1)}

    @pytest.mark.parametrize(("kind", "share"), [("mask", 0.15), ("extreme", 0.5)])
    @pytest.mark.parametrize("span", [1.0, 3.0, 100.0])
    def test_spans(self, prepare: Prepare, kind: str, share: float, span: float) -> None:
        prepared = prepare("denoise", *self.only(kind), f"objective.denoise.{kind}_span={span}")
        special, stream = prepared.tokenizer.special, self.stream(prepared)
        numbers = set()
        for row in rows(prepared):
            given, wanted = self.parts(row)
            assert given.pop() == special.mask
            assert wanted.pop() == special.sep
            gaps = [list(g) for mask, g in itertools.groupby(given, lambda t: t == special.mask) if not mask]
            assert not any(a == b == special.mask for a, b in itertools.pairwise(given)), "spans are apart"
            spans = [list(g) for mask, g in itertools.groupby(wanted, lambda t: t == special.mask) if not mask]
            assert len(spans) == given.count(special.mask)
            whole, left = [], iter(spans)
            for token in given:
                whole += next(left) if token == special.mask else [token]
            assert self.text(whole) in stream
            assert sum(map(len, spans)) == max(1, round(share * len(whole)))
            assert len(whole) + 2 * len(spans) <= LENGTH < len(whole) + 2 * len(spans) + 4
            assert gaps
            numbers.add(len(spans))
        assert len(numbers) == 1

    def test_delete(self, prepare: Prepare) -> None:
        prepared = prepare("denoise", *self.only("delete"))
        stream, sep = self.stream(prepared), prepared.tokenizer.special.sep
        for row in rows(prepared):
            given, wanted = self.parts(row)
            assert given.pop() == wanted.pop() == sep
            assert self.text(wanted) in stream
            rest = iter(wanted)
            assert all(token in rest for token in given), "in their order"

    def test_permute(self, prepare: Prepare) -> None:
        prepared = prepare("denoise", *self.only("permute"))
        stream, special = self.stream(prepared), prepared.tokenizer.special
        moved = 0
        for row in rows(prepared, 3):
            given, wanted = self.parts(row)
            assert given.pop() == wanted.pop() == special.sep
            assert self.text(wanted) in stream
            if len(given) < len(wanted):
                assert not any(
                    b". " in bytes(t for t in part if t < 256)
                    for end, part in itertools.groupby(wanted, lambda t: t == special.eos)
                    if not end
                ), "tokens are left out where no document has two sentences"
                continue
            moved += given != wanted
            ends = [n for n, token in enumerate(wanted) if token == special.eos]
            assert ends == [n for n, token in enumerate(given) if token == special.eos]
            for a, b in itertools.pairwise([0, *ends, len(wanted)]):
                assert sorted(given[a:b]) == sorted(wanted[a:b]), "sentences stay in their document"
        assert moved > 20

    @pytest.mark.parametrize("words", [1, 80])
    def test_no_sentences_to_shuffle(self, prepare: Prepare, words: int) -> None:
        """Documents of one sentence, shorter and longer than a row."""
        text = "\n\n".join(f"words {n}" * words for n in range(200))
        found = [self.parts(row) for row in rows(prepare("denoise", *self.only("permute"), text=text))]
        left = sum(map(len, (given for given, _ in found))) / sum(map(len, (wanted for _, wanted in found)))
        assert abs(left - 0.85) < 0.05

    def test_no_kind_at_all(self, prepare: Prepare) -> None:
        with pytest.raises(ConfigError, match="must be above 0"):
            prepare("denoise", *self.only("none"))

    def test_rows_too_short(self, prepare: Prepare) -> None:
        with pytest.raises(ConfigError, match="no room for the kind 'delete'"):
            prepare("denoise", *self.only("delete"), "train.sequence_length=4")


class TestPrefix:
    def test_is_declared_with_its_tensor(self, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
        (part,) = prepare("denoise").objective.parts.values()
        tokens, prefix = TensorSpec(), TensorSpec(("batch",), to="all")
        for needs in (
            Needs("prefix", {"tokens": tokens}),
            Needs("causal", {"tokens": tokens, "prefix": prefix}),
            Needs("prefix", {"tokens": tokens, "prefix": TensorSpec(("batch",))}),
        ):
            monkeypatch.setattr(type(part), "needs", lambda self, needs=needs: needs)
            with pytest.raises(ObjectiveError, match="the tensor 'prefix'"):
                TrainingObjective({"denoise": part}, 262)

    def test_rows_of_documents_have_none(self) -> None:
        tokens = torch.zeros((2, 4), dtype=torch.int64)
        with pytest.raises(ObjectiveError, match="not both"):
            make_microbatch({"tokens": tokens, "documents": tokens, "prefix": tokens[:, 0]}, single_rank())

    def test_packing_is_refused(self, prepare: Prepare) -> None:
        with pytest.raises(ConfigError, match="denoise cannot pack"):
            prepare("denoise", "data.packing=true")


class TestContrast:
    def test_a_sentence_twice(self, prepare: Prepare) -> None:
        prepared = prepare("contrastive")
        corpus, special = prepared.train, prepared.tokenizer.special
        for number, row in enumerate(rows(prepared)):
            text = corpus.stream(*corpus.sentence(number)).tolist()[: LENGTH - 2]
            for tokens, present in zip(row["tokens"], row["attention_mask"], strict=True):
                assert tokens[present].tolist() == [special.cls, *text, special.sep]
                assert (tokens[~present] == special.pad).all()

    def test_a_document_is_a_pair(self, prepare: Prepare) -> None:
        text = "\n\n".join(f"Gloss {n}. An example. And more." if n % 3 else f"Alone {n}" for n in range(60))
        prepared = prepare("contrastive", 'objective.contrastive.positives="document"', text=text)
        for row in rows(prepared):
            first, second = (
                prepared.tokenizer.decode(tokens[present].tolist())
                for tokens, present in zip(row["tokens"], row["attention_mask"], strict=True)
            )
            assert f"{first}{second}" in text if second != first else first.startswith("Alone")
            assert first.startswith(("Gloss", "Alone"))

    def test_rows_of_a_batch_are_views_in_turn(self, prepare: Prepare) -> None:
        prepared = prepare("contrastive")
        some = rows(prepared)[:5]
        batch = prepared.objective.collate(some)
        for n in range(10):
            np.testing.assert_array_equal(batch["tokens"][n], some[n // 2]["tokens"][n % 2])
        assert prepared.objective.counts(batch) == {"contrastive": 5}

    def test_layouts_that_do_not_hold_a_cell_are_refused(self, prepare: Prepare) -> None:
        with pytest.raises(ConfigError, match=r"must equal train\.cell = 4"):
            prepare("contrastive", "train.cell=4")

    def test_one_text_cannot_be_compared(self, prepare: Prepare) -> None:
        with pytest.raises(DataError, match="the corpus has 1"):
            prepare("contrastive", text="one\n\ntwo")
