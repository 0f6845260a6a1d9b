"""Constant boxes, which any localisation has to beat, and a choice that is made on other images than it is judged by.

Boxes are x0, y0, x1, y1 in pixels of the model's input, x1 and y1 exclusive.
"""
from collections.abc import Sequence
from typing import Any

import torch

from .metrics import Metric, box_iou, dim_zero_cat

__all__ = ['IOUS', 'ConstantBoxes', 'cross_fitted_accuracy', 'hits_of', 'square_hits', 'whole_hits']

IOUS = (0.3, 0.5, 0.7)
CONSTANT = ('localization_ap_all_patches', 'localization_ap_centred_square')


def hits_of(boxes: torch.Tensor, truth: torch.Tensor, above: bool = False) -> torch.Tensor:
    """Whether one of the boxes (N, 4) has each of IOUS, at least, with one of the true ones (L, 4): (3,).

    At least is the rule of MaxBoxAccV2; ``above`` it is that of ``BoxLocalization``.
    """
    best = box_iou(boxes, truth).max() if len(boxes) and len(truth) else torch.tensor(0., device='cpu')
    ious = torch.tensor(IOUS, device=best.device)
    return best > ious if above else best >= ious


def cross_fitted_accuracy(hits: torch.Tensor) -> torch.Tensor:
    """Accuracy of each image at the choice that is best on the other half of the images.

    The odd images choose for the even ones and the other way round, so that no image is judged by a choice that it had
    a part in, and all count.

    Args:
        hits: (N, T, I) bool: for each image and each of T choices (thresholds, sizes), one hit at each of I IoUs.

    Returns:
        (N,) in [0, 1]: mean over the IoUs, for each of which the choice is made by itself.
    """
    result = torch.zeros(len(hits), device=hits.device)
    halves = [torch.arange(len(hits), device=hits.device)[start::2] for start in (0, 1)]
    for chosen, judged in (halves, halves[::-1]):
        if not len(chosen) or not len(judged):
            return torch.full((len(hits),), torch.nan, device=hits.device)  # a single image has no other half
        best = hits[chosen].float().mean(dim=0).argmax(dim=0)  # (3,) the first of equally good ones
        result[judged] = torch.stack([hits[judged, t, i].float() for i, t in enumerate(best.tolist())]).mean(dim=0)
    return result


def whole_hits(box: torch.Tensor, boxes: Sequence[torch.Tensor], above: bool = False) -> torch.Tensor:
    """Hits (B, 1, 3) of one box (4,) that is the same for all images; ``above`` as in ``hits_of``."""
    return torch.stack([hits_of(box[None].cpu(), truth.cpu(), above)[None] for truth in boxes])


def square_hits(size: tuple[int, int], boxes: Sequence[torch.Tensor], above: bool = False) -> torch.Tensor:
    """Hits (B, T, 3) of the centred squares in an image of size (H, W), of 5 %, 10 %, … 100 % of its shorter side."""
    centre = torch.tensor([size[1], size[0], size[1], size[0]], device='cpu') / 2
    sides = torch.arange(1, 21, device='cpu')[:, None] / 20 * min(size)
    half = sides / 2 * torch.tensor([-1, -1, 1, 1], device='cpu')
    return torch.stack([torch.stack([hits_of(square[None], truth.cpu(), above) for square in centre + half])
                        for truth in boxes])


class ConstantBoxes(Metric):
    """Localisation of boxes that know nothing of the image, in percent, beside ``BoxLocalization`` at IoU 0.5.

    The smallest square around all patches, and the centred square whose size is best on the other half of the images.
    Images without box do not count.
    """
    patches: list[torch.Tensor]
    squares: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ('patches', 'squares'):
            self.add_state(name, default=[], dist_reduce_fx='cat')

    def update(self, size: tuple[int, int], around: torch.Tensor, boxes: Sequence[torch.Tensor]) -> None:
        """Count a batch.

        Args:
            size: (H, W) of the images.
            around: (4,) square around all patches.
            boxes: B tensors (L, 4).
        """
        given = [truth for truth in boxes if len(truth)]
        if given:
            self.patches.append(whole_hits(around, given, above=True).to(self.device))
            self.squares.append(square_hits(size, given, above=True).to(self.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """Percent; NaN without images, of the square with a single one."""
        if not len(self.patches):
            return dict.fromkeys(CONSTANT, torch.tensor(torch.nan))
        half = IOUS.index(0.5)
        squares = dim_zero_cat(self.squares)[..., half:half + 1].cpu()
        around = dim_zero_cat(self.patches)[:, 0, half].float().mean()
        return dict(zip(CONSTANT, (100 * around, 100 * cross_fitted_accuracy(squares).mean())))
