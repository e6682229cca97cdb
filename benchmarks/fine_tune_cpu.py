"""Fine-tuning on one CPU thread: megalm against the Hugging Face Trainer, speed and what comes of it.

    python benchmarks/fine_tune_cpu.py --model FOLDER [--task supersense|sts|ner] [--data FOLDER] [--steps N]
                                       [--seeds N] [--write]

Both start from the same weights (``--model`` is a folder that transformers reads) and train on the same rows in the
same order with the same rates, AdamW, clipping and dropout, each seed with a head and an order of its own. The Trainer
is given megalm's batches: rows of like length, its best setting, which it finds encoded and padded, while megalm's are
made in its steps. The two take turns of a few steps, in threads of which one runs at a time, so that a machine whose
speed drifts slows both alike; the seconds are those of the steps. What is measured are records that neither has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from record import write_record

from megalm.api import Callback, Settings, hookimpl
from megalm.config.load import load_config
from megalm.parallel.mesh import single_rank
from megalm.plugin.manager import PluginManager
from megalm.train.feed import evaluation_rows
from megalm.train.head import as_corpus
from megalm.train.prepare import Prepared, prepare_run
from megalm.train.trainer import Trainer as MegalmTrainer

BUNDLED = Path(__file__).parents[1] / "examples" / "data"
TURN, WARM = 5, 5
"""Steps of a turn, and steps before the clock runs."""
ROWS = 32
MEASURED = 1500
"""Records of the test part, or all."""
IGNORE = -100


@dataclass(frozen=True)
class Task:
    """A head over records, and what transformers has for it."""

    head: str
    records: str
    """TOML of [data.records], of files in ``{data}``."""
    settings: str
    metric: str
    hugging_face: str
    labels: Callable[[Mapping[str, Any]], torch.Tensor]
    """What the Trainer's model takes as labels, from megalm's batch."""
    predictions: Callable[[torch.Tensor, Mapping[str, Any], tuple[str, ...]], list[Any]]
    """What megalm's head would say, from that model's logits, the batch and the labels' names."""
    lr: float


def _tag_labels(batch: Mapping[str, Any]) -> torch.Tensor:
    labels = torch.full(batch["tokens"].shape, IGNORE)
    for row, places, tags in zip(labels, batch["first_tokens"], batch["tags"], strict=True):
        for place, tag in zip(places.tolist(), tags.tolist(), strict=True):
            if place >= 0:
                row[place] = tag
    return labels


