"""Capsule patch layers as loops over capsule units: what ``benchmark.py --capsules`` compares one convolution with."""
from typing import Any

import torch
from torch import nn

from timm_lossattn.models.patch_layers import CapsulePatchLayers

__all__ = ['LoopedCapsules']


class LoopedConv(nn.Module):
    """A ConvNormAct of C·D channels as D convolutions of C channels, stacked to (B, C, D, H', W')."""

    def __init__(self, layer: Any, capsules: int) -> None:
        super().__init__()
        conv, bn = layer.conv, layer.bn
        dims = conv.out_channels // capsules
        self.units = nn.ModuleList()
        for d in range(dims):
            rows = slice(d, None, dims)  # channel c·D + d
            unit: Any = nn.Conv2d(conv.in_channels, capsules, conv.kernel_size, stride=conv.stride)
            norm = nn.BatchNorm2d(capsules)
            with torch.no_grad():
                for own, source in ((unit, conv), (norm, bn)):
                    own.weight.copy_(source.weight[rows])
                    own.bias.copy_(source.bias[rows])
            self.units.append(nn.Sequential(unit, norm, nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C', H, W) to (B, C, D, H', W')."""
        return torch.stack([unit(x) for unit in self.units], dim=2)


class LoopedCapsules(nn.Module):
    """CapsulePatchLayers with the same weights: 16 convolutions for the primary capsules, 128 for the second layer.

    Each has its own batch norm and ReLU.
    """

    def __init__(self, layers: CapsulePatchLayers) -> None:
        super().__init__()
        self.primary = LoopedConv(layers.primary.conv, layers.primary.capsules)
        self.offset = nn.Parameter(layers.length.offset.detach().clone())
        self.secondary = LoopedConv(layers.secondary, layers.capsules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C', H, W) to the features that CapsuleLossAttentionHead takes."""
        lengths = torch.relu(torch.linalg.vector_norm(self.primary(x), dim=2) - self.offset)
        return self.secondary(lengths).flatten(1, 2)
