"""A whole small dataset decoded in memory, on the device.

For CIFAR-sized sets: 50,000 images of 32×32 are 154 MB of uint8. Decoding happens once; after that the step never
waits for a loader.
"""
import logging
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import Mixup, ScheduledBatchSampler
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from tqdm import tqdm

from .augment import BatchAugment

__all__ = ['CachedLoader', 'cache_images']

_logger = logging.getLogger('train')


def cache_images(
        dataset: Any, transform: Any, workers: int, device: torch.device,
        what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a dataset once.

    Args:
        dataset: map-style, of images of any size.
        transform: Pillow image to uint8 (C, H, W) of one size, tensor or array.
        workers: processes that decode.
        device: where images and targets go.
        what: name for the progress bar.

    Returns:
        (N, C, H, W) uint8 images and (N,) or (N, K) targets, both on the device.

    Raises:
        ValueError: the dataset is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError('--cache-dataset: a streamed dataset (hfids/, wds/, tfds/) cannot be cached.')
    dataset.transform = transform
    loader = DataLoader(dataset, batch_size=500, num_workers=workers)
    images: Any = None
    targets: Any = None
    done = 0
    for x, y in tqdm(loader, desc=f'decode {what}', leave=False, dynamic_ncols=True, mininterval=1):
        if images is None:  # filled in place: a list and torch.cat would need the memory twice
            images = torch.empty(len(dataset), *x.shape[1:], dtype=torch.uint8)
            targets = torch.empty(len(dataset), *y.shape[1:], dtype=y.dtype)
        images[done:done + len(x)], targets[done:done + len(x)] = x, y
        done += len(x)
    _logger.info(f'{what}: {len(images)} images in {images.numel() / 2 ** 20:.0f} MiB on {device}')
    return images.to(device), targets.to(device)


class CachedLoader:
    """Batches of a dataset that lies on the device; order, crops and flips follow from (seed, epoch, rank) alone.

    Process ``rank`` of ``world_size`` gets every world_size-th image of each global batch, so that any number of
    processes sees the same global batches. In evaluation the last batch may be short, and no image is seen twice.

    Args:
        images: (N, C, H, W) uint8.
        targets: (N,) or (N, K).
        batch_size: images in a batch of one process.
        augment: from uint8 to normalised batches.
        seed: of order and augmentation.
        rank: this process.
        world_size: number of processes.
        is_training: shuffle, and drop the last batch if it is not full.
        sizes: training resolutions to draw each batch's from.
        progressive_epochs: move through ``sizes`` over so many epochs (timm's ScheduledBatchSampler).
        spread, random_mix: of that schedule, as timm's.
        mixup: timm's Mixup, applied to the batches.
    """

    def __init__(
            self, images: torch.Tensor, targets: torch.Tensor, batch_size: int, augment: BatchAugment, seed: int = 0,
            rank: int = 0, world_size: int = 1, is_training: bool = True, sizes: list[int] | None = None,
            progressive_epochs: int | None = None, spread: float = 0.65, random_mix: float = 0.1,
            mixup: Mixup | None = None) -> None:
        self.images, self.targets, self.augment, self.mixup = images, targets, augment, mixup
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.is_training = is_training
        self.epoch = 0
        self.sizes = [(size, size) for size in sizes or ()]
        self.schedule = ScheduledBatchSampler(
            SequentialSampler(range(len(self) * batch_size)), batch_sizes=[batch_size] * len(self.sizes), seed=seed,
            choice_schedule='progressive' if progressive_epochs else 'constant', schedule_epochs=progressive_epochs,
            schedule_spread=spread, schedule_random_mix=random_mix,
        ) if self.sizes else None

    @property
    def dataset(self) -> torch.Tensor:
        """The images."""
        return self.images

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch
        if self.schedule is not None:
            self.schedule.set_epoch(epoch)

    def __len__(self) -> int:
        full = self.batch_size * self.world_size
        return len(self.images) // full if self.is_training else -(-len(self.images) // full)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n = len(self.images)
        shared = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)  # the same in every process
        own = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) * 4099 + 1 + self.rank)
        order = torch.randperm(n, generator=shared) if self.is_training else torch.arange(n)
        sizes = [self.sizes[batch[0][1]] for batch in self.schedule] if self.schedule is not None else []
        for i in range(len(self)):
            index = order[i * self.batch_size * self.world_size:(i + 1) * self.batch_size * self.world_size]
            index = index[self.rank::self.world_size].to(self.images.device)
            if not len(index):  # evaluation: the last batch has fewer images than there are processes
                continue
            x = self.augment(self.images[index], own, sizes[i] if sizes else None)
            y = self.targets[index]
            yield self.mixup(x, y) if self.mixup is not None else (x, y)
