"""Bootstrap intervals over images, for a mean and for the paired difference of two."""
import math
from dataclasses import dataclass

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

    def __str__(self) -> str:
        interval = '' if math.isnan(self.low) else f' [{self.low:+.3f}, {self.high:+.3f}]'
        return f'{self.mean:+.3f}{interval}'

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
