"""Dropout whose mask is a function of an address: (seed, step, site, slot, view, position, feature).

A *slot* is a row's place in the step's global batch, a *view* numbers the rows built from one sample, a *position* is
the index in the unsharded row. Every value takes one 16-bit draw: block ``position * ceil(F / 16) + feature // 16``
of the Philox stream with key (seed, site) and counter words (slot, view, step). So a token shard, a microbatch or a
recomputed layer draws exactly the bits that the whole batch would have drawn.

On the CPU numpy draws the bits; elsewhere the same generator runs as torch integer arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megalm.parallel import rng

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Span:
    """Consecutive positions [start, stop) of one row."""

    slot: int
    view: int
    start: int
    stop: int


@dataclass(frozen=True)
class DropoutAddress:
    """Where the rows of a (T, F) tensor lie: spans that follow each other."""

    seed: int
    step: int
    spans: tuple[Span, ...]

    @cached_property
    def tokens(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    @cached_property
    def _hash(self) -> int:
        return hash((self.seed, self.step, self.spans))

    def __hash__(self) -> int:
        return self._hash  # tables are looked up by addresses of thousands of spans, once a layer


def row_spans(slots: Sequence[int], length: int, start: int, stop: int, views: int = 1) -> tuple[Span, ...]:
    """Spans of the flattened tokens [start, stop) of rows of ``length``; row r is view r % views of slots[r //
    views].
    """
    out = []
    for row in range(len(slots) * views):
        first, last = max(start, row * length), min(stop, (row + 1) * length)
        if first < last:
            out.append(Span(slots[row // views], row % views, first - row * length, last - row * length))
    return tuple(out)


def dropout(x_TF: torch.Tensor, p: float, address: DropoutAddress, site: str) -> torch.Tensor:
    """Zero each value with probability ``p`` (to 1 / 65536) and scale the others by the inverse: same shape and
    dtype.
    """
    threshold = threshold_of(p)
    if threshold == 0:
        return x_TF
    keep = draws16(address, site, x_TF.shape[-1], x_TF.device) >= threshold
    # A scalar factor is not rounded to x's dtype: in bfloat16 a scaled mask would bias every mean.
    return (x_TF * keep) * (65536.0 / (65536 - threshold))


def dropout_add(
    x_TF: torch.Tensor,
    residual_TF: torch.Tensor,
    p: float,
    address: DropoutAddress,
    site: str,
    bias_F: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + dropout(x + bias)``, of ``x``'s dtype, computed in float32 at least and rounded once."""
    wide = x_TF.to(torch.promote_types(x_TF.dtype, torch.float32))
    dropped = dropout(wide if bias_F is None else wide + bias_F, p, address, site)
    return (residual_TF + dropped).to(x_TF.dtype)


def threshold_of(p: float) -> int:
    """Of 65536 draws, how many drop: at least one is always kept."""
    return min(round(p * 65536), 65535)


def draws16(address: DropoutAddress, site: str, features: int, device: torch.device) -> torch.Tensor:
    """The 16-bit draws of every token and feature: int32 (T, F)."""
    key = rng.key(address.seed, "dropout", site)
    if device.type == "cpu":
        return _numpy_draws(address, key, features)
    return _torch_draws(address, key, features, device)


def _numpy_draws(address: DropoutAddress, key: tuple[int, int], features: int) -> torch.Tensor:
    per_token = -(-features // rng.DRAWS_PER_BLOCK)
    out = torch.empty((address.tokens, features), dtype=torch.int32)
    row = 0
    for span in address.spans:
        tokens = span.stop - span.start
        words = (span.slot, span.view, address.step)
        drawn = rng.blocks(key, span.start * per_token, tokens * per_token, words)
        values = drawn.astype("<u8", copy=False).view("<u2").reshape(tokens, -1)[:, :features]
        out[row : row + tokens] = torch.from_numpy(values.astype("int32"))
        row += tokens
    return out


def _torch_draws(address: DropoutAddress, key: tuple[int, int], features: int, device: torch.device) -> torch.Tensor:
    per_token = -(-features // rng.DRAWS_PER_BLOCK)
    counters = torch.empty((address.tokens, 4), dtype=torch.int64)
    row = 0
    for span in address.spans:
        tokens = span.stop - span.start
        counters[row : row + tokens, 0] = torch.arange(span.start, span.stop) * per_token
        counters[row : row + tokens, 1:] = torch.tensor([span.slot, span.view, address.step])
        row += tokens
    counters = counters.to(device)[:, None].repeat(1, per_token, 1)
    counters[..., 0] += torch.arange(per_token, device=device) + 1
    raw = philox_4x64(counters.reshape(-1, 4), key)
    shifts = torch.arange(0, 64, 16, device=device)
    bits = (raw[..., None] >> shifts) & 0xFFFF
    return bits.reshape(address.tokens, -1)[:, :features].to(torch.int32)


def philox_4x64(counters: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Ten rounds of Philox4x64 on int64 ``counters`` (n, 4), taken as unsigned: int64 (n, 4)."""
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ _signed(k0), low1, high0 ^ c3 ^ _signed(k1), low0
        k0, k1 = (k0 + _WEYL[0]) % 2**64, (k1 + _WEYL[1]) % 2**64
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 128-bit product of unsigned x and factor, in signed 64-bit arithmetic."""
    x_high, x_low = (x >> 32) & _LOW32, x & _LOW32
    f_high, f_low = factor >> 32, factor & _LOW32
    low_low, high_low = x_low * f_low, x_high * f_low
    low_high, high_high = x_low * f_high, x_high * f_high
    middle = ((low_low >> 32) & _LOW32) + (high_low & _LOW32) + (low_high & _LOW32)
    high = high_high + ((high_low >> 32) & _LOW32) + ((low_high >> 32) & _LOW32) + (middle >> 32)
    return high, x * _signed(factor)