def _tags(logits: torch.Tensor, batch: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    found = []
    for row, places, words in zip(logits.argmax(-1).tolist(), batch["first_tokens"], batch["words"], strict=True):
        found.append({"tags": [names[row[place]] if place >= 0 else None for place in places[: int(words)].tolist()]})
    return found


POOLER = 'take = {{"plugins.{head}.pooler" = "classifiers.pooler"}}'
TASKS = {
    "supersense": Task(
        "sequence_classification",
        """train = ["{data}/wordnet_supersense.tsv.gz"]
columns = {{text = "3", label = "2"}}
header = false
only = {{"1" = "train"}}
validation_only = {{"1" = "test"}}""",
        "",
        "accuracy",
        "AutoModelForSequenceClassification",
        lambda batch: torch.from_numpy(batch["label"]),
        lambda logits, _, names: [{"label": names[best]} for best in logits.argmax(-1).tolist()],
        2e-4,
    ),
    "sts": Task(
        "regression",
        """train = ["{data}/stsb-en-train.csv.gz"]
validation = ["{data}/stsb-en-test.csv.gz"]
columns = {{text = "1", text_pair = "2", value = "3"}}
header = false""",
        "pair = true",
        "spearman",
        "AutoModelForSequenceClassification",
        lambda batch: torch.from_numpy(batch["value"]).float(),
        lambda logits, *_: [{"value": value} for value in logits[:, 0].tolist()],
        5e-5,
    ),
    "ner": Task(
        "token_classification",
        """train = ["{data}/wnut17-train.conll.gz"]
validation = ["{data}/wnut17-test.conll.gz"]""",
        'metrics = ["span_f1"]',
        "span_f1",
        "AutoModelForTokenClassification",
        _tag_labels,
        _tags,
        2e-4,
    ),
}

CONFIG = """
[run]
dir = "{run}"
seed = {seed}
[model]
architecture = "bert"
layers = {layers}
hidden_size = {hidden_size}
heads = {heads}
ffn_size = {ffn_size}
max_positions = {max_positions}
dropout = 0.1
attention_dropout = {attention_dropout}
[data.records]
{records}
[train]
head = "{head}"
steps = {steps}
sequence_length = 128
global_batch = {rows}
micro_batch = {rows}
lr = {lr}
precision = "float32"
lr_schedule = "linear"
[lr_schedule.linear]
warmup_steps = {warmup}
final = 0.0
[optimizer.adamw]
beta2 = 0.999
eps = 1e-8
weight_decay = 0.0
[head.{head}]
{settings}
[finetune]
method = "full"
{take}
[eval]
every = 0
samples = 1
final_samples = {measured}
[checkpoint]
load = "{checkpoint}"
[launch]
device = "cpu"
threads = 1
"""


class Turns:
    """Of two contenders one runs; each gives way after :data:`TURN` of its steps, and stays away when it has ended."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._names = list(names)
        self._now = names[0]
        self._changed = threading.Condition()
        self._steps = dict.fromkeys(names, 0)
        self._began: float | None = None
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        """Of each step after the first :data:`WARM`."""

    def begin(self, name: str) -> None:
        """Wait for the first turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._now == name)

    def step(self, name: str) -> None:
        """A step begins, and the one before it has ended."""
        self._count(name)
        if self._steps[name] and self._steps[name] % TURN == 0:
            self._give_way(name)
            self.begin(name)
        self._steps[name] += 1
        self._began = time.perf_counter()

    def steps_end(self, name: str) -> None:
        """The last step has ended."""
        self._count(name)
        self._began = None

    def end(self, name: str) -> None:
        """It has no turn any more."""
        with self._changed:
            self._names.remove(name)
            self._now = self._names[0] if self._names else ""
            self._changed.notify_all()

    def _count(self, name: str) -> None:
        if self._began is not None and self._steps[name] > WARM:
            self.seconds[name].append(time.perf_counter() - self._began)

    def _give_way(self, name: str) -> None:
        with self._changed:
            self._began = None
            self._now = next((other for other in self._names if other != name), name)
            self._changed.notify_all()


HERE, THERE = "megalm", "trainer"


class TakesTurns(Callback):
    """megalm's steps."""

    def __init__(self, turns: Turns) -> None:
        super().__init__(Settings())
        self._turns = turns

    @hookimpl
    def megalm_step_start(self, run: Any, step: int) -> None:
        self._turns.step(HERE)

    @hookimpl
    def megalm_step_end(self, run: Any, step: int, metrics: Any) -> None:
        if step == run.total_steps:
            self._turns.steps_end(HERE)


def prepared_run(folder: Path, checkpoint: Path, task: Task, options: argparse.Namespace, seed: int) -> Prepared:
    """megalm's run."""
    model = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    pooled = task.head != "token_classification"
    text = CONFIG.format(
        run=folder / f"run{seed}",
        seed=seed,
        layers=model["num_hidden_layers"],
        hidden_size=model["hidden_size"],
        heads=model["num_attention_heads"],
        ffn_size=model["intermediate_size"],
        max_positions=model["max_position_embeddings"],
        attention_dropout=options.attention_dropout,
        records=task.records.format(data=options.data),
        head=task.head,
        steps=options.steps,
        rows=ROWS,
        measured=MEASURED,
        lr=task.lr,
        warmup=options.steps // 10,
        settings=task.settings,
        take=POOLER.format(head=task.head) if pooled else "",
        checkpoint=checkpoint,
    )
    path = folder / f"run{seed}.toml"
    path.write_text(text, encoding="utf-8")
    manager = PluginManager.for_launch(None)
    return prepare_run(load_config(path, [], manager), manager, 1, "cpu")


def train_megalm(prepared: Prepared, task: Task, turns: Turns) -> float:
    """Train; the measure."""
    prepared = replace(prepared, callbacks={**prepared.callbacks, "turns": TakesTurns(turns)})
    MegalmTrainer(prepared, single_rank()).run()
    lines = (prepared.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["eval"]["metrics"][task.metric])


def batches_of(prepared: Prepared, task: Task) -> list[dict[str, torch.Tensor]]:
    """megalm's batches, as the Trainer's model takes them."""
    feed = MegalmTrainer(prepared, single_rank()).feed
    made = [feed.step(step)[0].batch for step in range(prepared.resolved.config.train.steps)]
    feed.close()
    return [{**inputs(batch), "labels": task.labels(batch)} for batch in made]


