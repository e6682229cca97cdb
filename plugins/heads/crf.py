"""A linear-chain conditional random field over labels. (Lafferty et al., 2001; Collobert et al., 2011.)

The probability of a row's path of labels is exp(score) / Z, where a path's score is the sum of the emissions of its
labels, of the transitions between neighbours, and of its first and last label; Z sums exp(score) over all paths.
Everything is in log space, where the sums neither overflow nor vanish.

The gradient of log Z is the probability of each label at each place, and of each pair at neighbouring places, which the
backward recursion gives. Computing it so keeps one tensor of the size of the emissions; following the forward recursion
with autograd would keep one of labels times labels for each place.

B rows, T places, L labels. ``mask_BT`` is true at a row's places, which come first; a row without any scores 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Chain(NamedTuple):
    """Scores of a path's first label (L,), of neighbours [from, to] (L, L), and of its last label (L,)."""

    start_L: torch.Tensor
    step_LL: torch.Tensor
    end_L: torch.Tensor


class _LogPartition(torch.autograd.Function):
    """log Z of each row: (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        emissions_BTL: torch.Tensor,
        mask_BT: torch.Tensor,
        start_L: torch.Tensor,
        step_LL: torch.Tensor,
        end_L: torch.Tensor,
    ) -> torch.Tensor:
        alpha_BL = start_L + emissions_BTL[:, 0]
        alphas = [alpha_BL]
        for t in range(1, emissions_BTL.shape[1]):
            reached_BL = (alpha_BL[:, :, None] + step_LL).logsumexp(dim=1) + emissions_BTL[:, t]
            alpha_BL = torch.where(mask_BT[:, t, None], reached_BL, alpha_BL)
            alphas.append(alpha_BL)
        log_z_B = torch.where(mask_BT[:, 0], (alpha_BL + end_L).logsumexp(dim=1), 0.0)
        ctx.save_for_backward(emissions_BTL, mask_BT, step_LL, end_L, torch.stack(alphas, dim=1), log_z_B)
        return log_z_B

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, gradient_B: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        emissions_BTL, mask_BT, step_LL, end_L, alphas_BTL, log_z_B = ctx.saved_tensors
        places = emissions_BTL.shape[1]
        marginals, pairs_LL = [], torch.zeros_like(step_LL)
        beta_BL = end_L.expand_as(emissions_BTL[:, 0])
        last_BL = torch.zeros_like(beta_BL)
        after_B = torch.zeros_like(mask_BT[:, 0])  # whether the place after this one is the row's
        for t in reversed(range(places)):
            if t + 1 < places:
                ahead_BL = emissions_BTL[:, t + 1] + beta_BL
                log_pairs_BLL = step_LL + ahead_BL[:, None, :]
                weight_B = torch.where(after_B, gradient_B, 0.0)
                shift_BL = alphas_BTL[:, t] - log_z_B[:, None]
                pairs_BLL = torch.where(after_B[:, None, None], (log_pairs_BLL + shift_BL[:, :, None]).exp(), 0.0)
                pairs_LL = pairs_LL + (pairs_BLL * weight_B[:, None, None]).sum(dim=0)
                beta_BL = torch.where(after_B[:, None], log_pairs_BLL.logsumexp(dim=2), end_L)
            own_B = mask_BT[:, t]
            found_BL = (alphas_BTL[:, t] + beta_BL - log_z_B[:, None]).exp()
            found_BL = torch.where(own_B[:, None], found_BL, 0.0) * gradient_B[:, None]
            marginals.append(found_BL)
            last_BL = last_BL + torch.where((own_B & ~after_B)[:, None], found_BL, 0.0)
            after_B = own_B
        emissions = torch.stack(marginals[::-1], dim=1)
        return emissions, None, emissions[:, 0].sum(dim=0), pairs_LL, last_BL.sum(dim=0)


def log_partition(emissions_BTL: torch.Tensor, mask_BT: torch.Tensor, chain: Chain) -> torch.Tensor:
    """log Z of each row: (B,), differentiable once in the emissions and the chain."""
    found: torch.Tensor = _LogPartition.apply(emissions_BTL, mask_BT, *chain)  # type: ignore[no-untyped-call]
    return found


def path_score(emissions_BTL: torch.Tensor, mask_BT: torch.Tensor, chain: Chain, path_BT: torch.Tensor) -> torch.Tensor:
    """The score of a path of labels in each row: (B,). Labels at places that are not a row's change nothing, and must
    be valid ones.
    """
    emitted_BT = emissions_BTL.gather(2, path_BT[:, :, None])[:, :, 0]
    stepped_BT = chain.step_LL[path_BT[:, :-1], path_BT[:, 1:]]
    last_B = (mask_BT.sum(dim=1) - 1).clamp(min=0)
    final_B = path_BT.gather(1, last_B[:, None])[:, 0]
    ends_B = torch.where(mask_BT[:, 0], chain.start_L[path_BT[:, 0]] + chain.end_L[final_B], 0.0)
    inner_B = torch.where(mask_BT, emitted_BT, 0.0).sum(dim=1)
    return inner_B + torch.where(mask_BT[:, 1:], stepped_BT, 0.0).sum(dim=1) + ends_B


def best_path(emissions_BTL: torch.Tensor, mask_BT: torch.Tensor, chain: Chain) -> torch.Tensor:
    """The path of the highest score in each row, (B, T) int64; 0 at places that are not a row's. (Viterbi, 1967.)

    Among equal scores, the label of the lowest number wins, from the last place backwards.
    """
    score_BL = chain.start_L + emissions_BTL[:, 0]
    origins = []
    for t in range(1, emissions_BTL.shape[1]):
        reached_BL, origin_BL = (score_BL[:, :, None] + chain.step_LL).max(dim=1)
        score_BL = torch.where(mask_BT[:, t, None], reached_BL + emissions_BTL[:, t], score_BL)
        origins.append(origin_BL)
    label_B = (score_BL + chain.end_L).argmax(dim=1)
    path = [label_B]
    for t in reversed(range(1, emissions_BTL.shape[1])):
        label_B = torch.where(mask_BT[:, t], origins[t - 1].gather(1, label_B[:, None])[:, 0], label_B)
        path.append(label_B)
    return torch.where(mask_BT, torch.stack(path[::-1], dim=1), 0)
