"""Values that stand in outputs until they have arrived, and that can be recognised in whatever is computed from them.

A NaN has bits to spare. Processors hand on those of an operand, also from float64 to float32 and back, so a NaN that
carries a mark and the number of its operation usually still does so after arithmetic, and tells at the next operation
which output was read too early. (Formats of 16 bits have too few to spare, and some functions make NaNs of their own:
there the result is NaN, and unnamed.) Integers are filled with their largest value.
"""

from __future__ import annotations

import torch

_MARK, _NUMBER_BITS = 0b101101, 16
NUMBERS = 1 << _NUMBER_BITS
"""Operations are numbered modulo this."""
_QUIET = {torch.float32: (torch.int32, 0x7FC0 << 16, 0), torch.float64: (torch.int64, 0x7FF8 << 48, 29)}
"""The integer of the same size, a quiet NaN, and how far its 22 spare bits are from the right."""


def fill(tensor: torch.Tensor, number: int) -> None:
    """Fill a tensor with what no one takes for a result; ``number``: of the operation that will write it."""
    tensor = tensor.detach()
    if tensor.dtype in _QUIET:
        bits, quiet, shift = _QUIET[tensor.dtype]
        spare = _MARK << _NUMBER_BITS | number % NUMBERS
        tensor.copy_(torch.full_like(tensor, quiet | spare << shift, dtype=bits).view(tensor.dtype))
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def is_filled(tensor: torch.Tensor) -> bool:
    """Whether a tensor still holds what :func:`fill` put there."""
    tensor = tensor.detach()
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().all())
    return tensor.dtype == torch.bool or bool((tensor == torch.iinfo(tensor.dtype).max).all())


def origin(tensor: torch.Tensor) -> int | None:
    """Number (modulo :data:`NUMBERS`) of an operation whose output the values come from, where they bear a mark."""
    if tensor.dtype not in _QUIET:
        return None
    flat = tensor.detach().reshape(-1)
    wrong = flat[flat.isnan()]
    if not wrong.numel():
        return None
    bits, _, shift = _QUIET[tensor.dtype]
    spare = wrong.view(bits) >> shift & ((1 << 22) - 1)
    marked = spare[spare >> _NUMBER_BITS == _MARK]
    return int(marked[0]) % NUMBERS if marked.numel() else None
