"""Explanation: what decided, as numbers: evidence, selected patches, boxes, JSON.

Everything is read off one forward pass of the model: nothing is estimated afterwards. Boxes are x0, y0, x1, y1 in
pixels of the model's input, x1 and y1 exclusive; ``preprocessing.Preprocessed`` maps them to the file and back.
"""
from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..files import replace_file, unique_stems
from ..prediction import PatchPrediction
from ..text import percent, printable
from .drawing import PANELS, draw_explanation
from .evidence import AGAINST, Against, direction, evidence_along, leave_one_out
from .geometry import interpolate, patches_to_pixels, spread_over_neighbours, square_box
from .labels import Classes, classes_of, known_classes
from .numbers import numbers_of
from .preprocessing import Preprocessed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['Explanation']

LARGER, FEW_CLASSES, THUMBNAIL = 4, 20, 96
SHOWN = 3  # images in the text of an explanation


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no single truth
class Explanation:
    """Which part of each of B images decided.

    Attributes:
        prediction: what the model computed, on the CPU in float32.
        probabilities: (B, K) softmax of the image logits, or with ``multi_label`` or a single class their sigmoid; for
            routing, whose logits are lengths of class capsules and stand for the probability that the class is there,
            the logits themselves.
        target: (B,) the class that is explained, by default the predicted one.
        against: what the target is compared with: 'rest', 'mean', (B,) classes, or None.
        true_class: (B,) what the images really show, None if it is not known.
        grid: (H', W') of the patch grid; M = H'·W'.
        input_size: (H, W) of the model's input in pixels.
        patch_boxes: (M, 4) nominal pixels of each patch.
        selected: (B, M) bool; α > 0 for loss attention, α > ξ/M for attention and gated attention, all for the rest.
        images: what was explained: (B, C, H, W) tensor on the CPU or B preprocessed images.
        statistics: mean and std of the channels, to undo a tensor's normalisation.
        labels: K names of classes.
        data: name of the data that the weights were trained on, '' if it is not known.
        independent: classes do not exclude each other: multi-label, or a single class.
        held: what of the head is held as for the whole image, so that contributions add up; '' if nothing is.

    Examples:
        >>> explanation = explain(model, ['cat.png'])
        >>> explanation.evidence                     # (1, M) what each patch adds to the predicted class's lead
        >>> explanation.figure(0).savefig('cat_explained.png')
        >>> explanation.save('explanations')         # cat.png and cat.json, the next time cat-2.png and cat-2.json
        [PosixPath('explanations/cat.png')]
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
    against: Against
    true_class: torch.Tensor | None = None
    data: str = ''
    independent: bool = False
    held: str = ''

    def __len__(self) -> int:
        return len(self.target)

    def __repr__(self) -> str:
        """The predictions of the first images, what is explained if it is something else, and the grid."""
        said = []
        for k, target, p in zip(*(t[:SHOWN].tolist() for t in (self.predicted, self.target, self.probabilities))):
            asked = '' if k == target else f', explained: {self.labels[target]}'
            said.append(f'{self.labels[k]} {percent(p[k])}{asked}')
        more = '; …' if len(self) > SHOWN else ''
        count = f'{len(self)} image' + ('s' if len(self) > 1 else '')
        return f'<Explanation of {count}, {self.grid[0]}×{self.grid[1]} patches: {"; ".join(said)}{more}>'

    @property
    def evidence(self) -> torch.Tensor:
        """(B, M) what each patch adds to the target's lead; the sum over M is that lead, to rounding.

        With c_mk = ``prediction.contributions`` and t the target, it is for ``against``
            'rest':   c_mt − Σ_{k≠t} w_k c_mk, which sums to z_t − Σ_{k≠t} w_k z_k, the lead over the rivals:
                      w = softmax of the other logits, so that classes count that nearly won
            'mean':   the same with w_k = 1 / (K − 1), all others alike
            classes:  c_mt − c_ma,             which sums to z_t − z_a: the answer to "why not a?"
            None:     c_mt,                    which sums to z_t

        What all logits of a patch have in common makes its weight larger, but, once weighted, cancels in the softmax.
        It drops out of all but the last, which is for models with independent classes (multi-label), whose logits
        count each by itself. docs/other_tools.md measures the difference.
        """
        return evidence_along(self.prediction.contributions, self.direction)

    @property
    def direction(self) -> torch.Tensor:
        """(B, K) the direction v in the space of the logits z that is explained: the evidence sums to v·z.

        To ask another tool about the same number, give it ``(model(x) * explanation.direction).sum(1)``.
        """
        return direction(self.prediction.logits, self.target, self.against)

    def spread_evidence(self, sigma: float = 2.) -> torch.Tensor:
        """(B, M) evidence, shared among patches nearby that the model takes for the same thing.

        It sums to the same number. Noise of neighbours cancels and what is for the class comes out more clearly:
        docs/leaderboard.md measures how much.

        Args:
            sigma: of the Gaussian, in steps of the grid, see ``spread_over_neighbours``.
        """
        return spread_over_neighbours(self.evidence, self.prediction.patch_logits, self.grid, sigma, self.independent)

    def leave_one_out(self) -> torch.Tensor:
        """(B, M) what the lead would lose if a patch were left out and the others shared its weight.

        Evidence says who holds the lead, this what would go without one: a patch that says as much as the average loses
        nothing. Exact for the weights and patch logits as they are: weights anew for M − 1 patches are these for ξ = 0,
        while the threshold ξ/M of Eq. 5b would move a little; of kinds B and C 1/σ or the gates are held as well.
        Capsule models weigh each capsule by itself, and routing anew: there it is an approximation. It does not sum to
        the lead. docs/other_tools.md compares it with blanked images.
        """
        return leave_one_out(self.evidence, self.prediction.alpha)

    def versus(self, against: Classes | None) -> Explanation:
        """The same explanation, its target compared with something else; nothing is computed anew.

        Args:
            against: 'rest', 'mean', a class (name or index) for all images or one for each, or None, see ``evidence``.
                Where classes are independent 'rest' and 'mean' mean nothing, and are None.

        Raises:
            ValueError: no such class, or the target itself.
        """
        if against is None or (isinstance(against, str) and against in AGAINST):
            return replace(self, against=None if self.independent else cast(Against, against))
        classes = classes_of('against', against, len(self), self.labels)
        if bool((classes == self.target).any()):
            raise ValueError('against must differ from the target, which is the predicted class unless it is '
                             f'given; got {classes.tolist()} for {self.target.tolist()}.')
        return replace(self, against=classes)

    @property
    def predicted(self) -> torch.Tensor:
        """(B,) the class with the largest logit."""
        return self.prediction.logits.argmax(dim=1)

    def ranked(self, n: int = 5, index: int | slice = slice(None)) -> torch.Tensor:
        """(B, min(n, K)) classes from the predicted one on, the largest logits; of equal ones the first comes first.

        With the index of one image (min(n, K),) of that one: the others are not sorted.
        """
        return self.prediction.logits[index].argsort(dim=-1, descending=True, stable=True)[..., :n]

    def why_not(self) -> Explanation:
        """The same target against one class: the one that is asked for, else the true class, else its runner-up.

        The runner-up is the class with the largest logit of all others, for another target than the predicted class
        thus the predicted one.

        Raises:
            ValueError: the model knows one class only.
        """
        if isinstance(self.against, torch.Tensor):
            return self
        logits = self.prediction.logits
        if logits.shape[1] == 1:
            raise ValueError('why_not: the model knows one class only; there is no other to compare it with.')
        rival = logits.scatter(1, self.target.unsqueeze(1), float('-inf')).argmax(dim=1)
        if self.true_class is not None:
            rival = torch.where(self.true_class == self.target, rival, self.true_class)
        return self.versus(rival)

    def core(self, share: float = 0.5) -> torch.Tensor:
        """(B, M) bool: the fewest patches that hold a share of all positive evidence; none where there is none.

        Raises:
            ValueError: share is not in (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f'share must be in (0, 1], got {share}.')
        positive, order = self.evidence.double().clamp(min=0).sort(dim=1, descending=True)
        before = positive.cumsum(dim=1) - positive
        chosen = (before < share * positive.sum(dim=1, keepdim=True) * (1 - 1e-9)) & (positive > 0)
        return torch.zeros_like(chosen).scatter(1, order, chosen)

    def answer(self, index: int = 0) -> str:
        """The evidence of one image in a line: "cat over dog: +1.23; 31 of 49 patches for it".

        Raises:
            ValueError: the logits of this image are not finite.
        """
        self._require_finite(index)
        evidence, label = self.evidence[index], self.labels[int(self.target[index])]
        if self.against is None:
            question = f'{label}, its logit'
        elif isinstance(self.against, str):
            question = f'{label} over {AGAINST[self.against]}'
        else:
            question = f'{label} over {self.labels[int(self.against[index])]}'
        count = f'{int((evidence > 0).sum())} of {len(evidence)} patches for it'
        return f'{question}: {float(evidence.sum()):+.2f}; {count}'

    @property
    def boxes(self) -> torch.Tensor:
        """(B, 4) estimated box: the smallest square with all selected patches (all if none is), within the image."""
        return torch.stack([
            square_box(self.patch_boxes[s] if s.any() else self.patch_boxes, self.input_size) for s in self.selected])

    def pixel_map(self, values: torch.Tensor) -> torch.Tensor:
        """(B, M) values of patches to (B, H, W) in pixels, see ``patches_to_pixels``."""
        return patches_to_pixels(values, self.patch_boxes, self.input_size)

    def spans(self, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of each row (H', 2) and each column (W', 2) of patches, in pixels of the image as it was given.

        They may lie outside of the image where timm's transform pads it.
        """
        source, boxes = self.source(index), self.patch_boxes.view(*self.grid, 4).double().numpy()
        (ox, oy), (sx, sy) = source.offset, source.scale
        return boxes[:, 0, 1::2] * sy + oy, boxes[0, :, 0::2] * sx + ox

    def heat_map(self, index: int = 0, values: torch.Tensor | None = None, smooth: bool = True) -> np.ndarray:
        """One image's evidence as an array over the image's own pixels, to lay over it.

        Between the middles of the patches it is interpolated, so that the sum over pixels means nothing: numbers are
        those of ``evidence``. ``pixel_map`` has the model's input pixels instead, and NaN where there is no patch.

        Args:
            index: which image.
            values: (M,) other values of its patches, ``prediction.alpha[index]`` say.
            smooth: False gives each pixel the value of the patch whose middle is nearest.

        Returns:
            (H, W) float32 of the image as it was given, 0 where there is no patch (outside of the crop, say).

        Raises:
            ValueError: values are not one for each patch, or the logits of this image are not finite.
        """
        self._require_finite(index)
        values = self.evidence[index] if values is None else torch.as_tensor(values, device='cpu').detach()
        if values.shape != self.patch_boxes.shape[:1]:
            raise ValueError(f'values must have the shape ({len(self.patch_boxes)},), got {tuple(values.shape)}.')
        width, height = self.source(index).image.size
        rows, columns = self.spans(index)
        return interpolate(values.view(self.grid).double().numpy(), rows, columns, np.arange(height) + 0.5,
                           np.arange(width) + 0.5, smooth).astype(np.float32)

    def unlike_training(self, index: int = 0) -> str:
        """What makes an image one that the model can hardly know, in a sentence; '' if nothing is found.

        All that is looked at is the size: a photograph, more than four times as large as the input of a model of
        thumbnails and of at most twenty classes, is no such thumbnail. Of what an image shows it says nothing.
        """
        width, height = self.source(index).image.size
        large = max(width, height) > LARGER * max(self.input_size)
        if not large or max(self.input_size) > THUMBNAIL or len(self.labels) > FEW_CLASSES:
            return ''
        size = f'{self.input_size[1]}×{self.input_size[0]}'
        return (f'This image has {width}×{height} pixels; the model reads {size} and '
                f'{known_classes(self.labels, self.data)}. It answers with one of them whatever is in the image.')

    def source(self, index: int) -> Preprocessed:
        """The image as it was given; a tensor's normalisation is undone."""
        image = self.images[index]
        return image if isinstance(image, Preprocessed) else Preprocessed.from_input(image, *self.statistics)

    def _require_finite(self, index: int) -> None:
        if not all(numbers[index].isfinite().all() for numbers in self.prediction):
            name = getattr(self.images[index], 'name', None) or f'image {index}'
            raise ValueError(f'{name}: its logits or contributions are not finite. Is a pixel or a weight NaN?')

    def figure(self, index: int = 0, title: str | None = None, panels: Sequence[str] | str = PANELS[:3],
               stacked: bool = False) -> Figure:
        """Picture of one explanation, see ``drawing.draw_explanation``; its title is by default the name of the file.

        Raises:
            ImportError: matplotlib, the ``viz`` extra, is not installed.
            ValueError: the logits of this image are not finite.
        """
        self._require_finite(index)
        title = printable(self.source(index).name) if title is None else title
        return draw_explanation(self, index, title, panels, stacked)

    def to_dict(self, index: int = 0, all_classes: bool = False) -> dict[str, Any]:
        """The numbers of one explanation: maps as lists over patch rows and columns, boxes in pixels of the image.

        Args:
            index: which image.
            all_classes: contributions to every class, and not only to the target and to what it is compared with.

        Raises:
            ValueError: the logits of this image are not finite.
        """
        self._require_finite(index)
        return numbers_of(self, index, all_classes)

    def to_json(self, index: int = 0, all_classes: bool = False, /, **notes: Any) -> str:
        """``to_dict`` as JSON, after whatever notes are given (a file name, say).

        Raises:
            ValueError: what ``to_dict`` raises, or a note has the name of one of its fields.
        """
        numbers = self.to_dict(index, all_classes)
        if taken := [name for name in notes if name in numbers]:
            raise ValueError(f'{taken[0]}: this is a field of the numbers; give the note another name.')
        return json.dumps({**notes, **numbers}, indent=1)

    def save(
            self, folder: str | Path, names: Sequence[str] | None = None,
            titles: Sequence[str | None] | None = None, all_classes: bool = False,
            panels: Sequence[str] | str = PANELS[:3], stacked: bool = False, **notes: Any) -> list[Path]:
        """Write NAME.png and NAME.json for each image; each file appears whole or not at all.

        Args:
            folder: made if it does not exist.
            names: of the B images, all different; older files of these names are replaced. By default those of the
                images' files, or 0, 1, ... where there are none, with a number behind them that makes them new: cat-2.
                Two processes that write at the same time can take the same one: give names there.
            titles: what stands above the B pictures; None, by default for all: the name of the image's file.
            all_classes: see ``to_dict``.
            panels: of the pictures, see ``figure``.
            stacked: see ``figure``.
            notes: for every JSON, see ``to_json``.

        Returns:
            Paths of the B pictures, in the order of the images; the numbers lie beside them.

        Raises:
            ValueError: not B names or titles, a name that is no plain file name or occurs twice, or a note with the
                name of a field.
            ImportError: matplotlib is not installed.
        """
        B, folder = len(self), Path(folder)
        if names is None:
            there = folder.iterdir() if folder.is_dir() else ()
            files = [image.name if isinstance(image, Preprocessed) else '' for image in self.images]
            names = unique_stems((Path(file).stem or str(i) for i, file in enumerate(files)),
                                 taken=[file.stem for file in there if file.suffix.lower() in ('.png', '.json')])
        titles = [None] * B if titles is None else titles
        if len(names) != B or len(titles) != B:
            raise ValueError(f'names and titles must have {B} entries, got {len(names)} and {len(titles)}.')
        if len(set(names)) != B or any(Path(name).name != name for name in names):
            raise ValueError(f'names must be different plain file names, got {list(names)}.')
        folder.mkdir(parents=True, exist_ok=True)
        for i, (name, title) in enumerate(zip(names, titles)):
            picture, numbers = self._png(i, title, panels, stacked), self.to_json(i, all_classes, **notes).encode()
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

    def _repr_png_(self) -> bytes | None:
        """For notebooks: the picture of the first image, None without matplotlib; ``show`` displays those of all."""
        try:
            return self._png(0)
        except ImportError:
            return None

    def _png(self, index: int, title: str | None = None, panels: Sequence[str] | str = PANELS[:3],
             stacked: bool = False) -> bytes:
        buffer = io.BytesIO()
        self.figure(index, title, panels, stacked).savefig(buffer, format='png')
        return buffer.getvalue()
