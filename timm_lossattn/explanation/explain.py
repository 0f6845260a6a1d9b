"""explain: one forward pass of a patch model -> Explanation."""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image
from timm.utils import unwrap_model

from ..models.any_timm import loss_attention
from ..prediction import PatchPrediction
from ..text import shorten
from .explanation import Explanation
from .labels import Classes, by_index, class_labels, classes_of, training_data
from .preprocessing import Preprocessed, input_config, open_image, preprocess, to_rgb, upright

Source = Union[Preprocessed, Image.Image, np.ndarray, str, Path]

__all__ = ['HELD', 'explain', 'held_of', 'patch_model']

HELD = {'B': "the head's 1/σ", 'C': "the head's gates and any 1/σ"}  # by ``patch_kind``


@torch.no_grad()
def explain(
        model: Any,
        images: torch.Tensor | Source | Sequence[Source],
        target: Classes | None = None,
        against: Classes | None = 'rest',
        multi_label: bool = False,
        true_class: Classes | None = None,
        labels: Sequence[str] | dict[int, str] | None = None,
) -> Explanation:
    """Explain a batch of images in one forward pass without gradients.

    Args:
        model: patch model with a classifier, in eval mode; or a stock timm model, whose own logits are explained, every
            patch with the same weight (``loss_attention(model, pool='avg')``).
        images: (B, C, H, W) normalised images, any size of at least one patch; or one or B image files, PIL images,
            NumPy arrays that Pillow takes, (H, W, 3) uint8 say, or what ``preprocess`` returned: they get timm's
            evaluation transform.
        target: class to explain, name or index, for all images or for each; by default the predicted one.
        against: what to compare the target with, see ``Explanation.evidence``: 'rest', its rivals, the other classes by
            their softmax; 'mean', the others alike; a class, for all images or for each, "why not that one?"; or None,
            nothing.
        multi_label: the classes are independent: probabilities are sigmoids, and 'rest' and 'mean' mean nothing.
        true_class: what the images really show, for all or for each, if it is known: wrong predictions are marked, and
            ``why_not`` is asked about it. Not where classes are independent: of these several may be right.
        labels: names of the K classes, all different, in their order or by index; by default those of the model's
            weights.

    Raises:
        TypeError: the model is no patch model and has no forward_features and forward_head.
        ValueError: the model, or a part of it, is in train mode, or its logits are no sum over patches; images are no
            batch or cannot be read; a class does not exist, or it would be compared with itself; labels are not K
            different names.
    """
    model = patch_model(model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError('model must be in eval mode: call model.eval() first'
                         + (f' (its part {training!r} is in train mode).' if training else '.'))
    if isinstance(images, (Preprocessed, Image.Image, np.ndarray, str, Path)):
        images = [images]
    if isinstance(images, (list, tuple)) and not images:
        raise ValueError('images must hold at least one image, got an empty list.')
    given = images.detach().to('cpu', copy=True) if isinstance(images, torch.Tensor) else [
        preprocessed(model, image) for image in images]
    x = images if isinstance(images, torch.Tensor) else torch.stack(
        [image.x for image in given])
    if x.dim() != 4 or not len(x):
        raise ValueError(f'images must be a batch (B, C, H, W) with B > 0, got a tensor of shape {tuple(x.shape)}'
                         + ('; for one image add the batch dimension: x.unsqueeze(0).' if x.dim() == 3 else '.'))
    if not x.is_floating_point():
        raise ValueError(f'images must be a tensor of normalised numbers, got {x.dtype}; pixels from 0 to 255 go in as '
                         'PIL images or NumPy arrays.')
    parameter = next(model.parameters())
    output = model.forward_patches(x.to(device=parameter.device, dtype=parameter.dtype))
    prediction = PatchPrediction(*(t.float().cpu() for t in output))
    B, K = prediction.logits.shape

    logits = prediction.logits
    names = class_labels(model, K) if labels is None else (
        by_index(labels, K) if isinstance(labels, dict) else [str(label) for label in labels])
    strange = isinstance(labels, (str, set, frozenset)) or (
        isinstance(labels, dict) and not {str(k) for k in labels} <= {str(k) for k in range(K)})
    if len(names) != K or len(set(names)) != K or strange:
        raise ValueError(f'labels must be {K} different names in a list, or by index, got {shorten(str(labels), 100)}.')
    chosen = logits.argmax(dim=1) if target is None else classes_of('target', target, B, names)
    independent = K == 1 or multi_label
    if independent and true_class is not None:
        raise ValueError(f'true_class must be None where classes are independent (multi_label, or a single class), got '
                         f'{true_class!r}.')
    weights, (height, width) = model.patch_weights, x.shape[-2:]
    config = input_config(model)
    explanation = Explanation(
        prediction=prediction,
        probabilities=weights.probabilities(logits, multi_label),
        target=chosen,
        grid=model.patch_grid(height, width),
        input_size=(height, width),
        patch_boxes=model.patch_boxes(height, width),
        selected=weights.selected(prediction.alpha),
        images=given,
        statistics=(config['mean'], config['std']),
        labels=names,
        against=None,
        true_class=None if true_class is None else classes_of('true_class', true_class, B, names),
        data=training_data(model, names) if labels is None else '',
        independent=independent,
        held=held_of(model),
    )
    return explanation.versus(against)


def held_of(model: Any) -> str:
    """What of a patch model's head is held as for the whole image, so that contributions add up; '' if nothing is."""
    return HELD.get(getattr(model, 'patch_kind', ''), '')


def patch_model(model: Any) -> Any:
    """The model itself if it has patches, a stock timm model with α = 1/M; without a wrapper, as torch.compile's.

    Raises:
        TypeError: it is neither.
        ValueError: the logits of the timm model are no sum over patches.
    """
    model = unwrap_model(model)
    if hasattr(model, 'forward_patches'):
        return model
    if isinstance(model, str):
        raise TypeError(f'model must be a model, got the name {model!r}: timm_lossattn.load_model({model!r}) gives it.')
    if not hasattr(model, 'forward_features') or not hasattr(model, 'forward_head'):
        raise TypeError('model must have forward_patches, as patch models do, or forward_features and forward_head, as '
                        f'timm models do; {type(model).__name__} has neither.')
    return loss_attention(model, pool='avg')


def preprocessed(model: Any, image: Source) -> Preprocessed:
    """An image file, a PIL image of any mode or an array, upright, through the model's evaluation transform.

    Raises:
        ValueError: not readable, no image, or the model does not say how it wants its images.
    """
    if isinstance(image, Preprocessed):
        return image
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError('images must be a tensor for a model without pretrained_cfg, which has no transform.')
    if isinstance(image, (str, Path)):
        return replace(preprocess(model, open_image(image)), name=Path(image).name)
    if isinstance(image, np.ndarray):
        got = f'{image.shape} {image.dtype}'
        try:
            image = Image.fromarray(image)
        except (TypeError, ValueError):
            raise ValueError('images: a NumPy array must be one image that Pillow takes, (H, W, 3) uint8 say, got '
                             f'{got}.') from None
    if not isinstance(image, Image.Image):
        raise ValueError('images must be a tensor (B, C, H, W) or a list of files, PIL images or NumPy arrays, got a '
                         f'list with a {type(image).__name__}.')
    return preprocess(model, to_rgb(upright(image)))
