"""The paper's schedule for Adam, as a timm scheduler."""
import math
from collections.abc import Sequence

import torch
from timm.scheduler.scheduler import Scheduler

__all__ = ['GaussianRampupScheduler']


class GaussianRampupScheduler(Scheduler):
    """Gaussian ramp-up of the learning rate, then steps; β₂ of Adam may change at the end of the ramp.

        lr(t) = lr · exp(−5 (1 − min(t / T, 1))²) · decay_rate^(number of milestones ≤ t)

    with t in epochs, followed at every update: the ramp of S. Laine and T. Aila, "Temporal Ensembling for
    Semi-Supervised Learning", as the paper uses it with T = 80, milestones 120 and 160, β₂ 0.99 and then 0.999.

    Args:
        optimizer: its groups hold lr; with β₂ also betas.
        rampup_t: T in epochs; 0 for none.
        milestones: epochs at which the learning rate is multiplied by decay_rate.
        decay_rate: see above.
        beta2_after_rampup: β₂ from epoch T on; None leaves it.
        updates_per_epoch: optimizer updates in an epoch.

    Raises:
        ValueError: rampup_t negative, or β₂ is to change in an optimizer that has none.
    """

    def __init__(
            self, optimizer: torch.optim.Optimizer, rampup_t: float = 80, milestones: Sequence[int] = (120, 160),
            decay_rate: float = 0.1, beta2_after_rampup: float | None = None, updates_per_epoch: int = 1) -> None:
        if not rampup_t >= 0:
            raise ValueError(f'rampup_t must be at least 0, got {rampup_t!r}.')
        if beta2_after_rampup is not None and any('betas' not in group for group in optimizer.param_groups):
            raise ValueError(f'beta2_after_rampup: {type(optimizer).__name__} has no β₂.')
        self.rampup_t = rampup_t
        self.milestones = tuple(milestones)
        self.decay_rate = decay_rate
        self.beta2_after_rampup = beta2_after_rampup
        self.updates_per_epoch = updates_per_epoch
        super().__init__(optimizer, param_group_field='lr', t_in_epochs=False)
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        epoch = t / self.updates_per_epoch
        ramp = 1. if self.rampup_t == 0 else math.exp(-5. * (1. - min(epoch / self.rampup_t, 1.)) ** 2)
        factor = ramp * self.decay_rate ** sum(epoch >= milestone for milestone in self.milestones)
        if self.beta2_after_rampup is not None and epoch >= self.rampup_t:
            for group in self.optimizer.param_groups:
                group['betas'] = (group['betas'][0], self.beta2_after_rampup)
        return [value * factor for value in self.base_values]
