"""Image -> model input with timm's own evaluation transform, and coordinates from one to the other.

The one path from images to inputs: explain, validate.py, figures and comparisons all go it, so that boxes, maps and
accuracies are of the same pixels.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import CenterCropOrPad, ResizeKeepRatio, create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import CenterCrop, Resize

from ..models.probe import input_size
from ..text import one_line

__all__ = [
    'PREPROCESSING', 'Preprocessed', 'Preprocessing', 'boxes_to_image', 'boxes_to_input', 'image_endings',
    'input_config', 'open_image', 'preprocess', 'to_rgb', 'upright',
]

PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # of timm's data config
MAX_RESIZED = 100_000_000  # pixels; the shorter side becomes the input's, so a line of pixels would grow to gigabytes


def open_image(path: str | Path) -> Image.Image:
    """Open any image that Pillow opens as upright 8-bit RGB: first frame, EXIF rotation applied, alpha over white.

    Raises:
        ValueError: the file does not exist or is not an image that Pillow can read.
    """
    try:
        with Image.open(path) as file:
            file.seek(0)
            return to_rgb(upright(file))
    except FileNotFoundError:
        raise ValueError(f'image: no such file: {path}') from None
    except Exception as error:  # broken files: RuntimeError, NotImplementedError and more
        raise ValueError(f'image: cannot read {path}: {one_line(error)}') from None


def image_endings() -> set[str]:
    """Endings of the files that Pillow can open: '.png', '.jpg', ..."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data say, or as it is where these are damaged.

    Raises:
        OSError: and many others; its pixels are broken.
    """
    image.load()  # outside of the try block: broken pixels are no matter of EXIF
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # SyntaxError, struct.error and more
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB, transparent parts over white.

    Grey of 16 bits keeps its place in [0, 65535]; other numbers, float or beyond that range, are scaled from their own.
    """
    if image.mode.startswith('I') or image.mode == 'F':  # 16-bit or float grey; convert('RGB') would clip it
        grey = np.asarray(image, dtype=np.float64)
        beyond = image.mode == 'I' and (grey.min() < 0 or grey.max() > 65535)  # Hounsfield units, int32
        if image.mode == 'F' or beyond:  # its range to [0, 255]; NaN and -inf are black, inf is white
            finite = grey[np.isfinite(grey)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0., 0.)
            grey = (np.nan_to_num(grey, nan=low, posinf=high, neginf=low) - low) * (
                255. / (high - low) if high > low else 0.)
        elif image.mode.startswith('I;16') or grey.max() > 255:
            grey = grey / 257.  # 16-bit PNGs
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode == 'La':  # Pillow takes it to no other mode
        image = image.convert('LA')
    if image.mode in ('RGBA', 'LA', 'PA', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        background = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(background, image)
    return image.convert('RGB')


def boxes_to_image(
        boxes: torch.Tensor, size: tuple[int, int], scale: tuple[float, float],
        offset: tuple[float, float]) -> torch.Tensor:
    """(..., 4) boxes in input pixels to boxes in the pixels of an image of size (W, H), see ``Preprocessed``."""
    boxes = boxes.double()
    places, limit = boxes.new_tensor([*offset, *offset]), boxes.new_tensor([*size, *size])
    return (boxes * boxes.new_tensor([*scale, *scale]) + places).clamp(min=0).minimum(limit)


def boxes_to_input(
        boxes: torch.Tensor, size: tuple[int, int], scale: tuple[float, float],
        offset: tuple[float, float]) -> torch.Tensor:
    """(..., 4) boxes in image pixels to boxes in the pixels of an input of size (W, H), clipped to it; float64."""
    boxes = boxes.double()
    places, limit = boxes.new_tensor([*offset, *offset]), boxes.new_tensor([*size, *size])
    return ((boxes - places) / boxes.new_tensor([*scale, *scale])).clamp(min=0).minimum(limit)


@dataclass(frozen=True)
class Preprocessed:
    """An image, the model's input made of it, and where that input lies in the image.

    Attributes:
        image: RGB image.
        x: (C, H, W) normalised input.
        scale: (sx, sy) image pixels per input pixel.
        offset: (ox, oy) image position of the input's corner.
        name: of the image's file, '' if it came from none.
    """
    image: Image.Image
    x: torch.Tensor
    scale: tuple[float, float]
    offset: tuple[float, float]
    name: str = ''

    @classmethod
    def from_input(cls, x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> 'Preprocessed':
        """A model's input (C, H, W) as an image: normalisation undone; other than three channels in grey."""
        if len(x) != len(mean):
            mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
        pixels = x.float().cpu()
        pixels = pixels * pixels.new_tensor(std).view(-1, 1, 1) + pixels.new_tensor(mean).view(-1, 1, 1)
        if len(pixels) != 3:
            pixels = pixels.mean(dim=0, keepdim=True).expand(3, -1, -1)
        image = (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return cls(Image.fromarray(image), x, (1., 1.), (0., 0.))

    def to_image(self, boxes: torch.Tensor) -> torch.Tensor:
        """(..., 4) boxes in input pixels to boxes in image pixels, clipped to the image."""
        return boxes_to_image(boxes, self.image.size, self.scale, self.offset)

    def to_input(self, boxes: torch.Tensor) -> torch.Tensor:
        """(..., 4) boxes in image pixels to boxes in input pixels, clipped to the input; float64."""
        height, width = self.x.shape[-2:]
        return boxes_to_input(boxes, (width, height), self.scale, self.offset)


def input_config(model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model's weights; for one channel mean and std are averaged, as timm's loader does."""
    config: dict[str, Any] = {**resolve_model_data_config(model)}
    config['input_size'] = input_size(model)
    if config['input_size'][0] == 1:
        config.update({key: (sum(config[key]) / len(config[key]),) for key in ('mean', 'std')})
    return config


class Preprocessing:
    """timm's evaluation transform that keeps track of the geometry: a Pillow image -> Preprocessed.

    Args:
        config: timm's data config, with input_size, mean, std, interpolation, crop_pct and crop_mode.

    Raises:
        ValueError: the input has neither one nor three channels.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.channels, height, width = config['input_size']
        self.pixels = height * width
        if self.channels not in (1, 3):
            raise ValueError(f'model must have 1 or 3 input channels, got {self.channels}.')
        self.steps: list[Any] = create_transform(
            **{key: config[key] for key in PREPROCESSING if config.get(key) is not None}, is_training=False).transforms

    def __call__(self, image: Image.Image) -> Preprocessed:
        """RGB image to Preprocessed; for one channel it is made grey.

        Raises:
            ValueError: the image is so long and thin that it would have more than MAX_RESIZED pixels.
        """
        if self.pixels * max(image.size) > MAX_RESIZED * min(image.size):
            raise ValueError(f'image: {image.width}×{image.height} pixels are too long and thin for the model: resized '
                             f'there would be more than {MAX_RESIZED // 1_000_000} megapixels.')
        x: Any = image.convert('L') if self.channels == 1 else image
        size, offset = image.size, (0., 0.)  # of the whole image at the input's scale; of the input's corner in it
        for step in self.steps:
            before = x
            x = step(before)
            if isinstance(step, (Resize, ResizeKeepRatio)):
                size = x.size
            elif isinstance(step, (CenterCrop, CenterCropOrPad)):
                # torchvision and timm round an odd crop to the nearest even number, and put an odd padding to the right
                left, top = (round((b - a) / 2.) if b >= a else -((a - b) // 2) for a, b in zip(x.size, before.size))
                offset = (float(left), float(top))
        scale = (image.size[0] / size[0], image.size[1] / size[1])
        return Preprocessed(image, x, scale, (offset[0] * scale[0], offset[1] * scale[1]))


def preprocess(model: nn.Module, image: Image.Image) -> Preprocessed:
    """Apply a model's evaluation transform to an RGB image, see Preprocessing.

    Args:
        model: timm model; its pretrained_cfg gives size, mean, std, interpolation, crop.
        image: RGB image. A model with one input channel gets it in grey.

    Raises:
        ValueError: the model has neither one nor three input channels.
    """
    return Preprocessing(input_config(model))(image)
