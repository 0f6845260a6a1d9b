"""Evidence: what each patch adds to a class, or to its lead. Explanations and exported files take it from here.

What is explained is one number an image, v·z of its logits z and a direction v: the logit of the target t (v is 1 at
t), its lead over another class a (−1 at a as well), or over its rivals (−w_k at all others). The contributions c_mk of
the patches sum to z_k, so their evidence Σ_k v_k c_mk sums to v·z, whatever v is.
"""
from typing import Literal, Union

import torch
from torch.nn import functional as F

__all__ = ['AGAINST', 'Against', 'direction', 'direction_over_rivals', 'evidence_along', 'leave_one_out']

AGAINST = {'rest': 'its rivals', 'mean': 'the mean of the others'}  # and what they are called
Against = Union[torch.Tensor, Literal['rest', 'mean'], None]


def direction_over_rivals(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``direction`` with against='rest', as exporters and TorchScript read it: (B, K) and (B,) to (B, K)."""
    z = logits.detach().float()
    v = torch.zeros_like(z).scatter(1, target.unsqueeze(1), 1.)
    if z.shape[1] == 1:
        return v
    return v - z.masked_fill(v > 0., float('-inf')).softmax(dim=1)


def direction(logits: torch.Tensor, target: torch.Tensor, against: Against = 'rest') -> torch.Tensor:
    """The direction v in the space of the K logits, such that v·z is what is explained.

    Args:
        logits: z, (B, K).
        target: t, (B,) classes.
        against: what the target is compared with: 'rest', its rivals, w = softmax of the other logits, so that a class
            counts as much as it competes; 'mean', all others alike, w = 1 / (K − 1); (B,) classes; or None, nothing. A
            single class (K = 1) has no others.

    Returns:
        (B, K): 1 at the target and −w_k elsewhere, with Σ_k w_k = 1, or 0 for None. w is a constant: no gradient.
    """
    if isinstance(against, str) and against == 'rest':
        return direction_over_rivals(logits, target)
    v = torch.zeros_like(logits, dtype=torch.float32).scatter(1, target.unsqueeze(1), 1.)
    if against is None or v.shape[1] == 1:
        return v
    if isinstance(against, torch.Tensor):
        return v.scatter(1, against.unsqueeze(1), -1.)
    return v - (1. - v) / (v.shape[1] - 1)


def evidence_along(contributions: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_k v_k c_mk of contributions (B, M, K) and a direction v (B, K): (B, M), whose sum over M is v·z."""
    return (contributions * v.to(contributions.dtype).unsqueeze(1)).sum(dim=2)  # autocast would round a matmul


def leave_one_out(evidence: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """What v·z would lose without a patch, its weight shared by the others in proportion to theirs.

    v·z is Σ_m α_m q_m with q_m = e_m / α_m. Without patch m it is Σ_n e_n / Σ_n α_n over the others, n ≠ m, so that the
    loss is v·z minus that. A patch that has all the weight takes all of v·z with it.

    Args:
        evidence: e, (B, M).
        alpha: α, (B, M), with sum 1.

    Returns:
        (B, M).
    """
    e, a = evidence.double(), alpha.double()
    left, rest = sum_of_others(e), sum_of_others(a)
    alone = rest <= 0.
    return torch.where(alone, e, e + left - left / rest.masked_fill(alone, 1.)).to(evidence.dtype)


def sum_of_others(x: torch.Tensor) -> torch.Tensor:
    """Of (B, M) for each m the sum of all but m, added up: 1 − α_m would lose the rest where α_m is near 1."""
    before = F.pad(x[:, :-1].cumsum(dim=1), (1, 0))
    behind = F.pad(x[:, 1:].flip(1).cumsum(dim=1).flip(1), (0, 1))
    return before + behind
