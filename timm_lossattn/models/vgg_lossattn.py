"""VGG backbones with batch norm and without pooling, the models built on them, and the plain VGGs in CIFAR form.

K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition". The paper removes
every max-pooling layer; where an image is larger, a stride stands in the last convolution of a stage instead.
"""
from functools import partial
from typing import Any

from timm.layers import ClassifierHead, ConvNormAct
from timm.models import VGG, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vgg import ConvMlp
from torch import nn

from .backbone import StagedBackbone, scale_width, scale_widths
from .entrypoints import NANO_CAPS, NANO_CONV, create_patch_classifier, patch_model_cfg, without_labels
from .patch_classifier import PatchClassifier
from .patch_layers import CapsulePatchLayers, PrimaryCapsules
from .pretrained import verified_overlay, with_published

__all__ = ['VGGBackbone', 'VGGCifar']


class VGGBackbone(StagedBackbone):
    """VGG's convolutions without pooling: (B, in_chans, H, W) -> (B, num_features, ceil(H/s), ceil(W/s)).

    Args:
        in_chans: image channels.
        backbone_stride: s; 2 strides the last convolution of stage 3 (VGG11's 4th), 4 also that of stage 4,
            8 also that of stage 5.
        drop_path_rate: VGG has no residual branches to drop; must be 0.
        depths: convolutions in each of the five stages; the first of all is the stem.
        widths: channels of each stage.
        width_mult: of the widths.

    Raises:
        ValueError: drop_path_rate is not 0.
    """

    def __init__(
            self,
            in_chans: int,
            backbone_stride: int,
            drop_path_rate: float,
            depths: tuple[int, ...] = (1, 1, 2, 2, 2),
            widths: tuple[int, ...] = (64, 128, 256, 512, 512),
            width_mult: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if drop_path_rate:
            raise ValueError(f'drop_path_rate must be 0 for VGG, which has no residual branches, got {drop_path_rate}.')
        widths = scale_widths(widths, width_mult)
        self.stem = ConvNormAct(in_chans, widths[0], 3, bias=True, **dd)
        self.feature_info: list[dict[str, Any]] = []
        chs, reduction = widths[0], 1
        stages = []
        for i, (depth, width) in enumerate(zip(depths, widths)):
            layers = []
            for j in range(1 if i == 0 else 0, depth):
                stride = 2 if i > 1 and j == depth - 1 and reduction < backbone_stride else 1
                layers.append(ConvNormAct(chs, width, 3, stride=stride, bias=True, **dd))
                chs, reduction = width, reduction * stride
            stages.append(nn.Sequential(*layers))
            self.feature_info.append(dict(num_chs=chs, reduction=reduction, module=f'stages.{i}'))
        self.stages = nn.Sequential(*stages)
        self.num_features = chs
        self.init_weights()


class VGGCifar(VGG):
    """timm's VGG in CIFAR form: on the 1×1 map that five poolings leave of 32×32, the classifier is 4096-4096-K.

    Args:
        cfg: timm's layer list.
        drop_rate: dropout in the classifier.
        width_mult: width multiplier of all layers.
        kwargs: the other arguments of timm's VGG.
    """

    def __init__(
            self, cfg: list[Any], drop_rate: float = 0., width_mult: float = 1., device=None, dtype=None,
            **kwargs: Any) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            [width if width == 'M' else scale_width(width, width_mult) for width in cfg], drop_rate=drop_rate,
            mlp_ratio=1 / 4096, norm_layer=nn.BatchNorm2d, **dd, **kwargs)
        # timm's has a 7×7 kernel for 224×224 images: 103 M parameters that nothing here would use
        hidden = scale_width(4096, width_mult)
        layers = {key: kwargs[key] for key in ('act_layer', 'conv_layer') if key in kwargs}
        self.pre_logits = ConvMlp(self.num_features, hidden, kernel_size=1, drop_rate=drop_rate, **layers, **dd)
        if hidden != self.head.in_features:
            pool = kwargs.get('global_pool', 'avg')
            self.head = ClassifierHead(hidden, self.num_classes, pool_type=pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features  # of a pool that widens, as catavgmax, more than hidden
        self._initialize_weights()


default_cfgs = generate_default_cfgs(with_published({
    'vgg11_bn_lossattn_conv.cifar10': patch_model_cfg(),
    'vgg11_bn_meanpool_conv.cifar10': patch_model_cfg(),
    'vgg11_bn_attn_conv.cifar10': patch_model_cfg(),
    'vgg11_bn_gatedattn_conv.cifar10': patch_model_cfg(),
    'vgg11_bn_lossattn_caps.cifar10': patch_model_cfg(),
    'vgg11_bn_routing_caps.cifar10': patch_model_cfg(fixed_input_size=True),
    'vgg11_bn_lossattn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'vgg11_bn_meanpool_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'vgg11_bn_attn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'vgg11_bn_gatedattn_conv_s2.tiny_imagenet': patch_model_cfg(size=64),
    'vgg11_bn_lossattn_caps_s2.tiny_imagenet': patch_model_cfg(size=64),
    'vgg11_bn_routing_caps_s2.tiny_imagenet': patch_model_cfg(size=64, fixed_input_size=True),
    'vgg16_bn_lossattn_conv.cifar10': patch_model_cfg(),
    'vgg11_bn_lossattn_conv_nano.cifar10': patch_model_cfg(),
    'vgg11_bn_lossattn_caps_nano.cifar10': patch_model_cfg(),
    'vgg11_bn_cifar.cifar10': patch_model_cfg(pool_size=(1, 1), first_conv='features.0', classifier='head.fc'),
    'vgg16_bn_cifar.cifar10': patch_model_cfg(pool_size=(1, 1), first_conv='features.0', classifier='head.fc'),
}))


WIDTHS, NANO_WIDTHS = (64, 128, 256, 512, 512), (8, 16, 32, 64, 64)
VGG11_DEPTHS, VGG16_DEPTHS = (1, 1, 2, 2, 2), (2, 2, 3, 3, 3)
VGG11 = partial(VGGBackbone, depths=VGG11_DEPTHS, widths=WIDTHS)
VGG11_NANO = partial(VGGBackbone, depths=VGG11_DEPTHS, widths=NANO_WIDTHS)
VGG16 = partial(VGGBackbone, depths=VGG16_DEPTHS, widths=WIDTHS)


def _create_vgg(variant: str, pretrained: bool, **kwargs: Any) -> PatchClassifier:
    return create_patch_classifier(variant, pretrained, num_stages=5, **kwargs)


def _create_vgg_cifar(variant: str, depths: tuple[int, ...], pretrained: bool, **kwargs: Any) -> VGGCifar:
    cfg: list[Any] = []
    for depth, width in zip(depths, WIDTHS):
        cfg += [width] * depth + ['M']
    model = build_model_with_cfg(
        VGGCifar, variant, pretrained, model_cfg=cfg,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3, 4, 5)),
        **verified_overlay(variant, pretrained, kwargs))
    return model if pretrained else without_labels(model, kwargs)


