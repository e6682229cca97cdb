"""The training loop, the same on every rank; rank 0 also writes and shows."""

from __future__ import annotations

import math
import platform
import time
from typing import Any

import torch

from megalm import __version__
from megalm.checkpoint.folders import complete_checkpoints
from megalm.checkpoint.job import Retention
from megalm.checkpoint.load import load_state
from megalm.checkpoint.save import Saver
from megalm.checkpoint.state import allocate_optimizer_state, set_scalars, training_state
from megalm.data.stream import Stream
from megalm.errors import MegalmError, Preempted
from megalm.metrics import jsonl
from megalm.metrics.console import make_console
from megalm.metrics.jsonl import MetricsFile
from megalm.model.hf.origin import KEY as ORIGIN
from megalm.model.hf.origin import Origin
from megalm.model.language_model import LanguageModel, logical_shapes
from megalm.nn.module import materialise
from megalm.optim.gradients import clip_gradients, finish_gradients, first_not_finite, global_norm
from megalm.optim.weights import DTYPES, Weights
from megalm.optim.zeros import KeptZeros, kept_zeros
from megalm.parallel.mesh import ParallelContext
from megalm.parallel.phase import phase
from megalm.plugin.contract.callback import RunInfo
from megalm.train.best import Best, flat_metrics
from megalm.train.describe import heading, layout_words
from megalm.train.feed import TrainFeed, evaluation_rows
from megalm.train.finetune import load_weights
from megalm.train.outcome import ensure_report, is_complete, sample_of, show_outcome, write_outcome
from megalm.train.preemption import REASON, Preemption
from megalm.train.prepare import Prepared
from megalm.train.provenance import used_plugins
from megalm.train.rates import make_optimizer, set_rate
from megalm.train.recorder import PipelineRecorder
from megalm.train.resume import Start, find_start, identity, own_identity
from megalm.train.run_folder import CHECKPOINTS, METRICS, RunLock, start_run_folder
from megalm.train.step import Losses, evaluate, forward_backward
from megalm.train.streamed import train_samples


class TrainingError(MegalmError):
    """Training cannot go on."""


