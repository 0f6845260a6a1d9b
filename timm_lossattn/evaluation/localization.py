"""MaxBoxAccV2 of heat maps, and the constant boxes that any localisation has to beat.

Boxes are x0, y0, x1, y1 in pixels of the model's input, x1 and y1 exclusive.
"""
from collections.abc import Sequence
from typing import Any

import torch

try:
    from scipy.ndimage import find_objects, label
except ImportError:
    raise ImportError(
        "timm_lossattn.evaluation.localization needs scipy: pip install 'timm-lossattn[compare]'") from None

from .metrics import box_iou
from .per_image import PerImage

__all__ = ['IOUS', 'THRESHOLDS', 'MaxBoxAccV2', 'cross_fitted_accuracy', 'square_hits', 'whole_hits']

IOUS = (0.3, 0.5, 0.7)
THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(50))


def hits_of(boxes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Whether one of the boxes (N, 4) has an IoU of at least each of IOUS with one of the true ones (L, 4): (3,)."""
    best = box_iou(boxes, truth).max() if len(boxes) and len(truth) else torch.tensor(0.)
    return best >= torch.tensor(IOUS)


def cross_fitted_accuracy(hits: torch.Tensor) -> torch.Tensor:
    """Accuracy of each image at the choice that is best on the other half of the images.

    The odd images choose for the even ones and the other way round, so that no image is judged by a choice that it had
    a part in, and all count.

    Args:
        hits: (N, T, 3) bool: for each image and each of T choices (thresholds, sizes), one hit an IoU.

    Returns:
        (N,) in [0, 1]: mean over the IoUs, for each of which the choice is made by itself.
    """
    result = torch.zeros(len(hits))
    halves = [torch.arange(start, len(hits), 2) for start in (0, 1)]
    for chosen, judged in (halves, halves[::-1]):
        if not len(chosen) or not len(judged):
            return torch.full((len(hits),), torch.nan)  # a single image has no other half
        best = hits[chosen].float().mean(dim=0).argmax(dim=0)  # (3,) the first of equally good ones
        result[judged] = torch.stack([hits[judged, t, i].float() for i, t in enumerate(best.tolist())]).mean(dim=0)
    return result


class MaxBoxAccV2(PerImage):
    """Box accuracy of heat maps, mean over IoUs of 0.3, 0.5 and 0.7, at thresholds chosen on other images.

    A map is scaled to [0, 1] between its smallest and largest value; for each threshold, every connected region above
    it has a box, and an image is hit if one of them has the IoU with one of the true boxes. J. Choe et al., "Evaluating
    Weakly Supervised Object Localization Methods Right", CVPR 2020; the threshold is chosen by
    ``cross_fitted_accuracy``, while the paper's maximum is taken over the images that are judged.
    """
    hits: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state('hits', default=[], dist_reduce_fx='cat')

    def measure(self, heat: torch.Tensor, boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Heat maps (B, H, W) and B tensors of boxes (L, 4), L > 0, to hits (B, T, 3) at each of THRESHOLDS."""
        result = []
        for one, truth in zip(heat.cpu().float(), boxes):
            known = one[~one.isnan()]
            low, high = (known.min(), known.max()) if len(known) else (torch.tensor(0.), torch.tensor(0.))
            scaled = ((one - low) / (high - low)).nan_to_num(-1.) if high > low else torch.full_like(one, -1.)
            result.append(torch.stack([hits_of(boxes_above(scaled, t), truth.cpu()) for t in THRESHOLDS]))
        return torch.stack(result)

    def update(self, heat: torch.Tensor, boxes: Sequence[torch.Tensor]) -> None:
        """Keep the hits of a batch."""
        self.hits.append(self.measure(heat, boxes).to(self.device))

    def compute(self) -> torch.Tensor:
        """Mean over images; NaN with fewer than two."""
        hits = torch.cat(list(self.hits)) if len(self.hits) else torch.zeros(0, len(THRESHOLDS), 3, dtype=torch.bool)
        return cross_fitted_accuracy(hits.cpu()).mean()


def boxes_above(scaled: torch.Tensor, threshold: float) -> torch.Tensor:
    """Boxes (N, 4) of the connected regions (of 8 neighbours) of an (H, W) map that reach a threshold."""
    regions, _ = label((scaled >= threshold).numpy(), structure=[[1, 1, 1]] * 3)
    return torch.tensor([(x.start, y.start, x.stop, y.stop) for y, x in find_objects(regions)]).view(-1, 4)


def whole_hits(box: torch.Tensor, boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hits (B, 1, 3) of one box (4,) that is the same for all images."""
    return torch.stack([hits_of(box[None], truth.cpu())[None] for truth in boxes])


def square_hits(size: tuple[int, int], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Hits (B, T, 3) of the centred squares in an image of size (H, W), of 5 %, 10 %, … 100 % of its shorter side."""
    centre = torch.tensor([size[1], size[0], size[1], size[0]]) / 2
    half = torch.arange(1, 21)[:, None] / 20 * min(size) / 2 * torch.tensor([-1, -1, 1, 1])
    return torch.stack([torch.stack([hits_of(square[None], truth.cpu()) for square in centre + half])
                        for truth in boxes])
