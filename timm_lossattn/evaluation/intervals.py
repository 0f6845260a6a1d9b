"""Bootstrap intervals over images, for a mean and for the paired difference of two."""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

try:
    from scipy.stats import bootstrap
except ImportError:
    raise ImportError(
        "timm_lossattn.evaluation.intervals needs scipy: pip install 'timm-lossattn[compare]'") from None

__all__ = ['Interval', 'mean_interval']

RESAMPLES = 5000
MINIMUM = 10  # fewer values say too little about their own spread


@dataclass(frozen=True)
class Interval:
    """A mean, and the 95 % interval of its bootstrap distribution; of fewer than MINIMUM values NaN.

    Attributes:
        mean: of the n values.
        low: 2.5 % quantile.
        high: 97.5 % quantile.
        n: independent values: images, or grids.
    """
    mean: float
    low: float
    high: float
    n: int

    @property
    def holds_zero(self) -> bool:
        """Whether there is no difference to speak of."""
        return not (self.low > 0 or self.high < 0)

    def __format__(self, spec: str) -> str:
        """'mean [low, high]', each number by the specification (default: +.3f); the mean alone of fewer than MINIMUM
        values, '–' of none.

        >>> f'{mean_interval(differences):+.3f}'
        '+0.037 [+0.015, +0.060]'
        """
        if math.isnan(self.mean):
            return '–'
        mean, low, high = (format(value, spec or '+.3f') for value in (self.mean, self.low, self.high))
        return mean if math.isnan(self.low) else f'{mean} [{low}, {high}]'

    def __str__(self) -> str:
        return f'{self}'

    def as_difference(self) -> str:
        """With signs, in Markdown bold where zero lies outside."""
        return str(self) if self.holds_zero else f'**{self}**'

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> 'Interval':
        """What ``to_dict`` gave, read from JSON."""
        mean, low, high = (math.nan if found[name] is None else found[name] for name in ('mean', 'low', 'high'))
        return cls(mean, low, high, found['n'])

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


def mean_interval(values: torch.Tensor) -> Interval:
    """Mean of (N,) independent values with its 95 % percentile bootstrap interval; NaN does not count.

    The values of a paired comparison are the differences, image by image.
    """
    given = values[~values.isnan()].double().numpy()
    mean = float(given.mean()) if len(given) else float('nan')
    if len(given) < MINIMUM:
        return Interval(mean, float('nan'), float('nan'), len(given))
    if np.ptp(given) == 0:
        return Interval(mean, mean, mean, len(given))
    found = bootstrap(
        (given,), np.mean, n_resamples=RESAMPLES, method='percentile', batch=500, rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return Interval(mean, float(low), float(high), len(given))