@register_model
def vgg11_bn_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG11)
    return _create_vgg('vgg11_bn_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_meanpool_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, mean pooling of convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG11, global_pool='avg')
    return _create_vgg('vgg11_bn_meanpool_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_attn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, attention of Ilse et al. on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG11, global_pool='attn')
    return _create_vgg('vgg11_bn_attn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_gatedattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, gated attention of Ilse et al. on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG11, global_pool='gatedattn')
    return _create_vgg('vgg11_bn_gatedattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_lossattn_caps(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, loss attention on capsules, for 32×32 images."""
    model_args = dict(backbone=VGG11, patch_layers=CapsulePatchLayers)
    return _create_vgg('vgg11_bn_lossattn_caps', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_routing_caps(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, dynamic routing of primary capsules, for 32×32 images."""
    model_args = dict(backbone=VGG11, patch_layers=PrimaryCapsules)
    return _create_vgg('vgg11_bn_routing_caps', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_lossattn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, loss attention on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=VGG11, backbone_stride=2)
    return _create_vgg('vgg11_bn_lossattn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_meanpool_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, mean pooling of convolutional patches, for 64×64 images."""
    model_args = dict(backbone=VGG11, global_pool='avg', backbone_stride=2)
    return _create_vgg('vgg11_bn_meanpool_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_attn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, attention of Ilse et al. on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=VGG11, global_pool='attn', backbone_stride=2)
    return _create_vgg('vgg11_bn_attn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_gatedattn_conv_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, gated attention of Ilse et al. on convolutional patches, for 64×64 images."""
    model_args = dict(backbone=VGG11, global_pool='gatedattn', backbone_stride=2)
    return _create_vgg('vgg11_bn_gatedattn_conv_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_lossattn_caps_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, loss attention on capsules, for 64×64 images."""
    model_args = dict(backbone=VGG11, patch_layers=CapsulePatchLayers, backbone_stride=2)
    return _create_vgg('vgg11_bn_lossattn_caps_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_routing_caps_s2(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm, dynamic routing of primary capsules, for 64×64 images."""
    model_args = dict(backbone=VGG11, patch_layers=PrimaryCapsules, backbone_stride=2)
    return _create_vgg('vgg11_bn_routing_caps_s2', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg16_bn_lossattn_conv(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG16 with batch norm, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG16)
    return _create_vgg('vgg16_bn_lossattn_conv', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_lossattn_conv_nano(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm and 1/8 of the widths, loss attention on convolutional patches, for 32×32 images."""
    model_args = dict(backbone=VGG11_NANO, patch_layers=NANO_CONV)
    return _create_vgg('vgg11_bn_lossattn_conv_nano', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_lossattn_caps_nano(pretrained: bool = False, **kwargs: Any) -> PatchClassifier:
    """VGG11 with batch norm and 1/8 of the widths, loss attention on capsules, for 32×32 images."""
    model_args = dict(backbone=VGG11_NANO, patch_layers=NANO_CAPS)
    return _create_vgg('vgg11_bn_lossattn_caps_nano', pretrained, **dict(model_args, **kwargs))


@register_model
def vgg11_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """Plain VGG11 with batch norm in CIFAR form, the baseline."""
    return _create_vgg_cifar('vgg11_bn_cifar', VGG11_DEPTHS, pretrained, **kwargs)


@register_model
def vgg16_bn_cifar(pretrained: bool = False, **kwargs: Any) -> VGGCifar:
    """Plain VGG16 with batch norm in CIFAR form, the baseline."""
    return _create_vgg_cifar('vgg16_bn_cifar', VGG16_DEPTHS, pretrained, **kwargs)
