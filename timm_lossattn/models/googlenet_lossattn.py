"""GoogLeNet backbone with batch norm (CIFAR form) and the models built on it.

C. Szegedy et al., "Going Deeper with Convolutions", with batch norm and two 3×3 convolutions for each 5×5, as is usual
for 32×32 images. The paper removes the pooling between stages; the stride-1 pooling branch inside a block stays.
"""
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

from .backbone import StagedBackbone, scale_width
from .entrypoints import create_patch_classifier, patch_model_cfg
from .patch_classifier import PatchClassifier
from .patch_layers import NoPatchLayers
from .pretrained import with_published

__all__ = ['GoogLeNetBackbone', 'InceptionBlock']


class InceptionBlock(nn.Module):
    """Four branches side by side: 1×1; 1×1, 3×3; 1×1, 3×3, 3×3; 3×3 max-pooling of stride 1, 1×1.

    Args:
        in_chs: channels in.
        branch1: channels of the 1×1 branch.
        branch3: channels (1×1, 3×3) of the second branch.
        branch5: channels (1×1, 3×3 twice) of the third branch.
        branch_pool: channels of the pooling branch.
    """

    def __init__(
            self, in_chs: int, branch1: int, branch3: tuple[int, int], branch5: tuple[int, int], branch_pool: int,
            device=None, dtype=None) -> None:
        dd: dict[str, Any] = {'bias': True, 'device': device, 'dtype': dtype}
        super().__init__()
        self.branch1 = ConvNormAct(in_chs, branch1, 1, **dd)
        self.branch3 = nn.Sequential(ConvNormAct(in_chs, branch3[0], 1, **dd), ConvNormAct(*branch3, 3, **dd))
        self.branch5 = nn.Sequential(
            ConvNormAct(in_chs, branch5[0], 1, **dd), ConvNormAct(*branch5, 3, **dd),
            ConvNormAct(branch5[1], branch5[1], 3, **dd))
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), ConvNormAct(in_chs, branch_pool, 1, **dd))
        self.out_chs = branch1 + branch3[1] + branch5[1] + branch_pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


# (1×1), (1×1, 3×3), (1×1, 5×5), (pool) channels of every block: Table 1 of Szegedy et al., stages 3, 4 and 5
_STAGES: tuple[tuple[tuple[int, tuple[int, int], tuple[int, int], int], ...], ...] = (
    ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64)),
    ((192, (96, 208), (16, 48), 64), (160, (112, 224), (24, 64), 64), (128, (128, 256), (24, 64), 64),
     (112, (144, 288), (32, 64), 64), (256, (160, 320), (32, 128), 128)),
    ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128)),
)


def scale_pair(widths: tuple[int, int], width_mult: float) -> tuple[int, int]:
    """``scale_width`` of both."""
    return scale_width(widths[0], width_mult), scale_width(widths[1], width_mult)


class GoogLeNetBackbone(StagedBackbone):
    """Inception stages: (B, in_chans, H, W) -> (B, num_features, ceil(H/s), ceil(W/s)); 1024 features.

    Args:
        in_chans: image channels.
        backbone_stride: s; 1 has no pooling between stages. There is no strided convolution to put a stride in, so 2
            and 4 put back the original max-pooling before the second, and before the second and third stage.
        drop_path_rate: there are no residual branches to drop; must be 0.
        width_mult: width multiplier of all channels.

    Raises:
        ValueError: backbone_stride is 8, or drop_path_rate is not 0.
    """

    def __init__(
            self, in_chans: int, backbone_stride: int, drop_path_rate: float, width_mult: float = 1., device=None,
            dtype=None) -> None:
        super().__init__()
        if backbone_stride > 4:
            raise ValueError(f'backbone_stride must be 1, 2 or 4 for GoogLeNet, which has three stages, '
                             f'got {backbone_stride}.')
        if drop_path_rate:
            raise ValueError(f'drop_path_rate must be 0 for GoogLeNet, which has no residual branches, '
                             f'got {drop_path_rate}.')
        chs, reduction = scale_width(192, width_mult), 1
        self.stem = ConvNormAct(in_chans, chs, 3, bias=True, device=device, dtype=dtype)
        self.feature_info: list[dict[str, Any]] = []
        stages = []
        for i, blocks in enumerate(_STAGES):
            layers: list[nn.Module] = []
            if i > 0 and reduction < backbone_stride:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
                reduction *= 2
            for branch1, branch3, branch5, branch_pool in blocks:
                inception = InceptionBlock(
                    chs, scale_width(branch1, width_mult), scale_pair(branch3, width_mult),
                    scale_pair(branch5, width_mult), scale_width(branch_pool, width_mult), device=device, dtype=dtype)
                layers.append(inception)
                chs = inception.out_chs
            stages.append(nn.Sequential(*layers))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.num_features = chs
        self.init_weights()


default_cfgs = generate_default_cfgs(with_published({
    'googlenet_lossattn_conv.cifar10': patch_model_cfg(),
    'googlenet_cifar.cifar10': patch_model_cfg(pool_size=(8, 8)),
}))


def _create_googlenet(variant: str, pretrained: bool, **kwargs: Any) -> PatchClassifier:
    return create_patch_classifier(variant, pretrained, num_stages=3, **kwargs)


@register_model
def googlenet_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """GoogLeNet, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=GoogLeNetBackbone)
    return _create_googlenet('googlenet_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def googlenet_cifar(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """Plain GoogLeNet in CIFAR form, the baseline."""
    model_args = dict(backbone=GoogLeNetBackbone, patch_layers=NoPatchLayers, backbone_stride=4)
    return _create_googlenet('googlenet_cifar', pretrained, **dict(model_args, **kwargs))
