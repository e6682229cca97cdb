"""The head's module: every parameter declared and used, the same each time it is built."""

from __future__ import annotations

from megalm.errors import MegalmError
from megalm.model.language_model import LanguageModel
from megalm.parallel.mesh import single_rank
from megalm.testing.check import CheckFailed
from megalm.testing.head.subject import HeadSubject
from megalm.testing.objective import terms
from megalm.testing.parity import gradients_of
from megalm.train.prepare import Prepared


def serial_model(subject: HeadSubject, prepared: Prepared | None = None) -> LanguageModel:
    """The whole model on one rank, in float64. CheckFailed where it cannot be built."""
    try:
        return terms.serial_model(subject, prepared)
    except MegalmError as error:
        raise CheckFailed(f"head {subject.name}: {error}") from error


def module_is_declared(subject: HeadSubject) -> str:
    """build() gives the same module each time, made from the context alone, and the loss uses all of it."""
    parameters = [
        {name: tuple(p.shape) for name, p in serial_model(subject).named_parameters() if name.startswith("plugins.")}
        for _ in range(2)
    ]
    if parameters[0] != parameters[1]:
        raise CheckFailed(f"head {subject.name}: build() gives {parameters[0]}, and then {parameters[1]}")
    found = gradients_of(subject.prepared(), single_rank(subject.device), [subject.rows(subject.examples(12))])
    if unused := next((name for name in parameters[0] if not found[name].any()), None):
        raise CheckFailed(f"head {subject.name}: the parameter {unused} gets no gradient; the loss does not use it")
    return f"{len(parameters[0])} parameters, {sum(found[name].numel() for name in parameters[0])} numbers"
