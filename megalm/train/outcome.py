"""What a finished run leaves: a generated sample, summary.json and report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm import files
from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.load import weights_sha256
from megalm.checkpoint.manifest import read_manifest
from megalm.data.ngram import baselines
from megalm.data.store import TokenStore
from megalm.metrics import jsonl
from megalm.metrics.console import ConsoleLike
from megalm.metrics.report import NAME as REPORT
from megalm.metrics.report import Drawing, write_report
from megalm.metrics.summary import read_summary, write_summary
from megalm.model.language_model import LanguageModel
from megalm.parallel.phase import phase
from megalm.pipeline.recorded import Recorded
from megalm.train.generate import sample_text
from megalm.train.prepare import Prepared
from megalm.train.run_folder import CHECKPOINTS, METRICS, SAMPLE


def is_complete(prepared: Prepared, done: int, stopped: bool = False) -> bool:
    """The run has taken its last step, or ``stopped`` after this one for good, and said so; an earlier summary is of a
    run that was since made longer."""
    over = stopped or done >= prepared.resolved.config.train.steps
    return over and read_summary(prepared.run_dir).get("steps") == done


def sample_of(prepared: Prepared, model: LanguageModel) -> str | None:
    """Text that the model generates as ``[sample]`` says; none for other than causal models. Every rank calls it."""
    config = prepared.resolved.config
    wanted = config.sample
    if not (prepared.spec.causal and prepared.spec.lm_head and wanted.tokens):
        return None
    with phase("sample"):
        return sample_text(
            model,
            prepared.tokenizer,
            prepared.pipeline,
            prompt=wanted.prompt,
            tokens=wanted.tokens,
            context=config.train.sequence_length,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            seed=config.run.seed,
        )


def write_outcome(prepared: Prepared, step: int, facts: dict[str, Any], sample: str | None) -> None:
    """Write sample.txt, summary.json and report.html; rank 0 calls it once the last checkpoint is complete."""
    config, run_dir = prepared.resolved.config, prepared.run_dir
    # Losses are read back: a run killed between its last checkpoint and its summary has them nowhere else.
    recorded = jsonl.read(run_dir / METRICS)
    train_loss = next((record["loss"] for record in reversed(recorded) if "loss" in record), None)
    evaluated: dict[str, Any] = next((record["eval"] for record in reversed(recorded) if "eval" in record), {})
    newest = complete_checkpoints(run_dir / CHECKPOINTS)[0]
    summary: dict[str, Any] = {
        "steps": step,
        "samples": step * config.train.global_batch,
        "train_loss": train_loss,
        "eval_loss": evaluated.get("loss"),
        "eval_terms": evaluated.get("terms", {}),
        **({"eval_metrics": evaluated["metrics"]} if "metrics" in evaluated else {}),
        "weights_sha256": weights_sha256(newest, read_manifest(newest)),
        "parameters": prepared.spec.parameter_count(),
        **facts,
    }
    if config.eval.baselines:
        assert isinstance(prepared.train, TokenStore), "baselines of a blend were refused"
        assert isinstance(prepared.validation, TokenStore), "baselines of a blend were refused"
        fitted = baselines(prepared.train, prepared.validation, prepared.tokenizer.vocab_size)
        summary["baselines"] = {"unigram": fitted.unigram, "bigram": fitted.bigram}
    if sample is not None:
        files.write_text(run_dir / SAMPLE, sample + "\n")
    write_summary(run_dir, summary)
    make_report(run_dir)


def make_report(run_dir: Path) -> None:
    """Build report.html from what the folder holds; DataError where a file of it is damaged."""
    write_report(run_dir, pipeline_drawings(run_dir))


def ensure_report(run_dir: Path) -> None:
    """Build the report where there is none: a run may have been killed right before it."""
    if not (run_dir / REPORT).exists():
        make_report(run_dir)


def pipeline_drawings(run_dir: Path) -> list[Drawing]:
    """The recorded step of the pipeline, planned above measured; none where no step was recorded."""
    recorded = Recorded.read(run_dir)
    if recorded is None:
        return []
    if not recorded.drawable:
        text = (
            f"{recorded.title}: too many actions to draw here. megalm schedule --run {run_dir} --svg FILE draws them."
        )
        return [Drawing("pipeline", "Pipeline", "", "", text)]
    svg = recorded.svg(embedded=True)
    return [Drawing("pipeline", "Pipeline", recorded.title, svg, recorded.caption)]


def show_outcome(prepared: Prepared, console: ConsoleLike) -> None:
    """Show the figures, the sample, and where to look further."""
    run_dir = prepared.run_dir
    sample = run_dir / SAMPLE
    console.finish(read_summary(run_dir), sample.read_text(encoding="utf-8") if sample.exists() else None)
    console.message(f"run folder  {run_dir}")
    console.message(f"report      {run_dir / REPORT}")
