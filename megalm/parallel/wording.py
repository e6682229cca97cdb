"""What reports about communication share, whether ranks are simulated or real: words, frames and cycles."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pluggy
import torch

_HERE = Path(__file__).resolve().parent
_SKIP = (
    os.path.dirname(os.path.abspath(torch.__file__)),
    os.path.dirname(os.path.abspath(pluggy.__file__)),
    os.path.abspath(threading.__file__),
    *(str(_HERE / name) for name in ("sim", "comm.py", "flight.py", "phase.py", "wording.py")),
    str(_HERE.parent / "plugin" / "events.py"),
    "<",
)
_FRAMES = 3
_MANY = 16


def spell(tensor: torch.Tensor) -> str:
    """``float32[2, 3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def spell_group(label: str, ranks: Sequence[int]) -> str:
    """``tp [0, 1]``; a large group by its size."""
    members = listed(ranks) if len(ranks) <= _MANY else f"{len(ranks)} ranks"
    return f"{label} [{members}]"


def spell_call(kind: str, about: Mapping[str, Any]) -> str:
    """``all_reduce(reduction sum, dtype float32, shape [3])``."""
    return f"{kind}({', '.join(f'{name} {value}' for name, value in about.items())})"


def ranks_text(numbers: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0, 1``."""
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {listed(numbers)}"


def wait_text(numbers: Sequence[int]) -> str:
    """``rank 3 waits`` or ``ranks 0, 1 wait``."""
    return f"{ranks_text(numbers)} {'waits' if len(numbers) == 1 else 'wait'}"


def listed(numbers: Iterable[int]) -> str:
    """``0, 1, 5``."""
    return ", ".join(map(str, numbers))


def place_in_code(phases: Sequence[str], frames: Sequence[str], indent: str) -> str:
    """Phase labels and user frames, as lines."""
    lines = [f"{indent}during: {' > '.join(phases)}"] if phases else []
    return "\n".join([*lines, f"{indent}at {' < '.join(frames)}"])


def user_frames(start: FrameType | None = None) -> tuple[str, ...]:
    """The innermost three frames outside torch and the communication layer, innermost first.

    ``start``: where to begin, for another thread's; default: the caller's.
    """
    out: list[str] = []
    frame: FrameType | None = sys._getframe(1) if start is None else start
    while frame is not None and len(out) < _FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_SKIP):
            out.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(out)


def find_cycle(needs: Mapping[int, Sequence[int]]) -> list[int]:
    """A shortest cycle of who needs whom, its first rank repeated at the end; empty where there is none."""
    best: list[int] = []
    for start in sorted(needs):
        paths, seen = [[start]], {start}
        while paths:
            path = paths.pop(0)
            for rank in needs.get(path[-1], []):
                if rank == start and (not best or len(path) + 1 < len(best)):
                    best = [*path, start]
                if rank not in seen:
                    seen.add(rank)
                    paths.append([*path, rank])
    return best
