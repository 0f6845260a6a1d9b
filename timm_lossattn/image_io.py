"""Image files to model inputs with timm's evaluation transform, and coordinates back to the file's pixels."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Resize

__all__ = ['Preprocessed', 'open_image', 'preprocess']


def open_image(path: str | Path) -> Image.Image:
    """Open any image that Pillow opens as upright 8-bit RGB: first frame, EXIF rotation applied, alpha over white.

    Raises:
        ValueError: the file does not exist or is not an image that Pillow can read.
    """
    try:
        with Image.open(path) as file:
            file.seek(0)
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f'image: no such file: {path}') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'image: cannot read {path}: {error}') from None
    if image.mode.startswith('I') or image.mode == 'F':  # 16-bit or float grey; convert('RGB') would clip it
        grey = np.asarray(image, dtype=np.float64)
        if image.mode == 'F':
            low, high = float(np.nanmin(grey)), float(np.nanmax(grey))
            grey = (np.nan_to_num(grey, nan=low) - low) * (255. / (high - low) if high > low else 0.)
        elif image.mode.startswith('I;16') or grey.max() > 255:
            grey = grey / 257.  # 16-bit PNGs
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(background, image)
    return image.convert('RGB')


@dataclass(frozen=True)
class Preprocessed:
    """An image, the model's input made of it, and where that input lies in the image.

    Attributes:
        image: RGB image.
        x: (C, H, W) normalised input.
        scale: (sx, sy) image pixels per input pixel.
        offset: (ox, oy) image position of the input's corner.
    """
    image: Image.Image
    x: torch.Tensor
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_image(self, boxes: torch.Tensor) -> torch.Tensor:
        """(..., 4) boxes in input pixels to boxes in image pixels, clipped to the image."""
        scale = torch.tensor([*self.scale, *self.scale], dtype=torch.float64)
        offset = torch.tensor([*self.offset, *self.offset], dtype=torch.float64)
        size = torch.tensor([*self.image.size, *self.image.size], dtype=torch.float64)
        return (boxes.double() * scale + offset).clamp(min=0).minimum(size)


def preprocess(model: nn.Module, image: Image.Image) -> Preprocessed:
    """Apply the model's evaluation transform and keep track of the geometry.

    Args:
        model: timm model; its pretrained_cfg gives size, mean, std, interpolation, crop.
        image: RGB image.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    if config['input_size'][0] == 1:
        transform.transforms.insert(0, lambda img: img.convert('L'))
    x = transform(image)
    height, width = config['input_size'][1:]
    scaled = image.size  # (width, height) after the resizing step
    for step in transform.transforms:
        if isinstance(step, Resize):
            with_short_side = step.size if isinstance(step.size, int) else None
            if with_short_side is None and len(step.size) == 1:
                with_short_side = step.size[0]
            if with_short_side is None:
                scaled = (step.size[1], step.size[0])
            else:
                short = min(image.size)
                scaled = tuple(int(with_short_side * side / short) for side in image.size)
        elif isinstance(step, CenterCrop):
            height, width = step.size
    scale = image.size[0] / scaled[0], image.size[1] / scaled[1]
    left, top = round((scaled[0] - width) / 2.), round((scaled[1] - height) / 2.)
    return Preprocessed(image, x, scale, (left * scale[0], top * scale[1]))
