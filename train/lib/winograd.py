"""3×3 convolutions by Winograd's minimal filtering, for training on CPUs: a quarter of the multiplications.

    changed = use_winograd(model)       # the same parameters, state-dict keys and results, to float32 rounding

F(4×4, 3×3) of A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): a tile of 4×4
outputs needs 6×6 inputs d and the 3×3 filter g, and

    y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A

is exact. Summed over channels, each of the 36 positions of ⊙ is a matrix product of all tiles with all filters: one
``torch.bmm`` with 36 · 4⁻² = 2.25 multiplications per output, channel and filter instead of 9. The interpolation points
are 0, ±3/4, ±3/2 and ∞. The paper's, 0, ±1, ±2 and ∞, cost as much and left four times the rounding error in float32;
with ours it is at most about twice that of the ordinary convolution, 2e-6 of the largest output.

Tensors in here are float32 and have their channels last: B images, H×W pixels, C channels in, K out; T = B · H/4 · W/4
tiles. The transforms touch every number once and cost as much as the product unless they are fused, which torch.compile
does (it needs a C++ compiler on the machine); everything else is eager.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['MIN_CHANNELS', 'WinogradConv2d', 'use_winograd', 'winograd_conv2d']

OUT, KERNEL = 4, 3
TILE = OUT + KERNEL - 1
POINTS = (0., 0.75, -0.75, 1.5, -1.5)  # and ∞; all numbers of Aᵀ and Bᵀ are exact in float32
MIN_CHANNELS = 128  # of the smaller side; at 64 the ordinary convolution is faster
MIN_TILES = 256  # with fewer, transforming the filters costs more than the product
MAX_PADDING = 1.3  # pixels with those that are padded, over pixels without

Matrix = list[list[float]]


def toom_cook(points: Sequence[float]) -> tuple[Matrix, Matrix, Matrix]:
    """Aᵀ (4, 6), G (6, 3) and Bᵀ (6, 6) for five finite points and ∞.

    A filter as a polynomial g(x) is evaluated at the points; transposing the interpolation of the product gives the
    filtering. Row j of Bᵀ holds the coefficients of Π_{i≠j} (x − p_i), which G divides by its value at p_j.
    """
    def product(roots: Sequence[float]) -> list[float]:
        coefficients = [1.]
        for root in roots:  # times (x − root), lowest power first
            coefficients = [low - root * high for low, high in zip([0., *coefficients], [*coefficients, 0.])]
        return coefficients

    a = [[float(p) ** i for p in points] + [float(i == OUT - 1)] for i in range(OUT)]
    g, b = [], []
    for j, point in enumerate(points):
        others = [p for i, p in enumerate(points) if i != j]
        scale = 1.
        for other in others:
            scale *= point - other
        g.append([point ** k / scale for k in range(KERNEL)])
        b.append([*product(others), 0.])
    return a, [*g, [0., 0., 1.]], [*b, product(points)]


A_T, _g, B_T = toom_cook(POINTS)
A = [list(column) for column in zip(*A_T)]
G = torch.tensor(_g)

# one program for all sizes; the default of 64 would split the 36 results and their parts among several loops
fused = torch.compile(dynamic=True, options={'max_fusion_size': 200})


def combine(row: Sequence[float], terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ row_i · terms_i without the zeros."""
    total: Any = None
    for factor, term in zip(row, terms):
        if factor:
            scaled = term if factor == 1. else factor * term
            total = scaled if total is None else total + scaled
    return total


