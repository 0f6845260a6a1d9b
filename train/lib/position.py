"""Checkpoints within an epoch: where in it a run is, and all that is random from there on."""
import random
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .checkpoint import AtomicSaver
from .process import Process

__all__ = ['Recovery', 'random_state', 'set_random_state']

INTERVAL = 5  # updates between two questions to rank 0, whose clock decides


def random_state(device: torch.device) -> dict[str, Any]:
    """Of all generators, as plain data."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (timm's mixup draws from it)
    state = {'torch': torch.get_rng_state(), 'python': random.getstate(),
             'numpy': [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]}
    return state | ({'cuda': torch.cuda.get_rng_state(device)} if device.type == 'cuda' else {})


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Back to what ``random_state`` found."""
    torch.set_rng_state(state['torch'])
    random.setstate(state['python'])
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if device.type == 'cuda' and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'], device)


def is_finite(model: Any) -> bool:
    """Whether all parameters are numbers."""
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class Recovery:
    """Writes last.pth.tar every so many minutes, with the position in the epoch.

    A resumed epoch draws the batches before the position again, without training on them. timm's loader is a batch
    ahead of the training: the state before it drew the next one is kept as well.

    Args:
        minutes: between two checkpoints; None: none.
        process: this one.
        saver: of rank 0.
        position: of the checkpoint that the run is resumed from, if it has one.
    """

    def __init__(
            self, minutes: float | None, process: Process, saver: AtomicSaver | None,
            position: dict[str, Any] | None = None) -> None:
        self.minutes, self.process, self.saver = minutes, process, saver
        self.position = position if position is None else position['ranks'][process.rank]
        self.saved = time.monotonic()
        self.states: list[dict[str, Any]] = self.position['random'] if self.position is not None else []

    def skip(self, batch: int) -> bool:
        """Whether the resumed run has trained on this batch already."""
        if self.position is None or batch >= self.position['batches']:
            return False
        before = self.position['batches'] - batch  # 1: the last one
        if before <= len(self.position['random']):
            set_random_state(self.position['random'][-before], self.process.device)
        return True

    def batch_done(
            self, epoch: int, batches: int, updates: int | None, images: int, sums: dict[str, Any],
            seconds: float) -> None:
        """Save if it is time, after an update.

        Args:
            epoch: number of the epoch.
            batches: done in it.
            updates: done in all, None within one.
            images: done in the epoch.
            sums: of the loss terms over them.
            seconds: spent on them.
        """
        if self.minutes is None:
            return
        self.states = [*self.states[-1:], random_state(self.process.device)]
        if updates is None or (self.process.distributed and updates % INTERVAL):
            return
        due = time.monotonic() - self.saved >= 60 * self.minutes
        if not self.process.from_first(due and (self.saver is None or is_finite(self.saver.model))):
            return  # of weights that are not finite the last good ones stay, to go on from with a lower --lr
        own = {'batches': batches, 'images': images, 'random': self.states, 'seconds': seconds,
               'sums': {name: value.cpu() if torch.is_tensor(value) else value for name, value in sums.items()}}
        ranks = [own]
        if self.process.distributed:
            ranks = [own] * self.process.world_size
            dist.all_gather_object(ranks, own)
        if self.saver is not None:
            self.saver.save_position(epoch, {'ranks': ranks})
        self.saved = time.monotonic()
