"""Patch weights α, and what they mean: which patches count as selected, what the logits are, which loss trains them.

Shapes: B images, M patches, K classes, C channels (or capsule channels). Equation numbers are those of X. Shi et al.,
"Loss-based Attention for Interpreting Image-level Prediction of Convolutional Neural Networks". The attention baselines
are those of M. Ilse et al., "Attention-based Deep Multiple Instance Learning".

A further way to weigh patches is a subclass of PatchWeights under ``@register_weights(name)``: any model on
convolutional patches then takes it as ``global_pool=name``.
"""
from collections.abc import Callable
from typing import TypeVar

import torch
from timm.models import register_notrace_module
from torch import nn

from ..prediction import upcast

__all__ = [
    'AttentionWeights', 'GatedAttentionWeights', 'LossAttentionWeights', 'MeanWeights', 'PatchWeights',
    'create_weights', 'list_weights', 'normalize', 'plain_weights', 'register_weights', 'weighted_sum',
]

HIDDEN_FEATURES = 128  # rows of V and U, in both papers
_WEIGHTS: dict[str, type['PatchWeights']] = {}
Weights = TypeVar('Weights', bound='PatchWeights')


def checked_xi(xi: float) -> float:
    """ξ as a float; ValueError outside of [0, 1]."""
    if not 0. <= xi <= 1.:
        raise ValueError(f'xi must lie in [0, 1], got {xi!r}.')
    return float(xi)


def register_weights(name: str) -> Callable[[type[Weights]], type[Weights]]:
    """Class decorator: make a PatchWeights class available as ``global_pool=name``.

    Raises:
        ValueError: the name is taken by another class.
    """
    def register(cls: type[Weights]) -> type[Weights]:
        there = _WEIGHTS.get(name, cls)  # the same class again, where a module is loaded anew
        if (there.__module__, there.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f'global_pool {name!r} is registered already, by {there.__module__}.{there.__qualname__}.')
        _WEIGHTS[name] = cls
        return register_notrace_module(cls)  # reason: dtype dependent control flow
    return register


def list_weights() -> tuple[str, ...]:
    """Names of all registered patch weights."""
    return tuple(_WEIGHTS)


def create_weights(name: str, in_features: int, xi: float, device=None, dtype=None) -> 'PatchWeights':
    """Registered patch weights by name, for features of ``in_features`` channels."""
    return _WEIGHTS[name].create(in_features, xi, device=device, dtype=dtype)


def plain_weights(pool: str, channels: int, xi: float) -> 'PatchWeights':
    """Registered patch weights that have no parameters.

    Raises:
        ValueError: they do not exist, or have parameters.
    """
    if pool not in list_weights():
        raise ValueError(f'pool must be one of {list_weights()}, got {pool!r}.')
    weights = create_weights(pool, channels, xi)
    if list(weights.parameters()):
        raise ValueError(
            f"pool={pool!r} has parameters to learn, which no stock model holds; 'lossattn' and 'avg' have none.")
    return weights


def normalize(weights: torch.Tensor) -> torch.Tensor:
    """Divide non-negative (B, N) weights by their sum; a row of zeros becomes uniform, with zero gradient."""
    total = weights.sum(dim=1, keepdim=True)
    safe_total = torch.where(total > 0, total, torch.ones_like(total))  # keeps 0/0 out of the backward pass too
    return torch.where(total > 0, weights / safe_total, torch.full_like(weights, 1. / weights.shape[1]))


def weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Σ_n weights_n · values_n of (B, N) and (B, N, K), to (B, K): one batched product, in the values' precision."""
    if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what stands below this, and this alone
        if values.is_meta or not torch.is_autocast_enabled(values.device.type):  # no autocast for meta tensors
            return torch.bmm(weights.unsqueeze(1), values).squeeze(1)
    return (weights.unsqueeze(-1) * values).sum(dim=1)  # autocast would round a batched product to half precision


