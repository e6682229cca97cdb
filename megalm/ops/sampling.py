"""Tokens drawn from a softmax over a vocabulary that is divided among ranks, by address.

The Gumbel-max trick (Gumbel, 1954; Maddison et al., "A* sampling", 2014): the arg-max of logits + noise is a draw from
their softmax, where the noise of each token of the vocabulary is an independent Gumbel value. So a rank draws the noise
of its own part of the vocabulary, and ranks compare their best: no logits and no cumulative sums are exchanged.

Every value takes one 32-bit draw: with b = ceil(V / 8), block ``position * b + token // 8`` of the Philox stream with
key (seed, "sample", site) and counter words (slot, view, step). So what is drawn at a position does not depend on who
draws it, nor on what else is drawn. V is the whole vocabulary's size, also where only ids below ``size`` are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megalm.ops.dropout import DropoutAddress, philox_4x64
from megalm.parallel import rng
from megalm.parallel.comm import Group

DRAWS_PER_BLOCK = 8
"""32-bit draws in one Philox block."""
CHUNK_BYTES = 64 << 20
"""Largest size of a chunk's noise."""


@dataclass(frozen=True)
class TokenDraw:
    """How tokens are drawn.

    Args:
        address: of all tokens of the microbatch.
        site: what is drawn.
        temperature: logits are divided by it.
        size: only ids below it are drawn; None: all.
    """

    address: DropoutAddress
    site: str
    temperature: float = 1.0
    size: int | None = None

    def tokens(
        self,
        h_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        where_T: torch.Tensor,
        group: Group,
        vocab_size: int,
        first_row: int,
    ) -> torch.Tensor:
        """Ids (n,) int64 for vectors (n, H), those of the tokens where ``where_T`` is true; the same on every rank of
        the group. ``weight_VH`` and ``bias_V`` are this rank's rows of the vocabulary, from ``first_row`` on.

        Equal sums, which hardly occur, go to the lowest id.
        """
        counters = self._counters(where_T)
        best = h_NH.new_full((len(h_NH), 2), -torch.inf, dtype=torch.float64)
        step = max(1, CHUNK_BYTES // (8 * max(1, len(weight_VH))))
        for begin in range(0, len(h_NH) if len(weight_VH) else 0, step):
            part = slice(begin, begin + step)
            sums = F.linear(h_NH[part], weight_VH, bias_V).to(torch.float64)
            if self.temperature != 1.0:
                sums /= self.temperature
            sums -= self._noise(counters[part], vocab_size, first_row, len(weight_VH), h_NH.device)
            if self.size is not None:
                sums[:, max(0, self.size - first_row) :] = -torch.inf
            found = sums.argmax(dim=1, keepdim=True)
            best[part] = torch.cat((sums.gather(1, found), found + first_row), dim=1)
        # Lower ranks have lower ids, and of equal values the first is taken. Ids are whole in float64 below 2^53.
        everyone = group.all_gather(best[None])
        winner = everyone[..., 0].argmax(dim=0)
        return everyone[..., 1].gather(0, winner[None])[0].long()

    def _counters(self, where_T: torch.Tensor) -> np.ndarray:
        """(slot, view, position) of each chosen token: int64 (n, 3)."""
        spans = self.address.spans
        rows = [
            np.stack(np.broadcast_arrays(s.slot, s.view, np.arange(s.start, s.stop)), axis=1) for s in spans
        ]
        counters: np.ndarray = np.concatenate(rows)[where_T.cpu().numpy()]
        return counters

    def _noise(
        self, counters: np.ndarray, vocab_size: int, first: int, count: int, device: torch.device
    ) -> torch.Tensor:
        """Gumbel values, their signs changed, of the tokens [first, first + count): float64 (n, count)."""
        per_token = -(-vocab_size // DRAWS_PER_BLOCK)
        low = first // DRAWS_PER_BLOCK
        blocks = -(-(first + count) // DRAWS_PER_BLOCK) - low
        key = rng.key(self.address.seed, "sample", self.site)
        draws = _numpy_draws if device.type == "cpu" else _torch_draws
        drawn = draws(key, counters, self.address.step, per_token, low, blocks, device)
        begin = first - low * DRAWS_PER_BLOCK
        # In place: passes over this, not the draws, are what it costs.
        return drawn[:, begin : begin + count].add_(0.5).mul_(2.0**-32).log_().neg_().log_()


def _numpy_draws(
    key: tuple[int, int], counters: np.ndarray, step: int, per_token: int, low: int, blocks: int, device: torch.device
) -> torch.Tensor:
    """The 32-bit draws of ``blocks`` blocks of each position, from its block ``low`` on: float64 (n, 8 * blocks)."""
    out = np.empty((len(counters), blocks * DRAWS_PER_BLOCK))
    for row, (slot, view, position) in enumerate(counters.tolist()):
        drawn = rng.blocks(key, position * per_token + low, blocks, (slot, view, step))
        out[row] = drawn.astype("<u8", copy=False).view("<u4").reshape(-1)
    return torch.from_numpy(out)


def _torch_draws(
    key: tuple[int, int], counters: np.ndarray, step: int, per_token: int, low: int, blocks: int, device: torch.device
) -> torch.Tensor:
    """The same by torch integer arithmetic, on any device."""
    rows = torch.from_numpy(counters).to(device)
    words = torch.empty((len(counters), blocks, 4), dtype=torch.int64, device=device)
    # The counter is raised before each block.
    words[..., 0] = rows[:, 2:] * per_token + low + 1 + torch.arange(blocks, device=device)
    words[..., 1:3] = rows[:, None, :2]
    words[..., 3] = step
    raw = philox_4x64(words.reshape(-1, 4), key)
    halves = torch.stack((raw & 0xFFFFFFFF, (raw >> 32) & 0xFFFFFFFF), dim=-1)
    return halves.reshape(len(counters), blocks * DRAWS_PER_BLOCK).double()
