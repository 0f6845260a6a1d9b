"""Attention heads: (patch features, classifier) -> PatchPrediction.

Shapes in this file: B images, M = H'·W' patches, K classes, C channels (or capsule channels), D capsule dimensions.
Equation numbers are those of X. Shi et al., "Loss-based Attention for Interpreting Image-level Prediction of
Convolutional Neural Networks". The attention baselines are those of M. Ilse et al., "Attention-based Deep Multiple
Instance Learning". Dynamic routing has a file of its own.

Whatever the autocast dtype, norms, attention weights and weighted sums are computed in float32 (float64 stays float64).
"""
from typing import NamedTuple

import torch
from timm.models import register_notrace_module
from torch import nn

__all__ = [
    'AttentionWeights', 'CapsuleLossAttentionHead', 'ConvPatchHead', 'GatedAttentionWeights', 'LossAttentionWeights',
    'MeanWeights', 'PatchPrediction',
]

class PatchPrediction(NamedTuple):
    """What a patch model says about a batch of images and about every patch of them.

    Attributes:
        logits: (B, K) image logits z, in the dtype of the classifier.
        patch_logits: (B, M, K) each patch's own class logits p_m; for capsules the sum over capsule channels.
        alpha: (B, M) patch weights, >= 0, sum 1, float32 (float64 for float64 models).
        contributions: (B, M, K) what each patch adds to the image logits; summed over patches, the logits to rounding.

    Patch m = i·W' + j is row i, column j of the patch grid.
    """
    logits: torch.Tensor
    patch_logits: torch.Tensor
    alpha: torch.Tensor
    contributions: torch.Tensor


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def normalize(weights: torch.Tensor) -> torch.Tensor:
    """Divide non-negative (B, N) weights by their sum; a row of zeros becomes uniform, with zero gradient."""
    total = weights.sum(dim=1, keepdim=True)
    safe_total = torch.where(total > 0, total, torch.ones_like(total))  # keeps 0/0 out of the backward pass too
    return torch.where(total > 0, weights / safe_total, torch.full_like(weights, 1. / weights.shape[1]))


def check_pool(pool_type: str, accepted: tuple[str, ...], num_classes: int) -> None:
    """ValueError unless a head knows this kind of pooling, and '' goes without a classifier."""
    if pool_type not in accepted:
        raise ValueError(f'global_pool must be one of {accepted} for these patch features, got {pool_type!r}.')
    if not pool_type and num_classes > 0:
        raise ValueError(f"global_pool='' leaves the features unpooled and needs num_classes=0, got {num_classes}.")


