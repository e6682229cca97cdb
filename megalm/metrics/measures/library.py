"""How the libraries are called: imported when used, quiet, and never without a number.

They warn where a measure is not defined (a class that nobody predicts, one side that is constant) and then give 0, 1 or
nan, as each sees fit. Here it is 0, which the measures' page says, and the warning says nothing new.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from megalm.data.extras import load_extra


def library(name: str, measure: str) -> Any:
    """A module of the extra ``eval``. DataError, saying what needs it, where it is not installed."""
    return load_extra((name,), f"the measure {measure}", "eval")


def quietly(compute: Callable[[], Any]) -> Any:
    """What it gives, without the warnings of libraries about what is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute()


def number(value: Any) -> float:
    """A finite float; 0 where the measure is not defined."""
    found = float(value)
    return found if math.isfinite(found) else 0.0
