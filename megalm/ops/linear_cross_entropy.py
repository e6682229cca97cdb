"""Linear projection and cross-entropy over a vocabulary that is divided among ranks; logits are never all in memory.

Objectives add up the losses of tokens, so the gradient that comes back is one number for all. Each gradient is
therefore computed for ones while a chunk's logits are there, in the forward, and only multiplied in the backward: three
products of matrices as without chunks, and gradients in memory instead of logits. Where the backward gets several
numbers, rows of the input's gradient are multiplied by theirs, and the weight's gradient is computed again. So are both
in a second backward, and always in float16, whose gradients may overflow before the loss's scale is known.

Chunks are of tokens, with all rows of the vocabulary. Where such a chunk would have few tokens, or where the sum over
chunks in float32 would be large beside 16-bit weights, chunks are of rows of the vocabulary, with all tokens: first the
statistics, then, from logits computed again, the gradients, a stretch of the weight's at a time, in full and in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm.errors import UsageError
from megalm.ops.cross_entropy import REFERENCE, CrossEntropyKernels, Loss, combine, merge, no_statistics, wide_dtype
from megalm.parallel.comm import Group

CHUNK_BYTES = 64 << 20
"""Largest size of a chunk's logits where it has whole rows of logits."""
FEWEST_TOKENS = 256
"""Of a chunk with whole rows of logits, where tokens make several: products of fewer read the weight too often."""
SUM_ROWS = 1 << 16
"""Most rows of 16-bit weights whose gradients are summed in float32 over chunks."""
COLUMN_BYTES = 24 << 20
"""Size of a chunk's logits where it has a part of each row of logits."""
FEWEST_COLUMNS = 512
"""Of such a chunk, however large it becomes."""


