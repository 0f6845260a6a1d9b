#!/usr/bin/env python3
"""Capsule layers as one convolution each against the same mathematics as loops over capsule units.

    python train/benchmark_capsules.py [--batch-size N] [--device DEVICE]

The loop version runs 16 convolutions for the primary capsules (one a dimension) and 128 for the second layer (one a
dimension), each with its own batch norm and ReLU, and then the same Eq. 6 head. It holds the same weights, so that
outputs and input gradients can be compared before anything is timed. Prints both times and their ratio as JSON.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from timm_lossattn.attention import CapsuleLossAttentionHead
from timm_lossattn.models.patch_layers import CapsulePatchLayers


class LoopedConv(nn.Module):
    """A ConvNormAct of C·D channels as D convolutions of C channels, stacked to (B, C, D, H', W')."""

    def __init__(self, layer: nn.Module, capsules: int) -> None:
        super().__init__()
        conv, bn = layer.conv, layer.bn
        dims = conv.out_channels // capsules
        self.units = nn.ModuleList()
        for d in range(dims):
            rows = slice(d, None, dims)  # channel c·D + d
            unit = nn.Conv2d(conv.in_channels, capsules, conv.kernel_size, stride=conv.stride)
            norm = nn.BatchNorm2d(capsules)
            with torch.no_grad():
                unit.weight.copy_(conv.weight[rows])
                unit.bias.copy_(conv.bias[rows])
                norm.weight.copy_(bn.weight[rows])
                norm.bias.copy_(bn.bias[rows])
            self.units.append(nn.Sequential(unit, norm, nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([unit(x) for unit in self.units], dim=2)


class LoopedCapsules(nn.Module):
    """CapsulePatchLayers with loops over units."""

    def __init__(self, layers: CapsulePatchLayers) -> None:
        super().__init__()
        self.primary = LoopedConv(layers.primary.conv, layers.primary.capsules)
        self.offset = nn.Parameter(layers.length.offset.detach().clone())
        self.secondary = LoopedConv(layers.secondary, layers.capsules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.relu(torch.linalg.vector_norm(self.primary(x), dim=2) - self.offset)
        return self.secondary(lengths).flatten(1, 2)


def step(layers: nn.Module, head: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward; logits and the gradient with respect to x."""
    x = x.detach().requires_grad_()
    logits = head(layers(x)).logits
    logits.square().sum().backward()
    return logits.detach(), x.grad


def seconds(function: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device != 'cpu':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--minimum', type=float, default=1.5, help='exit with 1 under this median ratio')
    args = parser.parse_args()

    torch.manual_seed(0)
    layers = CapsulePatchLayers(512)
    looped = LoopedCapsules(layers)
    head = CapsuleLossAttentionHead(64, 128, 10)
    for module in (layers, looped, head):
        module.to(args.device).train()
    x = torch.randn(args.batch_size, 512, 32, 32, device=args.device)

    one, many = step(layers, head, x), step(looped, head, x)
    for name, a, b in zip(('logits', 'input gradients'), one, many):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f'{n} differ: {m}')
    pairs = [(seconds(lambda: step(layers, head, x), args.device, 1)[0],
              seconds(lambda: step(looped, head, x), args.device, 1)[0]) for _ in range(args.repeats)]
    ratios = sorted(b / a for a, b in pairs)
    print(json.dumps({
        'batch_size': args.batch_size,
        'device': torch.cuda.get_device_name() if args.device != 'cpu' else f'CPU, {torch.get_num_threads()} threads',
        'one_convolution_seconds': [round(a, 4) for a, _ in pairs],
        'loops_seconds': [round(b, 4) for _, b in pairs],
        'median_ratio_loops_over_one': round(ratios[len(ratios) // 2], 2),
    }, indent=2))
    return 0 if ratios[len(ratios) // 2] >= args.minimum else 1


if __name__ == '__main__':
    sys.exit(main())
