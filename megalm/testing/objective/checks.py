"""Everything that an objective is held to, cheapest first."""

from __future__ import annotations

from megalm.testing.check import Check
from megalm.testing.component_checks import component_checks
from megalm.testing.objective.batches import microbatches_add_up, padding_is_nothing
from megalm.testing.objective.parity import layouts_agree, ranks_say_the_same
from megalm.testing.objective.purity import steps_repeat
from megalm.testing.objective.resume import resumes_exactly
from megalm.testing.objective.rows import rates_are_as_declared, rows_have_addresses
from megalm.testing.objective.sequence_shards import scopes_hold
from megalm.testing.objective.subject import ObjectiveSubject
from megalm.testing.objective.terms import counts_are_what_is_scored, terms_are_scored, terms_are_sums

CHECKS: tuple[Check[ObjectiveSubject], ...] = (
    *component_checks("objectives"),
    Check("terms", "Every term is scored, finite, and reaches the backbone", terms_are_scored),
    Check("rows", "A row is a function of its number, whoever builds it and when", rows_have_addresses),
    Check("steps", "A step depends on its rows alone, and changes nothing in place", steps_repeat),
    Check("rates", "Random draws happen at the declared rates", rates_are_as_declared),
    Check("counts", "Counts() equals what the loss scores", counts_are_what_is_scored),
    Check("sums", "Terms are sums over rows, not means", terms_are_sums),
    Check("microbatches", "Accumulation changes nothing, nor do rows with nothing to score", microbatches_add_up),
    Check("padding", "Padding changes nothing, nor does what stands in it", padding_is_nothing),
    Check("scopes", "A row's positions may be split over ranks", scopes_hold),
    Check("resume", "A resumed run ends with the same bits", resumes_exactly),
    Check("trace", "Every rank says the same, whatever its rows hold", ranks_say_the_same),
    Check("layouts", "Loss and every gradient equal one rank's under every layout", layouts_agree),
)