@dataclass(frozen=True)
class _Walk:
    """Chunks, alike on every rank: ranks may hold different numbers of rows, and exchange something for each chunk.

    They do not depend on the hidden size, so that what is communicated does not either.
    """

    columns: bool
    size: int
    """Tokens of a chunk, or rows of the vocabulary."""

    @staticmethod
    def choose(tokens: int, most_rows: int, dtype: torch.dtype) -> _Walk:
        fitting = CHUNK_BYTES // (dtype.itemsize * max(1, most_rows))
        if tokens <= max(1, fitting):
            return _Walk(False, max(1, tokens))
        if fitting >= FEWEST_TOKENS and (most_rows <= SUM_ROWS or dtype == wide_dtype(dtype)):
            chunks = -(-tokens // fitting)
            return _Walk(False, -(-tokens // chunks))
        return _Walk(True, max(FEWEST_COLUMNS, COLUMN_BYTES // (dtype.itemsize * tokens)))


@dataclass
class _Gradients:
    """Of input, weight, bias, as far as they are wanted; sums may be wider than what they are gradients of."""

    h_TH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @property
    def each(self) -> tuple[Tensor | None, ...]:
        return self.h_TH, self.weight_VH, self.bias_V

    def times_(self, number: Tensor, of_h: torch.dtype, of_weight: torch.dtype) -> tuple[Tensor | None, ...]:
        """These gradients of ones times a number, in the dtypes of what they are gradients of."""
        dtypes = (of_h, of_weight, of_weight)
        return tuple(None if g is None else _times_(g, number, t) for g, t in zip(self.each, dtypes, strict=True))


def _one_number(x: Tensor) -> bool:
    """Whether that is all there is to ``x`` (n,). A device's values are not read, which would make the host wait."""
    if x.numel() <= 1 or x.stride() == (0,):
        return x.numel() > 0
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and bool((x == x[0]).all())


def _times_(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` times ``factor``, computed in the latter's dtype, in place if ``x`` is of ``dtype``."""
    if x.dtype == factor.dtype:
        return x.mul_(factor).to(dtype)
    rows = max(1, (4 << 20) // max(1, x[:1].numel()))
    for begin in range(0, x.shape[0], rows):
        part = slice(begin, begin + rows)
        x[part] = x[part].to(factor.dtype).mul_(factor if factor.dim() == 0 else factor[part])
    return x


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` (rows, columns) in a dtype of half its width, in its own memory: a copy would be the peak."""
    if x.dtype == dtype:
        return x
    out = x.view(-1).view(dtype)[: x.numel()].view(x.shape)
    # Each stretch of rows lands before where it comes from, on what has been read.
    begin, end = 0, 1
    while begin < x.shape[0]:
        out[begin:end] = x[begin:end].to(dtype) if begin == 0 else x[begin:end]
        begin, end = end, 2 * end
    return out


@dataclass(frozen=True)
class _Problem:
    h_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    labels_T: Tensor
    excluded_T: Tensor | None
    first_row: int
    loss: Loss
    group: Group | None
    kernels: CrossEntropyKernels
    walk: _Walk

    def forward(self, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, _Gradients]:
        """Losses, the whole vocabulary's statistics (4, T), and the gradients for ones that are wanted."""
        if self.walk.columns:
            stats = no_statistics(self.h_TH.shape[0], self.h_TH)
            for rows in self._columns():
                stats = merge(stats, self._statistics(self._logits(slice(None), rows), slice(None), rows))
            stats = combine(stats, self.group, total=self.loss.total)
            return self.loss.losses(stats, self.labels_T), stats, self.gradients(stats, None, wanted)
        every = slice(0, self.weight_VH.shape[0])
        stats = no_statistics(self.h_TH.shape[0], self.h_TH)
        sums = self._sums(wanted)
        for part in self._parts():
            logits = self._logits(part, every)
            found = combine(self._statistics(logits, part, every), self.group, total=self.loss.total)
            stats[:, part] = found
            if any(wanted):
                self._add(sums, logits, part, found, None)
        return self.loss.losses(stats, self.labels_T), stats, sums

    def gradients(self, stats: Tensor, grad_T: Tensor | None, wanted: tuple[bool, bool, bool]) -> _Gradients:
        """What is wanted, computed from the input and its statistics; ``grad_T`` None: ones."""
        if not any(wanted):
            return _Gradients(None, None, None)
        if self.walk.columns:
            return self._by_columns(stats, grad_T, wanted)
        every = slice(0, self.weight_VH.shape[0])
        sums = self._sums(wanted)
        for part in self._parts():
            grad = None if grad_T is None else grad_T[part]
            self._add(sums, self._logits(part, every), part, stats[:, part], grad)
        return sums

    def _parts(self) -> Iterator[slice]:
        # At least one chunk, so that ranks without a token say what the others say.
        for begin in range(0, max(1, self.h_TH.shape[0]), self.walk.size):
            yield slice(begin, begin + self.walk.size)

    def _columns(self) -> Iterator[slice]:
        for begin in range(0, self.weight_VH.shape[0], self.walk.size):
            yield slice(begin, min(begin + self.walk.size, self.weight_VH.shape[0]))

    def _logits(self, part: slice, rows: slice) -> Tensor:
        bias = None if self.bias_V is None else self.bias_V[rows]
        logits = F.linear(self.h_TH[part], self.weight_VH[rows], bias)
        if self.excluded_T is not None and logits.shape[1] > 0:
            local = self.excluded_T[part, None] - (self.first_row + rows.start)
            here = (local >= 0) & (local < logits.shape[1])
            local = local.clamp_(0, logits.shape[1] - 1)
            logits.scatter_(1, local, logits.gather(1, local).masked_fill_(here, -torch.inf))
        return logits

    def _statistics(self, logits: Tensor, part: slice, rows: slice) -> Tensor:
        first = self.first_row + rows.start
        return self.kernels.statistics(logits, self.labels_T[part], first, total=self.loss.total)

    def _sums(self, wanted: tuple[bool, bool, bool]) -> _Gradients:
        """Where chunks of tokens are added up: in float32, unless there is but one."""
        wide = wide_dtype(self.h_TH.dtype)
        bias = None if self.bias_V is None or not wanted[2] else torch.zeros_like(self.bias_V, dtype=wide)
        h_TH = torch.empty_like(self.h_TH, memory_format=torch.contiguous_format) if wanted[0] else None
        narrow = self.h_TH.shape[0] <= self.walk.size
        dtype = self.weight_VH.dtype if narrow else wide
        weight = torch.zeros_like(self.weight_VH, dtype=dtype) if wanted[1] else None
        return _Gradients(h_TH, weight, bias)

    def _add(self, sums: _Gradients, logits: Tensor, part: slice, stats: Tensor, grad_T: Tensor | None) -> None:
        """A chunk of tokens, whose logits are overwritten."""
        self.loss.differentiate_(self.kernels, logits, self.labels_T[part], self.first_row, stats, grad_T)
        if sums.h_TH is not None:
            torch.mm(logits, self.weight_VH, out=sums.h_TH[part])
        if sums.weight_VH is not None:
            _add_product_(sums.weight_VH, logits.t(), self.h_TH[part])
        if sums.bias_V is not None:
            sums.bias_V += logits.sum(dim=0, dtype=sums.bias_V.dtype)

    def _by_columns(self, stats: Tensor, grad_T: Tensor | None, wanted: tuple[bool, bool, bool]) -> _Gradients:
        wide, (tokens, hidden) = wide_dtype(self.h_TH.dtype), self.h_TH.shape
        h_TH = self.h_TH.new_zeros((tokens, hidden), dtype=wide) if wanted[0] else None
        weight = torch.empty_like(self.weight_VH, memory_format=torch.contiguous_format) if wanted[1] else None
        bias = torch.empty_like(self.bias_V, dtype=wide) if self.bias_V is not None and wanted[2] else None
        # Of a 16-bit product before it is added in float32.
        block = max(1, COLUMN_BYTES // (2 * wide.itemsize * max(1, hidden)))
        for rows in self._columns():
            logits = self._logits(slice(None), rows)
            first = self.first_row + rows.start
            self.loss.differentiate_(self.kernels, logits, self.labels_T, first, stats, grad_T)
            if h_TH is not None:
                for begin in range(0, tokens, block):
                    part = slice(begin, begin + block)
                    _add_product_(h_TH[part], logits[part], self.weight_VH[rows])
            if weight is not None:
                torch.mm(logits.t(), self.h_TH, out=weight[rows])
            if bias is not None:
                bias[rows] = logits.sum(dim=0, dtype=wide)
            del logits  # before the next chunk's are made
        return _Gradients(None if h_TH is None else _narrow(h_TH, self.h_TH.dtype), weight, bias)


_Rest = tuple[int, Loss, Group | None, CrossEntropyKernels, _Walk]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        excluded_T: Tensor | None,
        rest: _Rest,
        recording: bool,
    ) -> Tensor:
        wanted = (False, False, False)
        if recording and h_TH.dtype != torch.float16:
            wanted = ctx.needs_input_grad[:3]
        losses, stats, ctx.kept = _Problem(h_TH, weight_VH, bias_V, labels_T, excluded_T, *rest).forward(wanted)
        if recording:
            ctx.save_for_backward(h_TH, weight_VH, bias_V, labels_T, excluded_T, stats)
            ctx.rest = rest
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        h_TH, weight_VH = tensors[:2]
        # What is kept is multiplied in place and given away; a second backward computes it again.
        kept, ctx.kept = ctx.kept, _Gradients(None, None, None)
        wanted = ctx.needs_input_grad[:3]
        if _one_number(grad_T) and all(g is not None or not w for g, w in zip(kept.each, wanted, strict=True)):
            return (*kept.times_(grad_T[0], h_TH.dtype, weight_VH.dtype), None, None, None, None)
        grad_h = None if kept.h_TH is None else _times_(kept.h_TH, grad_T[:, None], h_TH.dtype)
        kept = _Gradients(None, None, None)
        found = _Problem(*tensors, *ctx.rest).gradients(
            stats, grad_T, (wanted[0] and grad_h is None, wanted[1], wanted[2])
        )
        grad_h = found.h_TH if grad_h is None else grad_h
        grad_weight = None if found.weight_VH is None else found.weight_VH.to(weight_VH.dtype)
        grad_bias = None if found.bias_V is None else found.bias_V.to(weight_VH.dtype)
        return grad_h, grad_weight, grad_bias, None, None, None, None


def linear_cross_entropy(
    h_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    group: Group | None = None,
    *,
    vocab_size: int,
    bias_V: Tensor | None = None,
    first_row: int = 0,
    ignore: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    excluded_T: Tensor | None = None,
    kernels: CrossEntropyKernels = REFERENCE,
) -> Tensor:
    """Cross-entropy of h W^T + b for each token: (T,) in float32 (float64 for float64), 0 at ignored labels, NaN at
    labels outside the vocabulary; see :mod:`megalm.ops.cross_entropy` for the formula.

    ``weight_VH`` and ``bias_V`` are this rank's rows of the vocabulary, from ``first_row`` on; ``labels_T`` are ids
    of the whole vocabulary of ``vocab_size``. ``excluded_T`` names one id for each token that is left out of its
    softmax (-1: none); not with label smoothing. The gradient of ``h_TH`` is this rank's part of a sum over ``group``.

    When gradients are recorded they are computed at once, for losses that are added up; the memory between forward and
    backward is theirs.
    """
    loss = Loss(vocab_size, ignore, label_smoothing, z_loss)
    if excluded_T is not None and loss.total:
        raise UsageError("label smoothing runs over the whole vocabulary, so that no id can be excluded from it")
    most_rows = -(-vocab_size // (1 if group is None else group.size))
    walk = _Walk.choose(h_TH.shape[0], most_rows, h_TH.dtype)
    rest = (first_row, loss, group, kernels, walk)
    recording = torch.is_grad_enabled()
    out: Tensor = _LinearCrossEntropy.apply(h_TH, weight_VH, bias_V, labels_T, excluded_T, rest, recording)
    return out
