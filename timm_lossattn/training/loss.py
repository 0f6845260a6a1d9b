"""The losses of the paper (Eqs. 9 and 10), the margin loss of dynamic routing, and the ramp-up of γ."""
import math
from collections.abc import Callable
from itertools import product
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn

from ..prediction import PatchPrediction, upcast

__all__ = ['LossAttentionLoss', 'MarginLoss', 'gamma_rampup']


def gamma_rampup(tau: float, gamma_max: float = 0.1, rampup_epochs: float = 80.) -> float:
    """γ(τ) = γ_max · exp(−5 (1 − T)²) with T = min(τ / rampup_epochs, 1), and γ(0) = 0.

    The paper prints the exponent without the 5; its code and its source (Laine & Aila, "Temporal Ensembling for
    Semi-Supervised Learning") have it.

    Args:
        tau: training time in epochs, fractions allowed.
        gamma_max: weight of the patch term at the end of the ramp.
        rampup_epochs: length of the ramp in epochs; 0 for none.

    Raises:
        ValueError: a negative argument.
    """
    for name, value in (('tau', tau), ('gamma_max', gamma_max), ('rampup_epochs', rampup_epochs)):
        if not value >= 0:
            raise ValueError(f'{name} must be at least 0, got {value!r}.')
    if rampup_epochs == 0:
        return gamma_max
    if tau == 0:
        return 0.
    return gamma_max * math.exp(-5. * (1. - min(tau / rampup_epochs, 1.)) ** 2)


