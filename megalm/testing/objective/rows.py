"""Rows: a function of (seed, epoch, sample) and nothing else, drawn at the declared rates."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from megalm.testing.check import CheckFailed, NotApplicable
from megalm.testing.objective.fresh_rows import Digests, built_elsewhere, digests
from megalm.testing.objective.purity import generators_kept, move_generators
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.train.objective import TrainingObjective

CERTAINTY = 1e-9
"""Chance that a right objective is called wrong."""


def rows_have_addresses(subject: ObjectiveSubject) -> str:
    """Row i is the same bits whatever was built before, by which instance or process, and whatever others draw."""
    count = min(subject.samples, 200 if subject.full else 60)
    numbers = list(range(count))
    expected = dict(_build(subject, subject.objective, numbers))
    shuffled = random.Random(subject.seed).sample(numbers, count)
    another = subject.prepared(f"run.seed={subject.seed}").objective
    with generators_kept():
        move_generators(shuffled[0])
        _compare(subject, expected, _build(subject, subject.objective, shuffled), "in another order")
        _compare(subject, expected, _build(subject, another, numbers[::-1]), "by another instance")
    _compare(subject, expected, _in_worker(subject, shuffled[: count // 2]), "in a worker process")
    covered = f"{count} rows, in order, shuffled, by another instance, in a forked worker"
    if subject.objective.builds_batches:
        _batches(subject, shuffled)
        covered += ", by build_batch"
    toml = subject.configuration()
    if toml is None:
        return covered
    found = built_elsewhere(toml, subject.manager.plugins, shuffled, subject.folder, 1 + subject.seed)
    _compare(subject, expected, found, "in a new process, where hashes of texts and the order of sets are other ones,")
    return f"{covered} and in a new process"


def _build(
    subject: ObjectiveSubject, objective: TrainingObjective, numbers: Iterable[int]
) -> Iterator[tuple[int, Digests]]:
    return digests(objective, subject.corpus, subject.seed, numbers)


def _compare(
    subject: ObjectiveSubject,
    expected: Mapping[int, Digests],
    found: Iterable[tuple[int, Digests]],
    how: str,
) -> None:
    for number, row in found:
        if row != expected[number]:
            first = expected[number]
            names = sorted(key for key in {*row, *first} if row.get(key) != first.get(key))
            raise CheckFailed(
                f"objective {subject.name}: row {number} built {how} differs in {', '.join(names)}. A row may depend "
                "on its number, the corpus and the given rng only: draw from no other generator, and keep no state "
                "between rows"
            )


def _batches(subject: ObjectiveSubject, numbers: list[int]) -> None:
    """Batches built in one go are those of the rows one by one."""
    objective, address = subject.objective, (subject.seed, "train", 0)
    for start in range(0, len(numbers), 7):
        samples = [(subject.corpus, number, address) for number in numbers[start : start + 7]]
        found = objective.batch(samples)
        expected = objective.collate([objective.build(number, corpus, at) for corpus, number, at in samples])
        if wrong := sorted(name for name, array in expected.items() if not np.array_equal(array, found[name])):
            raise CheckFailed(
                f"objective {subject.name}: build_batch() of the samples {[number for _, number, _ in samples]} "
                f"differs in {', '.join(wrong)} from what collate() gives of their rows"
            )


def _in_worker(subject: ObjectiveSubject, numbers: list[int]) -> list[tuple[int, dict[str, str]]]:
    """Digests from a forked process, as a data loader's worker would build them."""
    import json

    path = subject.folder / "worker.json"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            move_generators(numbers[0] + 1)
            path.write_text(json.dumps(list(_build(subject, subject.objective, numbers))))
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1] != 0:
        raise CheckFailed(f"objective {subject.name}: build_example fails in a forked worker process")
    return [(number, found) for number, found in json.loads(path.read_text())]


def rates_are_as_declared(subject: ObjectiveSubject) -> str:
    """What the rows show of each declared rate is as likely as not to be drawn at it."""
    parts = {name: part.rates() for name, part in subject.objective.parts.items()}
    if not any(parts.values()):
        raise NotApplicable("rates() declares none")
    examples = subject.examples(5000 if subject.full else 500)
    told = []
    for name, rates in parts.items():
        totals = {rate: [0, 0] for rate in rates}
        for example in examples:
            seen = subject.objective.parts[name].observe(example)
            if set(seen) != set(rates):
                raise CheckFailed(
                    f"objective {name}: observe() gives {sorted(seen)}, but rates() declares {sorted(rates)}"
                )
            for rate, (hits, trials) in seen.items():
                totals[rate][0] += hits
                totals[rate][1] += trials
        for rate, (hits, trials) in totals.items():
            check_rate(f"objective {name}: the rate {rate!r}", hits, trials, rates[rate])
            told.append(f"{rate} {hits / trials:.4f} of {trials} (declared {rates[rate]:.4f})")
    return ", ".join(told)


def check_rate(what: str, hits: int, trials: int, probability: float) -> None:
    """CheckFailed where ``hits`` of ``trials`` independent draws of ``probability`` are too unlikely to be chance.

    The bound is Chernoff's: a share of at least x, or at most x, has a probability of at most exp(-n KL(x || p)).
    """
    if not 0 <= probability <= 1:
        raise CheckFailed(f"{what} is declared as {probability}, which is no probability")
    if not 0 <= hits <= trials:
        raise CheckFailed(f"{what}: observe() counts {hits} hits in {trials} trials")
    if trials == 0:
        raise CheckFailed(f"{what} is declared, but no row draws it; observe() counts no trials")
    share = hits / trials
    if 2 * math.exp(-trials * _divergence(share, probability)) < CERTAINTY:
        raise CheckFailed(
            f"{what} is declared as {probability:.6g}, but {hits} of {trials} draws, {share:.6g}, are hits, "
            f"which chance gives less than once in {1 / CERTAINTY:.0e} times"
        )


def _divergence(x: float, p: float) -> float:
    """Kullback-Leibler divergence of two coins, in nats."""
    total = 0.0
    for a, b in ((x, p), (1 - x, 1 - p)):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total
