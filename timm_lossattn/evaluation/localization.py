"""MaxBoxAccV2: how well a box around what is hot in a map fits the object."""
from collections.abc import Sequence
from typing import Any

import torch

try:
    from scipy.ndimage import find_objects, label
except ImportError:
    raise ImportError(
        "timm_lossattn.evaluation.localization needs scipy: pip install 'timm-lossattn[compare]'") from None

from .constant_boxes import cross_fitted_accuracy, hits_of
from .metrics import Metric, dim_zero_cat

__all__ = ['THRESHOLDS', 'MaxBoxAccV2']

THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(50))


class MaxBoxAccV2(Metric):
    """Box accuracy of heat maps, mean over IoUs of 0.3, 0.5 and 0.7, at thresholds chosen on other images.

    A map is scaled to [0, 1] between its smallest and largest value; for each threshold, every connected region above
    it has a box, and an image is hit if one of them has the IoU with one of the true boxes. J. Choe et al., "Evaluating
    Weakly Supervised Object Localization Methods Right", CVPR 2020; the threshold is chosen by
    ``cross_fitted_accuracy``, while the paper's maximum is taken over the images that are judged. Thresholds are 0.02
    apart, and maps are not smoothed.
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
        hits = dim_zero_cat(self.hits) if len(self.hits) else torch.zeros(0, len(THRESHOLDS), 3, dtype=torch.bool)
        return cross_fitted_accuracy(hits.cpu()).mean()


def boxes_above(scaled: torch.Tensor, threshold: float) -> torch.Tensor:
    """Boxes (N, 4) of the connected regions (of 8 neighbours) of an (H, W) map that reach a threshold."""
    regions, _ = label((scaled >= threshold).numpy(), structure=[[1, 1, 1]] * 3)
    return torch.tensor([(x.start, y.start, x.stop, y.stop) for y, x in find_objects(regions)]).view(-1, 4)
