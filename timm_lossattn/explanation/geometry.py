"""From patches to pixels: heat maps and boxes in the coordinates of the model's input."""
import torch

__all__ = ['patches_to_pixels', 'square_box']


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


def square_box(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Smallest square that contains all boxes, moved into the image; clipped if the image is narrower than it.

    Args:
        boxes: (N, 4) with N > 0.
        size: (H, W) of the image.

    Returns:
        (4,) x0, y0, x1, y1.
    """
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    limit = torch.tensor([size[1], size[0]])
    side = (high - low).max()
    start = torch.div(low + high - side, 2, rounding_mode='floor')
    start = start.minimum(limit - side).clamp(min=0)
    return torch.cat([start, (start + side).minimum(limit)])
