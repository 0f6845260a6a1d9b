"""Wide strided convolutions as a gather and one matrix product: for the 9×9 patch convolution in bfloat16 on CPUs.

    changed = use_gathered(model)       # the same parameters, state-dict keys and results, to rounding

PyTorch's own convolution (oneDNN) is fast for 3×3 filters, but slow for a 9×9 filter with stride 4 in bfloat16
(training steps are measured in TRAINING.md, "Speed and memory"). Here the windows of an image are copied into
the rows of a matrix, (B · H' · W', 9 · 9 · C), and output and both gradients are products with it. In channels-last
layout the copy moves whole runs of C numbers, and with stride 4 each number goes to at most nine windows.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['gathered_conv2d', 'use_gathered']

MIN_KERNEL = 5  # 3×3 filters are Winograd's and oneDNN's
MAX_OVERLAP = 3  # kernel over stride: the matrix holds its square times as many numbers as the image
MIN_CHANNELS = 16  # numbers that a copy moves at once


def windows(x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """All windows of (B, H, W, C), contiguous: (B, H', W', kernel, kernel, C), a view."""
    batch, height, width, channels = x.shape
    b, h, w, c = x.stride()
    size = tuple((length - k) // s + 1 for length, k, s in zip((height, width), kernel, stride))
    return x.as_strided((batch, *size, *kernel, channels), (b, h * stride[0], w * stride[1], h, w, c))


class GatheredFunction(torch.autograd.Function):
    """The convolution without padding, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
        """(B, H, W, C) and (K, kernel, kernel, C), contiguous, to (B, H', W', K)."""
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        parts = windows(x, weight.shape[1:3], stride)
        product = parts.reshape(-1, weight[0].numel()) @ weight.flatten(1).t()
        return product.view(*parts.shape[:3], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Of the input, each window's share added where it was taken from, in float32; of the filters, a product."""
        x, weight = ctx.saved_tensors
        kernel = weight.shape[1:3]
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            shares = (rows @ weight.flatten(1)).view(*grad.shape[:3], *weight.shape[1:])
            total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            taken = windows(total, kernel, ctx.stride)
            for i in range(kernel[0]):
                for j in range(kernel[1]):  # one position of all windows: no number twice
                    taken[:, :, :, i, j] += shares[:, :, :, i, j]
            grad_x = total.to(x.dtype)
            del shares, total, taken  # as large as what comes next
        if ctx.needs_input_grad[1]:
            gathered = windows(x, kernel, ctx.stride).reshape(len(rows), -1)  # again: keeping them takes five times x
            grad_weight = (rows.t() @ gathered).view_as(weight)
        return grad_x, grad_weight, None


def gathered_conv2d(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int],
        padding: tuple[int, int]) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)``.

    Args:
        x: (B, C, H, W), best in channels_last.
        weight: (K, C, kernel, kernel), best in channels_last.
        bias: (K,).
        stride: rows and columns from window to window.
        padding: rows and columns of zeros on each side.

    Returns:
        (B, K, H', W') in channels_last.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    y = GatheredFunction.apply(x.permute(0, 2, 3, 1).contiguous(), weight.permute(0, 2, 3, 1).contiguous(), stride)
    return (y if bias is None else y + bias.to(y.dtype)).permute(0, 3, 1, 2)


class GatheredConv2d(nn.Conv2d):
    """What ``use_gathered`` makes of a suitable convolution: gathered if the input allows it, else the ordinary way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, K, H', W')."""
        if self.fits(x):
            return gathered_conv2d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]
        return super().forward(x)

    def fits(self, x: torch.Tensor) -> bool:
        """A batch of images with a window, on the CPU, outside of compilation and export."""
        if x.device.type != 'cpu' or x.dim() != 4 or not x.numel():
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        sizes: Any = zip(x.shape[-2:], self.padding, self.kernel_size)
        return all(size + 2 * padding >= kernel for size, padding, kernel in sizes)


def suitable(module: nn.Module) -> bool:
    """Whether it is a plain convolution whose filters are wide, whose windows move on, and that has channels enough."""
    return (
        type(module) is nn.Conv2d and min(module.kernel_size) >= MIN_KERNEL
        and all(kernel <= MAX_OVERLAP * stride for kernel, stride in zip(module.kernel_size, module.stride))
        and not isinstance(module.padding, str) and module.padding_mode == 'zeros' and module.dilation == (1, 1)
        and module.groups == 1 and min(module.in_channels, module.out_channels) >= MIN_CHANNELS)


def use_gathered(model: nn.Module) -> int:
    """Make every convolution that it suits a ``GatheredConv2d``.

    Args:
        model: changed in place; parameters, hooks and keys of the state dict stay.

    Returns:
        How many were changed.
    """
    found = [module for module in model.modules() if suitable(module)]
    for module in found:
        module.__class__ = GatheredConv2d
    return len(found)
