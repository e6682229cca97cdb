"""First-party heads against transformers' models with the same weights, and against plain formulas."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalm.config.schema import ModelConfig
from megalm.errors import ConfigError, DataError
from megalm.model.hf.config import model_settings
from megalm.model.hf.names import tensor_map
from megalm.model.language_model import LanguageModel
from megalm.model.spec import ModelSpec
from megalm.nn.module import fill_from_logical, materialise
from megalm.optim.weights import Weights
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.head import Head, HeadEnv
from megalm.plugin.contract.objective import IGNORE
from megalm.testing.parity import whole_gradients
from megalm.train.feed import evaluation_rows
from megalm.train.head import as_corpus, head_objective, predict
from megalm.train.step import forward_backward
from megalm_plugins.heads import MEGALM_API, megalm_heads
from megalm_plugins.heads.extractive_qa import ExtractiveQA
from megalm_plugins.heads.multi_label_classification import MultiLabelClassification
from megalm_plugins.heads.regression import Regression
from megalm_plugins.heads.sequence_classification import SequenceClassification
from megalm_plugins.heads.token_classification import TokenClassification
from megalm_plugins.tokenizers.byte import ByteTokenizer

LENGTH = 24
LABELS = ("O", "B-PER", "I-PER")
TEXTS = ["a king", "the queen of Rome came and saw", "no", "swords, and more swords", "Wörld 中文"]
CLASSES = [{"text": text, "label": LABELS[n % 3]} for n, text in enumerate(TEXTS)]
PAIRS = [{"text": a, "text_pair": b, "label": LABELS[len(a) % 3]} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
SEVERAL = [{"text": text, "labels": list(LABELS[n % 2 : n])} for n, text in enumerate(TEXTS)]
VALUES = [{"text": text, "value": 1.5 * n - 2} for n, text in enumerate(TEXTS)]
WORDS = [
    {"words": ["Ann", "of", "Ely"], "tags": ["B-PER", "I-PER", "O"]},
    {"words": ["so"], "tags": ["O"]},
    {"words": ["a", "b", "c", "d"], "tags": ["O", "O", "B-PER", "I-PER"]},
]


def make_env(labels: Sequence[str] = LABELS, **more: Any) -> HeadEnv:
    return HeadEnv(ByteTokenizer(), LENGTH, tuple(labels), **more)


def make_head(cls: type[Head], labels: Sequence[str] = LABELS, **settings: Any) -> Head:
    return cls(cls.Config(**{"dropout": 0.0, **settings}), make_env(labels))


def hf_model(name: str, outputs: int) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=262,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=LENGTH,
        num_labels=outputs,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
        initializer_range=0.4,
    )
    model = getattr(transformers, name)(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def own_names(head: str, single: bool) -> dict[str, str]:
    out = f"plugins.{head}" if single else f"plugins.{head}.out"
    names = {f"classifier.{leaf}": f"{out}.{leaf}" for leaf in ("weight", "bias")}
    return names | {f"bert.pooler.dense.{leaf}": f"plugins.{head}.pooler.{leaf}" for leaf in ("weight", "bias")}


def make_model(head: Head, name: str, hf: Any) -> LanguageModel:
    """megalm's model with the weights of transformers'."""
    cfg = ModelConfig(**model_settings(hf.config.to_dict()))
    needs = head_objective(name, head).needs
    spec = ModelSpec(cfg, 262, 3, 4, 20, LENGTH, 2, False, False, (), modules=needs.modules)
    model = LanguageModel(spec, single_rank())
    materialise(model, single_rank(), 0, torch.float64)
    fill_from_logical(model, single_rank(), logical(hf.state_dict(), spec, name))
    return model


def logical(tensors: Mapping[str, torch.Tensor], spec: ModelSpec, name: str) -> dict[str, torch.Tensor]:
    own = own_names(name, name == "token_classification")
    rest = {key: tensor for key, tensor in tensors.items() if key not in own}
    out = tensor_map("bert", spec).to_logical(rest)
    return out | {own[key]: tensor for key, tensor in tensors.items() if key in own}


CASES: dict[str, tuple[type[Head], str, list[dict[str, Any]], dict[str, Any], int]] = {
    "one text": (SequenceClassification, "BertForSequenceClassification", CLASSES, {}, 3),
    "a pair": (SequenceClassification, "BertForSequenceClassification", PAIRS, {"pair": True}, 3),
    "a number": (Regression, "BertForSequenceClassification", VALUES, {}, 1),
    "words": (TokenClassification, "BertForTokenClassification", WORDS, {}, 3),
    "several labels": (MultiLabelClassification, "BertForSequenceClassification", SEVERAL, {}, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_transformers(case: str) -> None:
    cls, hf_name, records, settings, outputs = CASES[case]
    head, hf = make_head(cls, **settings), hf_model(hf_name, outputs)
    name = getattr(cls, "kind", "token_classification")
    model, objective = make_model(head, name, hf), head_objective(name, head)
    (rows,) = evaluation_rows(objective, as_corpus(records), seed=0, samples=9, micro_batch=9, dp_index=0, dp_size=1)
    losses = forward_backward(model, objective, [rows], seed=0, step=0)

    batch = {key: torch.from_numpy(value) for key, value in rows.batch.items()}
    given = {"input_ids": batch["tokens"], "attention_mask": batch["attention_mask"].long()}
    if "token_types" in batch:
        given["token_type_ids"] = batch["token_types"]
    if case == "words":
        labels = torch.full_like(batch["tokens"], IGNORE)
        for row, (places, tags) in enumerate(zip(batch["first_tokens"], batch["tags"], strict=True)):
            for place, tag in zip(places, tags, strict=True):
                if place >= 0:
                    labels[row, place] = tag
    elif case == "several labels":
        labels, hf.config.problem_type = batch["chosen"].double(), "multi_label_classification"
    else:
        labels = batch["value"] if case == "a number" else batch["label"]
    expected = hf(**given, labels=labels)
    expected.loss.backward()
    assert losses.total == pytest.approx(expected.loss.item(), rel=1e-10)
    found = whole_gradients(Weights(model, single_rank(), torch.float64))
    gradients = logical({key: p.grad for key, p in hf.named_parameters()}, model.spec, name)
    assert set(found) == set(gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-8, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )

    predictions = predict(
        model, name, head, [{k: v for k, v in r.items() if k != "label"} for r in records], micro_batch=2
    )
    for row, prediction in enumerate(predictions):
        logits = expected.logits[row].detach()
        if case == "words":
            places = batch["first_tokens"][row, : len(records[row]["words"])]
            assert prediction == {"tags": [LABELS[n] for n in logits[places].argmax(-1)]}
        elif case == "a number":
            assert prediction["value"] == pytest.approx(logits.item(), rel=1e-9)
        elif case == "several labels":
            probabilities = logits.sigmoid().tolist()
            assert list(prediction["probabilities"].values()) == pytest.approx(probabilities, rel=1e-9)
            assert prediction["labels"] == [name for name, p in zip(LABELS, probabilities, strict=True) if p >= 0.5]
        else:
            assert prediction["label"] == LABELS[int(logits.argmax())]
            probabilities = logits.softmax(-1).tolist()
            assert list(prediction["probabilities"].values()) == pytest.approx(probabilities, rel=1e-9)


def test_answers_are_scored_as_transformers_scores_them() -> None:
    """Of a context in one window, and of one in several: the spans' scores are sums of its logits."""
    head, hf = make_head(ExtractiveQA, n_best=3, max_answer=4), hf_model("BertForQuestionAnswering", 2)
    records = [{"question": "who", "context": text} for text in ("a king", "the queen of Rome came and saw")]
    spec = ModelSpec(
        ModelConfig(**model_settings(hf.config.to_dict())),
        *(262, 3, 4, 20, LENGTH, 2, False, False, ()),
        modules=head_objective("extractive_qa", head).needs.modules,
    )
    model = LanguageModel(spec, single_rank())
    materialise(model, single_rank(), 0, torch.float64)
    tensors = hf.state_dict()
    own = {f"plugins.extractive_qa.{leaf}": tensors.pop(f"qa_outputs.{leaf}") for leaf in ("weight", "bias")}
    fill_from_logical(model, single_rank(), tensor_map("bert", spec).to_logical(tensors) | own)
    for record, found in zip(records, predict(model, "extractive_qa", head, records, micro_batch=2), strict=True):
        best: dict[tuple[int, int], float] = {}
        for part in head.parts(record):
            row = head.build_example(part)
            out = hf(
                input_ids=torch.from_numpy(row["tokens"])[None],
                token_type_ids=torch.from_numpy(row["token_types"])[None],
            )
            for a, b in itertools.combinations_with_replacement(range(1, len(row["places"])), 2):
                if b - a < 4:
                    span = (int(row["from_character"][a]), int(row["to_character"][b]))
                    score = out.start_logits[0, row["places"][a]] + out.end_logits[0, row["places"][b]]
                    best[span] = max(best.get(span, -math.inf), score.item())
        order = sorted(best, key=lambda span: -best[span])[:3]
        assert [tuple(each["span"]) for each in found["candidates"]] == order
        assert [each["score"] for each in found["candidates"]] == pytest.approx(
            [best[span] for span in order], rel=1e-9
        )


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_poolings(pooling: str) -> None:
    """The score is the linear layer on the vector that the setting names."""
    head, hf = make_head(SequenceClassification, pooling=pooling), hf_model("BertForSequenceClassification", 3)
    objective = head_objective("sequence_classification", head)
    spec = ModelSpec(
        ModelConfig(**model_settings(hf.config.to_dict())),
        *(262, 3, 4, 20, LENGTH, 2, False, False, ()),
        modules=objective.needs.modules,
    )
    model = LanguageModel(spec, single_rank())
    materialise(model, single_rank(), 0, torch.float64)
    tensors = {
        key: t for key, t in logical(hf.state_dict(), spec, "sequence_classification").items() if "pooler" not in key
    }
    fill_from_logical(model, single_rank(), tensors)
    for record, prediction in zip(
        CLASSES, predict(model, "sequence_classification", head, CLASSES, micro_batch=3), strict=True
    ):
        ids = [259, *record["text"].encode()[: LENGTH - 2], 260]
        vectors = hf.bert(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vector = {"cls": vectors[0], "mean": vectors.mean(0), "last": vectors[-1]}[pooling]
        logits = F.linear(vector, hf.classifier.weight, hf.classifier.bias)
        assert list(prediction["probabilities"].values()) == pytest.approx(logits.softmax(-1).tolist(), rel=1e-9)


def test_rows_of_texts_and_pairs() -> None:
    cls, sep = 259, 260
    single = make_head(SequenceClassification).build_example({"text": "ab", "label": "I-PER"})
    assert single["tokens"].tolist() == [cls, 97, 98, sep]
    assert single["label"] == 2
    assert not single["truncated"]
    pair = make_head(SequenceClassification, pair=True).build_example({"text": "ab", "text_pair": "c"})
    assert pair["tokens"].tolist() == [cls, 97, 98, sep, 99, sep]
    assert pair["token_types"].tolist() == [0, 0, 0, 0, 1, 1]
    assert pair["label"] == IGNORE


@pytest.mark.parametrize(("first", "second", "kept"), [(40, 3, (18, 3)), (3, 40, (3, 18)), (40, 40, (11, 10))])
def test_long_pairs_lose_the_end_of_the_longer(first: int, second: int, kept: tuple[int, int]) -> None:
    row = make_head(SequenceClassification, pair=True).build_example({"text": "a" * first, "text_pair": "b" * second})
    assert row["truncated"]
    assert row["tokens"].tolist().count(97) == kept[0]
    assert row["tokens"].tolist().count(98) == kept[1]
    assert len(row["tokens"]) == LENGTH


def test_words_and_their_first_tokens() -> None:
    """The separator's own token, where the tokenizer has one, is not a word's."""
    head = make_head(TokenClassification)
    row = head.build_example(WORDS[0])
    assert bytes(row["tokens"][1:-1].tolist()) == b"Ann of Ely"
    assert row["first_tokens"].tolist() == [1, 5, 8]
    assert row["tags"].tolist() == [1, 2, 0]
    joined = make_head(TokenClassification, separator="").build_example({"words": ["中", "文"]})
    assert joined["first_tokens"].tolist() == [1, 4]
    assert joined["tags"].tolist() == [IGNORE, IGNORE]
    cut = head.build_example({"words": ["x" * 10, "y" * 10, "z" * 10], "tags": ["O"] * 3})
    assert cut["truncated"]
    assert cut["first_tokens"].tolist() == [1, 12, -1]
    assert cut["tags"].tolist() == [0, 0, IGNORE]
    assert head.counts(head.collate([row, cut], LENGTH)) == {"token_classification": 5}


def test_words_of_a_bpe_are_those_of_the_whole_text() -> None:
    from megalm_plugins.tokenizers.hf import HFConfig, HFTokenizer

    tokenizer = HFTokenizer.train(["the king of Rome saw the queen of Rome"] * 9, HFConfig(vocab_size=300))
    head = TokenClassification(TokenClassification.Config(), HeadEnv(tokenizer, LENGTH, LABELS))
    words = ["the", "queen", "of", "Rome"]
    row = head.build_example({"words": words})
    ids = tokenizer.encode_batch([" ".join(words)])[0]
    assert row["tokens"][1:-1].tolist() == ids
    text = [tokenizer.decode(row["tokens"][start : start + 1].tolist()).strip() for start in row["first_tokens"]]
    assert all(word.startswith(piece) and piece for word, piece in zip(words, text, strict=True))


REFUSED: dict[str, tuple[type[Head], dict[str, Any], dict[str, Any], str]] = {
    "labels": (SequenceClassification, {}, {"labels": ("a",)}, "needs at least two labels; found"),
    "tags": (TokenClassification, {}, {"labels": ()}, "needs at least two labels; found"),
    "causal": (
        SequenceClassification,
        {"pooling": "cls"},
        {"attention": "causal"},
        'pooling = "cls" reads the first token',
    ),
    "length": (Regression, {"pair": True}, {"sequence_length": 4}, "leaves no room for text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_configured(case: str) -> None:
    cls, settings, more, message = REFUSED[case]
    env = {"sequence_length": LENGTH, "labels": LABELS, **more}
    with pytest.raises(ConfigError, match=message):
        cls(cls.Config(**settings), HeadEnv(ByteTokenizer(), **env))


def test_a_tokenizer_without_special_tokens() -> None:
    """Pair and first-token heads say what they miss; the others do without."""
    from megalm.plugin.contract.tokenizer import SpecialTokens

    class Bare(ByteTokenizer):
        special = SpecialTokens()  # type: ignore[assignment]

    env = HeadEnv(Bare(), LENGTH, LABELS)
    with pytest.raises(ConfigError, match="reads the cls token, and this tokenizer has none"):
        SequenceClassification(SequenceClassification.Config(), env)
    with pytest.raises(ConfigError, match="pair = true needs a tokenizer with a sep token"):
        Regression(Regression.Config(pooling="mean", pair=True), env)
    head = Regression(Regression.Config(pooling="last"), env)
    assert head.build_example({"text": "ab"})["tokens"].tolist() == [97, 98]


def test_a_text_without_tokens_is_refused_by_field() -> None:
    class Deaf(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            return [[] for _ in texts]

    with pytest.raises(DataError, match="field 'text': the tokenizer has no token"):
        Regression(Regression.Config(), HeadEnv(Deaf(), LENGTH)).build_example({"text": "\u200b."})
    with pytest.raises(DataError, match="field 'words': the tokenizer has no token"):
        TokenClassification(TokenClassification.Config(), HeadEnv(Deaf(), LENGTH, LABELS)).build_example(
            {"words": ["x"]}
        )


def test_measures_are_chosen_by_name() -> None:
    head = make_head(SequenceClassification, metrics=("matthews", "accuracy"))
    assert head.goals() == {"matthews": "max", "accuracy": "max"}
    assert head.metrics([{"label": "O"}, {"label": "B-PER"}], CLASSES[:2]) == {"matthews": 1.0, "accuracy": 1.0}
    assert head.report([{"label": "O"}], CLASSES[:1])["labels"]["O"]["support"] == 1
    with pytest.raises(ConfigError, match="regression: metrics: 'accuracy' is no measure of a head that"):
        make_head(Regression, metrics=("accuracy",))
    assert next(iter(make_head(TokenClassification).goals())) == "span_f1"
    assert next(iter(make_head(TokenClassification, labels=("a", "b")).goals())) == "f1_macro"
    with pytest.raises(ConfigError, match=r"span_f1 counts spans that tags in IOB2 mark .* but the labels are a, b"):
        make_head(TokenClassification, labels=("a", "b"), metrics=("span_f1",))


def test_listing_and_importing_heads_needs_no_torch() -> None:
    assert MEGALM_API == (1, 5)
    targets = [component.target for component in megalm_heads()]
    code = "import importlib, sys\n" + "\n".join(
        f"getattr(importlib.import_module({target.split(':')[0]!r}), {target.split(':')[1]!r})" for target in targets
    )
    result = subprocess.run([sys.executable, "-c", f"{code}\nsys.exit('torch' in sys.modules)"], capture_output=True)
    assert result.returncode == 0, result.stderr
