"""From patches to pixels: heat maps and boxes in the coordinates of the model's input."""
from collections.abc import Sequence

import numpy as np
import torch

__all__ = [
    'cell_edges', 'inside_boxes', 'interpolate', 'patch_scores', 'patches_to_pixels', 'share_of_positive',
    'spread_over_neighbours', 'square_box',
]


def cell_edges(spans: np.ndarray) -> np.ndarray:
    """Where the cells of a picture's grid begin and end along one axis.

    Patches may overlap; the cell of a patch is what is nearer to its middle than to another's, within all patches.

    Args:
        spans: (N, 2) start and end of each patch, in order.

    Returns:
        (N + 1,), for patches that lie side by side their own borders.
    """
    middles = spans.mean(axis=1)
    return np.concatenate([spans[:1, 0], (middles[:-1] + middles[1:]) / 2., spans[-1:, 1]])


def interpolate(
        values: np.ndarray, rows: np.ndarray, columns: np.ndarray, y: np.ndarray, x: np.ndarray,
        smooth: bool = True) -> np.ndarray:
    """Values of a grid of patches at points: bilinear between the patches' middles, 0 where there is no patch.

    Args:
        values: (H', W').
        rows: (H', 2) start and end of each row of patches.
        columns: (W', 2) of each column.
        y: (H,) places of the points' rows, in the same unit.
        x: (W,) places of their columns.
        smooth: False takes the value of the patch whose middle is nearest.

    Returns:
        (H, W) float64, between the smallest and the largest of the values, or 0.
    """
    def weights(spans: np.ndarray, at: np.ndarray) -> np.ndarray:
        middles, edges = spans.mean(axis=1), cell_edges(spans)
        inside = (at >= edges[0]) & (at < edges[-1])
        if smooth:
            share = np.stack([np.interp(at, middles, one) for one in np.eye(len(spans))], axis=1)
        else:
            share = np.eye(len(spans))[np.searchsorted(edges[1:-1], at, side='right')]
        return share * inside[:, None]
    return weights(rows, y) @ values @ weights(columns, x).T


def patches_to_pixels(values: torch.Tensor, patch_boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Spread the value of each patch over its nominal pixels, averaged where patches overlap.

    Args:
        values: (B, M).
        patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive).
        size: (H, W) of the map.

    Returns:
        (B, H, W); pixels that no patch covers nominally (a margin at the right and bottom) are NaN.
    """
    total = values.new_zeros((len(values), *size))
    count = values.new_zeros(size)
    for m, (x0, y0, x1, y1) in enumerate(patch_boxes.tolist()):
        total[:, y0:y1, x0:x1] += values[:, m, None, None]
        count[y0:y1, x0:x1] += 1
    return total / count.where(count > 0, torch.nan)


def spread_over_neighbours(
        values: torch.Tensor, patch_logits: torch.Tensor, grid: tuple[int, int], sigma: float,
        independent: bool = False) -> torch.Tensor:
    """Spread what each patch says over the patches near it that the model takes for the same. The sum stays what it is.

    Patch m gives its value away in parts proportional to exp(−d²/2σ²) · (Σ_k √(p_mk p_nk))², with d the distance to
    patch n and p the softmax of a patch's logits; the sum over k is the coefficient of A. Bhattacharyya (1943), 1 for
    patches that say the same and 0 for those that have no class in common. For independent classes it is the product
    over classes, Π_k (√(p_mk p_nk) + √((1 − p_mk)(1 − p_nk))), with p the sigmoid. So a map is smoothed within what the
    model takes for one thing, and not across its border: as a bilateral filter does with colours (C. Tomasi and
    R. Manduchi, 1998).

    Args:
        values: (B, M), of any sign.
        patch_logits: (B, M, K), or (1, M, K) for all B.
        grid: (H', W') with H'·W' = M.
        sigma: σ of the Gaussian, in steps of the grid; 0 leaves the values as they are.
        independent: classes are independent (multi-label, or a single one).

    Returns:
        (B, M).

    Raises:
        ValueError: sigma is negative.
    """
    if sigma < 0:
        raise ValueError(f'sigma must not be negative, got {sigma}.')
    if sigma == 0:
        return values
    rows, columns = (torch.arange(n, device=values.device).double() for n in grid)
    places = torch.cartesian_prod(rows, columns).view(-1, 2)
    near = torch.exp(-torch.cdist(places, places) ** 2 / (2. * sigma ** 2))  # (M, M)
    if independent:
        alike = torch.ones((), dtype=torch.float64, device=values.device)
        for logit in patch_logits.double().unbind(dim=2):
            roots = torch.stack([logit, -logit], dim=2).sigmoid().sqrt()  # of the class and of its absence
            alike = alike * torch.bmm(roots, roots.transpose(1, 2))
    else:
        roots = patch_logits.double().softmax(dim=2).sqrt()
        alike = torch.bmm(roots, roots.transpose(1, 2))
    parts = near * alike ** 2  # (B or 1, M, M)
    parts = parts / parts.sum(dim=2, keepdim=True)  # what patch m gives to each patch n
    return (values.double().unsqueeze(1) @ parts).squeeze(1).to(values.dtype)


def share_of_positive(heat: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Σ_inside max(h, 0) / Σ max(h, 0) of (B, H, W) maps: (B,); 0 where nothing is positive: none may abstain."""
    positive = heat.nan_to_num(0.).clamp(min=0).double()
    total = positive.sum(dim=(1, 2))
    return ((positive * inside).sum(dim=(1, 2)) / total.where(total > 0, 1.)).float()


def inside_boxes(boxes: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Pixels whose middle lies in one of an image's boxes.

    Args:
        boxes: B tensors (L, 4), x0, y0, x1, y1 in pixels, of whole or broken numbers; L may be 0.
        size: (H, W).

    Returns:
        (B, H, W) bool, on the CPU.
    """
    y, x = torch.arange(size[0], device='cpu')[:, None] + 0.5, torch.arange(size[1], device='cpu')[None] + 0.5
    result = torch.zeros(len(boxes), *size, dtype=torch.bool, device='cpu')
    for mask, truth in zip(result, boxes):
        x0, y0, x1, y1 = truth.cpu().reshape(-1, 4).T[..., None, None]
        mask |= ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).any(dim=0)
    return result


def square_box(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Smallest square that contains all boxes, moved into the image; clipped if the image is narrower than it.

    Args:
        boxes: (N, 4) with N > 0.
        size: (H, W) of the image.

    Returns:
        (4,) x0, y0, x1, y1.
    """
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    limit = torch.tensor([size[1], size[0]], device=boxes.device)
    side = (high - low).max()
    start = torch.div(low + high - side, 2, rounding_mode='floor')
    start = start.minimum(limit - side).clamp(min=0)
    return torch.cat([start, (start + side).minimum(limit)])


def patch_scores(heat: torch.Tensor, patch_boxes: torch.Tensor) -> torch.Tensor:
    """Mean of a heat map over each patch's pixels.

    Args:
        heat: (B, H, W); NaN where the map says nothing.
        patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive).

    Returns:
        (B, M).
    """
    return torch.stack([heat[:, y0:y1, x0:x1].nanmean(dim=(1, 2)) for x0, y0, x1, y1 in patch_boxes.tolist()], dim=1)
