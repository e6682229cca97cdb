"""Keys and values of tokens that were computed before, for generation.

A row's token stands in the cache at its position in the row, whatever the other rows are: prompts of unequal length
are padded behind their end, and what follows overwrites the padding. So a row's positions do not depend on the batch
that it is in.

Each layer's keys and values are those of the heads that this rank holds, and layers appear when they are first
computed: any division of heads and layers over ranks is served alike.
"""

from __future__ import annotations

import torch


class KeyValueCache:
    """The cache of some rows. Say with :meth:`at` where the tokens of the next forward stand."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._rows = torch.arange(rows, device=device)[:, None]
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._width = 0
        self.positions_BS = torch.zeros((rows, 0), dtype=torch.int64, device=device)
        """Positions of the tokens of this forward, in their rows."""
        self.first = True
        """Nothing was cached before this forward: its tokens are the rows from their beginning."""
        self.mask_BSK = torch.zeros((rows, 0, 0), dtype=torch.bool, device=device)
        """True where a token of this forward may attend to a cached position."""

    def at(self, positions_BS: torch.Tensor) -> None:
        """Begin a forward of tokens at these positions (rows, length) in int64. The first one's are 0, 1, ..."""
        self.first = self._width == 0
        self.positions_BS = positions_BS
        self._width = max(self._width, int(positions_BS.max()) + 1)
        keys = torch.arange(self._width, device=positions_BS.device)
        self.mask_BSK = keys <= positions_BS[..., None]

    def extend(self, layer: str, k_BSMD: torch.Tensor, v_BSMD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's keys and values of this forward; those of all positions so far, each (B, M, K, D)."""
        found = self._layers.get(layer)
        if found is None or found[0].shape[2] < self._width:
            found = self._layers[layer] = (self._larger(k_BSMD, found, 0), self._larger(v_BSMD, found, 1))
        for stored, new in zip(found, (k_BSMD, v_BSMD), strict=True):
            stored[self._rows, :, self.positions_BS] = new
        k, v = found
        return k[:, :, : self._width], v[:, :, : self._width]

    def _larger(
        self, new_BSMD: torch.Tensor, old: tuple[torch.Tensor, torch.Tensor] | None, which: int
    ) -> torch.Tensor:
        """Room for half as much again, with what is stored already."""
        rows, _, heads, size = new_BSMD.shape
        out = new_BSMD.new_zeros((rows, heads, self._width + self._width // 2 + 16, size))
        if old is not None:
            out[:, :, : old[which].shape[2]] = old[which]
        return out