class LossAttentionWeights(nn.Module):
    """Attention weights of loss attention (Eqs. 5a, 5b; 6a, 6b).

        s_m = ‖p_m‖₂ (conv) or Σ_c ‖p_cm‖₂ (capsules);  α_m = s_m / Σ_j s_j;
        α_m ← max(α_m − ξ/M, 0) / Σ_j max(α_j − ξ/M, 0)

    M is the number of patches, as in the paper (its public convolutional code divides ξ by the feature-map size).
    If no weight is left, α is uniform.

    Args:
        xi: ξ in [0, 1]; patches with a weight under ξ/M get exactly zero.
    """

    def __init__(self, xi: float = 0.1) -> None:
        super().__init__()
        if not 0. <= xi <= 1.:
            raise ValueError(f'xi must lie in [0, 1], got {xi}.')
        self.xi = float(xi)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch logits (B, M, K), or (B, C, M, K) for capsules, to α (B, M). The features h are not used."""
        s = torch.linalg.vector_norm(upcast(patch_logits), dim=-1)
        if s.dim() == 3:
            s = s.sum(dim=1)  # over capsule channels
        alpha = normalize(s)
        return normalize((alpha - self.xi / alpha.shape[1]).clamp(min=0))

    def extra_repr(self) -> str:
        return f'xi={self.xi}'


class MeanWeights(nn.Module):
    """Mean pooling: α_m = 1/M."""

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return torch.full_like(upcast(h[..., 0]), 1. / h.shape[1])


class AttentionWeights(nn.Module):
    """Attention of Ilse et al. (their Eq. 8): α_m = softmax_m(wᵀ tanh(V h_m)); V and w have biases, as in their code.

    Args:
        in_features: C.
        hidden_features: rows of V, 128 in both papers.
    """

    def __init__(self, in_features: int, hidden_features: int = 128, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.v = nn.Linear(in_features, hidden_features, **dd)
        self.w = nn.Linear(hidden_features, 1, **dd)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return upcast(self.w(torch.tanh(self.v(h))).squeeze(-1)).softmax(dim=1)


class GatedAttentionWeights(AttentionWeights):
    """Gated attention of Ilse et al. (their Eq. 9): α_m = softmax_m(wᵀ (tanh(V h_m) ⊙ σ(U h_m)))."""

    def __init__(self, in_features: int, hidden_features: int = 128, device=None, dtype=None) -> None:
        super().__init__(in_features, hidden_features, device=device, dtype=dtype)
        self.u = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return upcast(self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).squeeze(-1)).softmax(dim=1)


@register_notrace_module  # reason: dtype and shape dependent control flow
class ConvPatchHead(nn.Module):
    """Head on convolutional patch features (Eq. 5 with loss attention).

        p_m = θ(h_m);  α from ``attn``;  z = Σ_m α_m p_m = θ(Σ_m α_m h_m)   (5c, 5d; equal because Σα = 1)

    Dropout acts on h before θ, so that the image logits stay a weighted sum of the patch logits in training too.

    Args:
        in_features: C.
        num_classes: K; with 0 there is no classifier, loss attention has no logits to weigh by and becomes the mean.
        pool_type: 'lossattn', 'avg', 'attn', 'gatedattn', or '' to leave the features unpooled (needs num_classes=0).
        xi: ξ of Eq. 5b.
        drop_rate: dropout on the patch features.
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
        check_pool(pool_type, ('lossattn', 'avg', 'attn', 'gatedattn', ''), num_classes)
        self.num_features = in_features
        self.pooled = pool_type != ''
        self.drop = nn.Dropout(drop_rate)
        attn: nn.Module = MeanWeights()
        if pool_type == 'attn':
            attn = AttentionWeights(in_features, **dd)
        elif pool_type == 'gatedattn':
            attn = GatedAttentionWeights(in_features, **dd)
        elif pool_type == 'lossattn' and num_classes > 0:
            attn = LossAttentionWeights(xi)
        self.attn = attn
        self.fc = nn.Linear(in_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map (B, C, H', W') to PatchPrediction."""
        h = self.drop(x.flatten(2).transpose(1, 2))  # (B, M, C)
        p = self.fc(h)  # (B, M, K)
        alpha = self.attn(h, p)  # (B, M)
        contributions = alpha.unsqueeze(-1) * upcast(p)
        return PatchPrediction(contributions.sum(dim=1).to(p.dtype), p, alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C, H', W') to Σ_m α_m h_m (B, C): ``fc`` of it gives the image logits. Unpooled: x itself."""
        if not self.pooled:
            return x
        h = self.drop(x.flatten(2).transpose(1, 2))
        alpha = self.attn(h, self.fc(h))
        return (alpha.unsqueeze(-1) * upcast(h)).sum(dim=1).to(h.dtype)


@register_notrace_module  # reason: dtype and shape dependent control flow
class CapsuleLossAttentionHead(nn.Module):
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
        check_pool(pool_type, ('lossattn', ''), num_classes)
        self.capsules = capsules
        self.num_features = capsule_dim
        self.num_classes = num_classes
        self.pooled = pool_type != ''
        self.drop = nn.Dropout(drop_rate)
        self.attn = LossAttentionWeights(xi)
        self.fc = nn.Linear(capsule_dim, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C·D, H', W') to capsules (B, C, M, D), with dropout."""
        return self.drop(x.reshape(x.shape[0], self.capsules, self.num_features, -1).transpose(2, 3))

    def weigh(self, h: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Capsules and their logits (B, C, M, K) to α (B, M) and a (B, C, M) of Eq. 6c."""
        alpha = self.attn(h, p)
        kept = torch.linalg.vector_norm(upcast(p), dim=-1) * (alpha > 0).unsqueeze(1)  # 6a's divisor cancels in 6c
        return alpha, normalize(kept.flatten(1)).view_as(kept)

    def forward(self, x: torch.Tensor) -> PatchPrediction:
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
        return (a.unsqueeze(-1) * upcast(h)).sum(dim=(1, 2)).to(h.dtype)
