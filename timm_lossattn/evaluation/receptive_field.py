"""How much of the image a patch really sees: its effective receptive field.

As W. Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks": the gradient of
one patch's output with respect to the input, here of its logit for the predicted class.
"""
from typing import Any

import torch

__all__ = ['influence', 'middle_patch', 'share_in_box', 'side_for', 'square_shares']


def middle_patch(model: Any, height: int, width: int) -> tuple[int, list[int]]:
    """Index and box (x0, y0, x1, y1) of the patch in the middle of the grid, for an input of height × width pixels."""
    rows, columns = model.patch_grid(height, width)
    patch = rows // 2 * columns + columns // 2
    return patch, model.patch_boxes(height, width)[patch].tolist()


def share_in_box(influence: torch.Tensor, box: list[int]) -> float:
    """Share of an (H, W) influence that lies in a box x0, y0, x1, y1 (exclusive)."""
    x0, y0, x1, y1 = box
    return float(influence[y0:y1, x0:x1].sum() / influence.sum())


def influence(model: Any, x: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, H, W) images to (B, H, W): Σ_channels |∂ p_mk / ∂ x| for patch m and the predicted class k."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        prediction = model.forward_patches(x)
        k = prediction.logits.argmax(dim=1, keepdim=True)
        # images do not influence each other in eval mode, so the gradient of the sum holds each image's own
        (gradient,) = torch.autograd.grad(prediction.patch_logits[:, patch].gather(1, k).sum(), x)
    return gradient.abs().sum(dim=1)


def square_shares(influence: torch.Tensor, box: list[int]) -> dict[int, float]:
    """Side of a square around the box's centre -> share of an (H, W) influence in it, until it holds all.

    Args:
        influence: (H, W).
        box: x0, y0, x1, y1 (exclusive); only sides of the parity of its width consist of whole pixels.
    """
    H, W = influence.shape
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing='ij')
    distance = torch.maximum((x - (box[0] + box[2]) / 2).abs(), (y - (box[1] + box[3]) / 2).abs())
    sides = range((box[2] - box[0]) % 2 or 2, int(2 * float(distance.max())) + 2, 2)
    return {side: float(influence[distance < side / 2].sum() / influence.sum()) for side in sides}


def side_for(shares: dict[int, float], wanted: float) -> int:
    """Side of the smallest square that holds the wanted share."""
    return next(side for side, share in shares.items() if share >= wanted - 1e-6)
