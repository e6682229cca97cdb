"""``torchrun ... -m megalm.launch RUN.toml [--set key=value ...] [--plugins a,b]``: one rank of a run.

What can be wrong is looked for before any process group exists. Each rank reports what it found through the
rendezvous store; if any found something, one rank of each host prints one message, and all exit together: 2 where the
user can mend it, else 1. Without torchrun the process is a run of one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from megalm.errors import ConfigError, Preempted, UsageError

if TYPE_CHECKING:
    import torch

    from megalm.parallel.bootstrap import Place, Rendezvous
    from megalm.parallel.mesh import ParallelContext
    from megalm.train.prepare import Prepared

USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "RUN.toml" in message:
            message += " (it stands before --set, which takes all that follows it)"
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; UsageError where it is wrong."""
    parser = _Parser(prog="python -m megalm.launch", description="Train as RUN.toml says.")
    parser.add_argument("config", type=Path, metavar="RUN.toml", help="the run's configuration")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="override a key, e.g. train.lr=3e-4"
    )
    parser.add_argument("--plugins", metavar="a,b", help="load exactly these plugins instead of all installed ones")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; returns the exit status."""
    end_with_launcher()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "-h" in arguments or "--help" in arguments:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            parse_arguments(arguments)
        return 0
    from megalm.parallel.bootstrap import Place, Rendezvous

    rendezvous = Rendezvous(Place.from_environment())

    def prepare() -> tuple[Prepared, dict[str, Any]]:
        prepared = _prepare(arguments, rendezvous.place)
        return prepared, prepared.facts()

    return _train(prepare_together(rendezvous, prepare), rendezvous)


def prepare_together(rendezvous: Rendezvous, prepare: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """Call ``prepare`` on every rank; its value, where each rank has one and they agree on the facts (JSON) beside it.

    Otherwise every rank exits, after one message a host.
    """
    from megalm.parallel.bootstrap import RendezvousError

    report: dict[str, Any] = {}
    prepared: list[T] = []
    try:
        value, report["facts"] = prepare()
        prepared.append(value)
    except UsageError as error:
        report["error"], report["status"] = f"megalm: {_text(error)}", USAGE_ERROR
    except Exception:
        report["error"], report["status"] = traceback.format_exc(), FAILURE
    try:
        reports = rendezvous.exchange("prepared", report)
    except RendezvousError as error:
        print(f"megalm: {error}", file=sys.stderr)
        raise SystemExit(FAILURE) from error
    status = _tell(reports, rendezvous.place)
    if status or not prepared:
        _leave_together(rendezvous, status)
    return prepared[0]


def _prepare(arguments: Sequence[str], place: Place) -> Prepared:
    from megalm.config.load import load_config
    from megalm.plugin.manager import PluginManager
    from megalm.train.prepare import prepare_run, verify_data
    from megalm.train.provenance import absent_plugins
    from megalm.train.run_folder import check_run_folder

    options = parse_arguments(arguments)
    only = None if options.plugins is None else [name for name in options.plugins.split(",") if name]
    manager = PluginManager.for_launch(only)
    try:
        resolved = load_config(options.config, options.set, manager)
        device = choose_device(resolved.config.launch.device, place)
        prepared = prepare_run(resolved, manager, place.world_size, "cuda" if device.type == "cuda" else "cpu")
    except UsageError as error:
        for line in absent_plugins(options.config, options.set, manager):
            error.add_note(line)
        raise
    if place.local_rank == 0:
        verify_data(prepared)
    if place.rank == 0:
        check_run_folder(resolved)
    return prepared


def _tell(reports: list[dict[str, Any]], place: Place) -> int:
    """Print what went wrong, once a host, and return the exit status; 0 where nothing did."""
    failed = {rank: report for rank, report in enumerate(reports) if "error" in report}
    lines = []
    for text in dict.fromkeys(report["error"] for report in failed.values()):
        ranks = [rank for rank, report in failed.items() if report["error"] == text]
        alone = len(ranks) < len(reports) and ranks != [0]
        lines.append(f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {text}" if alone else text)
    if not failed:
        lines = _disagreements([report["facts"] for report in reports])
    if lines and place.local_rank == 0:
        print("\n".join(lines), file=sys.stderr, flush=True)
    return max((report["status"] for report in failed.values()), default=USAGE_ERROR if lines else 0)


def _disagreements(facts: list[dict[str, Any]]) -> list[str]:
    """Where a rank's facts differ from rank 0's: the first such rank, each thing and both values."""
    from megalm.config.load import diff_configs

    for rank, mine in enumerate(facts):
        lines = []
        for topic, value in mine.items():
            first = facts[0][topic]
            if isinstance(value, dict):
                lines += [f"  {topic}: {line}" for line in diff_configs(first, value)]
            elif value != first:
                lines.append(f"  {topic}: {first} -> {value}")
        if lines:
            return [f"megalm: rank {rank} differs from rank 0; every rank must have the same:", *lines]
    return []


def end_with_launcher() -> None:
    """Ask the kernel to end this rank with torchrun: torchrun gives ranks a session of their own, so whoever kills it
    would leave them training.
    """
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _leave_together(rendezvous: Rendezvous, status: int) -> NoReturn:
    """Exit when every rank is about to: torchrun kills the others as soon as one has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that waits in a collective cannot come, and is ended by the launcher; nor is there anything left to say
    # where the rank that holds the store has gone already.
    with contextlib.suppress(Exception):
        rendezvous.exchange("leaving", status, timeout=5.0)
    # Skips the interpreter's clean-up, whose length differs from rank to rank.
    os._exit(status)


