"""Heads: (patch features, classifier) -> PatchPrediction.

Shapes in this file: B images, M = H'·W' patches, K classes, C channels (or capsule channels), D capsule dimensions.
Equation numbers are those of X. Shi et al., "Loss-based Attention for Interpreting Image-level Prediction of
Convolutional Neural Networks". The attention baselines are those of M. Ilse et al., "Attention-based Deep Multiple
Instance Learning", and dynamic routing that of S. Sabour et al., "Dynamic Routing Between Capsules".

Whatever the autocast dtype, norms, attention weights and weighted sums are computed in float32 (float64 stays float64).
"""
from typing import NamedTuple

import torch
from timm.models import register_notrace_module
from torch import nn

__all__ = [
    'POOL_TYPES', 'AttentionWeights', 'CapsuleVotes', 'CapsuleLossAttentionHead', 'ConvPatchHead', 'DynamicRoutingHead',
    'GatedAttentionWeights', 'LossAttentionWeights', 'MeanWeights', 'PatchPrediction', 'create_head',
]

POOL_TYPES = {
    'conv': ('lossattn', 'avg', 'attn', 'gatedattn', ''),
    'caps': ('lossattn', ''),
    'primarycaps': ('routing', ''),
    'none': ('avg', ''),
}
"""What ``global_pool`` may be for each kind of patch features; '' disables pooling."""


class PatchPrediction(NamedTuple):
    """What a patch model says about a batch of images and about every patch of them.

    Attributes:
        logits: (B, K) image logits z, in the dtype of the classifier.
        patch_logits: (B, M, K) each patch's own class logits p_m; for capsules the sum over capsule channels.
        alpha: (B, M) patch weights, >= 0, sum 1, float32 (float64 for float64 models).
        contributions: (B, M, K) what each patch adds to the image logits: ``contributions.sum(1) == logits`` to rounding.

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


class LossAttentionWeights(nn.Module):
    """Attention weights of loss attention (Eqs. 5a, 5b; 6a, 6b).

    s_m = ‖p_m‖₂ (conv) or Σ_c ‖p_cm‖₂ (capsules);  α_m = s_m / Σ_j s_j;  α_m ← max(α_m − ξ/M, 0) / Σ_j max(α_j − ξ/M, 0)

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
    """Attention of Ilse et al. (their Eq. 8): α_m = softmax_m(wᵀ tanh(V h_m)).

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


class CapsuleVotes(nn.Module):
    """Sabour et al., Eq. 2: prediction vectors û_{k|i} = W_ik u_i, a weight of its own for every capsule and position.

    Args:
        positions: N = C·M primary capsules.
        in_features: D, dimension of a primary capsule.
        num_classes: K.
        out_features: dimension of a class capsule.
    """

    def __init__(
            self, positions: int, in_features: int, num_classes: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(positions, num_classes, out_features, in_features, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, std=0.1)  # Sabour et al.'s public code

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, K, out_features)."""
        return torch.einsum('bnd,nkod->bnko', u, self.weight)


@register_notrace_module  # reason: dtype and shape dependent control flow
class DynamicRoutingHead(nn.Module):
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
        class_capsule_dim: dimension of v_k.
        iterations: routing iterations.
        drop_rate: dropout on the primary capsules.
    """

    def __init__(
            self,
            capsules: int,
            capsule_dim: int,
            grid_size: tuple[int, int],
            num_classes: int,
            pool_type: str = 'routing',
            class_capsule_dim: int = 16,
            iterations: int = 3,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        self.capsules = capsules
        self.capsule_dim = capsule_dim
        self.grid_size = grid_size
        self.num_features = capsules * capsule_dim
        self.pooled = pool_type != ''
        self.iterations = iterations
        self.drop = nn.Dropout(drop_rate)
        self.attn = MeanWeights()
        positions = capsules * grid_size[0] * grid_size[1]
        self.fc = CapsuleVotes(
            positions, capsule_dim, num_classes, class_capsule_dim, device=device, dtype=dtype,
        ) if num_classes > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map (B, C·D, H', W') to PatchPrediction; its logits are lengths in [0, 1) for the margin loss."""
        B, _, H, W = x.shape
        if (H, W) != self.grid_size:
            raise ValueError(
                f'Dynamic routing was built for a patch grid of {self.grid_size}, the input gives {(H, W)}; '
                f'create the model with img_size set to the input size.')
        alpha = self.attn(x.flatten(2).transpose(1, 2), x)
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
        length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)  # (B, K, 1)
        direction = s / torch.where(length > 0, length, torch.ones_like(length))
        parts = c * (votes * direction.unsqueeze(1)).sum(dim=-1)  # (B, C·M, K)
        patch_logits = parts.reshape(B, self.capsules, H * W, -1).sum(dim=1)  # (B, M, K)
        contributions = patch_logits * (length / (1 + length.square())).transpose(1, 2)
        return PatchPrediction(contributions.sum(dim=1).to(x.dtype), patch_logits.to(x.dtype), alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C·D, H', W') to its mean over patches (B, C·D). Unpooled: x itself."""
        return x.mean(dim=(2, 3)) if self.pooled else x


def squash(s: torch.Tensor) -> torch.Tensor:
    """Sabour et al., Eq. 1, over the last dimension: ‖s‖² / (1 + ‖s‖²) · s / ‖s‖, written without the division by ‖s‖."""
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * (length / (1 + length.square()))


def create_head(
        kind: str,
        num_features: int,
        num_classes: int,
        global_pool: str,
        capsules: int = 0,
        grid_size: tuple[int, int] | None = None,
        xi: float = 0.1,
        drop_rate: float = 0.,
        device=None,
        dtype=None,
) -> nn.Module:
    """Head for one kind of patch features.

    Args:
        kind: 'conv', 'caps', 'primarycaps' or 'none', a key of ``POOL_TYPES``.
        num_features: channels of the feature map.
        num_classes: K, 0 for none.
        global_pool: one of ``POOL_TYPES[kind]``.
        capsules: capsule channels, for the two capsule kinds.
        grid_size: (H', W'), for dynamic routing.
        xi: ξ of Eqs. 5b and 6b.
        drop_rate: dropout on the patch features.

    Raises:
        ValueError: global_pool does not exist for this kind, or is '' while there is a classifier.
    """
    if global_pool not in POOL_TYPES[kind]:
        raise ValueError(f'global_pool must be one of {POOL_TYPES[kind]} for {kind} patch features, got {global_pool!r}.')
    if not global_pool and num_classes > 0:
        raise ValueError(f"global_pool='' leaves the features unpooled and needs num_classes=0, got {num_classes}.")
    kwargs = dict(num_classes=num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype)
    if kind == 'caps':
        return CapsuleLossAttentionHead(capsules, num_features // capsules, xi=xi, **kwargs)
    if kind == 'primarycaps':
        assert grid_size is not None
        return DynamicRoutingHead(capsules, num_features // capsules, grid_size, **kwargs)
    return ConvPatchHead(num_features, xi=xi, **kwargs)
