"""ResNet backbones without pooling (CIFAR form) and the models built on them.

ResNet18 and ResNet34 are those of K. He et al., "Deep Residual Learning for Image Recognition", with a 3×3 stem of
stride 1. The paper's ResNet50 differs from the usual one: see ``Bottleneck3x3``.
"""
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import nn

from .backbone import StagedBackbone, scale_widths
from .entrypoints import (
    CIFAR100_LABELS,
    NANO_CAPS,
    NANO_CONV,
    TINY_IMAGENET_MINI_LABELS,
    create_patch_classifier,
    patch_model_cfg,
)
from .patch_classifier import PatchClassifier
from .patch_layers import CapsulePatchLayers, NoPatchLayers, PrimaryCapsules
from .pretrained import with_published

__all__ = ['Bottleneck3x3', 'ResNetBackbone']


class Bottleneck3x3(nn.Module):
    """Bottleneck of the paper's ResNet50: 3×3, 3×3, 1×1 convolutions, ReLU also after the third batch norm."""
    expansion = 4

    def __init__(
            self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
            drop_path: nn.Module | None = None, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = ConvNormAct(inplanes, planes, 3, **dd)
        self.conv2 = ConvNormAct(planes, planes, 3, stride=stride, **dd)
        self.conv3 = ConvNormAct(planes, planes * self.expansion, 1, **dd)
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.drop_path = drop_path if drop_path is not None else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.drop_path(self.conv3(self.conv2(self.conv1(x)))) + self.downsample(x))


