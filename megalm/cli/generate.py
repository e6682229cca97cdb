"""``megalm generate``: text from a checkpoint, on one process or, under torchrun, on several ranks."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalm.cli.on_ranks import on_ranks
from megalm.cli.options import Plugins, names

if TYPE_CHECKING:
    from megalm.parallel.mesh import ParallelContext
    from megalm.pipeline.plan import Pipeline
    from megalm.train.generate import Generated
    from megalm.train.sampling import Sampling
    from megalm.train.stored import Stored


@dataclass(frozen=True)
class _Job:
    """Everything that can be wrong was looked for."""

    stored: Stored
    texts: list[str]
    prompts: list[list[int]]
    sampling: Sampling
    stop: frozenset[int]
    pipeline: Pipeline | None
    precision: str
    context: int
    tokens: int
    batch: int
    json: bool


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder, or a run's folder.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to continue; may be repeated.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="A prompt a line, empty ones left out.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The most tokens after each prompt.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw among the likeliest tokens that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TOKEN", help="A token, or its id, that ends a text, as the end token does."),
    ] = None,
    ignore_end: Annotated[bool, typer.Option("--ignore-end", help="Go on after the model's end tokens.")] = False,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin with the tokenizer's bos token; default: as imported.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts at a time; changes no text.")] = 16,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="The most tokens that the model sees; default: all it can.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="float32, bfloat16 or float64; default: as it was trained.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks; default: all but --pp.")] = None,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline ranks.")] = 1,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="SPEC", help="Where it is not beside the checkpoint or the run's data."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a prompt, when all are done.")] = False,
    only: Plugins = None,
) -> None:
    """Continue prompts. On several ranks: torchrun --nproc-per-node N -m megalm.cli generate CKPT ...

    The same seed gives the same text on any number of ranks, whatever prompts stand beside it."""
    from megalm.parallel.bootstrap import Place

    place = Place.from_environment()

    def prepare() -> tuple[_Job, dict[str, Any]]:
        job = _prepare(
            checkpoint,
            _texts(prompt or [], prompt_file),
            only=names(only),
            tokenizer=tokenizer,
            ranks=place.world_size,
            layout=(place.world_size // pp if tp is None else tp, pp),
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed},
            stop=stop or [],
            ignore_end=ignore_end,
            bos=bos,
            precision=precision,
            context=context,
            tokens=tokens,
            batch=batch,
            json=json,
        )
        return job, {"checkpoint": job.stored.manifest.sha256, "prompts": job.prompts}

    on_ranks(prepare, _run, place, device=device, tp=place.world_size // pp, pp=pp)


def _texts(given: list[str], file: Path | None) -> list[str]:
    from megalm.errors import UsageError

    texts = list(given)
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: cannot be read as text: {error}") from error
    if not texts:
        raise UsageError("megalm generate needs something to continue: --prompt TEXT or --prompt-file FILE")
    return texts


def _prepare(
    checkpoint: Path,
    texts: list[str],
    *,
    only: list[str] | None,
    tokenizer: str | None,
    ranks: int,
    layout: tuple[int, int],
    sampling: dict[str, Any],
    stop: list[str],
    ignore_end: bool,
    bos: bool | None,
    precision: str | None,
    context: int | None,
    tokens: int,
    batch: int,
    json: bool,
) -> _Job:
    from megalm.cli.checkpoints import open_checkpoint
    from megalm.errors import LayoutError, UsageError
    from megalm.model.spec import tensor_parallel_problems
    from megalm.optim.weights import DTYPES
    from megalm.pipeline.plan import make_pipeline
    from megalm.plugin.manager import PluginManager
    from megalm.train.generate import check_prompts
    from megalm.train.sampling import Sampling

    drawing = Sampling(**sampling)
    manager = PluginManager.for_launch(only)
    stored = open_checkpoint(checkpoint, manager, tokenizer, required=True)
    spec = stored.spec
    precision = precision or stored.resolved.config.train.precision
    if precision not in DTYPES:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(DTYPES)}")
    tp, pp = layout
    if tp * pp != ranks:
        raise LayoutError(f"--tp {tp} times --pp {pp} is {tp * pp} rank(s), but there are {ranks}")
    if problems := tensor_parallel_problems(spec, tp):
        raise LayoutError("; ".join(problems))
    pipeline = make_pipeline(spec, manager, schedule="gpipe", ranks=pp, microbatches=pp) if pp > 1 else None
    longest = spec.max_positions - spec.cfg.position_offset if context is None else context
    prompts = _encode(stored, texts, bos)
    check_prompts(spec, prompts, longest)
    return _Job(
        stored=stored,
        texts=texts,
        prompts=prompts,
        sampling=drawing,
        stop=_stop_tokens(stored, stop, ignore_end),
        pipeline=pipeline,
        precision=precision,
        context=longest,
        tokens=tokens,
        batch=batch,
        json=json,
    )


def _encode(stored: Stored, texts: list[str], bos: bool | None) -> list[list[int]]:
    from megalm.errors import UsageError
    from megalm.hf.origin_files import adds_bos

    first = stored.tokenizer.special.bos
    if bos is None:
        bos = first is not None and adds_bos(stored.folder)
    elif bos and first is None:
        raise UsageError(f"--bos: the tokenizer {stored.component} has no bos token")
    prompts = stored.tokenizer.encode_batch(texts)
    return [[first, *ids] if bos and first is not None else ids for ids in prompts]


def _stop_tokens(stored: Stored, given: list[str], ignore_end: bool) -> frozenset[int]:
    from megalm.errors import UsageError
    from megalm.hf.origin_files import end_tokens

    found = set() if ignore_end else set(end_tokens(stored))
    for text in given:
        if text.isdecimal() and int(text) < stored.spec.vocab_size:
            found.add(int(text))
            continue
        tokenizer = stored.tokenizer
        index = next((i for i in range(tokenizer.vocab_size) if tokenizer.token(i) == text), None)
        ids = tokenizer.encode_batch([text])[0] if index is None else [index]
        if len(ids) != 1:
            raise UsageError(f"--stop {text!r}: is no single token ({ids}); give a token or its id")
        found.update(ids)
    return frozenset(found)


def _run(job: _Job, parallel: ParallelContext) -> None:
    from megalm.train.generate import generate as continue_prompts

    stages = None if job.pipeline is None else job.pipeline.stages_of(parallel.pp.index)
    model = job.stored.model(parallel, job.precision, stages)
    leader = parallel.rank == 0
    stream = None
    if leader and not job.json:
        from megalm.cli.show_text import TextStream

        stream = TextStream(job.stored.tokenizer, job.prompts, job.stop, _write, sys.stdout.encoding or "utf-8")
    found = continue_prompts(
        model,
        job.prompts,
        job.sampling,
        tokens=job.tokens,
        context=job.context,
        pipeline=job.pipeline,
        batch=job.batch,
        stop=job.stop,
        vocabulary=min(job.stored.tokenizer.vocab_size, job.stored.spec.vocab_size),
        on_token=None if stream is None else stream.token,
        on_end=None if stream is None else stream.end,
    )
    if leader and job.json:
        _write("".join(jsonlib.dumps(line, ensure_ascii=False) + "\n" for line in _lines(job, found)))


def _lines(job: _Job, found: Sequence[Generated]) -> list[dict[str, Any]]:
    decode = job.stored.tokenizer.decode
    return [
        {
            "prompt": text,
            "text": decode([i for i in each.ids if i not in job.stop]),
            "ids": each.ids,
            "ended": each.ended,
        }
        for text, each in zip(job.texts, found, strict=True)
    ]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
