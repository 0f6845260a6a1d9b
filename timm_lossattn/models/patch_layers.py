"""The two layers between backbone and head: feature map (B, C, H, W) -> patch features (B, C', H', W').

Attributes of all: ``kernel`` and ``stride``, the positions of the backbone's feature map that a patch covers, and from
one to the next; ``num_features``, C'; ``capsules``, capsule channels in C' or 0; ``head``, the class of heads that such
features go to, and ``default_pool``, its global_pool.

Each patch is a 9×9 window of the backbone's feature map, one every 4 positions: H' = (H − 9) // 4 + 1. Convolutions
keep their bias before batch norm, as in the paper, whose parameter counts include them.
"""
import torch
from timm.layers import ConvNormAct
from timm.models import register_notrace_function, register_notrace_module
from torch import nn

from ..attention import CapsuleLossAttentionHead, ConvPatchHead, DynamicRoutingHead
from ..prediction import upcast

__all__ = ['PATCH_KERNEL', 'PATCH_STRIDE', 'CapsulePatchLayers', 'ConvPatchLayers', 'NoPatchLayers', 'PrimaryCapsules']

PATCH_KERNEL = 9
PATCH_STRIDE = 4


@register_notrace_function  # reason: the sizes are data to FX
def check_patch_size(x: torch.Tensor, backbone_stride: int, kernel: int = PATCH_KERNEL) -> None:
    """ValueError unless the feature map holds one patch. (TorchScript sees a default argument, not a global.)"""
    if x.shape[-2] < kernel or x.shape[-1] < kernel:
        minimum = (kernel - 1) * backbone_stride + 1
        raise ValueError(
            f'Input too small for one patch: height and width must be at least {minimum} pixels at '
            f'backbone_stride={backbone_stride}; the backbone gave a {x.shape[-2]}x{x.shape[-1]} feature map.')


class NoPatchLayers(nn.Module):
    """For plain classifiers: each position of the backbone's feature map is a patch.

    Args:
        in_chs: channels of the backbone.
        backbone_stride: pixels from patch to patch.
    """
    kernel, stride = 1, 1
    head = ConvPatchHead
    default_pool = 'avg'

    def __init__(self, in_chs: int, backbone_stride: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        self.capsules = 0
        self.num_features = in_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The feature map itself."""
        return x


class ConvPatchLayers(nn.Module):
    """9×9 convolution of stride 4 and 1×1 convolution, each with batch norm and ReLU.

    Args:
        in_chs: channels of the backbone. Wider than ``width``: a 1×1 convolution, BN, ReLU comes first.
        width: 512 in the paper.
        backbone_stride: for the error message on images that are too small.
    """
    kernel, stride = PATCH_KERNEL, PATCH_STRIDE
    head = ConvPatchHead
    default_pool = 'lossattn'

    def __init__(self, in_chs: int, width: int = 512, backbone_stride: int = 1, device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.backbone_stride = backbone_stride
        self.num_features = width
        self.capsules = 0
        self.reduce = ConvNormAct(in_chs, width, 1, bias=True, **dd) if in_chs > width else nn.Identity()
        self.conv1 = ConvNormAct(
            min(in_chs, width), width, PATCH_KERNEL, stride=PATCH_STRIDE, padding=0, bias=True, **dd)
        self.conv2 = ConvNormAct(width, width, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, width, H', W'). Raises ValueError if H or W is less than 9."""
        check_patch_size(x, self.backbone_stride)
        return self.conv2(self.conv1(self.reduce(x)))


class PrimaryCapsules(nn.Module):
    """Primary capsules: one 9×9 convolution of stride 4 to ``capsules`` channels × ``capsule_dim``, BN, ReLU.

    Output channel c·D + d is dimension d of capsule channel c.

    Args:
        in_chs: channels of the backbone.
        capsules: 32 in the paper.
        capsule_dim: D, 16 in the paper.
        backbone_stride: for the error message on images that are too small.
    """
    kernel, stride = PATCH_KERNEL, PATCH_STRIDE
    head = DynamicRoutingHead
    default_pool = 'routing'

    def __init__(
            self,
            in_chs: int,
            capsules: int = 32,
            capsule_dim: int = 16,
            backbone_stride: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        self.backbone_stride = backbone_stride
        self.capsules = capsules
        self.num_features = capsules * capsule_dim
        self.conv = ConvNormAct(
            in_chs, self.num_features, PATCH_KERNEL, stride=PATCH_STRIDE, padding=0, bias=True,
            device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, capsules·D, H', W'). Raises ValueError if H or W is less than 9."""
        check_patch_size(x, self.backbone_stride)
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
        """The offsets are thresholds, not weights."""
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
    """
    kernel, stride = PATCH_KERNEL, PATCH_STRIDE
    head = CapsuleLossAttentionHead
    default_pool = 'lossattn'

    def __init__(
            self,
            in_chs: int,
            primary: tuple[int, int] = (32, 16),
            secondary: tuple[int, int] = (64, 128),
            backbone_stride: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.capsules = secondary[0]
        self.num_features = secondary[0] * secondary[1]
        self.primary = PrimaryCapsules(in_chs, *primary, backbone_stride=backbone_stride, **dd)
        self.length = CapsuleLength(primary[0], **dd)
        self.secondary = ConvNormAct(primary[0], self.num_features, 1, bias=True, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chs, H, W) to (B, 64·128, H', W'). Raises ValueError if H or W is less than 9."""
        return self.secondary(self.length(self.primary(x)))
