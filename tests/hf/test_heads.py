"""Heads in Hugging Face folders: what transformers and sentence-transformers say of raw text is what the head says."""

from __future__ import annotations

import json
import random
import tomllib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config import toml
from megalm.config.load import load_config
from megalm.config.schema import KernelsConfig
from megalm.errors import CheckpointError, ConfigError
from megalm.hf import files
from megalm.hf.exporting import export_hf
from megalm.hf.importing import import_hf
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.train.head import predict
from megalm.train.merge import merge_lora
from megalm.train.prepare import prepare_run
from megalm.train.scoring import stored_head
from megalm.train.stored import Stored, find_checkpoint, open_stored
from megalm.train.trainer import Trainer

from .conftest import Folder, draw_settings, own_tokenizer

ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
WORDS = ["Ann", "of", "Ely", "naïve", "京", "and", "swords", "so", "no"]


@dataclass(frozen=True)
class Case:
    """A head with settings, and records for it."""

    head: str
    task: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "classes": Case("sequence_classification", "SequenceClassification"),
    "classes of pairs": Case("sequence_classification", "SequenceClassification", {"pair": True}),
    "several labels": Case("multi_label_classification", "SequenceClassification"),
    "a number": Case("regression", "SequenceClassification", {"pair": True}),
    "words": Case("token_classification", "TokenClassification"),
    "answers": Case("extractive_qa", "QuestionAnswering"),
    "vectors": Case("embedding", ""),
    "vectors of another size": Case("embedding", "", {"size": 7, "loss": "cosine"}),
}


def records(head: str, draw: random.Random) -> list[dict[str, Any]]:
    found = []
    for _ in range(16):
        words, more = draw.choices(WORDS, k=draw.randint(1, 3)), draw.choices(WORDS, k=2)
        record: dict[str, Any] = {"text": " ".join(words), "text_pair": " ".join(more), "value": draw.random()}
        record |= {"label": draw.choice("abc"), "labels": draw.sample("abc", draw.randint(0, 2)), "words": words}
        record |= {"tags": [draw.choice(["O", "B-x"]) for _ in words], "context": record["text"]}
        record |= {"question": record["text_pair"], "answers": [[0, len(words[0])]]}
        found.append(record)
    wanted = {
        "token_classification": ("words", "tags"),
        "extractive_qa": ("question", "context", "answers"),
        "multi_label_classification": ("text", "labels"),
        "regression": ("text", "text_pair", "value"),
        "embedding": ("text", "text_pair", "value"),
        "sequence_classification": ("text", "text_pair", "label"),
    }[head]
    return [{key: record[key] for key in wanted} for record in found]


