"""The hooks that plugins may implement, and what each promises.

Two families. *Component hooks*, one a kind, yield :class:`~megalm.plugin.component.Component` records: listing what
is installed imports nothing heavy. *Event hooks* follow a run, at most a few a step: a hook call costs microseconds,
so none exists per microbatch or per layer.

Every hook carries a :class:`HookContract`, because a distributed program has a question that docstrings tend to leave
open: which ranks make the call, and may the implementation use collectives? A hook that runs on one rank and waits
for the others never returns. ``megalm plugins --hooks`` prints this page's contents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pluggy

from megalm.plugin.component import KINDS, Component

if TYPE_CHECKING:
    from megalm.plugin.contract.callback import RunInfo

API_VERSION: tuple[int, int] = (1, 9)
"""(major, minor) of what plugins may rely on. A plugin declares ``MEGALM_API = (1, 0)``: it loads where the major is
the same and its minor is not above ours."""
PROJECT = "megalm"
"""Prefix of the hooks, and the group of the entry points."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class HookContract:
    """The distributed facts of a hook."""

    ranks: Literal["all", "0"]
    """Which ranks call it: every one, at the same point of the run, or rank 0 alone."""
    collectives: bool
    """Whether implementations may communicate. Never true where one rank calls alone."""
    when: str
    """How often, in words."""

    def __str__(self) -> str:
        who = "called on every rank" if self.ranks == "all" else "called on rank 0 only"
        return f"{who}, {self.when}; collectives {'allowed' if self.collectives else 'forbidden'}"


def contract(*, when: str, ranks: Literal["all", "0"] = "all", collectives: bool = False) -> Callable[[F], F]:
    """Attach a :class:`HookContract` to a hook specification."""

    def mark(function: F) -> F:
        function.megalm_contract = HookContract(ranks, collectives, when)  # type: ignore[attr-defined]
        return function

    return mark


_listing = contract(when="once, when components are listed")


class ComponentSpecs:
    """Hooks that offer components. They take no argument and must not import torch, nor the components themselves."""

    @hookspec
    @_listing
    def megalm_objectives(self) -> Iterable[Component]:
        """Pretraining objectives: subclasses of Objective."""
        return ()

    @hookspec
    @_listing
    def megalm_tokenizers(self) -> Iterable[Component]:
        """Tokenizers: subclasses of Tokenizer."""
        return ()

    @hookspec
    @_listing
    def megalm_heads(self) -> Iterable[Component]:
        """Tasks on top of a backbone: subclasses of Head."""
        return ()

    @hookspec
    @_listing
    def megalm_architectures(self) -> Iterable[Component]:
        """Families of models, as defaults of ``[model]``: subclasses of Architecture."""
        return ()

    @hookspec
    @_listing
    def megalm_optimizers(self) -> Iterable[Component]:
        """Optimizers: subclasses of OptimizerPlugin."""
        return ()

    @hookspec
    @_listing
    def megalm_lr_schedules(self) -> Iterable[Component]:
        """Learning-rate schedules: subclasses of LRSchedule."""
        return ()

    @hookspec
    @_listing
    def megalm_data_sources(self) -> Iterable[Component]:
        """Sources of documents for data preparation."""
        return ()

    @hookspec
    @_listing
    def megalm_callbacks(self) -> Iterable[Component]:
        """Callbacks of a run, chosen by ``log.callbacks``: subclasses of Callback; methods implement event hooks."""
        return ()

    @hookspec
    @_listing
    def megalm_kernels(self) -> Iterable[Component]:
        """Implementations of operations, chosen by name in ``[kernels]``: subclasses of KernelProvider."""
        return ()

    @hookspec
    @_listing
    def megalm_pipeline_schedules(self) -> Iterable[Component]:
        """Pipeline schedules: subclasses of PipelineSchedule."""
        return ()

    @hookspec
    @_listing
    def megalm_exporters(self) -> Iterable[Component]:
        """Writers of other checkpoint formats."""
        return ()

    @hookspec
    @_listing
    def megalm_importers(self) -> Iterable[Component]:
        """Readers of other checkpoint formats."""
        return ()


class EventSpecs:
    """Hooks that follow a run. ``run`` is a RunInfo; ``step`` is 1 for the first step (a schedule's ``at`` counts
    from 0); an exception ends the run on every rank.
    """

    @hookspec
    @contract(when="once, when model, optimizer and data are ready", collectives=True)
    def megalm_train_start(self, run: RunInfo) -> None:
        """The first step is about to run, or the first one after a resume."""

    @hookspec
    @contract(when="before each step")
    def megalm_step_start(self, run: RunInfo, step: int) -> None:
        """A step is about to run."""

    @hookspec
    @contract(when="each step, after gradients are reduced and before they are clipped", collectives=True)
    def megalm_grads_ready(self, run: RunInfo, step: int, grad_norm: float) -> None:
        """Gradients are complete. ``grad_norm`` is the global norm before clipping, the same on every rank."""

    @hookspec
    @contract(when="after each step")
    def megalm_step_end(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        """A step is done. ``metrics`` are floats that are already reduced over ranks; the dict is not to be changed."""

    @hookspec
    @contract(when="after each step", ranks="0")
    def megalm_log(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        """Record metrics: what writes to a file or a service belongs here. ``metrics`` as in ``megalm_step_end``."""

    @hookspec
    @contract(when="after each step")
    def megalm_should_stop(self, run: RunInfo, step: int) -> str | None:
        """Return a reason to end the run after this step, or None. One rank's reason stops all of them."""

    @hookspec
    @contract(when="after each evaluation", collectives=True)
    def megalm_eval_end(self, run: RunInfo, step: int, metrics: dict[str, float]) -> None:
        """An evaluation is done. ``metrics`` are floats that are already reduced over ranks."""

    @hookspec
    @contract(when="before each checkpoint is written", collectives=True)
    def megalm_save_state(self, run: RunInfo, meta: dict[str, Any]) -> None:
        """Put what must survive a resume into ``meta``, JSON values under a key that is the plugin's name. Rank 0's
        ``meta`` is stored in the checkpoint."""

    @hookspec
    @contract(when="once, after a checkpoint is loaded", collectives=True)
    def megalm_load_state(self, run: RunInfo, meta: dict[str, Any]) -> None:
        """``meta`` as ``megalm_save_state`` left it. The key of a plugin that was not there then is absent."""

    @hookspec
    @contract(when="once, at the end, also when the run failed")
    def megalm_train_end(self, run: RunInfo, error: BaseException | None) -> None:
        """The run is over; ``error`` is what ended it, None after the last step or a requested stop."""


SPECS: tuple[type, ...] = (ComponentSpecs, EventSpecs)


@dataclass(frozen=True)
class HookDoc:
    """One hook, for people."""

    name: str
    arguments: tuple[str, ...]
    family: Literal["component", "event"]
    doc: str
    contract: HookContract


def hook_docs() -> Iterator[HookDoc]:
    """Every hook in the order of this file, generated from the specifications above."""
    for spec in SPECS:
        for name, function in vars(spec).items():
            if name.startswith(f"{PROJECT}_"):
                arguments = tuple(inspect.signature(function).parameters)[1:]
                family: Literal["component", "event"] = "component" if spec is ComponentSpecs else "event"
                doc = inspect.getdoc(function) or ""
                yield HookDoc(name, arguments, family, " ".join(doc.split()), function.megalm_contract)


def component_hook(kind: str) -> str:
    """Name of the hook that lists the components of a kind of :data:`~megalm.plugin.component.KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"no such kind of component: {kind!r}; kinds: {', '.join(KINDS)}")
    return f"{PROJECT}_{kind}"
