"""How faithful a heat map is to the model: deletion, insertion, single deletion, completeness.

They judge any heat map, ours or another tool's, and see the model only as a function from images to logits. NaN in a
map is where it says nothing.
"""
from collections.abc import Callable
from typing import Any, Literal

import torch
from torchvision.transforms.v2.functional import gaussian_blur

from .per_image import PerImage

__all__ = ['Completeness', 'Deletion', 'Insertion', 'SingleDeletion', 'blank_image']

Model = Callable[[torch.Tensor], torch.Tensor]
Blank = Literal['mean', 'blur']
CELLS = 4  # a side, of single deletion


def blank_image(images: torch.Tensor, blank: Blank) -> torch.Tensor:
    """What stands in the place of removed pixels of normalised images (B, C, H, W).

    'mean': 0, the mean colour. 'blur': the image after a Gaussian blur with σ of a tenth of its shorter side, in which
    no edge appears that the image has not.
    """
    if blank == 'mean':
        return torch.zeros_like(images)
    sigma = min(images.shape[-2:]) / 10.
    return gaussian_blur(images, [2 * round(2 * sigma) + 1] * 2, [sigma] * 2)


def ranks_of_pixels(order: torch.Tensor, size: tuple[int, int], patch_boxes: torch.Tensor | None) -> torch.Tensor:
    """How many units come before each pixel.

    Args:
        order: (B, M) scores of patches; or (B, H, W) of pixels, if there are no patch_boxes.
        size: (H, W).
        patch_boxes: (M, 4).

    Returns:
        (B, H, W) integers from 0; M for pixels of no patch. A pixel of several patches
        is reached with the first of them.
    """
    flat = order.flatten(1).nan_to_num(-torch.inf)
    B, N = flat.shape
    order_of_units = flat.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order_of_units).scatter_(
        1, order_of_units, torch.arange(N, device=flat.device).expand(B, N))
    if patch_boxes is None:
        return ranks.view_as(order)
    result = ranks.new_full((B, *size), N)
    for m, (x0, y0, x1, y1) in enumerate(patch_boxes.tolist()):
        result[:, y0:y1, x0:x1] = result[:, y0:y1, x0:x1].minimum(ranks[:, m, None, None])
    return result


