"""The head on convolutional patch features."""
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import nn

from ..prediction import PatchPrediction, upcast
from .head import PatchHead
from .weights import MeanWeights, create_weights, list_weights, weighted_sum

__all__ = ['ConvPatchHead']


@register_notrace_module  # reason: dtype and shape dependent control flow
class ConvPatchHead(PatchHead):
    """Head on convolutional patch features (Eq. 5 with loss attention).

        p_m = θ(h_m);  α from ``attn``;  z = Σ_m α_m p_m = θ(Σ_m α_m h_m)   (5c, 5d; equal because Σα = 1)

    Dropout acts on h before θ, so that the image logits stay a weighted sum of the patch logits in training too.

    Args:
        in_features: C.
        num_classes: K; with 0 there is no classifier, loss attention has no logits to weigh by and becomes the mean.
        pool_type: a registered name of patch weights, or '' to leave the features unpooled (needs num_classes=0).
        xi: ξ of Eq. 5b.
        drop_rate: dropout on the patch features.

    Raises:
        ValueError: no such pool_type, or xi outside [0, 1].
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            pool_type: str = 'lossattn',
            xi: float = 0.1,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.check_pool(pool_type, num_classes)
        self.num_features = in_features
        self.pooled = pool_type != ''
        self.drop = nn.Dropout(drop_rate)
        attn = create_weights(pool_type, in_features, xi, **dd) if pool_type else MeanWeights(xi)
        if attn.reads_logits and num_classes == 0:
            attn = MeanWeights(xi)
        self.attn = attn
        self.reads_logits: bool = attn.reads_logits
        self.fc = nn.Linear(in_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @classmethod
    def pools(cls) -> tuple[str, ...]:
        """All registered patch weights."""
        return list_weights()

    @classmethod
    def create(cls, features: Any, grid_size: tuple[int, int], **kwargs: Any) -> 'ConvPatchHead':
        """The head for the features that patch layers give, see PatchHead."""
        return cls(features.num_features, **kwargs)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H', W') to patch features (B, M, C), with dropout."""
        return self.drop(x.flatten(2).transpose(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C, H', W') to image logits (B, K)."""
        if not torch.jit.is_scripting() and not self.reads_logits and isinstance(self.fc, (nn.Linear, nn.Identity)):
            return self.fc(self.pool(x))  # the same as below but for rounding, because the classifier is affine
        h = self.patches(x)
        p = self.fc(h)  # (B, M, K)
        return weighted_sum(self.attn(h, p), upcast(p)).to(p.dtype)

    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map (B, C, H', W') to PatchPrediction."""
        h = self.patches(x)
        p = self.fc(h)  # (B, M, K)
        alpha = self.attn(h, p)  # (B, M)
        contributions = alpha.unsqueeze(-1) * upcast(p)
        return PatchPrediction(contributions.sum(dim=1).to(p.dtype), p, alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C, H', W') to Σ_m α_m h_m (B, C): an affine ``fc`` of it is the logits. Unpooled: x."""
        if not self.pooled:
            return x
        h = self.patches(x)
        alpha = self.attn(h, self.fc(h) if self.reads_logits else h)
        return weighted_sum(alpha, upcast(h)).to(h.dtype)
