"""Typed errors, so that a launch can tell the user's mistakes from the engine's.

A :class:`UsageError` is something the user can mend (a key, a file, a plugin, a layout): every rank exits 2 after one
message, without a traceback. Everything else is an engine failure: exit 1, with the traceback of the first cause.

Messages name the file, key or tensor, what was expected, what was found and what to do next.
"""

from __future__ import annotations


class MegalmError(Exception):
    """Base of every error that megalm raises on purpose."""


class UsageError(MegalmError):
    """Input that the user can correct. Ranks exit with status 2."""


class ConfigError(UsageError):
    """One or more problems in a run's configuration, all collected before anything starts."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = list(problems)
        head = "1 configuration error" if len(problems) == 1 else f"{len(problems)} configuration errors"
        super().__init__(head + ":\n" + "\n".join(f"  {p}" for p in self.problems))


class PluginError(UsageError):
    """A plugin is missing, ambiguous, of another API version, or fails: to import, or where it is asked for
    something before a run begins."""


class LayoutError(UsageError):
    """A parallel layout that does not fit the model, the batch or the number of ranks."""


class ScheduleError(UsageError):
    """A pipeline schedule that does not fit the pipeline, or whose actions are not in an order that can run."""


class DataError(UsageError):
    """Unusable text, or a token store that is missing, truncated, altered or of another tokenizer."""


class Preempted(MegalmError):
    """The run was asked to end (SIGTERM) before its last step, and has, with a checkpoint of the last that it took."""

    STATUS = 143
    """Exit status, by the shell's convention: 128 + SIGTERM."""


class CheckpointError(UsageError):
    """A checkpoint that is missing, incomplete, altered or does not fit the model."""


class ObjectiveError(MegalmError):
    """An objective does not keep its contract: a tensor or a loss term is not what it declared."""


class TokenizerError(UsageError):
    """A tokenizer that cannot be trained, loaded, or is not the one that the data was made with."""
