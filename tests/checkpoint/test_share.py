"""Replicas' shares: every element once, and as much for each as rows allow."""

from __future__ import annotations

import math
import random

import torch

from megalm.checkpoint.share import shares
from megalm.parallel.layout import Part, Piece


def test_shares_are_a_partition(campaign_seed: int) -> None:
    draw = random.Random(f"{campaign_seed} shares")
    for case in range(200):
        items, widest = [], 0
        for number in range(draw.randint(1, 8)):
            shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
            held = tuple((0, n) for n in shape)
            start = draw.randint(0, shape[0] - 1)
            owned = draw.choice((held, ((start, shape[0]), *held[1:]), None))
            local = torch.zeros(shape, dtype=draw.choice((torch.float32, torch.float64)))
            items.append(Piece(f"t{number}", Part(shape), local, held, owned))
            if owned is not None:
                widest = max(widest, local.element_size() * math.prod(shape[1:]))
        size = draw.randint(1, 6)
        label = f"seed {campaign_seed}, case {case}"
        written = []
        for index in range(size):
            found = list(shares(items, index, size))
            written.append(sum(p.local.element_size() * math.prod(b - a for a, b in box) for p, box in found))
            for piece, box in found:
                view = piece.view(box)
                assert view.numel(), label
                view += 1
        for piece in items:
            if piece.owned is None:
                assert not piece.local.any(), label
            else:
                assert (piece.view(piece.owned) == 1).all(), label
                assert piece.local.sum() == math.prod(b - a for a, b in piece.owned), label
        assert max(written) - min(written) <= 2 * widest, label
