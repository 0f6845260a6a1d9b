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


class WindowLayers(nn.Module):
    """Base of the layers whose patches are windows of 9×9 positions of the backbone's feature map.

    Args:
        backbone_stride: for the error message on images that are too small.
        patch_stride: positions from one window to the next, 4 or 2.
        patch_padding: zeros around the feature map, 0 to 4; with more, a window could lie outside of the map.

    Raises:
        ValueError: another stride or padding.
    """
    kernel = PATCH_KERNEL

    def __init__(self, backbone_stride: int, patch_stride: int, patch_padding: int) -> None:
        super().__init__()
        if patch_stride not in PATCH_STRIDES:
            raise ValueError(f'patch_stride must be one of {PATCH_STRIDES}, got {patch_stride!r}.')
        if patch_padding not in range(PATCH_KERNEL // 2 + 1):
            raise ValueError(f'patch_padding must lie in 0 to {PATCH_KERNEL // 2}, got {patch_padding!r}.')
        self.backbone_stride, self.stride, self.padding = backbone_stride, patch_stride, patch_padding

    def window_convolution(self, in_chs: int, out_chs: int, device: Any = None, dtype: Any = None) -> ConvNormAct:
        """The convolution over the windows: with bias, batch norm and ReLU."""
        return ConvNormAct(
            in_chs, out_chs, PATCH_KERNEL, stride=self.stride, padding=self.padding, bias=True, device=device,
            dtype=dtype)


class ConvPatchLayers(WindowLayers):
    """9×9 convolution and 1×1 convolution, each with batch norm and ReLU.

    Args:
        in_chs: channels of the backbone. Wider than ``width``: a 1×1 convolution, BN, ReLU comes first.
        width: 512 in the paper.
        backbone_stride, patch_stride, patch_padding: see WindowLayers.
        width_mult: of ``width``.
    """
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
        super().__init__(backbone_stride, patch_stride, patch_padding)
        width = scale_width(width, width_mult)
        self.num_features = width
        self.capsules = 0
        self.reduce = ConvNormAct(in_chs, width, 1, bias=True, **dd) if in_chs > width else nn.Identity()
        self.conv1 = self.window_convolution(min(in_chs, width), width, **dd)
        self.conv2 = ConvNormAct(width, width, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, width, H', W'). Raises ValueError if H or W is less than 9 − 2 · padding."""
        check_patch_size(x, self.backbone_stride, self.padding)
        return self.conv2(self.conv1(self.reduce(x)))


class PrimaryCapsules(WindowLayers):
    """Primary capsules: one 9×9 convolution to ``capsules`` channels × ``capsule_dim``, BN, ReLU.

    Output channel c·D + d is dimension d of capsule channel c.

    Args:
        in_chs: channels of the backbone.
        capsules: 32 in the paper.
        capsule_dim: D, 16 in the paper.
        backbone_stride, patch_stride, patch_padding: see WindowLayers.
        width_mult: of ``capsule_dim``.
    """
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
        super().__init__(backbone_stride, patch_stride, patch_padding)
        self.capsules = capsules
        self.num_features = capsules * scale_width(capsule_dim, width_mult)
        self.conv = self.window_convolution(in_chs, self.num_features, device=device, dtype=dtype)

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
        self.offset = nn.Parameter(torch.empty(capsules, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No offset."""
        nn.init.zeros_(self.offset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The offsets are thresholds, not weights: they decay only where an optimizer lets biases and norms decay."""
        return {'offset'}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C·D, H', W') to (B, C, H', W')."""
        u = upcast(x).unflatten(1, (self.capsules, -1))
        return torch.relu(torch.linalg.vector_norm(u, dim=2).to(x.dtype) - self.offset)


class CapsulePatchLayers(WindowLayers):
    """Primary capsules, their lengths (Eq. 11), and a 1×1 convolution to the second capsule layer, BN, ReLU.

    Each layer is one convolution; the paper's public code runs one small convolution per capsule unit.

    Args:
        in_chs: channels of the backbone.
        primary: (channels, dimension) of the primary capsules, (32, 16) in the paper.
        secondary: (channels, dimension) of the second layer, (64, 128) in the paper.
        backbone_stride, patch_stride, patch_padding: see WindowLayers.
        width_mult: of the dimensions of all capsules, not of their numbers.
    """
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
        super().__init__(backbone_stride, patch_stride, patch_padding)
        self.capsules = secondary[0]
        self.num_features = secondary[0] * scale_width(secondary[1], width_mult)
        self.primary = PrimaryCapsules(
            in_chs, *primary, backbone_stride, patch_stride, patch_padding, width_mult, **dd)
        self.length = CapsuleLength(primary[0], **dd)
        self.secondary = ConvNormAct(primary[0], self.num_features, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, 64·128, H', W'). Raises ValueError if H or W is less than 9 − 2 · padding."""
        return self.secondary(self.length(self.primary(x)))
