"""The loss-attention head on capsules."""
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import nn

from ..prediction import PatchPrediction, upcast
from .head import PatchHead
from .weights import LossAttentionWeights, normalize, weighted_sum

__all__ = ['CapsuleLossAttentionHead']


@register_notrace_module  # reason: dtype and shape dependent control flow
class CapsuleLossAttentionHead(PatchHead):
    """Loss attention on capsules (Eq. 6). θ: D -> K is shared by all capsules.

        p_cm = θ(h_cm);  a_cm = ‖p_cm‖ / Σ ‖p‖;  α_m from Σ_c a_cm (6a, 6b);
        a_cm ← [α_m > 0] a_cm / Σ_{c,j} [α_j > 0] a_cj (6c);  z = Σ_{c,m} a_cm p_cm (6d, 6e)

    The exposed patch logits are Σ_c p_cm, as in the public code; contributions are Σ_c a_cm p_cm.

    Args:
        capsules: C capsule channels; the feature map has C·D channels, channel c·D + d being dimension d of capsule c.
        capsule_dim: D.
        num_classes: K; with 0 the capsules are averaged.
        pool_type: 'lossattn' or '' to leave the features unpooled (needs num_classes=0).
        xi: ξ of Eq. 6b.
        drop_rate: dropout on the capsules, before θ.

    Raises:
        ValueError: no such pool_type, or xi outside [0, 1].
    """

    def __init__(
            self,
            capsules: int,
            capsule_dim: int,
            num_classes: int,
            pool_type: str = 'lossattn',
            xi: float = 0.1,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        self.check_pool(pool_type, num_classes)
        self.capsules = capsules
        self.num_features = capsule_dim
        self.num_classes = num_classes
        self.pooled = pool_type != ''
        self.drop = nn.Dropout(drop_rate)
        self.attn = LossAttentionWeights(xi)
        self.fc = nn.Linear(capsule_dim, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    @classmethod
    def create(cls, features: Any, grid_size: tuple[int, int], **kwargs: Any) -> 'CapsuleLossAttentionHead':
        """The head for the features that patch layers give, see PatchHead."""
        return cls(features.capsules, features.num_features // features.capsules, **kwargs)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C·D, H', W') to capsules (B, C, M, D), with dropout."""
        return self.drop(x.flatten(2).unflatten(1, (self.capsules, self.num_features)).transpose(2, 3))

    def weigh(self, h: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Capsules and their logits (B, C, M, K) to α (B, M) and a (B, C, M) of Eq. 6c."""
        alpha = self.attn(h, p)
        kept = torch.linalg.vector_norm(upcast(p), dim=-1) * (alpha > 0).unsqueeze(1)  # 6a's divisor cancels in 6c
        return alpha, normalize(kept.flatten(1)).view_as(kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C·D, H', W') to image logits (B, K)."""
        h = self.split(x)
        p = self.fc(h)  # (B, C, M, K)
        _, a = self.weigh(h, p)
        return weighted_sum(a.flatten(1), upcast(p).flatten(1, 2)).to(p.dtype)

    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map (B, C·D, H', W') to PatchPrediction."""
        h = self.split(x)
        p = self.fc(h)  # (B, C, M, K)
        alpha, a = self.weigh(h, p)
        p32 = upcast(p)
        contributions = (a.unsqueeze(-1) * p32).sum(dim=1)  # (B, M, K)
        logits = contributions.sum(dim=1).to(p.dtype)
        return PatchPrediction(logits, p32.sum(dim=1).to(p.dtype), alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map to Σ_{c,m} a_cm h_cm (B, D): ``fc`` of it gives the image logits. Unpooled: x itself."""
        if not self.pooled:
            return x
        h = self.split(x)
        if self.num_classes == 0:
            return h.mean(dim=(1, 2))
        _, a = self.weigh(h, self.fc(h))
        return weighted_sum(a.flatten(1), upcast(h).flatten(1, 2)).to(h.dtype)