def inputs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A batch's rows."""
    found = {"input_ids": torch.from_numpy(batch["tokens"])}
    found["attention_mask"] = torch.from_numpy(batch["attention_mask"]).long()
    if "token_types" in batch:
        found["token_type_ids"] = torch.from_numpy(batch["token_types"])
    return found


def train_hugging_face(
    prepared: Prepared, task: Task, options: argparse.Namespace, turns: Turns, seed: int, folder: Path
) -> float:
    """Train by the Hugging Face Trainer; the measure."""
    import transformers

    transformers.logging.set_verbosity_error()
    assert prepared.task is not None
    names = prepared.task.head.env.labels
    torch.manual_seed(seed)
    model = getattr(transformers, task.hugging_face).from_pretrained(
        options.model,
        num_labels=len(names) or 1,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=options.attention_dropout,
        attn_implementation="sdpa",
    )
    batches = batches_of(prepared, task)

    class Waits(transformers.TrainerCallback):
        """The Trainer's steps."""

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            turns.step(THERE)

        def on_step_end(self, _: Any, state: Any, control: Any, **kwargs: object) -> None:
            if state.global_step == state.max_steps:
                turns.steps_end(THERE)

    class InOrder(transformers.Trainer):
        """A batch is an item here, and they come in their order."""

        def _get_train_sampler(self, *args: object) -> Any:
            return torch.utils.data.SequentialSampler(batches)

    steps = options.steps
    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=1,
            max_steps=steps,
            learning_rate=task.lr,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=batches,
        data_collator=lambda items: items[0],
        callbacks=[Waits()],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    model.eval()
    records = prepared.task.validation[: min(MEASURED, len(prepared.task.validation))]
    rows = evaluation_rows(
        prepared.objective,
        as_corpus(records),
        seed=0,
        samples=len(records),
        micro_batch=ROWS,
        dp_index=0,
        dp_size=1,
    )
    found: list[Any] = []
    with torch.no_grad():
        for each in rows:
            found += task.predictions(model(**inputs(each.batch)).logits, each.batch, names)
    return float(prepared.task.head.metrics(found, records.rows)[task.metric])


def compare(checkpoint: Path, task: Task, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One seed: examples/s and the measure of both."""
    turns = Turns((HERE, THERE))
    prepared = prepared_run(folder, checkpoint, task, options, seed)
    found: dict[str, float] = {}
    failed: list[BaseException] = []

    def run(name: str, train: Callable[[], float]) -> None:
        turns.begin(name)
        try:
            found[name] = train()
        except BaseException as error:
            failed.append(error)
        finally:
            turns.end(name)

    runs = {
        HERE: lambda: train_megalm(prepared, task, turns),
        THERE: lambda: train_hugging_face(prepared, task, options, turns, seed, folder),
    }
    threads = [threading.Thread(target=run, args=each) for each in runs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    speeds = {name: ROWS * len(seconds) / sum(seconds) for name, seconds in turns.seconds.items()}
    return {"seed": seed, task.metric: found, "examples_per_second": speeds, "ratio": speeds[HERE] / speeds[THERE]}


def main() -> None:
    """Run, print, and with ``--write`` record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", choices=[*TASKS], default="supersense")
    parser.add_argument("--data", type=Path, default=BUNDLED, help="where the files of the task lie")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--write", action="store_true", help="record the result in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        command = (Path(sys.executable).with_name("megalm"), "import", "hf", options.model, checkpoint)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seeds = [compare(checkpoint, task, options, seed, folder) for seed in range(options.seeds)]
    for each in seeds:
        speeds, measures = each["examples_per_second"], each[task.metric]
        print(
            f"{options.task} seed {each['seed']}: megalm {speeds[HERE]:.1f} examples/s, Trainer {speeds[THERE]:.1f}, "
            f"ratio {each['ratio']:.3f}; {task.metric} {measures[HERE]:.4f} and {measures[THERE]:.4f}"
        )
    print(f"median ratio {statistics.median(each['ratio'] for each in seeds):.3f}")
    if options.write:
        settings = {"steps": options.steps, "rows": ROWS, "attention_dropout": options.attention_dropout}
        write_record(f"fine_tune_cpu-{options.task}", {**settings, "seeds": seeds}, peers=("transformers",))


if __name__ == "__main__":
    main()