class LossAttentionLoss(nn.Module):
    """Image loss plus γ times the attention-weighted patch loss (Eqs. 9 and 10).

        single label (Eq. 9):  CE(z, y) + γ · mean_i Σ_m α_im CE(p_im, y_i)
        soft targets:          CE(z, y) + γ · mean_i Σ_m α_im (−Σ_k y_ik log softmax(p_im)_k)
        multi-label (Eq. 10):  Σ_k BCE(z, y) + γ · mean_i Σ_m α_im · min_{k: y_ik = 1} −log σ(p_imk)

    BCE is summed over classes and averaged over images; an image without a positive label has no patch term. Gradients
    flow through α. Label smoothing is the same in the patch term as in the image term, and images of the criterion's
    ``ignore_index`` count in neither; class weights of a criterion count in the image term alone. All in float32.

    Args:
        criterion: image loss (logits, target) -> scalar, e.g. any of ``timm.loss``. By default cross entropy with
            ``smoothing``, or for multi-label targets binary cross entropy as above.
        multi_label: targets are (B, K) with 0 and 1 for independent classes.
        smoothing: label smoothing for class indices, and for probabilities if the criterion is torch's cross entropy,
            which smooths them too; by default that of the criterion, if it says so, or else 0.

    Raises:
        ValueError: smoothing outside [0, 1), another one than the criterion's own, or any with multi_label.
    """

    def __init__(
            self,
            criterion: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
            multi_label: bool = False,
            smoothing: Optional[float] = None,
    ) -> None:
        super().__init__()
        if multi_label and smoothing:
            raise ValueError(f'smoothing: Eq. 10 has none; leave it out with multi_label, got {smoothing!r}.')
        parts = {'criterion': criterion,  # and the one inside timm's JsdCrossEntropy
                 'criterion.cross_entropy_loss': getattr(criterion, 'cross_entropy_loss', None)}
        for (place, part), name in product(parts.items(), ('smoothing', 'label_smoothing')):  # timm's, torch's name
            own = getattr(part, name, None)
            if own is not None and smoothing not in (None, own):
                raise ValueError(
                    f'smoothing: {smoothing!r} contradicts {place}.{name} = {own!r}; give one of the two.')
            smoothing = smoothing if own is None else own
        smoothing = smoothing or 0.
        if not 0. <= smoothing < 1.:
            raise ValueError(f'smoothing must lie in [0, 1), got {smoothing!r}.')
        self.multi_label = multi_label
        self.smoothing = smoothing
        if criterion is None:
            criterion = summed_bce if multi_label else nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.criterion = criterion
        self.ignore_index = int(getattr(criterion, 'ignore_index', -100))  # torch's default
        self.smooths_probabilities = isinstance(criterion, nn.CrossEntropyLoss)  # timm's losses do not

    def forward(
            self, prediction: PatchPrediction, target: torch.Tensor, gamma: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of a batch.

        Args:
            prediction: of B images, M patches, K classes.
            target: (B,) class indices, or (B, K) class probabilities (0 and 1 if multi-label).
            gamma: γ(τ), see ``gamma_rampup``.

        Returns:
            Three scalars: total loss, image term, patch term (before γ).

        Raises:
            ValueError: the target has neither shape, or there is a single class and multi_label is False.
        """
        B, K = prediction.logits.shape
        if K == 1 and not self.multi_label:  # the softmax of one logit is 1 whatever it is
            raise ValueError('multi_label must be True for a model of one class, whose cross entropy is always 0.')
        indices = target.dim() == 1 and not self.multi_label
        if target.shape != ((B,) if indices else (B, K)):
            raise ValueError(
                f'target must be {f"({B}, {K})" if self.multi_label else f"({B},) or ({B}, {K})"} for logits of shape '
                f'({B}, {K}){" and multi_label=True" if self.multi_label else ""}, got {tuple(target.shape)}.')
        with torch.autocast(device_type=target.device.type, enabled=False):
            image_loss = self.criterion(upcast(prediction.logits), target)
            patch_loss = self.patch_loss(prediction, target)
        return image_loss + gamma * patch_loss, image_loss, patch_loss

    def patch_loss(self, prediction: PatchPrediction, target: torch.Tensor) -> torch.Tensor:
        """mean_i Σ_m α_im l_im, the second term of Eqs. 9 and 10 without γ."""
        p = upcast(prediction.patch_logits)  # (B, M, K)
        images: int | torch.Tensor = len(p)
        if self.multi_label:
            positive = (target > 0.5).unsqueeze(1)  # (B, 1, K)
            nll = (-F.logsigmoid(p)).masked_fill(~positive, torch.inf).amin(dim=2)  # (B, M)
            nll = torch.where(positive.any(dim=2), nll, torch.zeros_like(nll))
        elif target.dim() == 1:
            nll = F.cross_entropy(
                p.transpose(1, 2), target.unsqueeze(1).expand(p.shape[:2]), reduction='none',
                ignore_index=self.ignore_index, label_smoothing=self.smoothing)  # (B, M)
            images = (target != self.ignore_index).sum()
        else:
            y = target.to(p.dtype).unsqueeze(1)
            if self.smooths_probabilities:
                y = y * (1. - self.smoothing) + self.smoothing / p.shape[2]
            nll = -(y * p.log_softmax(dim=-1)).sum(dim=-1)  # (B, M)
        return (prediction.alpha.to(p.dtype) * nll).sum() / images


def summed_bce(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy summed over classes, averaged over images (first term of Eq. 10)."""
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction='none').sum(dim=1).mean()


class MarginLoss(nn.Module):
    """Margin loss of S. Sabour et al., Eq. 4, for dynamic routing: the logits are lengths ‖v_k‖ of class capsules.

        Σ_k  y_k max(0, m⁺ − ‖v_k‖)² + λ (1 − y_k) max(0, ‖v_k‖ − m⁻)²,  averaged over images

    Args:
        m_plus: m⁺.
        m_minus: m⁻.
        down_weight: λ.
    """

    def __init__(self, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5) -> None:
        super().__init__()
        self.m_plus, self.m_minus, self.down_weight = m_plus, m_minus, down_weight

    def forward(self, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(B, K) lengths and (B,) class indices or (B, K) class probabilities to a scalar."""
        lengths = upcast(lengths)
        y = F.one_hot(target, lengths.shape[1]).to(lengths.dtype) if target.dim() == 1 else target.to(lengths.dtype)
        present = F.relu(self.m_plus - lengths).square()
        absent = F.relu(lengths - self.m_minus).square()
        return (y * present + self.down_weight * (1. - y) * absent).sum(dim=1).mean()
