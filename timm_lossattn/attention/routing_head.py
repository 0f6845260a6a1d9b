"""Dynamic routing: S. Sabour et al., "Dynamic Routing Between Capsules", the capsule baseline of the paper."""
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import nn

from ..prediction import PatchPrediction, upcast
from .head import PatchHead
from .weights import MeanWeights

__all__ = ['CapsuleVotes', 'DynamicRoutingHead', 'RoutingWeights']

CLASS_CAPSULE_DIM = 16  # dimension of v_k, of Sabour et al.


class RoutingWeights(MeanWeights):
    """α of dynamic routing: a patch's share of the coupling coefficients, of which each capsule hands out one: 1/M."""
    default_loss = 'margin'
    description = 'routed by agreement (dynamic routing of Sabour et al.)'

    def probabilities(self, logits: torch.Tensor, multi_label: bool = False) -> torch.Tensor:
        """The logits themselves: lengths of class capsules, which stand for the probability that the class is there."""
        return logits

    def independent_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """What has these lengths as its sigmoid."""
        return torch.logit(upcast(logits), eps=1e-6)


class CapsuleVotes(nn.Module):
    """Sabour et al., Eq. 2: prediction vectors û_{k|i} = W_ik u_i, a weight of its own for every capsule and position.

    Args:
        positions: N = C·M primary capsules.
        in_features: D, dimension of a primary capsule.
        num_classes: K.
    """

    def __init__(self, positions: int, in_features: int, num_classes: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(positions, num_classes, CLASS_CAPSULE_DIM, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random numbers as in Sabour et al.'s public code."""
        nn.init.trunc_normal_(self.weight, std=0.1)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, K, 16)."""
        return torch.einsum('bnd,nkod->bnko', u, self.weight)


@register_notrace_module  # reason: dtype and shape dependent control flow
class DynamicRoutingHead(PatchHead):
    """Dynamic routing of Sabour et al. (their Procedure 1) on primary capsules, with K class capsules v_k.

        u = squash(primary);  c = softmax_k(b);  s_k = Σ_i c_ik û_{k|i};  v_k = squash(s_k);  b_ik += û_{k|i}·v_k
        z_k = ‖v_k‖ = ‖s_k‖² / (1 + ‖s_k‖²)

    Patch logits: the part of ‖s_k‖ that comes from patch m, p_mk = (s_k / ‖s_k‖) · Σ_c c_cmk û_{k|cm}. Contributions:
    p_mk · ‖s_k‖ / (1 + ‖s_k‖²), whose sum over patches is z_k exactly. α_m is the patch's share of the coupling
    coefficients; each capsule hands out a total of one, so it is 1/M (the paper finds recall near 100 % for routing).

    Args:
        capsules: C capsule channels of the feature map, which has C·D channels.
        capsule_dim: D.
        grid_size: (H', W'); the weights belong to positions, so the input size is fixed.
        num_classes: K; with 0 the feature map is averaged.
        pool_type: 'routing' or '' to leave the features unpooled (needs num_classes=0).
        drop_rate: dropout on the primary capsules.
        xi: kept for a head that uses it; routing does not.

    Raises:
        ValueError: no such pool_type, or ξ outside of [0, 1]; from the forward pass, another patch grid.
    """
    default_pool = 'routing'
    fixed_grid = True

    def __init__(
            self,
            capsules: int,
            capsule_dim: int,
            grid_size: tuple[int, int],
            num_classes: int,
            pool_type: str = 'routing',
            drop_rate: float = 0.,
            xi: float = 0.1,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        self.check_pool(pool_type, num_classes)
        self.capsules = capsules
        self.capsule_dim = capsule_dim
        self.grid_size = grid_size
        self.num_features = capsules * capsule_dim
        self.pooled = pool_type != ''
        self.iterations = 3  # of Sabour et al.; here because TorchScript reads no Python global
        self.drop = nn.Dropout(drop_rate)
        self.attn = RoutingWeights(xi)
        positions = capsules * grid_size[0] * grid_size[1]
        self.fc = CapsuleVotes(
            positions, capsule_dim, num_classes, device=device, dtype=dtype,
        ) if num_classes > 0 else nn.Identity()

    @classmethod
    def create(cls, features: Any, grid_size: tuple[int, int], **kwargs: Any) -> 'DynamicRoutingHead':
        """The head for the features that patch layers give, see PatchHead."""
        return cls(features.capsules, features.num_features // features.capsules, grid_size, **kwargs)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Feature map to votes û (B, C·M, K, O), coupling coefficients c (B, C·M, K) and class capsules s (B, K, O)."""
        B, _, H, W = x.shape
        if self.grid_size != (H, W):
            raise ValueError(
                f'Dynamic routing was built for a patch grid of {self.grid_size}, the input gives {(H, W)}; '
                f'create the model with img_size set to the input size.')
        u = upcast(self.drop(x)).reshape(B, self.capsules, self.capsule_dim, H * W).transpose(2, 3)
        u = squash(u).flatten(1, 2)  # (B, C·M, D)
        votes = upcast(self.fc(u.to(x.dtype)))  # (B, C·M, K, O)
        b = torch.zeros_like(votes[..., 0])
        s = torch.zeros_like(votes[:, 0])
        c = b
        for i in range(self.iterations):
            c = b.softmax(dim=2)
            s = (c.unsqueeze(-1) * votes).sum(dim=1)  # (B, K, O)
            if i + 1 < self.iterations:
                b = b + (votes * squash(s).unsqueeze(1)).sum(dim=-1)
        return votes, c, s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C·D, H', W') to image logits (B, K): lengths in [0, 1) for the margin loss."""
        _, _, s = self.route(x)
        squared = s.square().sum(dim=-1)
        return (squared / (1 + squared)).to(x.dtype)

    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map (B, C·D, H', W') to PatchPrediction; its logits are lengths in [0, 1) for the margin loss."""
        votes, c, s = self.route(x)
        alpha = self.attn(x.flatten(2).transpose(1, 2), x)
        length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # (B, K, 1)
        direction = s / torch.where(length > 0, length, torch.ones_like(length))
        parts = c * (votes * direction.unsqueeze(1)).sum(dim=-1)  # (B, C·M, K)
        patch_logits = parts.unflatten(1, (self.capsules, alpha.shape[1])).sum(dim=1)  # (B, M, K)
        contributions = patch_logits * (length / (1 + length.square())).transpose(1, 2)
        return PatchPrediction(contributions.sum(dim=1).to(x.dtype), patch_logits.to(x.dtype), alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C·D, H', W') to its mean over patches (B, C·D). Unpooled: x itself."""
        return x.mean(dim=(2, 3)) if self.pooled else x


def squash(s: torch.Tensor) -> torch.Tensor:
    """Sabour et al., Eq. 1, over the last dimension: ‖s‖² / (1 + ‖s‖²) · s / ‖s‖, without the division by ‖s‖."""
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * (length / (1 + length.square()))
