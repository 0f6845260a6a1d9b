"""The two layers between backbone and head: feature map (B, C, H, W) -> patch features (B, C', H', W').

Attributes of all: ``kernel`` and ``stride``, the positions of the backbone's feature map that a patch covers, and from
one to the next; ``padding``, positions around the map that the first patches begin before it; ``num_features``, C';
``capsules``, capsule channels in C' or 0; ``head``, the class of heads that such features go to, and ``default_pool``,
its global_pool.

Each patch is a 9×9 window of the backbone's feature map, one every 4 positions, or every 2 (Table 7 of the paper): with
stride t and padding q, H' = (H + 2q − 9) // t + 1.
"""
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from ..attention import CapsuleLossAttentionHead, ConvPatchHead, DynamicRoutingHead
from ..prediction import upcast
from .backbone import scale_width

__all__ = ['PATCH_KERNEL', 'PATCH_STRIDE', 'CapsulePatchLayers', 'ConvPatchLayers', 'NoPatchLayers', 'PrimaryCapsules']

PATCH_KERNEL = 9
PATCH_STRIDE = 4
PATCH_STRIDES = (2, 4)


@register_notrace_function  # reason: the sizes are data to FX
def check_patch_size(x: torch.Tensor, backbone_stride: int, padding: int, kernel: int = PATCH_KERNEL) -> None:
    """ValueError unless the feature map holds one patch. (TorchScript sees a default argument, not a global.)"""
    if x.shape[-2] + 2 * padding < kernel or x.shape[-1] + 2 * padding < kernel:
        minimum = (kernel - 1 - 2 * padding) * backbone_stride + 1
        raise ValueError(
            f'Input too small for one patch: height and width must be at least {minimum} pixels at '
            f'backbone_stride={backbone_stride} and patch_padding={padding}; the backbone gave a '
            f'{x.shape[-2]}x{x.shape[-1]} feature map. patch_padding={kernel // 2} takes any.')


