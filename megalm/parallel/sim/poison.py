"""Values that stand in outputs until they have arrived, and that can be recognised in whatever is computed from them.

A NaN has bits to spare. Processors hand on those of an operand, also from float64 to float32 and back, so a NaN that
carries a mark and the number of its operation usually still does so after arithmetic, and tells at the next operation
which output was read too early. (Formats of 16 bits have too few to spare, and some functions make NaNs of their own:
there the result is NaN, and unnamed.)

The NaN are signalling ones, and negative. Arithmetic makes any NaN a quiet one, and a change of sign shows too, so even
``x.add_(0)`` leaves other bits behind; copies do not. What passes NaN on as they are (a clamp, a power of one) is not
seen by the bits. Integers are filled with their largest value, booleans with True: a write of the same is not seen
either.
"""

from __future__ import annotations

import torch

_MARK, _NUMBER_BITS = 0b101101, 16
NUMBERS = 1 << _NUMBER_BITS
"""Operations are numbered modulo this."""
_SPARE_BITS = 22
_NUMBERED = {torch.float32: (torch.int32, -1 << 23, 0), torch.float64: (torch.int64, -1 << 52, 29)}
"""The integer of the same size, that with sign and exponent set, and how far the 22 spare bits are from the right."""
_UNNUMBERED = {torch.bfloat16: -1 << 7 | 0b0100101, torch.float16: -1 << 10 | 0b0100100101}
"""A negative signalling NaN of formats without bits for a number, as an int16."""


def fill(tensor: torch.Tensor, number: int) -> None:
    """Fill a tensor with what no one takes for a result; ``number``: of the operation that will write it."""
    tensor = _real(tensor)
    if tensor.dtype in _NUMBERED:
        bits, special, shift = _NUMBERED[tensor.dtype]
        spare = _MARK << _NUMBER_BITS | number % NUMBERS
        tensor.copy_(torch.full_like(tensor, special | spare << shift, dtype=bits).view(tensor.dtype))
    elif tensor.dtype in _UNNUMBERED:
        tensor.copy_(torch.full_like(tensor, _UNNUMBERED[tensor.dtype], dtype=torch.int16).view(tensor.dtype))
    elif tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def is_filled(tensor: torch.Tensor, number: int) -> bool:
    """Whether a tensor holds, bit for bit, what :func:`fill` put there."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return True
    tensor = _real(tensor)
    expected = torch.empty(1, dtype=tensor.dtype, device=tensor.device)
    fill(expected, number)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return bool((tensor.view(bits) == expected.view(bits)).all())


def origin(tensor: torch.Tensor) -> int | None:
    """Number (modulo :data:`NUMBERS`) of an operation whose output the values come from, where they bear a mark."""
    tensor = _real(tensor)
    if tensor.dtype not in _NUMBERED:
        return None
    flat = tensor.reshape(-1)
    wrong = flat[flat.isnan()]
    if not wrong.numel():
        return None
    bits, _, shift = _NUMBERED[tensor.dtype]
    spare = wrong.view(bits) >> shift & ((1 << _SPARE_BITS) - 1)
    marked = spare[spare >> _NUMBER_BITS == _MARK]
    return int(marked[0]) % NUMBERS if marked.numel() else None


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without gradients; a complex one as pairs of its parts."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
