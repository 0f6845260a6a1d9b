"""Augmentation of whole batches on the device."""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing

__all__ = ['BatchAugment']


class BatchAugment:
    """Crop, flip, resize, normalise, erase and blank a batch; every image draws its own numbers.

    With ``crop_padding``, the paper's augmentation: zero padding and a random window of the original size. Without, a
    random resized crop as torchvision's: an area in ``scale`` and an aspect ratio in ``ratio``, sampled bilinearly.
    What is wider or higher than the image is cut to it, where torchvision draws again: such a crop is smaller.

    Args:
        size: height and width of the batches.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
        device: of the batches.
        enabled: False for evaluation: only normalise.
        crop_padding: pixels of zero padding.
        scale: range of the area of the crop.
        ratio: range of its aspect ratio.
        hflip: probability of a horizontal flip.
        reprob: probability of random erasing.
        blank_cells: probability of each of 4 × 4 cells to be the mean colour, so that blanked images are no surprise.
    """

    def __init__(
            self, size: Sequence[int], mean: Sequence[float], std: Sequence[float], device: torch.device | str = 'cpu',
            enabled: bool = True, crop_padding: int | None = None, scale: Sequence[float] = (0.08, 1.),
            ratio: Sequence[float] = (3 / 4, 4 / 3), hflip: float = 0.5, reprob: float = 0.,
            blank_cells: float = 0.) -> None:
        self.size = tuple(size)
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
        self.crop_padding, self.scale, self.ratio, self.hflip = crop_padding, scale, ratio, hflip
        self.erase = RandomErasing(reprob, mode='const', device=device) if reprob > 0 and enabled else None
        self.blank_cells, self.enabled = blank_cells, enabled

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
        if not self.enabled:
            return (x / 255. - self.mean) / self.std  # rounded as timm's evaluation transform does
        x = (x - 255. * self.mean) / (255. * self.std)  # after the crop: padding is black, as in the paper
        x = x if self.erase is None else self.erase(x)
        return self.with_blank_cells(x, generator) if self.blank_cells else x

    def with_blank_cells(self, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Each cell of each normalised image is 0 with probability blank_cells, but never all of them."""
        keep = torch.rand(len(x), 16, generator=generator) >= self.blank_cells
        keep[torch.arange(len(x)), torch.randint(16, (len(x),), generator=generator)] = True
        mask = F.interpolate(keep.view(-1, 1, 4, 4).float(), tuple(x.shape[-2:]), mode='nearest')
        return x * mask.to(x.device)

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

        area, aspect = uniform(*self.scale), torch.exp(uniform(*map(math.log, self.ratio)))
        width, height = (area * aspect).sqrt().clamp(max=1.), (area / aspect).sqrt().clamp(max=1.)  # of the image's
        dx, dy = uniform(-1., 1.) * (1. - width), uniform(-1., 1.) * (1. - height)  # centre, in [−1, 1] coordinates
        sign = torch.where(uniform(0., 1.) < self.hflip, -1., 1.)
        zero = torch.zeros_like(width)
        theta = torch.stack([torch.stack([sign * width, zero, dx], 1), torch.stack([zero, height, dy], 1)], 1)
        grid = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode='bilinear', padding_mode='reflection', align_corners=False)