class Shortcut(nn.Module):
    """1×1 convolution of every ``stride``-th position and batch norm: ResNet's projection shortcut.

    The positions are picked first, which is what the convolution's stride does, because oneDNN's strided kernel writes
    past its workspace in the backward pass in channels-last layout if the channels are few (under 16 with AVX-512, 8
    with AVX2): https://github.com/uxlfoundation/oneDNN/issues/6035. The small models would crash.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride > 1:
            x = x[:, :, ::self.stride, ::self.stride]
        return self.bn(self.conv(x))


class ResNetBackbone(StagedBackbone):
    """Residual stages without max-pooling: (B, in_chans, H, W) -> (B, num_features, ceil(H/s), ceil(W/s)).

    Args:
        in_chans: image channels.
        backbone_stride: s; 2 strides stage 2, 4 also stage 3, 8 also stage 4.
        drop_path_rate: stochastic depth, rising linearly over the blocks.
        block: BasicBlock or Bottleneck3x3.
        depths: blocks in each stage.
        widths: planes of each stage.
        width_mult: of the widths.
    """

    def __init__(
            self,
            in_chans: int,
            backbone_stride: int,
            drop_path_rate: float,
            block: Any = BasicBlock,
            depths: tuple[int, ...] = (2, 2, 2, 2),
            widths: tuple[int, ...] = (64, 128, 256, 512),
            width_mult: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        widths = scale_widths(widths, width_mult)
        self.stem = ConvNormAct(in_chans, widths[0], 3, **dd)
        self.feature_info: list[dict[str, Any]] = []
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        chs, reduction = widths[0], 1
        stages = []
        for i, (depth, width) in enumerate(zip(depths, widths)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 and reduction < backbone_stride else 1
                out_chs = width * block.expansion
                downsample = None
                if stride > 1 or chs != out_chs:
                    downsample = Shortcut(chs, out_chs, stride, **dd)
                drop_path = DropPath(rates[i][j]) if rates[i][j] > 0. else None
                blocks.append(block(chs, width, stride=stride, downsample=downsample, drop_path=drop_path, **dd))
                chs, reduction = out_chs, reduction * stride
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.num_features = chs
        self.init_weights()


default_cfgs = generate_default_cfgs(with_published({
    'resnet18_lossattn_conv.cifar10': patch_model_cfg(),
    'resnet18_meanpool_conv.cifar10': patch_model_cfg(),
    'resnet18_attn_conv.cifar10': patch_model_cfg(),
    'resnet18_gatedattn_conv.cifar10': patch_model_cfg(),
    'resnet18_lossattn_caps.cifar10': patch_model_cfg(),
    'resnet18_routing_caps.cifar10': patch_model_cfg(fixed_input_size=True),
    'resnet18_lossattn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_meanpool_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_attn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_gatedattn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_lossattn_caps_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_routing_caps_s2.tiny_imagenet': patch_model_cfg(size=64, fixed_input_size=True),
    'resnet18_lossattn_conv_s8.in1k': patch_model_cfg(size=224, min_input_size=(3, 160, 160)),
    'resnet34_lossattn_conv.cifar10': patch_model_cfg(),
    'resnet50_lossattn_conv.cifar10': patch_model_cfg(),
    'resnet50_lossattn_conv_s8.in1k': patch_model_cfg(size=224, min_input_size=(3, 160, 160)),
    'resnet18_lossattn_conv_nano.cifar10': patch_model_cfg(),
    'resnet18_lossattn_conv_nano.cifar100': patch_model_cfg(
        num_classes=100, label_names=CIFAR100_LABELS, mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276)),
    'resnet18_lossattn_caps_nano.cifar10': patch_model_cfg(),
    'resnet18_lossattn_conv_nano_s2.tiny_imagenet_mini': patch_model_cfg(  # ten of its classes
        size=64, num_classes=10, label_names=TINY_IMAGENET_MINI_LABELS),
    'resnet18_lossattn_conv_nano_s2.tiny_imagenet': patch_model_cfg(size=64),
    'resnet18_cifar.cifar10': patch_model_cfg(pool_size=(4, 4)),
    'resnet50_cifar.cifar10': patch_model_cfg(pool_size=(4, 4)),
}))


NANO_WIDTHS = (8, 16, 32, 64)  # an eighth
RESNET18 = partial(ResNetBackbone, depths=(2, 2, 2, 2))
RESNET18_NANO = partial(RESNET18, widths=NANO_WIDTHS)
RESNET34 = partial(ResNetBackbone, depths=(3, 4, 6, 3))
RESNET50 = partial(ResNetBackbone, depths=(3, 4, 6, 3), block=Bottleneck3x3)


def _create_resnet(variant: str, pretrained: bool, **kwargs: Any) -> PatchClassifier:
    return create_patch_classifier(variant, pretrained, num_stages=4, **kwargs)


@register_model
def resnet18_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET18)
    return _create_resnet('resnet18_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_meanpool_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, mean pooling of convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET18, global_pool='avg')
    return _create_resnet('resnet18_meanpool_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_attn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, attention of Ilse et al. on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET18, global_pool='attn')
    return _create_resnet('resnet18_attn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_gatedattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, gated attention of Ilse et al. on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET18, global_pool='gatedattn')
    return _create_resnet('resnet18_gatedattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_caps(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, loss attention on capsules, for 32×32 images."""
    model_args = dict(backbone=RESNET18, patch_layers=CapsulePatchLayers)
    return _create_resnet('resnet18_lossattn_caps', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_routing_caps(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, dynamic routing of primary capsules, for 32×32 images."""
    model_args = dict(backbone=RESNET18, patch_layers=PrimaryCapsules)
    return _create_resnet('resnet18_routing_caps', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, loss attention on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=RESNET18, backbone_stride=2)
    return _create_resnet('resnet18_lossattn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_meanpool_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, mean pooling of convolutional patches, for 64×64 images."""
    model_args = dict(backbone=RESNET18, global_pool='avg', backbone_stride=2)
    return _create_resnet('resnet18_meanpool_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_attn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, attention of Ilse et al. on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=RESNET18, global_pool='attn', backbone_stride=2)
    return _create_resnet('resnet18_attn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_gatedattn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, gated attention of Ilse et al. on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=RESNET18, global_pool='gatedattn', backbone_stride=2)
    return _create_resnet('resnet18_gatedattn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_caps_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, loss attention on capsules, for 64×64 images."""
    model_args = dict(backbone=RESNET18, patch_layers=CapsulePatchLayers, backbone_stride=2)
    return _create_resnet('resnet18_lossattn_caps_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_routing_caps_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, dynamic routing of primary capsules, for 64×64 images."""
    model_args = dict(backbone=RESNET18, patch_layers=PrimaryCapsules, backbone_stride=2)
    return _create_resnet('resnet18_routing_caps_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_conv_s8(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18, loss attention on convolutional patches, backbone stride 8, for 224×224 images."""
    model_args = dict(backbone=RESNET18, backbone_stride=8)
    return _create_resnet('resnet18_lossattn_conv_s8', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet34, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET34)
    return _create_resnet('resnet34_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """The paper's ResNet50, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET50)
    return _create_resnet('resnet50_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_lossattn_conv_s8(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """The paper's ResNet50, loss attention on convolutional patches, backbone stride 8, for 224×224 images."""
    model_args = dict(backbone=RESNET50, backbone_stride=8)
    return _create_resnet('resnet50_lossattn_conv_s8', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_conv_nano(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18 with 1/8 of the widths, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=RESNET18_NANO, patch_layers=NANO_CONV)
    return _create_resnet('resnet18_lossattn_conv_nano', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_caps_nano(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18 with 1/8 of the widths, loss attention on capsules, for 32×32 images."""
    model_args = dict(backbone=RESNET18_NANO, patch_layers=NANO_CAPS)
    return _create_resnet('resnet18_lossattn_caps_nano', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_lossattn_conv_nano_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """ResNet18 with 1/8 of the widths, loss attention on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=RESNET18_NANO, patch_layers=NANO_CONV, backbone_stride=2)
    return _create_resnet('resnet18_lossattn_conv_nano_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """Plain ResNet18 in CIFAR form, the baseline: mean pooling over an 8 times smaller feature map."""
    model_args = dict(backbone=RESNET18, patch_layers=NoPatchLayers, backbone_stride=8)
    return _create_resnet('resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """The paper's ResNet50 as a plain classifier in CIFAR form."""
    model_args = dict(backbone=RESNET50, patch_layers=NoPatchLayers, backbone_stride=8)
    return _create_resnet('resnet50_cifar', pretrained, **dict(model_args, **kwargs))