def tuned(
    folder: Folder, path: Path, manager: PluginManager, kind: str, case: Case, draw: random.Random, **more: Any
) -> tuple[Stored, list[dict[str, Any]]]:
    """A head trained for a few steps on an import, and the records."""
    model, sizes = draw_settings(kind, draw)
    base = model.replace("LMHeadModel", "Model").replace("ForCausalLM", "Model") if draw.random() < 0.5 else model
    if kind == "roberta":
        sizes["type_vocab_size"] = 2
    source = folder("source", base, {**sizes, "initializer_range": 0.3})
    import_hf(source, path / "in", manager, tokenizer=own_tokenizer(source, manager), verify=False)
    rows = records(case.head, draw)
    (path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = dict(case.settings)
    if kind in DECODERS:
        if case.task == "SequenceClassification":
            settings |= {"pooling": "last", "bias": False}
        if case.head in ("extractive_qa", "sequence_classification", "regression"):
            settings["token_types"] = False
        if case.head == "embedding":
            settings["pooling"] = draw.choice(["last", "mean"])
    elif case.head == "embedding":
        settings["pooling"] = draw.choice(["cls", "mean"])
    given = {
        "run.dir": path / "run",
        "data.records.train": [str(path / "rows.jsonl")],
        "data.records.validation": [str(path / "rows.jsonl")],
        "train.head": case.head,
        "train.steps": 3,
        "train.sequence_length": 44,
        "train.global_batch": 8,
        "train.micro_batch": 4,
        "train.lr": 0.05,
        "train.precision": "float32",
        "checkpoint.load": path / "in",
        "launch.threads": 1,
        **{f"kernels.{operation}": "reference" for operation in KernelsConfig.model_fields},
        **{f"head.{case.head}.{key}": value for key, value in settings.items()},
        **more,
    }
    if case.head == "embedding" and case.settings.get("loss") != "cosine":
        given |= {"train.cell": 8, "train.micro_batch": 8}
    (path / "run.toml").write_text(model_section(path))
    pairs = [f"{key}={json.dumps(value, default=str)}" for key, value in given.items()]
    resolved = load_config(path / "run.toml", pairs, manager)
    Trainer(prepare_run(resolved, manager, 1, "cpu"), single_rank()).run()
    return open_stored(find_checkpoint(path / "run")[0], manager, required=True), rows


def model_section(path: Path) -> str:
    written = tomllib.loads((path / "in" / "run.toml").read_text())
    return toml.dumps({"model": written["model"], "finetune": {"method": "full"}})


def theirs(out: Path, case: Case, rows: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """What transformers says of each record, from its text alone, and what megalm said. Tokens are bytes."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = getattr(transformers, f"AutoModelFor{case.task}").from_pretrained(out).eval()
    label, found = model.config.id2label, []
    for row, mine in zip(rows, own, strict=True):
        if case.head == "token_classification":
            best = model(**tokenizer(" ".join(row["words"]), return_tensors="pt")).logits[0].argmax(-1)
            before = [" ".join([*row["words"][:number], ""]) for number in range(len(row["words"]))]
            found.append(([label[int(best[1 + len(text.encode())])] for text in before], mine["tags"]))
        elif case.head == "extractive_qa":
            given = model(**tokenizer(row["question"], row["context"], return_tensors="pt"))
            # A word is all of its tokens, with the space before it: an answer begins and ends at any of them.
            (start, stop), words = mine["span"], mine["text"].split()
            before = 2 + len(row["question"].encode())
            first, last = (before + len(row["context"][:at].encode()) for at in (start, stop))
            begins = range(first - (start > 0), first + len(words[0].encode()))
            ends = range(last - len(words[-1].encode()) - (start > 0 or len(words) > 1), last)
            both = [given.start_logits[0, i] + given.end_logits[0, j] for i in begins for j in ends if i <= j < i + 30]
            score = max(both)
            found.append(([score.item()], [mine["score"]]))
        else:
            texts = [row["text"], *([row["text_pair"]] if case.settings.get("pair") else [])]
            logits = model(**tokenizer(*texts, return_tensors="pt")).logits[0]
            if case.head == "regression":
                found.append((logits.tolist(), [mine["value"]]))
                continue
            several = case.head == "multi_label_classification"
            probabilities = [mine["probabilities"][label[n]] for n in range(len(logits))]
            found.append(((logits.sigmoid() if several else logits.softmax(-1)).tolist(), probabilities))
    return found


PAIRS = [(kind, name) for kind in (*ENCODERS, *DECODERS) for name in CASES]


@pytest.mark.parametrize("number", range(len(PAIRS)))
@torch.no_grad()
def test_raw_text_is_scored_alike(
    number: int, folder: Folder, tmp_path: Path, manager: PluginManager, campaign_seed: int, full: bool
) -> None:
    """Kinds of models and heads in an order that is drawn: the first six, or with the full counts all."""
    if number >= 6 and not full:
        pytest.skip("runs with the full counts")
    order = random.Random(campaign_seed).sample(PAIRS, len(PAIRS))
    check(*order[number], folder, tmp_path, manager, campaign_seed)


def check(kind: str, name: str, folder: Folder, tmp_path: Path, manager: PluginManager, seed: int) -> None:
    case, draw = CASES[name], random.Random(f"{seed} {kind} {name}")
    if case.head == "embedding":
        pytest.importorskip("sentence_transformers")
    with torch.enable_grad():
        stored, rows = tuned(folder, tmp_path, manager, kind, case, draw)
    exported = export_hf(stored, tmp_path / "out")
    (agreement,) = exported.agreements
    assert agreement.largest > 0.01, (kind, name)
    head_name, head = stored_head(stored)
    own = predict(stored.model(single_rank(), "float32"), head_name, head, rows, micro_batch=5)
    if case.head == "embedding":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
        found = torch.from_numpy(model.encode([row["text"] for row in rows]))
        mine = torch.tensor([each["embedding"] for each in own])
        torch.testing.assert_close(found, mine, atol=1e-5, rtol=0)
        return
    for found, mine in theirs(tmp_path / "out", case, rows, own):
        if case.head == "token_classification":
            assert found == mine, (kind, name)
        else:
            torch.testing.assert_close(torch.tensor(found), torch.tensor(mine), atol=1e-5, rtol=0)


def test_a_folder_of_sentence_transformers_without_a_layer_of_its_own_normalises(
    folder: Folder, tmp_path: Path, manager: PluginManager
) -> None:
    """As the vectors have length 1 also where nobody verified them."""
    stored, _ = tuned(folder, tmp_path, manager, "bert", CASES["vectors"], random.Random(1))
    export_hf(stored, tmp_path / "out", verify=False)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [each["type"].rpartition(".")[2] for each in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all((tmp_path / "out" / each["path"]).is_dir() for each in modules)


@pytest.mark.parametrize("broken", ["weights", "rows", "labels"])
def test_a_folder_that_scores_otherwise_does_not_appear(
    broken: str, folder: Folder, tmp_path: Path, manager: PluginManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalm.hf import conversion, exporting

    stored, _ = tuned(folder, tmp_path, manager, "bert", CASES["classes"], random.Random(2))
    if broken == "weights":
        write = files.write_tensors

        def other(place: Path, tensors: Any, most: int) -> list[str]:
            return write(place, {**tensors, "classifier.bias": tensors["classifier.bias"] + 0.01}, most)

        monkeypatch.setattr(files, "write_tensors", other)
        words = "logits of megalm and transformers differ"
    elif broken == "rows":
        monkeypatch.setattr(exporting, "write_rows", lambda *given: None)
        words = "but the head was trained on"
    else:
        monkeypatch.setattr(conversion, "_task_config", lambda *given: {})
        words = "transformers cannot load it"
    with pytest.raises(CheckpointError, match=words):
        export_hf(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_has_no_class_for_is_said(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    cases = [
        ("bert", Case("token_classification", "", {"crf": True}), "has no model with a CRF"),
        ("bert", Case("sequence_classification", "", {"pooling": "mean"}), 'reads what pooling = "pooler" does'),
        ("llama", Case("sequence_classification", "", {"pooling": "last"}), "train the head with bias = false"),
    ]
    for number, (kind, case, words) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        stored, _ = tuned(partial(renamed, folder, place), place, manager, kind, case, random.Random(3))
        with pytest.raises(ConfigError, match=words):
            export_hf(stored, place / "out")
        assert not (place / "out").exists()


def renamed(folder: Folder, place: Path, name: str, *given: Any) -> Path:
    return folder(f"{place.name} {name}", *given)


def test_a_head_tuned_with_lora_is_exported_once_merged(folder: Folder, tmp_path: Path, manager: PluginManager) -> None:
    more = {"finetune.method": "lora", "finetune.lora_targets": ["q", "v"]}
    stored, _ = tuned(folder, tmp_path, manager, "bert", CASES["classes"], random.Random(4), **more)
    with pytest.raises(CheckpointError, match="megalm merge adds them"):
        export_hf(stored, tmp_path / "out")
    merge_lora(stored, tmp_path / "merged")
    assert export_hf(open_stored(tmp_path / "merged", manager), tmp_path / "out").agreements
