"""Training speed on one CPU thread: megalm over a minimal PyTorch loop and over the Hugging Face Trainer.

    python benchmarks/train_cpu.py [--rounds N] [--write]

Each round times a few steps of every contender, one after the other, so that a machine whose speed drifts slows all of
them alike; the ratio is taken round by round and its median reported. A step is everything from taking rows to the
updated weights. Models are float32 without dropout, of equal sizes:

- GPT-2-like, causal LM: 4 layers, hidden 256, 4 heads, context 256, vocabulary 8192, microbatch 8.
- BERT-like, MLM: the same sizes. megalm sends only the scored positions through the vocabulary.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from record import write_record
from torch import nn

from megalm.data.store import TokenStore
from megalm.parallel.mesh import single_rank
from megalm.plugin.contract.callback import RunInfo
from megalm.testing.runs import make_run, make_store
from megalm.train.trainer import Trainer as MegalmTrainer

LAYERS, HIDDEN, HEADS, LENGTH, VOCABULARY, ROWS = 4, 256, 4, 256, 8192, 8
STEPS_A_ROUND = 3
Steps = Callable[[], list[float]]
"""Runs a round's steps and returns the seconds of each."""


def timed(step: Callable[[], object], count: int = STEPS_A_ROUND) -> list[float]:
    """Seconds of each of ``count`` calls."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds


def megalm_steps(folder: Path, data: Path, objective: str, architecture: str) -> Steps:
    """The engine's own training step: data, forward, backward, clipping, AdamW, metrics."""
    prepared = make_run(
        folder,
        data,
        objective=objective,
        architecture=architecture,
        overrides=[
            f"model.layers={LAYERS}",
            f"model.hidden_size={HIDDEN}",
            f"model.heads={HEADS}",
            f"model.vocab_size={VOCABULARY}",
            f"train.sequence_length={LENGTH}",
            f"train.micro_batch={ROWS}",
            f"train.global_batch={ROWS}",
            "train.precision=float32",
            "train.steps=1000000",
            "train.lr=3e-4",
            "model.init_std=0.02",
        ],
    )
    trainer = MegalmTrainer(prepared, single_rank())
    info = RunInfo(folder, {}, 0, 1, 0, 1_000_000)
    numbers = iter(range(1_000_000))
    return lambda: timed(lambda: trainer.train_step(info, next(numbers)))


class Block(nn.Module):
    """A pre-norm transformer block on SDPA."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, HIDDEN))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class MinimalGPT(nn.Module):
    """What one would write by hand: nn.Embedding, blocks, tied head, F.cross_entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(HIDDEN)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.tokens(tokens) + self.positions.weight))
        return F.cross_entropy(F.linear(x, self.tokens.weight).flatten(0, 1), labels.flatten())


def loop_steps(data: Path) -> Steps:
    """A minimal training loop over the same store."""
    store, model = TokenStore.open(data, "train"), MinimalGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    draw = torch.Generator().manual_seed(0)

    def step() -> float:
        starts = torch.randint(store.num_tokens - LENGTH - 1, (ROWS,), generator=draw).tolist()
        window = torch.stack([torch.from_numpy(store.stream(s, s + LENGTH + 1)) for s in starts])
        loss = model(window[:, :-1], window[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return lambda: timed(step)


class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The store's windows as the Hugging Face Trainer takes them."""

    def __init__(self, data: Path, labels: bool) -> None:
        self.store, self.labels = TokenStore.open(data, "train"), labels

    def __len__(self) -> int:
        return self.store.num_tokens // LENGTH - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.from_numpy(self.store.stream(index * LENGTH, (index + 1) * LENGTH))
        return {"input_ids": tokens, "labels": tokens} if self.labels else {"input_ids": tokens}


def mask_tokens(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """BERT's masking, vectorised, as Hugging Face's own collator does it."""
    tokens = torch.stack([example["input_ids"] for example in examples])
    chosen = torch.rand(tokens.shape) < 0.15
    labels = tokens.masked_fill(~chosen, -100)
    kind = torch.rand(tokens.shape)
    masked = torch.where(chosen & (kind < 0.8), 261, tokens)
    random = torch.randint(256, tokens.shape)
    return {"input_ids": torch.where(chosen & (kind >= 0.9), random, masked), "labels": labels}


def hugging_face_steps(folder: Path, data: Path, kind: str) -> Steps:
    """The Hugging Face Trainer with GPT2LMHeadModel or BertForMaskedLM and its default fused AdamW and SDPA."""
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=LENGTH,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
            )
        )
    else:
        model = transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=LENGTH,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                intermediate_size=4 * HIDDEN,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )

    class Clock(transformers.TrainerCallback):
        """Seconds from the beginning of a step to that of the next."""

        marks: list[float] = []

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            self.marks.append(time.perf_counter())

    clock = Clock()

    def round_() -> list[float]:
        # One step more than is counted, and one mark more than steps: the first step of a call warms up.
        clock.marks = []
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(folder / "hf"),
                per_device_train_batch_size=ROWS,
                max_steps=STEPS_A_ROUND + 2,
                learning_rate=3e-4,
                max_grad_norm=1.0,
                weight_decay=0.1,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                dataloader_num_workers=0,
            ),
            train_dataset=Windows(data, labels=kind == "gpt2"),
            data_collator=None if kind == "gpt2" else mask_tokens,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()
        gaps = [b - a for a, b in zip(clock.marks, clock.marks[1:], strict=False)]
        return gaps[1:]

    return round_


def compare(contenders: dict[str, Steps], rounds: int) -> dict[str, dict[str, float]]:
    """Median tokens/s of each, and the median over rounds of megalm's speed over each other's."""
    for steps in contenders.values():
        steps()
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, steps in contenders.items():
            medians[name].append(statistics.median(steps()))
    tokens = ROWS * LENGTH
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(seconds),
            "megalm_over_this": statistics.median(s / m for s, m in zip(seconds, medians["megalm"], strict=True)),
        }
        for name, seconds in medians.items()
    }


def main() -> None:
    """Run, print, and with ``--write`` record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="record the result in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_store(folder, documents=6000)
        results = {
            "gpt": compare(
                {
                    "megalm": megalm_steps(folder, data, "causal_lm", "gpt2"),
                    "pytorch loop": loop_steps(data),
                    "hugging face trainer": hugging_face_steps(folder, data, "gpt2"),
                },
                options.rounds,
            ),
            "bert mlm": compare(
                {
                    "megalm": megalm_steps(folder, data, "mlm", "bert"),
                    "hugging face trainer": hugging_face_steps(folder, data, "bert"),
                },
                options.rounds,
            ),
        }

    for model, contenders in results.items():
        for name, figures in contenders.items():
            print(
                f"{model:9} {name:21} {figures['tokens_per_second']:8.0f} tokens/s   "
                f"megalm / this {figures['megalm_over_this']:.3f}"
            )
    if options.write:
        write_record("train_cpu", {"rounds": options.rounds, "results": results}, peers=("transformers",))


if __name__ == "__main__":
    main()