class PatchWeights(nn.Module):
    """Base of all patch weights: from features and patch logits to α, and the meaning of a model's numbers.

    Attributes:
        xi: ξ in [0, 1]; weights under ξ/M count as zero where a subclass says so. To change it, set the model's ``xi``,
            which is saved with the model.
        reads_logits: α depends on the patch logits, so that they are computed before the pooling.
        informative: α differs between patches.
        default_loss: what the paper trains such models with: 'loss_attention' (Eqs. 9, 10), 'classification' (the image
            loss alone) or 'margin' (Sabour et al.).
        description: how the image logits come about, to end a sentence.

    Args:
        xi: see above.

    Raises:
        ValueError: xi outside [0, 1].
    """
    reads_logits = False
    informative = True
    default_loss = 'classification'
    description = 'weighted'

    def __init__(self, xi: float = 0.1) -> None:
        super().__init__()
        self.xi = checked_xi(xi)

    @classmethod
    def create(cls: type[Weights], in_features: int, xi: float, device=None, dtype=None) -> Weights:
        """Weights for features of ``in_features`` channels; subclasses with parameters use them."""
        return cls(xi=xi)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) and their logits (B, M, K) to α (B, M)."""
        raise NotImplementedError

    def selected(self, alpha: torch.Tensor) -> torch.Tensor:
        """α (B, M) to the patches that count, (B, M) bool."""
        return torch.ones_like(alpha, dtype=torch.bool)

    def probabilities(self, logits: torch.Tensor, multi_label: bool = False) -> torch.Tensor:
        """Image logits (B, K) to probabilities (B, K): softmax, or for independent classes or a single one sigmoid."""
        return logits.sigmoid() if multi_label or logits.shape[1] == 1 else logits.softmax(dim=1)

    def independent_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Image logits (B, K) to those whose sigmoid is the probability of each class, for multi-label measures."""
        return logits

    def extra_repr(self) -> str:
        return f'xi={self.xi}'


@register_weights('lossattn')
class LossAttentionWeights(PatchWeights):
    """Attention weights of loss attention (Eqs. 5a, 5b; 6a, 6b).

        s_m = ‖p_m‖₂ (conv) or Σ_c ‖p_cm‖₂ (capsules);  α_m = s_m / Σ_j s_j;
        α_m ← max(α_m − ξ/M, 0) / Σ_j max(α_j − ξ/M, 0)

    M is the number of patches, as in the paper (its public convolutional code divides ξ by the feature-map size).
    If no weight is left, α is uniform.

    Args:
        xi: ξ in [0, 1]; patches with a weight under ξ/M get exactly zero.
    """
    reads_logits = True
    default_loss = 'loss_attention'
    description = 'weighted by the size of the patch logits (loss attention)'

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch logits (B, M, K), or (B, C, M, K) for capsules, to α (B, M). The features h are not used."""
        s = torch.linalg.vector_norm(upcast(patch_logits), dim=-1)
        if s.dim() == 3:
            s = s.sum(dim=1)  # over capsule channels
        alpha = normalize(s)
        return normalize((alpha - self.xi / alpha.shape[1]).clamp(min=0))

    def selected(self, alpha: torch.Tensor) -> torch.Tensor:
        """α > 0."""
        return alpha > 0


@register_weights('avg')
class MeanWeights(PatchWeights):
    """Mean pooling: α_m = 1/M."""
    informative = False
    description = 'all with the same weight'

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return torch.full_like(upcast(h[..., 0]), 1. / h.shape[1])


@register_weights('attn')
class AttentionWeights(PatchWeights):
    """Attention of Ilse et al. (their Eq. 8): α_m = softmax_m(wᵀ tanh(V h_m)); V and w have biases, as in their code.

    Args:
        in_features: C. V has 128 rows, as in both papers.
        xi: patches with a weight over ξ/M count as selected; α itself is not changed.
    """
    description = 'weighted by a learned attention (Ilse et al.)'

    def __init__(self, in_features: int, xi: float = 0.1, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(xi)
        self.v = nn.Linear(in_features, HIDDEN_FEATURES, **dd)
        self.w = nn.Linear(HIDDEN_FEATURES, 1, **dd)

    @classmethod
    def create(cls, in_features: int, xi: float, device=None, dtype=None):
        """Weights for features of ``in_features`` channels."""
        return cls(in_features, xi=xi, device=device, dtype=dtype)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return upcast(self.w(torch.tanh(self.v(h))).squeeze(-1)).softmax(dim=1)

    def selected(self, alpha: torch.Tensor) -> torch.Tensor:
        """α > ξ/M, and whatever ξ is the patch with the largest α (all patches, if all have the same)."""
        return (alpha > self.xi / alpha.shape[1]) | (alpha == alpha.amax(dim=1, keepdim=True))


@register_weights('gatedattn')
class GatedAttentionWeights(AttentionWeights):
    """Gated attention of Ilse et al. (their Eq. 9): α_m = softmax_m(wᵀ (tanh(V h_m) ⊙ σ(U h_m)))."""
    description = 'weighted by a learned gated attention (Ilse et al.)'

    def __init__(self, in_features: int, xi: float = 0.1, device=None, dtype=None) -> None:
        super().__init__(in_features, xi, device=device, dtype=dtype)
        self.u = nn.Linear(in_features, HIDDEN_FEATURES, device=device, dtype=dtype)

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        """Patch features h (B, M, C) to α (B, M)."""
        return upcast(self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h))).squeeze(-1)).softmax(dim=1)
