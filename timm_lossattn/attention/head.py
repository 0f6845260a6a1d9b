"""What every head is: patch features to image logits, and to a PatchPrediction."""
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..prediction import PatchPrediction
from .weights import PatchWeights

__all__ = ['PatchHead']


class PatchHead(nn.Module):
    """Base of all heads. A subclass given to ``PatchClassifier(head=...)`` works everywhere that the others do.

    Attributes:
        attn: the patch weights, which also say what the numbers mean.
        fc: the classifier, nn.Identity without classes.
        num_features: channels of the pooled features.
        default_pool: ``global_pool`` that the head has if none is named.
        fixed_grid: the weights belong to positions, so that the input size is fixed.
    """
    if TYPE_CHECKING:  # TorchScript would read annotations of the class
        attn: PatchWeights
        fc: nn.Module
        num_features: int
    default_pool = 'lossattn'
    fixed_grid = False

    @classmethod
    def pools(cls) -> tuple[str, ...]:
        """Values of ``global_pool`` that the head takes; besides, '' leaves the features unpooled."""
        return (cls.default_pool,)

    @classmethod
    def create(cls, features: Any, grid_size: tuple[int, int], **kwargs: Any) -> 'PatchHead':
        """The head for the features that patch layers give.

        Args:
            features: patch layers; their ``num_features`` and ``capsules`` count.
            grid_size: (H', W') of the patch grid, if ``fixed_grid``.
            kwargs: what every head takes: num_classes (K; 0 for no classifier), pool_type (one of ``pools()``, or ''),
                xi (ξ of Eqs. 5b and 6b), drop_rate (dropout on the features), device, dtype.
        """
        raise NotImplementedError

    @classmethod
    def check_pool(cls, pool_type: str, num_classes: int) -> None:
        """ValueError unless the head knows this kind of pooling, and '' goes without a classifier."""
        if pool_type not in (*cls.pools(), ''):
            raise ValueError(
                f'global_pool must be one of {(*cls.pools(), "")} for these patch features, got {pool_type!r}.')
        if not pool_type and num_classes > 0:
            raise ValueError(
                f"global_pool='' leaves the features unpooled and needs num_classes=0, got {num_classes}.")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map (B, C, H', W') to image logits (B, K), and nothing else."""
        raise NotImplementedError

    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        """Feature map to everything about the patches."""
        raise NotImplementedError

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Feature map to pooled features (B, num_features). Unpooled: x itself."""
        raise NotImplementedError
