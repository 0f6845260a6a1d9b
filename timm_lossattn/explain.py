"""Explanations: contributions -> heat maps, selected patches, boxes.

Everything is read off one forward pass of the model, ``model.forward_patches``: nothing is estimated afterwards. Boxes
are x0, y0, x1, y1 in pixels of the model's input, x1 and y1 exclusive; ``image_io.Preprocessed`` maps them to the file.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention import PatchPrediction

__all__ = ['Explanation', 'explain', 'patches_to_pixels', 'square_box']


@dataclass(frozen=True)
class Explanation:
    """Which part of each of B images decided.

    Attributes:
        prediction: what the model computed, on the CPU in float32.
        probabilities: (B, K) softmax of the image logits; for routing, whose logits are lengths of class capsules and
            stand for the probability that the class is there, the logits themselves.
        target: (B,) the class that is explained, by default the predicted one.
        against: (B,) the class that the target is compared with ("why not ...?"), or None.
        grid: (H', W') of the patch grid; M = H'·W'.
        input_size: (H, W) of the model's input in pixels.
        patch_boxes: (M, 4) nominal pixels of each patch.
        selected: (B, M) bool; α > 0 for loss attention, α > ξ/M for attention and gated attention, all for the rest.
    """
    prediction: PatchPrediction
    probabilities: torch.Tensor
    target: torch.Tensor
    grid: tuple[int, int]
    input_size: tuple[int, int]
    patch_boxes: torch.Tensor
    selected: torch.Tensor
    against: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def evidence(self) -> torch.Tensor:
        """(B, M) what each patch adds to the target's logit; the sum over M is that logit.

        With ``against``, what it adds to the difference of the two logits: the exact answer to "why not that class?".
        """
        evidence = self._contributions_to(self.target)
        return evidence if self.against is None else evidence - self._contributions_to(self.against)

    def _contributions_to(self, classes: torch.Tensor) -> torch.Tensor:
        contributions = self.prediction.contributions
        index = classes.view(-1, 1, 1).expand(-1, contributions.shape[1], 1)
        return contributions.gather(2, index).squeeze(2)

    @property
    def boxes(self) -> torch.Tensor:
        """(B, 4) estimated box: the smallest square that contains all selected patches, within the image."""
        return torch.stack([square_box(self.patch_boxes[s], self.input_size) for s in self.selected])

    def pixel_map(self, values: torch.Tensor) -> torch.Tensor:
        """(B, M) values of patches to (B, H, W) in pixels, see ``patches_to_pixels``."""
        return patches_to_pixels(values, self.patch_boxes, self.input_size)


@torch.no_grad()
def explain(
        model: Any,
        images: torch.Tensor,
        target: Sequence[int] | torch.Tensor | None = None,
        against: Sequence[int] | torch.Tensor | None = None,
) -> Explanation:
    """Explain a batch of images in one forward pass without gradients.

    Args:
        model: patch model with a classifier, in eval mode.
        images: (B, C, H, W) normalised images, any size of at least one patch.
        target: class to explain for each image; by default the predicted one.
        against: class to compare the target with, for each image: "why not that one?".

    Raises:
        TypeError: the model is not a patch model.
        ValueError: the model is in train mode, images are no batch, or a class does not exist.
    """
    if not hasattr(model, 'forward_patches'):
        raise TypeError(f'model must have forward_patches, as patch models do; {type(model).__name__} has not.')
    if model.training:
        raise ValueError('model must be in eval mode: call model.eval() first.')
    if images.dim() != 4:
        raise ValueError(f'images must be a batch (B, C, H, W), got a tensor of shape {tuple(images.shape)}.')
    parameter = next(model.parameters())
    output = model.forward_patches(images.to(device=parameter.device, dtype=parameter.dtype))
    prediction = PatchPrediction(*(t.float().cpu() for t in output))
    B, K = prediction.logits.shape

    def classes(name: str, value: Sequence[int] | torch.Tensor) -> torch.Tensor:
        result = torch.as_tensor(value).reshape(-1).cpu()
        if (result.shape != (B,) or result.is_floating_point() or result.dtype == torch.bool
                or int(result.min()) < 0 or int(result.max()) >= K):
            raise ValueError(f'{name} must hold {B} classes in [0, {K - 1}], got {result.tolist()}.')
        return result.long()

    M = prediction.alpha.shape[1]
    if model.global_pool == 'lossattn':
        selected = prediction.alpha > 0
    elif model.global_pool in ('attn', 'gatedattn'):
        selected = prediction.alpha > model.xi / M
    else:
        selected = torch.ones_like(prediction.alpha, dtype=torch.bool)
    height, width = images.shape[-2:]
    logits = prediction.logits
    return Explanation(
        prediction=prediction,
        probabilities=logits if model.global_pool == 'routing' else logits.softmax(dim=1),
        target=prediction.logits.argmax(dim=1) if target is None else classes('target', target),
        grid=model.patch_grid(height, width),
        input_size=(height, width),
        patch_boxes=model.patch_boxes(height, width),
        selected=selected,
        against=None if against is None else classes('against', against),
    )


def patches_to_pixels(values: torch.Tensor, patch_boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Spread the value of each patch over its nominal pixels, averaged where patches overlap.

    Args:
        values: (B, M).
        patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive).
        size: (H, W) of the map.

    Returns:
        (B, H, W); pixels that no patch covers nominally (a margin at the right and bottom) are NaN.
    """
    total = values.new_zeros((len(values), *size))
    count = values.new_zeros(size)
    for m, (x0, y0, x1, y1) in enumerate(patch_boxes.tolist()):
        total[:, y0:y1, x0:x1] += values[:, m, None, None]
        count[y0:y1, x0:x1] += 1
    return total / count.where(count > 0, torch.nan)


def square_box(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Smallest square that contains all boxes, moved into the image; clipped if the image is narrower than it.

    Args:
        boxes: (N, 4) with N > 0.
        size: (H, W) of the image.

    Returns:
        (4,) x0, y0, x1, y1.
    """
    low, high = boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)
    limit = torch.tensor([size[1], size[0]])
    side = (high - low).max()
    start = torch.div(low + high - side, 2, rounding_mode='floor')
    start = start.minimum(limit - side).clamp(min=0)
    return torch.cat([start, (start + side).minimum(limit)])
