"""What every backbone of this package is: a stem and stages, which own their forward, intermediates and pruning."""
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from timm.models import checkpoint_seq

# Private, but every timm model imports it: the one definition of how `indices` selects feature levels.
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import nn

__all__ = ['StagedBackbone', 'init_convolutions', 'scale_width', 'scale_widths']


def scale_width(width: int, width_mult: float) -> int:
    """Channels times the width multiplier, rounded, at least 1.

    Raises:
        ValueError: width_mult is not positive.
    """
    if not width_mult > 0:
        raise ValueError(f'width_mult must be positive, got {width_mult!r}.')
    return max(1, round(width * width_mult))


def scale_widths(widths: tuple[int, ...], width_mult: float) -> tuple[int, ...]:
    """``scale_width`` of each."""
    return tuple(scale_width(width, width_mult) for width in widths)


def init_convolutions(module: nn.Module) -> None:
    """He initialisation of all convolutions in a module, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class StagedBackbone(nn.Module):
    """A stem and a sequence of stages: (B, in_chans, H, W) -> (B, num_features, H', W').

    Subclasses make ``stem`` and ``stages``. What PatchClassifier needs of a backbone is what stands here: any module
    with these attributes and methods will do.

    Attributes:
        feature_info: num_chs, reduction and module of every stage, as timm's models have it.
        num_features: channels of the last stage.
    """
    if TYPE_CHECKING:  # TorchScript would read annotations of the class
        stem: nn.Module
        stages: nn.Sequential
        feature_info: list[dict[str, Any]]
        num_features: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def init_weights(self) -> None:
        """He initialisation of all convolutions; the residual branches of basic blocks start at zero."""
        init_convolutions(self)
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.zero_init_last()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups, names as in this module: the stem, then the stages (coarse) or their layers."""
        return dict(stem=r'^stem', blocks=[(r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)', None)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) images to the last feature map (B, num_features, H', W')."""
        x = self.stem(x)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return x

    def forward_intermediates(
            self, x: torch.Tensor, indices: Optional[Union[int, list[int]]] = None, stop_early: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last feature map that was computed, and those of the stages asked for.

        Args:
            x: (B, in_chans, H, W) images.
            indices: the last n stages if int, all if None, else those listed.
            stop_early: do not run what follows the last stage asked for.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[:max_index + 1] if stop_early else self.stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(x)
        return x, intermediates

    def reaches_end(self, indices: Optional[Union[int, list[int]]]) -> bool:
        """Whether the last stage is among those asked for."""
        return feature_take_indices(len(self.stages), indices)[1] == len(self.stages) - 1

    def prune_intermediate_layers(self, indices: Union[int, list[int]] = 1) -> list[int]:
        """Drop the stages after the last one asked for; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[:max_index + 1]
        self.num_features = self.feature_info[max_index]['num_chs']
        return take_indices
