"""Does a heat map point at the object? Pointing game, energy pointing, grid pointing.

They judge any heat map (B, H, W), ours or another tool's; NaN where the map says nothing. Boxes are x0, y0, x1, y1 in
pixels, x1 and y1 exclusive. Only the positive part of a map, what speaks for the class, counts in the last two.
"""
from collections.abc import Sequence
from typing import Any

import torch

from ..explanation.geometry import inside_boxes, share_of_positive
from .per_image import PerImage

__all__ = ['EnergyPointing', 'GridPointing', 'PointingGame', 'choose_grids', 'make_grids']


class PointingGame(PerImage):
    """Whether the hottest pixel lies in one of the image's boxes; of several hottest ones, the share that does.

    J. Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, without its margin of 15 pixels,
    and averaged over images, not over categories.
    """

    def measure(self, heat: torch.Tensor, boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Heat maps (B, H, W) and B tensors of boxes (L, 4) to (B,) in [0, 1]; NaN for an image without box or map."""
        result = []
        for one, inside in zip(heat, inside_boxes(boxes, (heat.shape[1], heat.shape[2])).to(heat.device)):
            hottest = one == one.nan_to_num(-torch.inf).max()
            result.append(inside[hottest].float().mean() if inside.any() else heat.new_tensor(torch.nan))
        return torch.stack(result)


class EnergyPointing(PerImage):
    """Share of the positive heat that lies in the image's boxes: Σ_{in box} max(h, 0) / Σ max(h, 0).

    H. Wang et al., "Score-CAM", CVPR workshops 2020. A map without anything positive has 0.
    """

    def measure(self, heat: torch.Tensor, boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Heat maps (B, H, W) and B tensors of boxes (L, 4) to (B,) in [0, 1]; NaN for an image without box."""
        inside = inside_boxes(boxes, (heat.shape[1], heat.shape[2])).to(heat.device)
        return share_of_positive(heat, inside).where(inside.flatten(1).any(dim=1), torch.nan)


class GridPointing(PerImage):
    """Share of the positive heat for a class that lies in the cell that shows it, in a grid of n × n images.

    M. Böhle et al., "Convolutional Dynamic Alignment Networks for Interpretable Classifications", CVPR 2021, and
    "B-cos Networks", CVPR 2022. A map that is the same everywhere has 1 / n².

    Args:
        n: cells a side.
    """

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = n

    def measure(self, heat: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
        """Heat maps (B, H, W) for the class of one cell, and the cells (B,), counted by rows from 0, to (B,) in [0, 1].

        Raises:
            ValueError: the maps cannot be divided into n × n cells.
        """
        B, H, W = heat.shape
        if H % self.n or W % self.n:
            raise ValueError(f'heat must have a height and width that {self.n} divides, got {H}×{W}.')
        rows = torch.arange(H, device=heat.device) // (H // self.n)
        columns = torch.arange(W, device=heat.device) // (W // self.n)
        which = rows[:, None] * self.n + columns
        return share_of_positive(heat, which == cell.to(heat.device).view(B, 1, 1))


def choose_grids(
        confidence: torch.Tensor, label: torch.Tensor, right: torch.Tensor, n: int, limit: int) -> list[list[int]]:
    """Which images make up grids: distinct classes in a grid, each image at most once, the most confident first.

    Because no image stands in two grids, grids are independent, and an interval over grids is honest.

    Args:
        confidence: (N,) probability of the own label.
        label: (N,) classes.
        right: (N,) bool, classified as the own label; others are never taken.
        n: cells a side.
        limit: grids at most.

    Returns:
        Up to ``limit`` lists of n² indices; the place of a class in a grid is random, with a fixed seed.
    """
    order = confidence.argsort(descending=True, stable=True).tolist()
    left = {k: [i for i in order if right[i] and int(label[i]) == k] for k in sorted(set(label.tolist()))}
    generator = torch.Generator().manual_seed(0)
    grids: list[list[int]] = []
    while len(grids) < limit:
        # of the classes with most images left, so that they last
        classes = sorted((k for k in left if left[k]), key=lambda k: -len(left[k]))[:n * n]
        if len(classes) < n * n:
            break
        places = torch.randperm(n * n, generator=generator).tolist()
        grids.append([left[classes[place]].pop(0) for place in places])
    return grids


def make_grids(images: torch.Tensor, n: int) -> torch.Tensor:
    """Images (G·n², C, H, W) to grids of n × n of them, row by row: (G, C, n·H, n·W)."""
    N, C, H, W = images.shape
    grids = images.view(N // n ** 2, n, n, C, H, W).permute(0, 3, 1, 4, 2, 5)
    return grids.reshape(N // n ** 2, C, n * H, n * W)
