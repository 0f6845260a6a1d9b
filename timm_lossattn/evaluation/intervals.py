"""Bootstrap intervals over images, for a mean and for the paired difference of two."""
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


@dataclass(frozen=True)
class Interval:
    """A mean, and the 95 % interval of its bootstrap distribution.

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
        return self.low <= 0 <= self.high


def mean_interval(values: torch.Tensor) -> Interval:
    """Mean of (N,) independent values with its 95 % percentile bootstrap interval; NaN does not count.

    The values of a paired comparison are the differences, image by image.
    """
    given = values[~values.isnan()].double().numpy()
    if len(given) < 2 or np.ptp(given) == 0:
        mean = float(given.mean()) if len(given) else float('nan')
        return Interval(mean, mean, mean, len(given))
    found = bootstrap(
        (given,), np.mean, n_resamples=RESAMPLES, method='percentile', batch=500, rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return Interval(float(given.mean()), float(low), float(high), len(given))
