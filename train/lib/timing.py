"""Times that survive a busy machine: functions by turns in one process, and ratios within a turn."""
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['by_turns', 'ratio']


def by_turns(
        functions: dict[str, Callable[[], Any]], warmup: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function in each turn; every other turn goes backwards, and the warm-up does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in list(functions.items())[::1 if i % 2 else -1]:
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    """Median over the turns of the one's time over the other's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))
