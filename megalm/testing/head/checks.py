"""Everything that a head is held to, cheapest first; what an objective is held to as well is the same function."""

from __future__ import annotations

from megalm.testing.check import Check
from megalm.testing.component_checks import component_checks
from megalm.testing.head.labelled import long_texts_are_cut, records_are_checked
from megalm.testing.head.losses import (
    counts_are_what_is_scored,
    padding_is_nothing,
    streams_are_not_read,
    unlabelled_rows_are_nothing,
)
from megalm.testing.head.metrics import metrics_are_sound
from megalm.testing.head.module import module_is_declared
from megalm.testing.head.predictions import predictions_agree, weights_travel
from megalm.testing.head.subject import HeadSubject, of_a_head
from megalm.testing.objective.batches import microbatches_add_up
from megalm.testing.objective.parity import layouts_agree, ranks_say_the_same
from megalm.testing.objective.rows import rows_have_addresses
from megalm.testing.objective.sequence_shards import scopes_hold
from megalm.testing.objective.terms import terms_are_scored, terms_are_sums

CHECKS: tuple[Check[HeadSubject], ...] = (
    *component_checks("heads"),
    Check("module", "Every parameter is declared, and used by the loss", module_is_declared),
    Check("records", "Bad records are refused by field, and only declared fields are read", records_are_checked),
    Check("texts", "Long texts are cut and say so; strange ones give a row or an error by field", long_texts_are_cut),
    Check("rows", "A row is a function of its record, whoever builds it and when", of_a_head(rows_have_addresses)),
    Check("terms", "Every term is scored, finite, and reaches the backbone", of_a_head(terms_are_scored)),
    Check("counts", "Counts() equals what the loss scores", counts_are_what_is_scored),
    Check("sums", "Terms are sums over rows, not means", of_a_head(terms_are_sums)),
    Check("streams", "No draw depends on a random stream, and nothing is kept between steps", streams_are_not_read),
    Check("microbatches", "Accumulation changes nothing", of_a_head(microbatches_add_up)),
    Check("unlabelled", "Records without labels change nothing", unlabelled_rows_are_nothing),
    Check("padding", "Padding changes nothing, nor does what stands in it", padding_is_nothing),
    Check("scopes", "A row's positions may be split over ranks", of_a_head(scopes_hold)),
    Check("metrics", "Right predictions are best by every metric, in any order", metrics_are_sound),
    Check("predictions", "A prediction depends on its record alone, under every layout", predictions_agree),
    Check("weights", "Saved weights predict the same under another layout", weights_travel),
    Check("trace", "Every rank says the same, whatever its rows hold", of_a_head(ranks_say_the_same)),
    Check("layouts", "Loss and every gradient equal one rank's under every layout", of_a_head(layouts_agree)),
)