class Removal(PerImage):
    """Mean probability of the target while parts of the image are removed, or put back, in the order of a map.

    Args:
        blank: what stands in the place of removed pixels, see ``blank_image``.
        steps: after how many equal shares of the parts the model is asked (and before the first); None: after each.
        batch_size: images in a forward pass.
    """
    inserting = False

    def __init__(
            self, blank: Blank = 'mean', steps: int | None = None, batch_size: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.blank, self.steps, self.batch_size = blank, steps, batch_size

    @torch.no_grad()
    def measure(
            self, model: Model, images: torch.Tensor, order: torch.Tensor, target: torch.Tensor,
            patch_boxes: torch.Tensor | None = None) -> torch.Tensor:
        """Area under the curve.

        Args:
            model: (N, C, H, W) to (N, K) probabilities.
            images: (B, C, H, W), normalised.
            order: (B, M), importance of each patch for the target; or (B, H, W) of each pixel.
            target: (B,) classes.
            patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive), with an order of patches. Pixels of no patch stay.

        Returns:
            (B,) in [0, 1]: mean probability over all steps, by the trapezoidal rule.

        Raises:
            ValueError: order fits neither patches nor pixels, or target is not (B,).
        """
        B, H, W = len(images), *images.shape[-2:]
        shape = (B, H, W) if patch_boxes is None else (B, len(patch_boxes))
        if order.shape != shape or target.shape != (B,):
            raise ValueError(f'order must be {shape} and target ({B},), got {tuple(order.shape)}, '
                             f'{tuple(target.shape)}.')
        ranks = ranks_of_pixels(order, (H, W), patch_boxes).to(images.device)
        units = order[0].numel()
        removed, steps = blank_image(images, self.blank), self.steps or units
        # in integers, so that no rounding decides: a unit of rank r is reached at step s if r + 1/2 <= units·s / steps
        reach = 2 * units * torch.arange(steps + 1, device=images.device)
        areas = []
        for image, other, rank, k in zip(images, removed, ranks, target.tolist()):
            curve = []
            for part in reach.split(self.batch_size):  # a chunk of changed copies at a time
                reached = ((2 * rank + 1) * steps <= part[:, None, None]).unsqueeze(1)  # (n, 1, H, W)
                keep = reached | (rank == units) if self.inserting else ~reached
                curve.append(model(torch.where(keep, image, other)).float()[:, k].cpu())
            areas.append(torch.trapezoid(torch.cat(curve), dx=1 / steps))
        return torch.stack(areas)


class Deletion(Removal):
    """Parts are removed, the most important first: the faster the probability drops, the better the order (low).

    V. Petsiuk et al., "RISE", BMVC 2018; there pixel by pixel and with the mean colour.
    """


class Insertion(Removal):
    """Parts are put back into an image without any, the most important first (high).

    V. Petsiuk et al., "RISE", BMVC 2018; there pixel by pixel and into a blurred image.
    """
    inserting = True


class SingleDeletion(PerImage):
    """Rank correlation of a map with what happens when one cell of the image shows the mean colour, over 4 × 4 cells.

    Spearman's ρ of the heat in each cell and the drop of the number that the map explains. For a model that was trained
    with blanked cells, on which such images are no surprise, it is the in-domain single-deletion score (IDSDS) of
    R. Hesse et al., "Benchmarking the Attribution Quality of Vision Models", NeurIPS 2024.
    """

    def cells(self, size: tuple[int, int]) -> torch.Tensor:
        """(16, H, W) bool: the cells of an image of that size."""
        rows, columns = (torch.arange(length) * CELLS // length for length in size)
        return (rows[:, None] * CELLS + columns) == torch.arange(CELLS ** 2).view(-1, 1, 1)

    @torch.no_grad()
    def drops(self, model: Model, images: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Drop of v·z when each cell is blanked: images (B, C, H, W) and directions (B, K) to (B, 16)."""
        cells = self.cells((images.shape[-2], images.shape[-1])).to(images.device)
        blank, explained = blank_image(images, 'mean'), (model(images).float() * v).sum(dim=1)
        left = [(model(torch.where(cell, blank, images)).float() * v).sum(dim=1) for cell in cells]
        return explained[:, None] - torch.stack(left, dim=1)

    def measure(self, heat: torch.Tensor, drops: torch.Tensor) -> torch.Tensor:
        """Heat maps (B, H, W) and ``drops`` (B, 16) to (B,) in [−1, 1]; 0 for a map that is the same in all cells."""
        cells = self.cells((heat.shape[1], heat.shape[2])).to(heat.device)
        sums = torch.einsum('bhw,chw->bc', heat.nan_to_num(0.).double(), cells.double())
        return rank_correlation(sums, drops)


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's ρ of each row of (B, N) with that of another (B, N): (B,); 0 where a row has one value only."""
    from torchmetrics.functional import spearman_corrcoef
    rho = torch.stack([spearman_corrcoef(x.double(), y.double()) for x, y in zip(a.cpu(), b.cpu())]).float()
    constant = (a.amax(1) == a.amin(1)) | (b.amax(1) == b.amin(1))
    return rho.where(~constant.cpu(), 0.).nan_to_num(0.)


class Completeness(PerImage):
    """How far a map's parts are from adding up to what they explain: |Σ parts − v·z| / max(1, |v·z|).

    Completeness is an axiom of M. Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017.
    """

    def measure(self, parts: torch.Tensor, explained: torch.Tensor) -> torch.Tensor:
        """Parts (B, ...) and what they should add up to, (B,) (integrated gradients: less the baseline's), to (B,)."""
        total, explained = parts.flatten(1).double().sum(dim=1), explained.double()
        return ((total - explained).abs() / explained.abs().clamp(min=1)).float()
