"""A whole small dataset decoded in memory, on the device, with augmentation of whole batches there.

For CIFAR-sized sets: 50,000 images of 32×32 are 154 MB of uint8. Decoding happens once; after that the step never
waits for a loader.
"""
import logging
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.data import Mixup, ScheduledBatchSampler
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from tqdm import tqdm

__all__ = ['BatchAugment', 'CachedLoader', 'cache_images']

_logger = logging.getLogger('train')


def cache_images(dataset, transform, args, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode a dataset once.

    Args:
        dataset: map-style, of images of any size.
        transform: Pillow image to uint8 (C, H, W) of one size, tensor or array.
        args: ``workers`` and ``device``.
        what: name for the progress bar.

    Returns:
        (N, C, H, W) uint8 images and (N,) or (N, K) targets, both on the device.

    Raises:
        ValueError: the dataset is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError('--cache-dataset: a streamed dataset (hfids/, wds/, tfds/) cannot be cached.')
    dataset.transform = transform
    loader = DataLoader(dataset, batch_size=500, num_workers=args.workers)
    images, targets, done = None, None, 0
    for x, y in tqdm(loader, desc=f'decode {what}', leave=False, dynamic_ncols=True, mininterval=1):
        if images is None:  # filled in place: a list and torch.cat would need the memory twice
            images = torch.empty(len(dataset), *x.shape[1:], dtype=torch.uint8)
            targets = torch.empty(len(dataset), *y.shape[1:], dtype=y.dtype)
        images[done:done + len(x)], targets[done:done + len(x)] = x, y
        done += len(x)
    assert images is not None
    assert targets is not None
    _logger.info(f'{what}: {len(images)} images in {images.numel() / 2 ** 20:.0f} MiB on {args.device}')
    return images.to(args.device), targets.to(args.device)


class BatchAugment:
    """Crop, flip, resize, normalise and erase a batch; every image draws its own numbers.

    With ``crop_padding``, the paper's augmentation: zero padding and a random window of the original size. Without, a
    random resized crop as torchvision's: an area in ``scale`` and an aspect ratio in ``ratio``, sampled bilinearly.

    Args:
        size: height and width of the batches.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        crop_padding: pixels of zero padding.
        scale: range of the area of the crop.
        ratio: range of its aspect ratio.
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing.
        device: of the batches.
        enabled: False for evaluation: only normalise.
    """

    def __init__(
            self,
            size: tuple[int, int],
            mean: tuple[float, ...],
            std: tuple[float, ...],
            crop_padding: int | None = None,
            scale: tuple[float, float] = (0.08, 1.),
            ratio: tuple[float, float] = (3 / 4, 4 / 3),
            hflip: float = 0.5,
            reprob: float = 0.,
            device: torch.device | str = 'cpu',
            enabled: bool = True,
    ) -> None:
        self.size = tuple(size)
        self.mean = 255. * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = 255. * torch.tensor(std, device=device).view(-1, 1, 1)
        self.crop_padding, self.scale, self.ratio, self.hflip = crop_padding, scale, ratio, hflip
        self.erase = RandomErasing(reprob, mode='const', device=device) if reprob > 0 and enabled else None
        self.enabled = enabled

    def __call__(
            self, images: torch.Tensor, generator: torch.Generator | None = None, size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Augment a batch.

        Args:
            images: (B, C, H, W) uint8.
            generator: on the CPU; the numbers do not depend on the device.
            size: other height and width of the result.

        Returns:
            (B, C, height, width) float32, normalised.
        """
        x = images.float()
        if self.enabled and self.crop_padding is not None:
            x = self.random_flip(self.padded_crop(x, generator), generator)
        elif self.enabled:
            x = self.resized_crop(x, generator)  # flips as well
        if tuple(x.shape[-2:]) != (size or self.size):
            x = F.interpolate(x, size or self.size, mode='bilinear', antialias=True, align_corners=False)
        x = (x - self.mean) / self.std  # after the crop: padding is black, as in the paper
        return x if self.erase is None else self.erase(x)

    def padded_crop(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A window of the original size out of the padded image, (B, C, H, W) to the same shape."""
        B, _, H, W = x.shape
        pad = self.crop_padding or 0
        windows = F.pad(x, [pad] * 4).unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 2·pad + 1, 2·pad + 1, H, W), a view
        top, left = (torch.randint(2 * pad + 1, (B,), generator=generator).to(x.device) for _ in range(2))
        return windows[torch.arange(B, device=x.device), :, top, left]

    def random_flip(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Mirror each image with probability hflip."""
        flip = (torch.rand(len(x), generator=generator) < self.hflip).to(x.device)
        return torch.where(flip[:, None, None, None], x.flip(3), x)

    def resized_crop(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """A window of random area, aspect ratio and place, stretched to the full size and perhaps mirrored."""
        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(len(x), generator=generator)

        area, aspect = uniform(*self.scale), torch.exp(uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
        width, height = (area * aspect).sqrt().clamp(max=1.), (area / aspect).sqrt().clamp(max=1.)  # of the image's
        dx, dy = uniform(-1., 1.) * (1. - width), uniform(-1., 1.) * (1. - height)  # centre, in [−1, 1] coordinates
        sign = torch.where(uniform(0., 1.) < self.hflip, -1., 1.)
        zero = torch.zeros_like(width)
        theta = torch.stack([torch.stack([sign * width, zero, dx], 1), torch.stack([zero, height, dy], 1)], 1)
        grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode='bilinear', padding_mode='reflection', align_corners=False)


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
        mixup: timm's Mixup, applied to the batches.
    """

    def __init__(
            self,
            images: torch.Tensor,
            targets: torch.Tensor,
            batch_size: int,
            augment: BatchAugment,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
            is_training: bool = True,
            sizes: list[int] | None = None,
            progressive_epochs: int | None = None,
            mixup: Mixup | None = None,
    ) -> None:
        self.images, self.targets, self.augment, self.mixup = images, targets, augment, mixup
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.is_training = is_training
        self.epoch = 0
        self.sizes = [(size, size) for size in sizes or ()]
        self.schedule = ScheduledBatchSampler(
            SequentialSampler(range(len(self) * batch_size)), batch_sizes=[batch_size] * len(self.sizes), seed=seed,
            choice_schedule='progressive' if progressive_epochs else 'constant', schedule_epochs=progressive_epochs,
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