class Trainer:
    """One rank of a run. Build it on every rank, then :meth:`run`."""

    def __init__(self, prepared: Prepared, parallel: ParallelContext) -> None:
        self.prepared = prepared
        self.parallel = parallel
        self.config = prepared.resolved.config
        self.objective = prepared.objective
        self.leader = parallel.rank == 0
        self.console = make_console(parallel.rank, self.config.log.every)
        precision = DTYPES[self.config.train.precision]
        master = torch.float64 if precision == torch.float64 else torch.float32
        self.model = LanguageModel(prepared.spec, parallel, prepared.pipeline.stages_of(parallel.pp.index))
        materialise(self.model, parallel, self.config.run.seed, master)
        if prepared.teacher is not None:
            prepared.teacher.attach(self.model, self.config.train.precision, prepared.pipeline)
        self.weights = Weights(self.model, parallel, precision)
        self.optimizer = make_optimizer(prepared, self.weights)
        self.feed = TrainFeed(
            self.objective,
            train_samples(prepared, parallel),
            seed=self.config.run.seed,
            global_batch=self.config.train.global_batch,
            micro_batch=self.config.train.micro_batch,
            dp_index=parallel.dp.index,
            dp_size=parallel.dp.size,
            workers=self.config.data.workers,
            pin=parallel.device.type == "cuda",
        )
        self.metrics = MetricsFile(prepared.run_dir / METRICS)
        self.recorder = PipelineRecorder(prepared.pipeline, parallel, prepared.run_dir, self._warn)
        kept = self.config.checkpoint
        self.saver = Saver(
            prepared.run_dir / CHECKPOINTS,
            parallel,
            Retention(kept.keep, kept.keep_every),
            asynchronous=kept.async_save,
            say=self.console.message,
        )
        self.preemption = Preemption(kept.preemption_deadline, self._last_word)
        self.best = Best(self.config, {} if prepared.task is None else prepared.task.head.goals())
        self.zeros: KeptZeros | None = None
        self.warnings: list[str] = []
        self.inherited: dict[str, Any] = {}
        """What a checkpoint remembers of where its model came from, and hands on."""

    def run(self) -> None:
        """Train from where the run stands to its last step, evaluate, and leave summary and report.

        Preempted, once a checkpoint is complete, where SIGTERM asked the run to end before.
        """
        lock = RunLock(self.prepared.run_dir)
        try:
            self._run(lock)
        finally:
            self.feed.close()
            lock.release()

    def _run(self, lock: RunLock) -> None:
        start = find_start(self.prepared, self.parallel, lock, self._warn)
        if start is not None and start.weights_only:
            with phase("load weights"):
                load_weights(start.folder, start.manifest, self.weights, self.config.finetune.take)
            self._inherit(start)
            start = None
        done = 0 if start is None else self._load(start)
        if self.config.finetune.keep_zeros:
            self.zeros = kept_zeros(self.weights, self.console.message)
        steps = self.config.train.steps
        self.best.recall(self.metrics.path, done, self.parallel)
        stopped = self.best.stop is not None
        with phase("is the run complete"):
            complete = self.parallel.world.broadcast_json(self.leader and is_complete(self.prepared, done, stopped))
        if complete:
            self.console.message(f"the run in {self.prepared.run_dir} is complete ({done} steps); nothing to do")
            if self.leader:
                ensure_report(self.prepared.run_dir)
            show_outcome(self.prepared, self.console)
            return
        info = RunInfo(
            dir=self.prepared.run_dir,
            config=self.prepared.resolved.as_dict(),
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
            start_step=done,
            total_steps=steps,
        )
        if self.leader:
            start_run_folder(self.prepared.resolved, lock)
            if self.prepared.task is not None:
                self.prepared.task.save_tokenizer(self.prepared.run_dir)
            self.metrics.truncate_after(done)
        hook = self.prepared.manager.hook
        for name, callback in self.prepared.callbacks.items():
            self.prepared.manager.register_callback(callback, name)
        error: BaseException | None = None
        try:
            if start is not None:
                hook.megalm_load_state(run=info, meta=start.manifest.state.get("callbacks", {}))
            self.console.start(steps, done, heading(self.prepared, self.parallel))
            self.console.watch(self._saving)
            hook.megalm_train_start(run=info)
            with self.preemption:
                reason = self._train(info, done)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.metrics.close()
            if error is not None:
                self.console.finish()
            hook.megalm_train_end(run=info, error=error)
        if reason == REASON:
            raise Preempted(f"the run in {self.prepared.run_dir} was asked to end")

    def _train(self, info: RunInfo, done: int) -> str | None:
        """Take the steps that are left; why the run stopped before the last one, if it did."""
        train = self.config.train
        started = time.perf_counter()
        step = done
        self.recorder.start(done, train.steps)
        self._evaluate_again(info, done)
        reason = self.best.stop
        while step < train.steps and reason is None:
            step += 1
            with phase(f"step {step}"):
                reason = self._whole_step(info, step)
        with phase("save checkpoint"):
            self.saver.finish()
        if reason is not None:
            self.console.message(f"stopped after step {step}: {reason}")
            if step < train.steps and reason != self.best.stop:
                self.console.finish()
                return reason
        self._finish(step, time.perf_counter() - started, self._tokens(step) - self._tokens(done))
        return None

    def _whole_step(self, info: RunInfo, step: int) -> str | None:
        """Take a step, counted from 1, and do what is due after it; why the run is to stop, if it is."""
        self.prepared.manager.hook.megalm_step_start(run=info, step=step)
        self.recorder.begin(step)
        began = time.perf_counter()
        losses, norm, rate = self.train_step(info, step - 1)
        seconds = time.perf_counter() - began
        self.recorder.end(step)
        record = {
            "loss": losses.total,
            "terms": losses.terms,
            "grad_norm": norm,
            "lr": rate,
            "tokens": self._tokens(step),
            "tokens_per_second": (self._tokens(step) - self._tokens(step - 1)) / seconds,
        }
        self._record(info, step, record)
        with phase("save checkpoint"):
            if step == info.start_step + 1:  # the optimizer has its state from here on
                self.saver.reserve(training_state(self.weights, self.optimizer))
            self.saver.poll()
        reason = self._should_stop(info, step)
        last, best = step == self.config.train.steps, False
        if not last and self.preemption.asked(self.parallel):
            reason = REASON
        elif last or self._evaluation_due(step):
            best = self._evaluate(info, step, last)
            reason = reason or self.best.stop
        if last or reason or best or (self.config.checkpoint.every and step % self.config.checkpoint.every == 0):
            self._save(info, step)
        return reason

    def _tokens(self, steps: int) -> int:
        """Tokens of the run's first so many steps, padding included."""
        found = self.feed.tokens(steps)
        train = self.config.train
        return steps * train.global_batch * train.sequence_length if found is None else found

    def train_step(self, info: RunInfo, step: int) -> tuple[Losses, float, float]:
        """Forward, backward, sums, clipping and update of one step; the first step is 0."""
        with phase("build examples"):
            rows = self.feed.step(step)
        losses = forward_backward(
            self.model,
            self.objective,
            rows,
            seed=self.config.run.seed,
            step=step,
            pipeline=self.prepared.pipeline,
            mark=self.recorder.mark,
            adversarial=self.config.train.adversarial,
        )
        finish_gradients(self.weights)
        if self.zeros is not None:
            self.zeros.stop()
        norm = global_norm(self.weights, self.prepared.spec.kernels.sums_of_squares).item()
        self._check_finite(step, losses, norm)
        self.prepared.manager.hook.megalm_grads_ready(run=info, step=step + 1, grad_norm=norm)
        with phase("update"):
            clip_gradients(self.weights, norm, self.config.train.clip_grad)
            rate = self.prepared.schedule.at(step)
            set_rate(self.optimizer, rate)
            self.optimizer.step()
            self.weights.publish()
            self.weights.zero_grad()
        return losses, norm, rate

    def _check_finite(self, step: int, losses: Losses, norm: float) -> None:
        if math.isfinite(losses.total) and math.isfinite(norm):
            return
        with phase("find what is not finite"):
            names = self.parallel.world.gather_json(first_not_finite(self.weights))
        where = next((f"; first in the gradient of {name} on rank {r}" for r, name in enumerate(names) if name), "")
        raise TrainingError(
            f"step {step + 1}: loss is {losses.total} and gradient norm {norm}{where}. "
            "Lower train.lr, lengthen the warm-up, or look at this step's samples"
        )

    def _evaluate(self, info: RunInfo, step: int, last: bool) -> bool:
        """Evaluate; whether a checkpoint of this step is to be kept as the best."""
        samples = (self.config.eval.final_samples if last else None) or self.config.eval.samples
        rows = evaluation_rows(
            self.objective,
            self.prepared.validation,
            seed=self.config.run.seed,
            samples=samples,
            micro_batch=self.config.train.micro_batch,
            dp_index=self.parallel.dp.index,
            dp_size=self.parallel.dp.size,
            cell=self.config.train.cell,
        )
        with phase("evaluate"):
            losses = evaluate(self.model, self.objective, rows, self.prepared.pipeline)
        if not math.isfinite(losses.total):
            raise TrainingError(f"evaluation after step {step}: loss is {losses.total}; lower train.lr")
        record: dict[str, Any] = {"loss": losses.total, "terms": losses.terms}
        if self.prepared.task is not None:
            with phase("measure"):
                record["metrics"] = self.prepared.task.measure(
                    self.model, samples, self.config.train.micro_batch, self.prepared.pipeline
                )
        if self.leader:
            self.metrics.append({"step": step, "eval": record})
        self.console.eval(step, record)
        flat = flat_metrics(record)
        self.prepared.manager.hook.megalm_eval_end(run=info, step=step, metrics=flat)
        return self.best.see(step, record)

    def _evaluation_due(self, step: int) -> bool:
        return bool(self.config.eval.every and step % self.config.eval.every == 0)

    def _evaluate_again(self, info: RunInfo, done: int) -> None:
        """Make up for an evaluation that a run which was asked to end had no time for."""
        with phase("was the evaluation made"):
            recorded = jsonl.read(self.metrics.path) if self.leader and self._evaluation_due(done) else []
            made = any(record["step"] == done and "eval" in record for record in recorded)
            due = self.parallel.world.broadcast_json(bool(recorded) and not made)
        if due:
            self._evaluate(info, done, last=done == self.config.train.steps)

    def _record(self, info: RunInfo, step: int, record: dict[str, Any]) -> None:
        if self.leader:
            self.metrics.append({"step": step, **record})
        self.console.step(step, record)
        flat = {key: value for key, value in record.items() if key != "terms"}
        flat.update({f"terms.{name}": value for name, value in record["terms"].items()})
        hook = self.prepared.manager.hook
        hook.megalm_step_end(run=info, step=step, metrics=flat)
        if self.leader and step % self.config.log.every == 0:
            hook.megalm_log(run=info, step=step, metrics=flat)

    def _should_stop(self, info: RunInfo, step: int) -> str | None:
        hook = self.prepared.manager.hook
        if not hook.implemented("megalm_should_stop"):
            return None
        reasons = hook.megalm_should_stop(run=info, step=step)
        with phase("should the run stop"):
            told = self.parallel.world.gather_json(reasons)
        return next((reason for each in told for reason in each), None)

    def _save(self, info: RunInfo, step: int) -> None:
        callbacks: dict[str, Any] = {}
        self.prepared.manager.hook.megalm_save_state(run=info, meta=callbacks)
        state = {
            **identity(self.prepared),
            **own_identity(self.prepared),
            "samples": step * self.config.train.global_batch,
            "tokens": self._tokens(step),
            "stream": self.feed.state(step),
            **self._place(),
            **self.inherited,
            **({} if self.prepared.task is None else {"head": self.prepared.task.state}),
            "config": self.prepared.resolved.as_dict(),
            "callbacks": callbacks,
        }
        with phase("save checkpoint"):
            self.saver.save(step, training_state(self.weights, self.optimizer), state, best=self.best.kept)

    def _saving(self) -> str | None:
        """How far the checkpoint is that is being written beside the training."""
        progress = self.saver.progress
        return None if progress is None else f"step {progress.step}, {progress}"

    def _last_word(self) -> str:
        """Where a run stands that ends without a checkpoint of its last step."""
        newest = complete_checkpoints(self.prepared.run_dir / CHECKPOINTS)
        return f"the newest is {newest[0].name}" if newest else "the run has none"

    def _load(self, start: Start) -> int:
        with phase("resume"):
            manifest, origin = start.manifest, self._inherit(start)
            whole = {*logical_shapes(self.prepared.spec), *([] if origin is None else origin.extra)}
            if manifest.optimizer or manifest.scalars:
                allocate_optimizer_state(self.weights, self.optimizer)
                load_state(start.folder, manifest, training_state(self.weights, self.optimizer, whole))
                set_scalars(self.weights, self.optimizer, manifest.scalars)
            else:  # weights alone: from elsewhere, or of an optimizer without state
                load_state(start.folder, manifest, training_state(self.weights, None, whole))
            self.weights.publish(frozen=True)
        self._skip_documents(start)
        before, now = start.manifest.state.get("layout"), self._place()["layout"]
        if before is not None and before != now:
            self.console.message(
                f"{start.folder.name} was saved under {layout_words(before)} and goes on under {layout_words(now)}: "
                "the same samples and draws, and losses equal but for rounding"
            )
        return start.manifest.step

    def _inherit(self, start: Start) -> Origin | None:
        """Remember what the checkpoint says of where its model came from."""
        origin = Origin.of(start.manifest.state)
        self.inherited = {} if origin is None else {ORIGIN: start.manifest.state[ORIGIN]}
        return origin

    def _skip_documents(self, start: Start) -> None:
        """Go on in a stream where the checkpoint was; after one that is of other data, begin it."""
        if not isinstance(self.prepared.train, Stream):
            return
        state = start.manifest.state
        place = state["stream"] if state.get("data") == self.prepared.data_identity else {}
        # Places count this run's samples, and a run that is gone on from may have had another global batch.
        samples = start.manifest.step * self.config.train.global_batch
        behind = state["samples"] - place["place"] if place else 0
        self.feed.begin({"epoch": 0, "documents": 0, **place, "place": samples - behind})
        if place:
            skipped = f"{place['documents']:,} documents of epoch {place['epoch'] + 1}"
            self.console.message(f"the stream goes on after {skipped}, which are skipped")

    def _finish(self, step: int, seconds: float, tokens: int) -> None:
        text = sample_of(self.prepared, self.model)
        if self.leader:
            self.metrics.close()
            facts = {
                **self._place(),
                "seconds": seconds,
                "tokens": self._tokens(step),
                "tokens_per_second": tokens / seconds if tokens else None,
                "warnings": self.warnings,
                **self.best.facts(),
            }
            write_outcome(self.prepared, step, facts, text)
            show_outcome(self.prepared, self.console)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.console.warn(text)

    def _place(self) -> dict[str, Any]:
        """Where and with what this run runs."""
        return {
            "layout": {
                "tp": self.parallel.tp.size,
                "sp": self.parallel.sp,
                "pp": self.parallel.pp.size,
                "dp": self.parallel.dp.size,
            },
            "threads": torch.get_num_threads(),
            "device": str(self.parallel.device),
            "versions": {"megalm": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "plugins": self.prepared.manager.fingerprint(),
            "uses": used_plugins(self.prepared),
            "kernels": {decision.operation: decision.as_dict() for decision in self.prepared.kernels},
        }
