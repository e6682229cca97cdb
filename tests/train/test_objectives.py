"""The first-party objectives: what their rows hold, against the text and against statistics."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from megalm.errors import ConfigError
from megalm.model.language_model import LanguageModel
from megalm.nn.microbatch import make_microbatch
from megalm.nn.module import materialise
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.objective import IGNORE
from megalm.train.feed import TrainFeed
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared

OBJECTIVES = ["causal_lm", "mlm", "nsp", "mlm+nsp"]
ADDRESS = (7, "train", 0)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[key], b[key]) for key in a)


def rows(prepared: Prepared, count: int, address: tuple[int | str, ...] = ADDRESS) -> list[dict[str, Any]]:
    return [prepared.objective.build(n, prepared.train, address) for n in range(count)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_do_not_depend_on_the_order_of_building(prepare: Any, name: str, campaign_seed: int) -> None:
    prepared = prepare(name)
    count = min(60, prepared.objective.num_samples(prepared.train))
    expected = rows(prepared, count)
    order = list(range(count))
    random.Random(campaign_seed).shuffle(order)
    for n in order:
        assert same(prepared.objective.build(n, prepared.train, ADDRESS), expected[n])


@pytest.mark.parametrize("name", OBJECTIVES[1:])
def test_epochs_seeds_and_splits_draw_anew(prepare: Any, name: str) -> None:
    prepared = prepare(name)
    first = rows(prepared, 20)
    for address in ((7, "train", 1), (8, "train", 0), (7, "validation", 0)):
        assert not all(same(a, b) for a, b in zip(first, rows(prepared, 20, address), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counts_are_what_the_loss_scores(prepare: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scored item of a model that knows nothing costs the same, so that the sum tells their number."""
    prepared = prepare(name)
    parallel = single_rank()
    model = LanguageModel(prepared.spec, parallel)
    materialise(model, parallel, 7, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = prepared.objective.collate(rows(prepared, 8))
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    microbatch = make_microbatch(tensors, parallel)
    terms = prepared.objective.loss(model(microbatch), tensors, model.context(microbatch))
    counts = prepared.objective.counts(batch)
    assert set(terms) == set(counts) == set(prepared.objective.weights)
    choices = {"causal_lm": prepared.spec.vocab_size, "mlm": prepared.spec.vocab_size, "nsp": 2}
    for term, count in counts.items():
        assert count > 0
        assert terms[term].sum.item() == pytest.approx(count * math.log(choices[term]), rel=1e-12)


class TestCausalLM:
    def test_a_label_is_the_next_token(self, prepare: Any) -> None:
        prepared = prepare("causal_lm")
        count = prepared.objective.num_samples(prepared.train)
        assert (count - 1) * 16 + 17 <= prepared.train.num_tokens < count * 16 + 17
        for n in (0, 1, count - 1):
            row = prepared.objective.build(n, prepared.train, ADDRESS)
            text = prepared.train.stream(n * 16, n * 16 + 17)
            np.testing.assert_array_equal(row["tokens"], text[:-1])
            np.testing.assert_array_equal(row["labels"], text[1:])


class TestMaskedLM:
    def test_statistics(self, prepare: Any) -> None:
        """Each share lies within five standard deviations of its binomial mean."""
        prepared = prepare("mlm", "train.sequence_length=32")
        special = prepared.tokenizer.special
        chosen = masked = kept = total = 0
        for row in (r for epoch in range(10) for r in rows(prepared, 150, (7, "train", epoch))):
            scored = row["labels"] != IGNORE
            original = np.where(scored, row["labels"], row["tokens"])
            ordinary = ~np.isin(original, special.ids())
            assert not (scored & ~ordinary).any(), "special tokens are never chosen"
            assert original[0] == special.cls
            assert original[-1] == special.sep
            total += int(ordinary.sum())
            chosen += int(scored.sum())
            masked += int((row["tokens"][scored] == special.mask).sum())
            kept += int((row["tokens"] == row["labels"])[scored].sum())
        assert total > 30000
        ordinary_ids = prepared.tokenizer.vocab_size - len(special.ids())

        def within(found: int, n: int, p: float) -> bool:
            return abs(found - n * p) < 5 * math.sqrt(n * p * (1 - p))

        assert within(chosen, total, 0.15)
        assert within(masked, chosen, 0.8)
        assert within(kept, chosen, 0.1 + 0.1 / ordinary_ids)

    def test_rows_hold_the_text(self, prepare: Any) -> None:
        prepared = prepare("mlm")
        for n, row in enumerate(rows(prepared, 50)):
            text = prepared.train.stream(n * 14, n * 14 + 14)
            original = np.where(row["labels"] != IGNORE, row["labels"], row["tokens"])
            np.testing.assert_array_equal(original[1:-1], text)

    def test_shares_that_do_not_add_up(self, prepare: Any) -> None:
        with pytest.raises(ConfigError, match="mask_share"):
            prepare("mlm", "objective.mlm.mask_share=0.9", "objective.mlm.random_share=0.2")


class TestNextSentence:
    def test_pairs(self, prepare: Any) -> None:
        """B follows A in the text where the label says so, and else is found only in other documents' text."""
        prepared = prepare("nsp", "train.sequence_length=48")
        special, corpus = prepared.tokenizer.special, prepared.train
        stream = corpus.stream(0, corpus.num_tokens).tolist()
        text = ",".join(map(str, stream)).join(",,")
        count = prepared.objective.num_samples(corpus)
        followed = 0
        for n, row in enumerate(rows(prepared, count)):
            tokens = row["tokens"].tolist()
            assert len(tokens) == 48
            used = int(row["attention_mask"].sum())
            assert all(row["attention_mask"][:used])
            assert tokens[used:] == [special.pad] * (48 - used)
            assert tokens[0] == special.cls
            assert tokens[used - 1] == special.sep
            middle = tokens.index(special.sep)
            assert middle < used - 1
            first, second = tokens[1:middle], tokens[middle + 1 : used - 1]
            assert first
            assert second
            expected_types = [0] * (middle + 1) + [1] * (used - middle - 1) + [0] * (48 - used)
            assert row["token_types"].tolist() == expected_types
            joined = "," + ",".join(map(str, first + second)) + ","
            if row["next_label"] == 0:
                followed += 1
                assert joined in text, n
            else:
                document = corpus.document_at(n * 45)
                start, stop = corpus.document(document)
                assert "," + ",".join(map(str, second)) + "," in text
                own = ",".join(map(str, stream[start:stop])).join(",,")
                assert len(second) < 12 or "," + ",".join(map(str, second)) + "," not in own, n
        assert abs(followed - count / 2) < 5 * math.sqrt(count / 4) + count * 0.1

    def test_shares(self, prepare: Any) -> None:
        prepared = prepare("nsp", "objective.nsp.random_prob=0.9", "train.sequence_length=48")
        labels = [row["next_label"] for row in rows(prepared, 100)]
        assert np.mean(labels) > 0.75


class TestJoint:
    def test_the_order_of_the_names_is_of_no_consequence(self, prepare: Any) -> None:
        one, other = prepare("mlm+nsp"), prepare("nsp+mlm")
        assert one.objective.name == other.objective.name == "mlm+nsp"
        assert one.objective.weights == other.objective.weights
        assert one.objective.versions == other.objective.versions
        for a, b in zip(rows(one, 30), rows(other, 30), strict=True):
            assert same(a, b)

    def test_nothing_is_masked_in_padding(self, prepare: Any) -> None:
        prepared = prepare("mlm+nsp", "train.sequence_length=48")
        for row in rows(prepared, 60):
            assert not (row["labels"] != IGNORE)[~row["attention_mask"]].any()
            assert (row["tokens"] == prepared.tokenizer.special.pad).sum() == (~row["attention_mask"]).sum()

    def test_the_pairs_are_those_of_nsp_alone(self, prepare: Any) -> None:
        joint, alone = prepare("mlm+nsp"), prepare("nsp")
        for a, b in zip(rows(joint, 30), rows(alone, 30), strict=True):
            assert a["next_label"] == b["next_label"]
            original = np.where(a["labels"] != IGNORE, a["labels"], a["tokens"])
            np.testing.assert_array_equal(original, b["tokens"])

    def test_two_that_build_rows_cannot_be_joined(self, prepare: Any) -> None:
        with pytest.raises(ConfigError, match="causal_lm and nsp both build rows"):
            prepare("causal_lm+nsp")

    def test_attention_must_agree(self, prepare: Any) -> None:
        with pytest.raises(ConfigError, match="attention"):
            prepare("causal_lm+mlm")

    def test_one_term_cannot_come_twice(self, prepare: Any) -> None:
        (part,) = prepare("mlm").objective.parts.values()
        with pytest.raises(ConfigError, match="loss term 'mlm'"):
            TrainingObjective({"a": part, "b": part}, 262)


@pytest.mark.parametrize("name", ["causal_lm", "mlm+nsp"])
def test_slots_hold_the_same_rows_under_every_layout(prepare: Any, name: str) -> None:
    prepared = prepare(name)

    def slots(dp: int, micro_batch: int, step: int) -> dict[int, dict[str, np.ndarray]]:
        found = {}
        for index in range(dp):
            feed = TrainFeed(
                prepared.objective,
                prepared.train,
                seed=7,
                global_batch=8,
                micro_batch=micro_batch,
                dp_index=index,
                dp_size=dp,
            )
            for part in feed.step(step):
                for place, slot in enumerate(part.slots):
                    assert slot not in found
                    found[slot] = {key: value[place] for key, value in part.batch.items()}
        return found

    # The last of these steps lies in a later epoch.
    for step in (0, 3, prepared.objective.num_samples(prepared.train) // 8 + 2):
        expected = slots(1, 8, step)
        assert sorted(expected) == list(range(8))
        for dp, micro_batch in ((1, 1), (2, 4), (2, 1), (4, 2), (8, 1)):
            found = slots(dp, micro_batch, step)
            assert sorted(found) == list(range(8))
            assert all(same(found[slot], expected[slot]) for slot in expected)


def test_an_epoch_shows_every_sample_once(prepare: Any) -> None:
    prepared = prepare("causal_lm", "train.sequence_length=64")
    samples = prepared.objective.num_samples(prepared.train)
    feed = TrainFeed(
        prepared.objective, prepared.train, seed=7, global_batch=samples, micro_batch=samples, dp_index=0, dp_size=1
    )
    text = prepared.train.stream(0, samples * 64).reshape(samples, 64)
    first, second = (feed.step(epoch)[0].batch["tokens"] for epoch in (0, 1))
    for epoch in (first, second):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, text))
    assert not np.array_equal(first, second)
