"""Explanations: contributions -> heat maps, selected patches, boxes.

Everything is read off one forward pass of the model, ``model.forward_patches``: nothing is estimated afterwards. Boxes
are x0, y0, x1, y1 in pixels of the model's input, x1 and y1 exclusive; ``image_io.Preprocessed`` maps them to the file.
"""
from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from PIL import Image, ImageOps
from timm.data import resolve_model_data_config

from .attention import PatchPrediction
from .image_io import Preprocessed, open_image, preprocess, replace_file, to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = Union[Preprocessed, Image.Image, str, Path]

__all__ = ['Explanation', 'class_labels', 'explain', 'patches_to_pixels', 'square_box']


def class_labels(model: Any, num_classes: int) -> list[str]:
    """Label names of the weights if there is one for each of the classes, or else the indices."""
    labels = getattr(model, 'pretrained_cfg', {}).get('label_names') or ()
    return list(labels) if len(labels) == num_classes else [f'class {k}' for k in range(num_classes)]


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no single truth, and their text is long
class Explanation:
    """Which part of each of B images decided.

    Attributes:
        prediction: what the model computed, on the CPU in float32.
        probabilities: (B, K) softmax of the image logits, or with ``multi_label`` or a single class their sigmoid; for
            routing, whose logits are lengths of class capsules and stand for the probability that the class is there,
            the logits themselves.
        target: (B,) the class that is explained, by default the predicted one.
        against: what the target is compared with: 'rest', (B,) classes, or None.
        grid: (H', W') of the patch grid; M = H'·W'.
        input_size: (H, W) of the model's input in pixels.
        patch_boxes: (M, 4) nominal pixels of each patch.
        selected: (B, M) bool; α > 0 for loss attention, α > ξ/M for attention and gated attention, all for the rest.
        images: what was explained: (B, C, H, W) tensor on the CPU or B preprocessed images.
        statistics: mean and std of the channels, to undo a tensor's normalisation.
        labels: K names of classes.

    Examples:
        >>> explanation = explain(model, ['cat.png'])
        >>> explanation.evidence                     # (1, M) what each patch adds to the predicted class's lead
        >>> explanation.figure(0).savefig('cat_explained.png')
        >>> explanation.save('explanations')         # a PNG and a JSON for each image
    """
    prediction: PatchPrediction
    probabilities: torch.Tensor
    target: torch.Tensor
    grid: tuple[int, int]
    input_size: tuple[int, int]
    patch_boxes: torch.Tensor
    selected: torch.Tensor
    images: torch.Tensor | Sequence[Preprocessed]
    statistics: tuple[Sequence[float], Sequence[float]]
    labels: list[str]
    against: torch.Tensor | Literal['rest'] | None

    def __len__(self) -> int:
        return len(self.target)

    @property
    def evidence(self) -> torch.Tensor:
        """(B, M) what each patch adds to the target's lead; the sum over M is that lead, to rounding.

        With c_mk = ``prediction.contributions`` and t the target, it is for ``against``
            'rest':   c_mt − mean_{k≠t} c_mk, which sums to z_t − mean_{k≠t} z_k
            classes:  c_mt − c_ma,            which sums to z_t − z_a: the answer to "why not a?"
            None:     c_mt,                   which sums to z_t

        What all logits of a patch have in common makes its weight larger, but, once weighted, cancels in the softmax.
        It drops out of the first two and not of the last, which is for models with independent classes (multi-label),
        whose logits count each by itself. docs/reading_explanations.md measures the difference.
        """
        evidence = self._contributions_to(self.target)
        if self.against is None:
            return evidence
        if isinstance(self.against, str):
            contributions = self.prediction.contributions
            return evidence - (contributions.sum(dim=2) - evidence) / (contributions.shape[2] - 1)
        return evidence - self._contributions_to(self.against)

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

    def source(self, index: int) -> Preprocessed:
        """The image as it was given; a tensor's normalisation is undone."""
        image = self.images[index]
        return image if isinstance(image, Preprocessed) else Preprocessed.from_input(image, *self.statistics)

    def figure(self, index: int = 0, title: str = '') -> Figure:
        """Picture of one explanation, see ``drawing.draw_explanation``. Needs matplotlib, the ``viz`` extra."""
        from .drawing import draw_explanation
        return draw_explanation(self, index, title)

    def to_dict(self, index: int = 0) -> dict[str, Any]:
        """The numbers of one explanation: maps as lists over patch rows and columns, boxes in pixels of the image."""
        source, labels, prediction = self.source(index), self.labels, self.prediction
        target = int(self.target[index])
        top = self.probabilities[index].topk(min(5, len(labels)))
        return {
            'image_size': list(source.image.size),
            'input_size': list(self.input_size[::-1]),
            'labels': labels,
            'logits': prediction.logits[index].tolist(),
            'top5': [
                {'class': k, 'label': labels[k], 'probability': p, 'logit': float(prediction.logits[index, k])}
                for p, k in zip(*(t.tolist() for t in top))],
            'target': {'class': target, 'label': labels[target]},
            'against': self.against if self.against is None or isinstance(self.against, str) else {
                'class': int(self.against[index]), 'label': labels[int(self.against[index])]},
            'evidence': self.evidence[index].view(self.grid).tolist(),
            'patch_grid': list(self.grid),
            'alpha': prediction.alpha[index].view(self.grid).tolist(),
            'contributions': prediction.contributions[index].view(*self.grid, -1).tolist(),
            'selected': self.selected[index].view(self.grid).tolist(),
            'patch_boxes': source.to_image(self.patch_boxes).view(*self.grid, 4).tolist(),
            'box': source.to_image(self.boxes[index]).tolist(),
        }

    def to_json(self, index: int = 0, **notes: Any) -> str:
        """``to_dict`` as JSON, after whatever notes are given (a file name, say)."""
        return json.dumps({**notes, **self.to_dict(index)}, indent=1)

    def save(
            self, folder: str | Path, names: Sequence[str] | None = None, titles: Sequence[str] | None = None,
            **notes: Any) -> list[Path]:
        """Write NAME.png and NAME.json for each image; each file appears whole or not at all. Older ones are replaced.

        Args:
            folder: made if it does not exist.
            names: of the B images, all different (default: 0, 1, ...; the next batch needs other ones).
            titles: what stands above the B pictures (default: nothing).
            notes: for every JSON, see ``to_json``.

        Returns:
            Paths of the pictures.

        Raises:
            ValueError: not B names or titles, or a name that is no plain file name or occurs twice.
            ImportError: matplotlib is not installed.
        """
        B, folder = len(self), Path(folder)
        names = [str(i) for i in range(B)] if names is None else names
        titles = [''] * B if titles is None else titles
        if len(names) != B or len(titles) != B:
            raise ValueError(f'names and titles must have {B} entries, got {len(names)} and {len(titles)}.')
        if len(set(names)) != B or any(Path(name).name != name for name in names):
            raise ValueError(f'names must be different plain file names, got {list(names)}.')
        folder.mkdir(parents=True, exist_ok=True)
        for i, (name, title) in enumerate(zip(names, titles)):
            picture, numbers = self._png(i, title), self.to_json(i, **notes).encode()
            replace_file(folder / f'{name}.png', picture)
            replace_file(folder / f'{name}.json', numbers)
        return [folder / f'{name}.png' for name in names]

    def show(self) -> None:
        """Display the pictures of all images in a notebook.

        Raises:
            ImportError: IPython or matplotlib is not installed.
        """
        from IPython.display import Image as NotebookImage
        from IPython.display import display
        for i in range(len(self)):
            display(NotebookImage(data=self._png(i)))

    def _png(self, index: int, title: str = '') -> bytes:
        buffer = io.BytesIO()
        self.figure(index, title).savefig(buffer, format='png')
        return buffer.getvalue()