def both_sides(matrix: Matrix, tile: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """matrix · tile · matrixᵀ for a tile whose entries are tensors: entry (i, j) of all tiles at once."""
    columns = list(zip(*tile))
    half = [[combine(row, column) for column in columns] for row in matrix]
    return [[combine(row, line) for row in matrix] for line in half]


@fused
def input_transform(x: torch.Tensor) -> torch.Tensor:
    """Bᵀ d B of every tile: (B, H + 2, W + 2, C), padded, to (36, B, H/4, W/4, C)."""
    h, w = x.shape[1] - TILE + OUT, x.shape[2] - TILE + OUT
    tile = [[x[:, i:i + h:OUT, j:j + w:OUT] for j in range(TILE)] for i in range(TILE)]
    return torch.stack([entry for line in both_sides(B_T, tile) for entry in line])


@fused
def output_transform(m: torch.Tensor) -> torch.Tensor:
    """Aᵀ m A of every tile: (6, 6, B, H/4, W/4, K) to (B, H/4, 4, W/4, 4, K), in memory the image."""
    tile = both_sides(A_T, [[m[i, j] for j in range(TILE)] for i in range(TILE)])
    return torch.stack([torch.stack(row, 3) for row in tile], 2)


@fused
def output_adjoint(y: torch.Tensor) -> torch.Tensor:
    """A y Aᵀ of every tile, the adjoint of ``output_transform``: (B, H, W, K) to (36, B, H/4, W/4, K)."""
    tile = [[y[:, i::OUT, j::OUT] for j in range(OUT)] for i in range(OUT)]
    return torch.stack([entry for line in both_sides(A, tile) for entry in line])


def filters(weight: torch.Tensor) -> torch.Tensor:
    """G g Gᵀ of every filter: (K, C, 3, 3) to (36, C, K)."""
    return torch.einsum('ia,jb,kcab->ijck', G, G, weight).flatten(0, 1).contiguous()


def pad_image(x: torch.Tensor, border: int) -> torch.Tensor:
    """Zeros around (B, H, W, C): ``border`` on each side, and to a multiple of 4 pixels at the right and the bottom."""
    bottom, right = -x.shape[1] % OUT, -x.shape[2] % OUT
    if not (border or bottom or right):
        return x
    return F.pad(x, (0, 0, border, border + right, border, border + bottom))


def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """3×3 convolution with padding 1: (B, H, W, C) and (K, C, 3, 3) to (B, H, W, K)."""
    tiles = input_transform(pad_image(x, 1))
    shape = tiles.shape[1:4]
    product = torch.bmm(tiles.flatten(1, 3), filters(weight))
    del tiles  # the largest tensor of all
    y = output_transform(product.view(TILE, TILE, *shape, -1))
    y = y.view(shape[0], OUT * shape[1], OUT * shape[2], -1)
    return y[:, :x.shape[1], :x.shape[2]].contiguous()  # no copy if nothing was cut off


class WinogradFunction(torch.autograd.Function):
    """The convolution and its exact gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C), contiguous, and (K, C, 3, 3) to (B, H, W, K)."""
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of the input, the same convolution with flipped filters; of the filters, a product over all tiles."""
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = convolve(grad, weight.transpose(0, 1).flip(2, 3))
        if ctx.needs_input_grad[1]:
            tiles = input_transform(pad_image(x, 1)).flatten(1, 3)  # again: keeping them would take 2.25 times x
            product = torch.bmm(tiles.transpose(1, 2), output_adjoint(pad_image(grad, 0)).flatten(1, 3))
            grad_weight = torch.einsum('ia,jb,ijck->kcab', G, G, product.unflatten(0, (TILE, TILE)))
        return grad_x, grad_weight


def winograd_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, padding=1)`` for float32 on the CPU.

    Args:
        x: (B, C, H, W), best in channels_last.
        weight: (K, C, 3, 3).
        bias: (K,).

    Returns:
        (B, K, H, W) in channels_last.
    """
    y = WinogradFunction.apply(x.permute(0, 2, 3, 1).contiguous(), weight)
    return (y if bias is None else y + bias).permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """What ``use_winograd`` makes of a suitable convolution: the faster way where it can, else the ordinary."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, K, H, W)."""
        if self.fits(x):
            return winograd_conv2d(x, self.weight, self.bias)
        return super().forward(x)

    def fits(self, x: torch.Tensor) -> bool:
        """Float32 on the CPU outside of autocast, compilation and export; tiles enough, and little to pad."""
        if x.dim() != 4 or not x.numel() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.device.type != 'cpu' or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return False
        if torch.is_autocast_enabled('cpu'):
            return False
        h, w = x.shape[-2:]
        pixels = (h + -h % OUT) * (w + -w % OUT)
        return pixels <= MAX_PADDING * h * w and len(x) * pixels >= OUT * OUT * MIN_TILES


def suitable(module: nn.Module) -> bool:
    """Whether it is a plain 3×3 convolution of stride 1, padding 1 and enough channels to be faster this way."""
    return (
        type(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.stride == (1, 1)
        and module.padding in ((1, 1), 'same') and module.padding_mode == 'zeros' and module.dilation == (1, 1)
        and module.groups == 1 and min(module.in_channels, module.out_channels) >= MIN_CHANNELS)


def use_winograd(model: nn.Module) -> int:
    """Make every convolution that gains from it a ``WinogradConv2d``.

    Args:
        model: changed in place; parameters, hooks and keys of the state dict stay.

    Returns:
        How many were changed.
    """
    found = [module for module in model.modules() if suitable(module)]
    for module in found:
        module.__class__ = WinogradConv2d
    return len(found)