def _train(prepared: Prepared, rendezvous: Rendezvous) -> int:
    from megalm.parallel.phase import phase
    from megalm.train.trainer import Trainer

    config, place = prepared.resolved.config, rendezvous.place
    device = choose_device(config.launch.device, place)
    threads = config.launch.threads
    use_threads(default_threads(place) if threads == "auto" else threads, device)
    layout = config.parallel

    def train(parallel: ParallelContext) -> None:
        with phase("build the model"):
            trainer = Trainer(prepared, parallel)
        trainer.run()

    timeout = config.launch.collective_timeout
    return run_rank(
        train, rendezvous, device, tp=layout.tp, pp=layout.pp, dp=layout.dp, sp=layout.sp, timeout=timeout
    )


def run_rank(
    program: Callable[[ParallelContext], None],
    rendezvous: Rendezvous,
    device: torch.device,
    *,
    tp: int,
    pp: int = 1,
    dp: int | None,
    sp: bool,
    timeout: float,
) -> int:
    """Run a program between the start and the end of process groups, under a watchdog; its exit status.

    What goes wrong is told once, whichever ranks it happens on, and ends the process: it returns 0, the status of a run
    that SIGTERM has ended, or not at all.
    """
    from megalm.parallel.bootstrap import start_process_group, stop_process_group
    from megalm.parallel.flight import CollectiveError, FlightRecord
    from megalm.parallel.mesh import make_mesh, single_rank
    from megalm.parallel.watchdog import BACKEND_MARGIN, Watchdog

    place, flight = rendezvous.place, FlightRecord()
    watchdog = Watchdog(flight, place.rank, place.world_size, rendezvous.board, timeout)
    contexts: list[ParallelContext] = []
    status = 0

    def start() -> None:
        limit = timeout + BACKEND_MARGIN
        start_process_group(rendezvous, device, limit)
        contexts.append(make_mesh(device, tp=tp, pp=pp, dp=dp, sp=sp, timeout=limit, flight=flight))

    try:
        if rendezvous.store is None:
            program(single_rank(device))
            return 0
        watchdog.start()
        # A rank that is lost before it joins keeps the others waiting as well.
        flight.fly(flight.line("launch", tuple(range(place.world_size))), "start_process_groups", (), start)
        program(contexts[0])
    except Preempted:
        # On all ranks: they have agreed to end, and part as after a last step.
        if rendezvous.store is None:
            return Preempted.STATUS
        status = Preempted.STATUS
    except UsageError as error:
        watchdog.leave(f"has failed: {_text(error)}", excuse=True)
        if rendezvous.first("failed"):
            print(f"megalm: {_text(error)}", file=sys.stderr, flush=True)
        _leave_together(rendezvous, USAGE_ERROR)
    except CollectiveError:
        watchdog.collective_failed(first=rendezvous.first("failed"))
    except Exception as error:
        watchdog.leave(f"has failed: {type(error).__name__}: {error}", excuse=True)
        if rendezvous.first("failed"):
            print(f"megalm: rank {place.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Not by the interpreter's way out: taking down a group whose collectives wait for other ranks can hang.
        os._exit(FAILURE)
    except KeyboardInterrupt:
        watchdog.leave("was interrupted", excuse=True)
        rendezvous.first("failed")
        if place.rank == 0:
            text = "interrupted; the same command goes on from the newest checkpoint"
            print(f"megalm: {text}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    watchdog.stop()
    stop_process_group()
    return status


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of a rank: ``auto`` takes CUDA where there is any. ConfigError where there are fewer than ranks."""
    import torch

    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(['launch.device is "cuda", but torch finds no CUDA device here; use "auto" or "cpu"'])
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            [f"this host runs {place.local_world_size} ranks, but has {torch.cuda.device_count()} CUDA device(s)"]
        )
    return torch.device("cuda", place.local_rank)


def use_threads(count: int, device: torch.device) -> None:
    """Compute with so many threads, and on this device where it is one of several."""
    import torch

    torch.set_num_threads(count)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def default_threads(place: Place) -> int:
    """This rank's share of the host's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // place.local_world_size)


def _text(error: UsageError) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


if __name__ == "__main__":
    sys.exit(main())