@torch.no_grad()
def explain(
        model: Any,
        images: torch.Tensor | Source | Sequence[Source],
        target: int | Sequence[int] | torch.Tensor | None = None,
        against: int | Sequence[int] | torch.Tensor | Literal['rest'] | None = 'rest',
        multi_label: bool = False,
) -> Explanation:
    """Explain a batch of images in one forward pass without gradients.

    Args:
        model: patch model with a classifier, in eval mode.
        images: (B, C, H, W) normalised images, any size of at least one patch; or one or B image files, PIL images or
            what ``preprocess`` returned, which get timm's evaluation transform.
        target: class to explain, for all images or for each; by default the predicted one.
        against: what to compare the target with, see ``Explanation.evidence``: 'rest', the mean of the other classes; a
            class, for all images or for each, "why not that one?"; or None, nothing.
        multi_label: the classes are independent: probabilities are sigmoids, and 'rest' means nothing.

    Raises:
        TypeError: the model is not a patch model.
        ValueError: the model is in train mode, images are no batch or cannot be read, a class does not exist, or it
            would be compared with itself.
    """
    if not hasattr(model, 'forward_patches'):
        raise TypeError(f'model must have forward_patches, as patch models do; {type(model).__name__} has not.')
    if model.training:
        raise ValueError('model must be in eval mode: call model.eval() first.')
    if isinstance(images, (Preprocessed, Image.Image, str, Path)):
        images = [images]
    given = images.detach().to('cpu', copy=True) if isinstance(images, torch.Tensor) else [
        preprocessed(model, image) for image in images]
    x = images if isinstance(images, torch.Tensor) else torch.stack(
        [image.x for image in given] or [torch.empty(0)])
    if x.dim() != 4 or not len(x):
        raise ValueError(f'images must be a batch (B, C, H, W) with B > 0, got a tensor of shape {tuple(x.shape)}.')
    parameter = next(model.parameters())
    output = model.forward_patches(x.to(device=parameter.device, dtype=parameter.dtype))
    prediction = PatchPrediction(*(t.float().cpu() for t in output))
    B, K = prediction.logits.shape

    def classes(name: str, value: int | Sequence[int] | torch.Tensor) -> torch.Tensor:
        try:
            result = torch.as_tensor(value).reshape(-1).cpu()
        except (TypeError, ValueError):  # names, say
            raise ValueError(f'{name} must hold {B} classes in [0, {K - 1}], got {value!r}.') from None
        if isinstance(value, int) and not isinstance(value, bool):
            result = result.expand(B)
        if (result.shape != (B,) or result.is_floating_point() or result.dtype == torch.bool
                or int(result.min()) < 0 or int(result.max()) >= K):
            raise ValueError(f'{name} must hold {B} classes in [0, {K - 1}], got {result.tolist()}.')
        return result.long()

    logits = prediction.logits
    chosen = logits.argmax(dim=1) if target is None else classes('target', target)
    compared: torch.Tensor | Literal['rest'] | None = None
    if isinstance(against, str) and against == 'rest':
        compared = 'rest' if K > 1 and not multi_label else None
    elif isinstance(against, str):
        raise ValueError(f"against must be 'rest', None or {B} classes, got {against!r}.")
    elif against is not None:
        compared = classes('against', against)
        if bool((compared == chosen).any()):
            raise ValueError('against must differ from the target, which is the predicted class unless it is given; '
                             f'got {compared.tolist()} for {chosen.tolist()}.')
    M = prediction.alpha.shape[1]
    if model.global_pool == 'lossattn':
        selected = prediction.alpha > 0
    elif model.global_pool in ('attn', 'gatedattn'):
        selected = prediction.alpha > model.xi / M
    else:
        selected = torch.ones_like(prediction.alpha, dtype=torch.bool)
    height, width = x.shape[-2:]
    if model.global_pool == 'routing':
        probabilities = logits
    else:
        probabilities = logits.sigmoid() if multi_label or K == 1 else logits.softmax(dim=1)
    config = resolve_model_data_config(model)
    return Explanation(
        prediction=prediction,
        probabilities=probabilities,
        target=chosen,
        grid=model.patch_grid(height, width),
        input_size=(height, width),
        patch_boxes=model.patch_boxes(height, width),
        selected=selected,
        images=given,
        statistics=(config['mean'], config['std']),
        labels=class_labels(model, K),
        against=compared,
    )


def preprocessed(model: Any, image: Source) -> Preprocessed:
    """An image file, or a PIL image of any mode, upright, through the model's evaluation transform.

    Raises:
        ValueError: not readable, no image, or the model does not say how it wants its images.
    """
    if isinstance(image, Preprocessed):
        return image
    if not hasattr(model, 'pretrained_cfg'):
        raise ValueError('images must be a tensor for a model without pretrained_cfg, which has no transform.')
    if isinstance(image, (str, Path)):
        image = open_image(image)
    elif not isinstance(image, Image.Image):
        raise ValueError(f'images must be a tensor (B, C, H, W) or a list of files or PIL images, got a list with a '
                         f'{type(image).__name__}.')
    return preprocess(model, to_rgb(ImageOps.exif_transpose(image)))


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