def patch_convolution(
        in_chs: int, out_chs: int, stride: int, padding: int, device: Any = None, dtype: Any = None) -> ConvNormAct:
    """The convolution that makes patches: 9×9, with bias, batch norm and ReLU.

    Raises:
        ValueError: a stride or a padding that is not allowed; with more padding than half the kernel, a patch could lie
            outside of the map.
    """
    if stride not in PATCH_STRIDES:
        raise ValueError(f'patch_stride must be one of {PATCH_STRIDES}, got {stride!r}.')
    if padding not in range(PATCH_KERNEL // 2 + 1):
        raise ValueError(f'patch_padding must lie in 0 to {PATCH_KERNEL // 2}, got {padding!r}.')
    return ConvNormAct(
        in_chs, out_chs, PATCH_KERNEL, stride=stride, padding=padding, bias=True, device=device, dtype=dtype)


class NoPatchLayers(nn.Module):
    """For plain classifiers: each position of the backbone's feature map is a patch.

    Args:
        in_chs: channels of the backbone.
        backbone_stride: pixels from patch to patch.
        width_mult: no effect, there is no width of its own.
    """
    kernel, stride, padding = 1, 1, 0
    head = ConvPatchHead
    default_pool = 'avg'

    def __init__(
            self, in_chs: int, backbone_stride: int = 1, width_mult: float = 1., device=None, dtype=None) -> None:
        super().__init__()
        self.capsules = 0
        self.num_features = in_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feature map itself."""
        return x


class ConvPatchLayers(nn.Module):
    """9×9 convolution and 1×1 convolution, each with batch norm and ReLU.

    Args:
        in_chs: channels of the backbone. Wider than ``width``: a 1×1 convolution, BN, ReLU comes first.
        width: 512 in the paper.
        backbone_stride: for the error message on images that are too small.
        patch_stride: of the 9×9 convolution, 4 or 2.
        patch_padding: zeros around the feature map, 0 to 4.
        width_mult: of ``width``.
    """
    kernel = PATCH_KERNEL
    head = ConvPatchHead
    default_pool = 'lossattn'

    def __init__(
            self,
            in_chs: int,
            width: int = 512,
            backbone_stride: int = 1,
            patch_stride: int = PATCH_STRIDE,
            patch_padding: int = 0,
            width_mult: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        width = scale_width(width, width_mult)
        self.backbone_stride = backbone_stride
        self.stride, self.padding = patch_stride, patch_padding
        self.num_features = width
        self.capsules = 0
        self.reduce = ConvNormAct(in_chs, width, 1, bias=True, **dd) if in_chs > width else nn.Identity()
        self.conv1 = patch_convolution(min(in_chs, width), width, patch_stride, patch_padding, **dd)
        self.conv2 = ConvNormAct(width, width, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, width, H', W'). Raises ValueError if H or W is less than 9 − 2 · padding."""
        check_patch_size(x, self.backbone_stride, self.padding)
        return self.conv2(self.conv1(self.reduce(x)))


class PrimaryCapsules(nn.Module):
    """Primary capsules: one 9×9 convolution to ``capsules`` channels × ``capsule_dim``, BN, ReLU.

    Output channel c·D + d is dimension d of capsule channel c.

    Args:
        in_chs: channels of the backbone.
        capsules: 32 in the paper.
        capsule_dim: D, 16 in the paper.
        backbone_stride: for the error message on images that are too small.
        patch_stride: of the 9×9 convolution, 4 or 2.
        patch_padding: zeros around the feature map, 0 to 4.
        width_mult: of ``capsule_dim``.
    """
    kernel = PATCH_KERNEL
    head = DynamicRoutingHead
    default_pool = 'routing'

    def __init__(
            self,
            in_chs: int,
            capsules: int = 32,
            capsule_dim: int = 16,
            backbone_stride: int = 1,
            patch_stride: int = PATCH_STRIDE,
            patch_padding: int = 0,
            width_mult: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        self.backbone_stride = backbone_stride
        self.stride, self.padding = patch_stride, patch_padding
        self.capsules = capsules
        self.num_features = capsules * scale_width(capsule_dim, width_mult)
        self.conv = patch_convolution(
            in_chs, self.num_features, patch_stride, patch_padding, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, capsules·D, H', W'). Raises ValueError if H or W is less than 9 − 2 · padding."""
        check_patch_size(x, self.backbone_stride, self.padding)
        return self.conv(x)


@register_notrace_module  # reason: dtype dependent control flow
class CapsuleLength(nn.Module):
    """Eq. 11: length of each capsule, minus a learned offset b_c, ReLU.

    Args:
        capsules: C.
    """

    def __init__(self, capsules: int, device=None, dtype=None) -> None:
        super().__init__()
        self.capsules = capsules
        self.offset = nn.Parameter(torch.zeros(capsules, 1, 1, device=device, dtype=dtype))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The offsets are thresholds, not weights: they decay only where an optimizer lets biases and norms decay."""
        return {'offset'}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C·D, H', W') to (B, C, H', W')."""
        u = upcast(x).unflatten(1, (self.capsules, -1))
        return torch.relu(torch.linalg.vector_norm(u, dim=2).to(x.dtype) - self.offset)


class CapsulePatchLayers(nn.Module):
    """Primary capsules, their lengths (Eq. 11), and a 1×1 convolution to the second capsule layer, BN, ReLU.

    Each layer is one convolution; the paper's public code runs one small convolution per capsule unit.

    Args:
        in_chs: channels of the backbone.
        primary: (channels, dimension) of the primary capsules, (32, 16) in the paper.
        secondary: (channels, dimension) of the second layer, (64, 128) in the paper.
        backbone_stride: for the error message on images that are too small.
        patch_stride: of the 9×9 convolution, 4 or 2.
        patch_padding: zeros around the feature map, 0 to 4.
        width_mult: of the dimensions of all capsules, not of their numbers.
    """
    kernel = PATCH_KERNEL
    head = CapsuleLossAttentionHead
    default_pool = 'lossattn'

    def __init__(
            self,
            in_chs: int,
            primary: tuple[int, int] = (32, 16),
            secondary: tuple[int, int] = (64, 128),
            backbone_stride: int = 1,
            patch_stride: int = PATCH_STRIDE,
            patch_padding: int = 0,
            width_mult: float = 1.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.capsules = secondary[0]
        self.num_features = secondary[0] * scale_width(secondary[1], width_mult)
        self.stride, self.padding = patch_stride, patch_padding
        self.primary = PrimaryCapsules(
            in_chs, *primary, backbone_stride, patch_stride, patch_padding, width_mult, **dd)
        self.length = CapsuleLength(primary[0], **dd)
        self.secondary = ConvNormAct(primary[0], self.num_features, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, 64·128, H', W'). Raises ValueError if H or W is less than 9 − 2 · padding."""
        return self.secondary(self.length(self.primary(x)))
