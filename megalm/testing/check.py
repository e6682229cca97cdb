"""Checks that a plugin can be held to: one function each, run by pytest suites and by ``megalm check-plugin`` alike.

A check gets a subject (what is examined, with all that it needs), says what it covered, or raises. So the command and a
third party's test file can never disagree about what was proved.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar

from megalm.errors import MegalmError

S = TypeVar("S")
Status = Literal["passed", "failed", "not applicable"]


class CheckFailed(AssertionError):
    """The subject is not as it has to be; the message names the fault and how to mend it."""


class NotApplicable(Exception):
    """The check asks for something that this subject does not have, such as padding; the message says what."""


@dataclass(frozen=True)
class Check(Generic[S]):
    """One property."""

    name: str
    """An identifier: pytest calls it ``test_<name>``."""
    proves: str
    """The property, as a sentence."""
    run: Callable[[S], str]
    """Returns what was covered (``84 layouts``); raises CheckFailed, NotApplicable or whatever the subject raises."""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    proves: str
    status: Status
    detail: str
    """What was covered, or what is wrong."""
    seconds: float


def _told(error: Exception) -> str:
    """What was raised, and where: the frames outside of megalm and torch if there are any, else all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ("/megalm/", "/torch/", "threading.py"))]
    lines = traceback.format_list(own or frames)
    return "".join([*traceback.format_exception_only(error), *lines]).rstrip()


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]


def run_checks(checks: Iterable[Check[S]], subject: S) -> Iterator[Result]:
    """Run each check in turn; one that fails does not stop the others. What was told before is not told at length."""
    seen: dict[str, str] = {}
    for check in checks:
        began = time.perf_counter()
        status: Status = "failed"
        try:
            detail = check.run(subject)
            status = "passed"
        except NotApplicable as reason:
            detail, status = str(reason), "not applicable"
        except (CheckFailed, MegalmError) as error:
            detail = "\n".join([str(error), *getattr(error, "__notes__", ())])
        except Exception as error:
            detail = _told(error)
        if status == "failed" and detail in seen:
            detail = f"{_first_line(detail)} (as in {seen[detail]})"
        else:
            seen[detail] = check.name
        yield Result(check.name, check.proves, status, detail, time.perf_counter() - began)


class Asked(TypedDict):
    """What the environment asks of every suite."""

    full: bool
    seed: int


class Suite:
    """Base of pytest classes that hold a plugin to checks: a subclass gets one ``test_`` method for each."""

    checks: tuple[Check[Any], ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for check in cls.checks:
            if not hasattr(cls, f"test_{check.name}"):  # a subclass may put its own in the place of one
                setattr(cls, f"test_{check.name}", _test_method(check))

    @classmethod
    def subject(cls) -> Any:
        """What is examined; made once for a class."""
        raise NotImplementedError

    @staticmethod
    def asked() -> Asked:
        """``MEGALM_PROOF=full`` asks for the long form, ``MEGALM_SEED=7`` for other draws."""
        return Asked(full=os.environ.get("MEGALM_PROOF") == "full", seed=int(os.environ.get("MEGALM_SEED") or 0))

    @classmethod
    def teardown_class(cls) -> None:
        """Called by pytest after the last test of the class."""
        made = cls.__dict__.get("_made")
        if made is not None:
            made.close()
            del cls._made

    _made: Any

    @classmethod
    def _subject(cls) -> Any:
        if "_made" not in cls.__dict__:
            cls._made = cls.subject()
        return cls._made


def _test_method(check: Check[Any]) -> Callable[[Suite], None]:
    def test(self: Suite) -> None:
        import pytest

        try:
            check.run(self._subject())
        except NotApplicable as reason:
            pytest.skip(str(reason))

    test.__doc__ = check.proves
    return test
