"""How sure a share of images is, such as an accuracy; without SciPy, which a report does not need."""
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

__all__ = ['top1_interval', 'wilson_interval']

Z = NormalDist().inv_cdf(0.975)


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (E. B. Wilson, 1927), in [0, 1]."""
    p, z2 = hits / n, Z * Z / n
    middle, half = (p + z2 / 2) / (1 + z2), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n)) / (1 + z2)
    return max(0., middle - half), min(1., middle + half)


def top1_interval(measured: Mapping[str, Any]) -> tuple[float, float]:
    """``wilson_interval`` of a measured ``top1`` in percent, over its ``images``; in percent."""
    low, high = wilson_interval(round(measured['top1'] / 100 * measured['images']), measured['images'])
    return 100 * low, 100 * high
