"""``megalm eval`` of a checkpoint without a head: what its model is worth on text, on one process or several."""

from __future__ import annotations

import json as jsonlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from megalm.cli.on_ranks import on_ranks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megalm.data.store import TokenStore
    from megalm.parallel.mesh import ParallelContext
    from megalm.pipeline.plan import Pipeline
    from megalm.train.objective import TrainingObjective
    from megalm.train.stored import Stored


@dataclass(frozen=True)
class Asked:
    """What was said on the command line."""

    checkpoint: Path
    data: list[Path]
    part: str
    samples: int | None
    length: int | None
    batch: int
    precision: str | None
    device: str
    tp: int
    pp: int
    sp: bool
    tokenizer: str | None
    plugins: list[str] | None
    out: Path | None
    json: bool


@dataclass(frozen=True)
class _Job:
    """Everything that can be wrong was looked for."""

    stored: Stored
    objective: TrainingObjective
    corpus: TokenStore
    samples: int
    length: int
    seed: int
    precision: str
    pipeline: Pipeline | None


def has_head(checkpoint: Path) -> bool:
    """Whether a checkpoint was made with a head, as its manifest says."""
    from megalm.checkpoint.manifest import read_manifest
    from megalm.train.stored import find_checkpoint

    return read_manifest(find_checkpoint(checkpoint)[0]).state.get("head") is not None


def evaluate_language(asked: Asked) -> None:
    """Measure and show; several ranks do it together, and the first shows it."""
    with tempfile.TemporaryDirectory(prefix="megalm-eval-") as folder:
        _evaluate(asked, Path(folder))


def _evaluate(asked: Asked, folder: Path) -> None:
    """``folder``: for what is made of text files."""
    from megalm.parallel.bootstrap import Place

    place = Place.from_environment()

    def prepare() -> tuple[_Job, dict[str, Any]]:
        job = _prepare(asked, folder, place.world_size)
        return job, {"checkpoint": job.stored.manifest.sha256, "tokens": job.corpus.num_tokens, "rows": job.samples}

    def run(job: _Job, parallel: ParallelContext) -> None:
        _run(asked, job, parallel)

    on_ranks(prepare, run, place, device=asked.device, tp=asked.tp, pp=asked.pp, sp=asked.sp)


def _prepare(asked: Asked, made: Path, ranks: int) -> _Job:
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.errors import LayoutError, UsageError
    from megalm.model.spec import tensor_parallel_problems
    from megalm.optim.weights import DTYPES
    from megalm.pipeline.plan import make_pipeline
    from megalm.plugin.manager import PluginManager
    from megalm.train.language_scoring import language_objective

    manager = PluginManager.for_launch(asked.plugins)
    stored = open_checkpoint(asked.checkpoint, manager, asked.tokenizer, required=True)
    spec, train = stored.spec, stored.resolved.config.train
    precision = asked.precision or train.precision
    if precision not in DTYPES:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(DTYPES)}")
    length = asked.length or train.sequence_length
    most = spec.max_positions - spec.cfg.position_offset
    if spec.cfg.position == "learned" and length > most:
        raise UsageError(f"--length {length}: the model has {most} positions")
    tp, pp = asked.tp, asked.pp
    if ranks % (tp * pp):
        raise LayoutError(f"{ranks} rank(s) cannot be divided into groups of --tp {tp} times --pp {pp}")
    if problems := tensor_parallel_problems(spec, tp):
        raise LayoutError("; ".join(problems))
    if asked.sp and length % tp:
        raise LayoutError(f"--sp: rows of {length} tokens cannot be shared by --tp {tp} ranks; --length N sets another")
    pipeline = make_pipeline(spec, manager, schedule="gpipe", ranks=pp, microbatches=pp) if pp > 1 else None
    objective = language_objective(stored, manager, length=length)
    corpus = open_corpus(asked.data, asked.part, stored, made)
    objective.check_corpus(corpus)
    whole = objective.num_samples(corpus)
    return _Job(
        stored=stored,
        objective=objective,
        corpus=corpus,
        samples=whole if asked.samples is None else min(whole, asked.samples),
        length=length,
        seed=int(stored.manifest.state["config"].get("run", {}).get("seed", 0)),
        precision=precision,
        pipeline=pipeline,
    )


def open_corpus(data: list[Path], part: str, stored: Stored, folder: Path) -> TokenStore:
    """The part of a store that is named, or a store of texts, made in ``folder``. UsageError where it is neither."""
    from megalm.data.manifest import NAME
    from megalm.data.prepare import prepare
    from megalm.data.store import TokenStore
    from megalm.errors import UsageError

    stores = [path for path in data if (path / NAME).is_file()]
    if stores and len(data) > 1:
        raise UsageError(f"--data {stores[0]}: a prepared store is measured alone")
    if stores:
        store = TokenStore.open(stores[0], part)
        store.check_tokenizer(stored.tokenizer)
        return store
    tables = [path for path in data if _is_table(path)]
    if tables:
        raise UsageError(
            f"{tables[0]}: holds records, but {stored.folder} has no head: it was trained with "
            f"{', '.join(stored.objective.parts)}. Train one on it with train.head, or name texts"
        )
    assert stored.component is not None  # the tokenizer was required
    prepare(data, stored.tokenizer, folder / "data", component=stored.component, validation=0)
    return TokenStore.open(folder / "data", "train")


def _is_table(path: Path) -> bool:
    """A file that by its name holds records, and no running text."""
    from megalm.data.labelled.read import format_of
    from megalm.errors import DataError

    try:
        return format_of(path) in ("tsv", "csv", "conll")
    except DataError:
        return False


def _run(asked: Asked, job: _Job, parallel: ParallelContext) -> None:
    from megalm.errors import UsageError
    from megalm.files import write_text
    from megalm.train.language_scoring import score_language

    stages = None if job.pipeline is None else job.pipeline.stages_of(parallel.pp.index)
    model = job.stored.model(parallel, job.precision, stages)
    found = score_language(
        model,
        job.objective,
        job.corpus,
        seed=job.seed,
        samples=job.samples,
        micro_batch=asked.batch,
        pipeline=job.pipeline,
    )
    if parallel.rank != 0:
        return
    told = {
        "checkpoint": str(job.stored.folder),
        "objective": job.objective.name,
        "data": [str(path) for path in asked.data],
        "rows": job.samples,
        "sequence_length": job.length,
        "loss": found.total,
        "terms": dict(found.terms),
        "scored": dict(found.scored),
        "perplexity": dict(found.perplexity),
    }
    text = jsonlib.dumps(told, ensure_ascii=False, indent=2) + "\n"
    if asked.out is not None:
        try:
            write_text(asked.out, text)
        except OSError as error:
            raise UsageError(f"--out {asked.out}: cannot be written: {error.strerror}") from None
    if asked.json:
        typer.echo(text, nl=False)
    else:
        _show(told)


def _show(told: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows, length = told["rows"], told["sequence_length"]
    console.print(Text(f"{told['objective']} of {told['checkpoint']} on {rows} rows of up to {length} tokens"))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("scored", "loss", "perplexity"):
        table.add_column(name, justify="right")
    for name, nats in told["terms"].items():
        perplexity = told["perplexity"].get(name)
        shown = "" if perplexity is None else f"{perplexity:,.3f}"
        table.add_row(Text(name), f"{told['scored'][name]:,}", f"{nats:.4f}", shown)
    console.print(table)
