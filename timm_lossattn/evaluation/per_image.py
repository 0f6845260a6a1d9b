"""PerImage: a measure that has one value an image, so that tools can be compared image by image."""
from typing import Any

import torch

from .metrics import Metric, dim_zero_cat

__all__ = ['PerImage']


class PerImage(Metric):
    """Mean over images of what ``measure`` gives for each; NaN, where a measure says nothing, does not count.

    ``measure`` takes a batch and returns (B,); ``update`` takes the same and keeps it.
    """
    values: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state('values', default=[], dist_reduce_fx='cat')

    def measure(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One value for each image, (B,)."""
        raise NotImplementedError

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Measure a batch and keep its values."""
        self.values.append(self.measure(*args, **kwargs).float().to(self.device))

    def compute(self) -> torch.Tensor:
        """Mean of all images; NaN without any."""
        return dim_zero_cat(self.values).nanmean() if len(self.values) else torch.tensor(torch.nan)
