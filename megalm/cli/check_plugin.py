"""``megalm check-plugin``: what a plugin is held to, shown as it is found out.

The checks are those of the suites in ``megalm.testing``, so that the command and a plugin's own tests agree.
"""

from __future__ import annotations

import contextlib
import importlib
import json as jsonlib
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megalm.cli.options import Plugins, names

if TYPE_CHECKING:
    from megalm.cli.check_targets import Target
    from megalm.cli.check_view import View
    from megalm.plugin.manager import PluginManager
    from megalm.testing.check import Result

_HOMES = {
    "objectives": ("megalm.testing.objective", "ObjectiveSubject"),
    "tokenizers": ("megalm.testing.tokenizer", "TokenizerSubject"),
    "heads": ("megalm.testing.head", "HeadSubject"),
    "pipeline_schedules": ("megalm.testing.schedule", "ScheduleSubject"),
}
_TORCH_FREE = ("tokenizers", "pipeline_schedules")
_TEMPORARY = re.compile(r"^.*?[/\\]run\.toml(:\d+)?: ")
"""Where a problem is in a run that a subject wrote for itself, which nobody can look up."""
_INTERRUPTED = 130
_PREPARATION = "It can be set up as the checks need it"


def check_plugin(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A component (mlm, plugin:mlm, mlm+nsp, csv:FILE), or a plugin or distribution for all that it has.",
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="objective, tokenizer, head or pipeline_schedule, where NAME is several.",
        ),
    ] = None,
    layouts: Annotated[
        str, typer.Option("--layouts", metavar="quick|full", help="A sample, or every layout and more cases.")
    ] = "quick",
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, max=2**31 - 1, help="Repeat what another run drew.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="For a tokenizer or a head one of its settings (vocab_size=300); for an objective a key of a run "
            "(objective.mlm.mask_prob=0.3); a pipeline schedule takes none. May be repeated.",
        ),
    ] = None,
    only: Plugins = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON at the end, and nothing else.")] = False,
) -> None:
    """Hold an installed plugin to its contract: a table, then whatever is wrong. Exits 0 if nothing is, else 1."""
    from megalm.cli.check_targets import kind_of, targets
    from megalm.cli.check_view import view_for
    from megalm.errors import UsageError
    from megalm.plugin.manager import PluginManager
    from megalm.plugin.suggest import did_you_mean

    if layouts not in ("quick", "full"):
        raise UsageError(f"--layouts {layouts}: expected quick or full{did_you_mean(layouts, ('quick', 'full'))}")
    kinds = kind_of(kind)
    manager = PluginManager.for_launch(names(only))
    chosen = targets(name, kinds, manager)
    if sets and len(chosen) > 1:
        raise UsageError(f'--set is for one component, and "{name}" is {len(chosen)}: {", ".join(map(str, chosen))}')
    if sets and chosen[0].kind == "pipeline_schedules":
        raise UsageError(f"--set {sets[0]}: {chosen[0]} is checked without settings")
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    view = view_for(json)
    rows: list[tuple[Target, list[Result]]] = []
    began = time.perf_counter()
    try:
        with _one_thread(chosen), _own_output(json):
            for target in chosen:
                results: list[Result] = []
                rows.append((target, results))
                with view.preparing():
                    prepared = _prepare(target, manager, sets or [], layouts == "full", seed)
                with prepared, view.table(f"{target}: {layouts}, seed {seed}") as table:
                    for result in _results(target, manager, prepared, table):
                        results.append(result)
                        table.add(result)
                view.failures(results)
    except KeyboardInterrupt:
        done = sum(len(results) for _, results in rows)
        typer.echo(f"megalm: interrupted after {done} checks (seed {seed})", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    failed = sum(result.status == "failed" for _, results in rows for result in results)
    if json:
        typer.echo(jsonlib.dumps(_document(rows, layouts, seed), indent=2, ensure_ascii=False))
    else:
        view.end([result for _, results in rows for result in results], time.perf_counter() - began, seed)
    if failed:
        raise typer.Exit(1)


@dataclass
class _Prepared:
    """A component that is ready to be examined, or what is in the way."""

    checks: tuple[Any, ...] = ()
    subject: Any = None
    wrong: str = ""
    lacks: str | None = None
    """The argument without which there is nothing to examine."""
    seconds: float = 0.0

    def __enter__(self) -> _Prepared:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.subject is not None:
            self.subject.close()


def _prepare(target: Target, manager: PluginManager, settings: Sequence[str], full: bool, seed: int) -> _Prepared:
    """Import the checks and make their subject.

    UsageError for what was asked for and cannot be: settings that are refused, parts that cannot be joined, an argument
    that cannot be used.
    """
    from megalm.errors import ConfigError, MegalmError, UsageError

    began = time.perf_counter()
    found = _Prepared(lacks=target.lacks)
    if target.lacks is not None:
        return found
    try:
        package, attribute = _HOMES[target.kind]
        found.checks = importlib.import_module(f"{package}.checks").CHECKS
        make = getattr(importlib.import_module(f"{package}.subject"), attribute)
        found.subject = make(target.spec, manager=manager, settings=tuple(settings), full=full, seed=seed)
        if target.argument is not None:
            found.subject.chosen.schedule.fixed_shape  # noqa: B018  reads the argument's file, if it is one
    except ConfigError as error:
        problems = [_TEMPORARY.sub("", problem) for problem in error.problems]
        if len(target.components) > 1 and all(problem.startswith("train.objective: ") for problem in problems):
            reasons = "; ".join(problem.removeprefix("train.objective: ") for problem in problems)
            raise UsageError(f"{target.name} cannot be one objective (train.objective): {reasons}") from None
        if settings:
            raise ConfigError(problems) from None
        found.wrong = str(ConfigError(problems))
    except MegalmError as error:
        if target.argument is not None and isinstance(error, UsageError):
            raise
        found.wrong = str(error)
    except Exception as error:
        found.wrong = f"{type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}"
    found.seconds = time.perf_counter() - began
    return found


def _results(target: Target, manager: PluginManager, prepared: _Prepared, table: View.Table) -> Iterator[Result]:
    """Every check's result, as it ends."""
    from megalm.testing.check import Result, run_checks
    from megalm.testing.component_checks import component_checks

    # These ask for no more than a name, so that they can tell why a subject could not be made.
    shared = component_checks(target.kind)
    plain = SimpleNamespace(manager=manager, name=target.name)
    yield from run_checks(_announced(shared, table), plain)
    if prepared.lacks is not None:
        yield Result("preparation", _PREPARATION, "not applicable", f"needs an argument, {prepared.lacks}", 0.0)
        return
    if prepared.subject is None:
        text = f"{prepared.wrong}\nso the other checks could not be run"
        yield Result("preparation", _PREPARATION, "failed", text, prepared.seconds)
        return
    already = {check.name for check in shared}
    left = [check for check in prepared.checks if check.name not in already]
    yield from run_checks(_announced(left, table), prepared.subject)


def _announced(checks: Sequence[Any], table: View.Table) -> Iterator[Any]:
    """Each check, which the table shows from when it is taken."""
    for check in checks:
        table.running(check.name)
        yield check


@contextlib.contextmanager
def _one_thread(chosen: Sequence[Target]) -> Iterator[None]:
    """One thread for torch, where it is used: simulated ranks share a core, and two threads are slower than one."""
    if all(target.kind in _TORCH_FREE for target in chosen):
        yield
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _own_output(json: bool) -> Iterator[None]:
    """What plugins print goes to standard error where standard output is for JSON."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def _document(rows: Sequence[tuple[Target, Sequence[Result]]], layouts: str, seed: int) -> dict[str, Any]:
    from megalm.cli.check_targets import one_of

    return {
        "passed": not any(result.status == "failed" for _, results in rows for result in results),
        "seed": seed,
        "layouts": layouts,
        "components": [
            {
                "kind": one_of(target.kind),
                "name": target.spec,
                "plugins": [
                    {"name": c.plugin.name, "dist": c.plugin.dist, "version": c.plugin.version}
                    for c in target.components
                    if c.plugin is not None
                ],
                "checks": [
                    {
                        "name": result.name,
                        "proves": result.proves,
                        "status": result.status,
                        "detail": result.detail,
                        "seconds": round(result.seconds, 3),
                    }
                    for result in results
                ],
            }
            for target, results in rows
        ],
    }
