"""Offers the schedule to megalm. Listing it imports no more than this file."""

from megalm.api import Component, hookimpl

MEGALM_API = (1, 2)


@hookimpl
def megalm_pipeline_schedules():
    return [Component("lean-v", "megalm_lean.schedule:LeanV", "about a third of zb-v's activations, a longer ramp")]
