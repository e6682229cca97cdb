"""An objective under examination: a corpus, and tiny runs that train it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megalm.data.blend import Blend
from megalm.data.store import TOKENIZER_FOLDER
from megalm.data.stream import Stream
from megalm.data.tokenizer import load_tokenizer
from megalm.model.spec import resolve_model
from megalm.pipeline.choose import choose
from megalm.pipeline.plan import Pipeline, make_pipeline
from megalm.plugin.contract.objective import Corpus, Needs, ObjectiveEnv
from megalm.plugin.manager import PluginManager
from megalm.testing.layouts import ROWS, RankLayout
from megalm.testing.objective.companions import (
    ORDINARY,
    make_teacher,
    missing_checkpoints,
    with_builder,
    without_teachers,
)
from megalm.testing.pipelines import QUICK_STAGES, STAGES
from megalm.testing.runs import load_run, make_run, make_store
from megalm.train.build import build_objective
from megalm.train.feed import Rows
from megalm.train.objective import TrainingObjective
from megalm.train.prepare import Prepared

T = TypeVar("T")

ARCHITECTURES = {"causal": "gpt2", "prefix": "gpt2", "bidirectional": "bert"}
SHAPE = ("model.hidden_size=32", "model.heads=16", "model.ffn_size=48", "model.init_std=0.3", "train.steps=4")
"""Sixteen heads, so that sixteen ranks have one each; an inner size and a vocabulary that few of them divide."""
DROPOUT = ("model.dropout=0.1", "model.attention_dropout=0.1")
NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0")


class ObjectiveSubject:
    """What the checks of an objective work on.

    Args:
        name: what ``train.objective`` would say; ``a+b`` for a joint objective. One that scores the rows of others is
            joined with one of them, and one that learns from a checkpoint gets a small one.
        manager: default: one with all installed plugins.
        settings: more ``key=value`` overrides, such as ``objective.mlm.mask_prob=0.3``.
        full: every layout of up to sixteen ranks, and more samples.
        sample: where it is not full, at most so many layouts, drawn from the quick set; default: all of that.
        seed: of the model, the rows, the layouts that are drawn and the schedules.
        tokenizer: component that needs no training, or ``component:path``.
        text: what to train on; default: a made-up text.
        device: where ranks compute.
        sequence_length: tokens of a row.
        stages: of the longest pipeline that is tried, which a model to learn from has a layer for each of; default:
            that of the layouts.

    Use it as a context manager or :meth:`close` it: it keeps a temporary folder.
    """

    def __init__(
        self,
        name: str,
        *,
        manager: PluginManager | None = None,
        settings: Sequence[str] = (),
        full: bool = False,
        sample: int | None = None,
        seed: int = 0,
        tokenizer: str = "byte",
        text: Path | None = None,
        device: str = "cpu",
        sequence_length: int = 48,
        stages: int | None = None,
    ) -> None:
        self.name = name
        self.manager = manager or PluginManager.for_launch(None)
        self.settings = tuple(settings)
        self.full = full
        self._stages = stages or (STAGES if full else QUICK_STAGES)
        self.sample = sample
        self.seed = seed
        self.device = device
        self.sequence_length = sequence_length
        self._folder = tempfile.TemporaryDirectory(prefix="megalm-check-")
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self._known: dict[Hashable, Any] = {}
        try:
            self._store = make_store(
                self.folder, documents=150, seed=seed, manager=self.manager, tokenizer=tokenizer, text=text
            )
            needs = self._needs()
            self._architecture = ARCHITECTURES[needs.attention or "causal"]
            self.coupled = needs.coupling == "cell"
            """The objective couples the rows of a cell."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ObjectiveSubject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the temporary folder."""
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """A folder for what checks write."""
        return Path(self._folder.name)

    def _needs(self) -> Needs:
        """What the objective asks for, which decides the run that can train it; what it cannot do without is made."""
        self._trained = with_builder(self.name, self.manager)
        if missing := missing_checkpoints(self._trained, self.settings, self.manager):
            needs = self._needs_of(self._trained, [*self._overrides(), *(f'{key}="-"' for key in missing)])
            teacher = self._teacher(needs)
            self.settings += tuple(f'{key}="{teacher}"' for key in missing)
        return self._needs_of(self._trained, self._overrides())

    def _teacher(self, needs: Needs) -> Path:
        """The folder of a run whose model the objective can learn from."""
        attention = needs.attention or "causal"
        objective, own = without_teachers(self._trained, self._overrides(), self.manager)
        if objective is None or not self._needs_of(objective, own).lm_head:
            objective = "+".join(filter(None, (objective, ORDINARY[attention])))
        if needs.coupling == "cell":
            own += [f"train.cell={ROWS}", f"eval.samples={ROWS}"]
        own += [f"train.global_batch={ROWS}", f"train.micro_batch={ROWS}"]
        return make_teacher(
            Path(tempfile.mkdtemp(dir=self.folder)),
            self._store,
            objective,
            ARCHITECTURES[attention],
            own,
            self.manager,
            length=self.sequence_length,
            device=self.device,
            layers=self._stages,
        )

    def _needs_of(self, objective: str, overrides: list[str]) -> Needs:
        with tempfile.TemporaryDirectory() as folder:
            resolved = load_run(
                Path(folder), self._store, objective=objective, overrides=overrides, manager=self.manager
            )
        _, tokenizer = load_tokenizer(
            self._store / TOKENIZER_FOLDER, self.manager.tokenizer_class
        )
        return build_objective(resolved, self.manager, ObjectiveEnv(tokenizer, self.sequence_length)).needs

    def _overrides(self, *more: str) -> list[str]:
        return [
            *SHAPE,
            *DROPOUT,
            f"run.seed={self.seed}",
            f"train.sequence_length={self.sequence_length}",
            f'launch.device="{self.device}"',
            *more,
            *self.settings,
        ]

    def prepared(
        self,
        *overrides: str,
        global_batch: int = ROWS,
        cell: int | None = None,
        dtype: str = "float64",
        folder: Path | None = None,
        layers: int | None = None,
    ) -> Prepared:
        """A run of one rank with one microbatch a cell (or a step), with dropout unless overridden; made once.

        ``cell``: of a coupled objective; default: the whole step. ``layers``: whatever settings say.
        """
        cell = cell or global_batch
        key = (*overrides, global_batch, cell, dtype, folder, layers)
        if key not in self._prepared:
            rows = [f"train.global_batch={global_batch}", f"train.micro_batch={cell if self.coupled else global_batch}"]
            if self.coupled:
                rows += [f"train.cell={cell}", f"eval.samples={cell}"]
            chosen = self._overrides(f'train.precision="{dtype}"', *rows, *overrides)
            chosen += [] if layers is None else [f"model.layers={layers}"]
            self._prepared[key] = self._run(folder or Path(tempfile.mkdtemp(dir=self.folder)), chosen)
        return self._prepared[key]

    def prepared_for(self, layout: RankLayout, dtype: str = "float64") -> tuple[Prepared, Pipeline | None]:
        """A run of one rank with the layout's rows, and the layout's pipeline if it has one, for which the model is
        made deeper where it has fewer layers than the pipeline has stages.

        ScheduleError where the schedule does not admit the layout.
        """
        make = partial(self.prepared, global_batch=layout.global_batch, cell=layout.cell, dtype=dtype)
        prepared = make()
        if layout.schedule is None:
            return prepared, None
        shape = choose(layout.schedule, self.manager).shape(layout.pp, layout.microbatches, layout.virtual)
        own = prepared.spec.cfg.layers
        layers = sum(layout.split) if layout.split else max(own, shape.stages)
        if layers != own:
            prepared = make(layers=layers)
        pipeline = make_pipeline(
            prepared.spec,
            self.manager,
            schedule=layout.schedule,
            ranks=layout.pp,
            microbatches=layout.microbatches,
            virtual=layout.virtual,
            split=layout.split,
        )
        return prepared, pipeline

    def in_another_process(self, prepared: Prepared) -> Prepared:
        """The run with an objective of its own, as another process would have made it."""
        objective = self._objective(prepared)
        spec = resolve_model(prepared.resolved.config, objective.needs, prepared.tokenizer.vocab_size)
        return replace(prepared, objective=objective, spec=spec)

    def _objective(self, prepared: Prepared) -> TrainingObjective:
        env = ObjectiveEnv(prepared.tokenizer, self.sequence_length)
        return build_objective(prepared.resolved, self.manager, env)

    def _run(self, folder: Path, overrides: list[str]) -> Prepared:
        """A run in ``folder`` of what is examined."""
        return make_run(
            folder,
            self._store,
            objective=self._trained,
            architecture=self._architecture,
            overrides=overrides,
            manager=self.manager,
        )

    def configuration(self) -> str | None:
        """TOML of :meth:`prepared`, with which another process comes to the same rows; none where it cannot."""
        return self.prepared().resolved.to_toml()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, made once for a key."""
        if key not in self._known:
            self._known[key] = make()
        found: T = self._known[key]
        return found

    @property
    def objective(self) -> TrainingObjective:
        """The objective of :meth:`prepared`."""
        return self.prepared().objective

    @property
    def corpus(self) -> Corpus:
        """The training part, or the records of a head."""
        train = self.prepared().train
        assert not isinstance(train, Blend | Stream), "a subject's run has one corpus"
        return train

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.objective.num_samples(self.corpus)

    def examples(self, count: int) -> list[dict[str, Any]]:
        """The first rows of the training part, epoch after epoch, in its own order."""
        samples, address = self.samples, (self.seed, "train")
        return [self.objective.build(n % samples, self.corpus, (*address, n // samples)) for n in range(count)]

    def rows(self, examples: Sequence[dict[str, Any]], first_slot: int = 0) -> Rows:
        """A microbatch of examples in consecutive slots."""
        batch = self.objective.collate(list(examples))
        return Rows(batch, tuple(range(first_slot, first_slot + len(examples))))
