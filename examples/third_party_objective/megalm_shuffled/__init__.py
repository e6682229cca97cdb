"""Offers the objective to megalm. Listing it imports no more than this file."""

from megalm.api import Component, hookimpl

MEGALM_API = (1, 0)


@hookimpl
def megalm_objectives():
    return [Component("shuffled", "megalm_shuffled.objective:ShuffledTokens", "which tokens are not in their place?")]
