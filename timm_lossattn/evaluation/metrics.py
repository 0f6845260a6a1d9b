"""Measures of interpretability and of multi-label accuracy, as torchmetrics (section 5.4 of the paper).

Boxes are x0, y0, x1, y1 in pixels of the model's input, x1 and y1 exclusive; an image has any number of them. All
measures are over the whole set, in percent, and the same for any number of processes.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torchvision

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
except ImportError:
    raise ImportError(
        "timm_lossattn.evaluation.metrics needs torchmetrics: pip install 'timm-lossattn[train]'") from None

__all__ = [
    'BoxLocalization', 'PatchLocalization', 'PublicCodeMeanAveragePrecision', 'VOCMeanAveragePrecision', 'box_iou',
    'patches_in_boxes',
]

RECALL_LEVELS = tuple(r / 10 for r in range(11))  # of VOC 2007


def box_intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Areas of intersection of boxes (N, 4) and (L, 4): (N, L)."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=2)


def box_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (N, 4) and (L, 4): (N, L); 0 where both are empty."""
    return torchvision.ops.box_iou(a.double(), b.double()).nan_to_num(0.)


def patches_in_boxes(patch_boxes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Patches of which more than half the nominal area lies in one of the boxes.

    Args:
        patch_boxes: (M, 4).
        boxes: (L, 4).

    Returns:
        (M,) bool.
    """
    patches = patch_boxes.double()
    area = (patches[:, 2:] - patches[:, :2]).prod(dim=1)
    return (box_intersection(patches, boxes.double().to(patches.device)) > 0.5 * area[:, None]).any(dim=1)


def label_consistent(patch_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Patches whose own prediction hits a label of the image.

    Args:
        patch_logits: (B, M, K).
        target: (B,) class indices: argmax_k p_mk = y; or (B, K) zeros and ones: any σ(p_mk) > 0.5 with y_k = 1.

    Returns:
        (B, M) bool.
    """
    if target.dim() == 1:
        return patch_logits.argmax(dim=2) == target[:, None]
    return ((patch_logits > 0) & (target[:, None] > 0.5)).any(dim=2)  # σ(p) > 0.5 is p > 0


class PatchLocalization(Metric):
    """Patch precision, recall and F over a whole set.

        precision = |selected ∧ consistent ∧ in object| / |selected ∧ consistent|
        recall    = |selected ∧ consistent ∧ in object| / |in object|
        F         = their harmonic mean

    Images without box do not count. Beside them |in object| / |patches|: the precision of a choice that knows neither
    image nor class. All patches, if they were consistent, would have that precision and a recall of 100 %.

    Examples:
        >>> metric = PatchLocalization()
        >>> metric.update(explanation.selected, prediction.patch_logits, target, explanation.patch_boxes, boxes)
        >>> metric.compute()    # {'patch_precision', 'patch_recall', 'patch_f', 'patches_in_object'}, percent
    """
    hits: torch.Tensor
    chosen: torch.Tensor
    inside: torch.Tensor
    patches: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ('hits', 'chosen', 'inside', 'patches'):
            self.add_state(name, default=torch.zeros((), dtype=torch.long), dist_reduce_fx='sum')

    def update(
            self, selected: torch.Tensor, patch_logits: torch.Tensor, target: torch.Tensor,
            patch_boxes: torch.Tensor, boxes: Sequence[torch.Tensor]) -> None:
        """Count a batch.

        Args:
            selected: (B, M) bool.
            patch_logits: (B, M, K).
            target: (B,) class indices or (B, K) zeros and ones.
            patch_boxes: (M, 4).
            boxes: B tensors (L, 4), the boxes of each image's labels.

        Raises:
            ValueError: the shapes do not belong together.
        """
        B, M, _ = patch_logits.shape
        if selected.shape != (B, M) or patch_boxes.shape != (M, 4) or len(target) != B or len(boxes) != B:
            raise ValueError(
                f'patch_logits of shape {tuple(patch_logits.shape)} need selected ({B}, {M}), patch_boxes ({M}, 4) and '
                f'{B} targets and boxes, got {tuple(selected.shape)}, {tuple(patch_boxes.shape)}, {len(target)}, '
                f'{len(boxes)}.')
        boxed = torch.tensor([len(b) > 0 for b in boxes])
        if not boxed.any():
            return
        device = self.hits.device
        chosen = (selected & label_consistent(patch_logits, target)).to(device)[boxed.to(device)]
        inside = torch.stack([patches_in_boxes(patch_boxes, b) for b in boxes if len(b)]).to(device)
        self.hits += (chosen & inside).sum()
        self.chosen += chosen.sum()
        self.inside += inside.sum()
        self.patches += inside.numel()

    def compute(self) -> dict[str, torch.Tensor]:
        """Percent; a share of nothing is 0."""
        precision = self.hits / self.chosen.clamp(min=1)
        recall = self.hits / self.inside.clamp(min=1)
        f = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float32).tiny)
        return {'patch_precision': 100 * precision, 'patch_recall': 100 * recall, 'patch_f': 100 * f,
                'patches_in_object': 100 * self.inside / self.patches.clamp(min=1)}


class BoxLocalization(Metric):
    """Share of images whose estimated box has IoU > 0.5 with a ground-truth box of the image's class.

    The paper calls it localisation AP. Top-1 localisation also wants the right class. Images without box do not count.

    Examples:
        >>> metric = BoxLocalization()
        >>> metric.update(explanation.boxes, boxes, correct=prediction.logits.argmax(1) == target)
        >>> metric.compute()    # {'localization_ap', 'top1_localization'} in percent
    """
    hits: torch.Tensor
    correct_hits: torch.Tensor
    images: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ('hits', 'correct_hits', 'images'):
            self.add_state(name, default=torch.zeros((), dtype=torch.long), dist_reduce_fx='sum')

    def update(self, estimated: torch.Tensor, boxes: Sequence[torch.Tensor], correct: torch.Tensor) -> None:
        """Count a batch.

        Args:
            estimated: (B, 4).
            boxes: B tensors (L, 4).
            correct: (B,) bool, the predicted class is a label of the image.

        Raises:
            ValueError: different numbers of images.
        """
        if not len(estimated) == len(boxes) == len(correct):
            raise ValueError(f'estimated, boxes and correct must have one entry per image, got {len(estimated)}, '
                             f'{len(boxes)}, {len(correct)}.')
        for one, truth, right in zip(estimated, boxes, correct.tolist()):
            if len(truth):
                hit = bool((box_iou(one[None].cpu(), truth.cpu()) > 0.5).any())
                self.hits += hit
                self.correct_hits += hit and right
                self.images += 1

    def compute(self) -> dict[str, torch.Tensor]:
        """Percent; 0 without images."""
        images = self.images.clamp(min=1)
        return {'localization_ap': 100 * self.hits / images, 'top1_localization': 100 * self.correct_hits / images}


class VOCMeanAveragePrecision(Metric):
    """11-point interpolated average precision of VOC 2007, averaged over the classes that have a positive image.

        AP_k = 1/11 · Σ_{r ∈ {0, 0.1, …, 1}} max precision at recall ≥ r

    Images of equal score count together, so that the order of the set does not matter.

    Examples:
        >>> metric = VOCMeanAveragePrecision()
        >>> metric.update(logits, target)    # (B, K) scores and zeros and ones
        >>> metric.compute()                 # mAP in percent
    """
    scores: list[torch.Tensor]
    targets: list[torch.Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state('scores', default=[], dist_reduce_fx='cat')
        self.add_state('targets', default=[], dist_reduce_fx='cat')

    def update(self, scores: torch.Tensor, target: torch.Tensor) -> None:
        """Add a batch.

        Args:
            scores: (B, K) logits or probabilities.
            target: (B, K) zeros and ones.

        Raises:
            ValueError: different shapes.
        """
        if scores.dim() != 2 or scores.shape != target.shape:
            raise ValueError(f'scores and target must be (B, K), got {tuple(scores.shape)}, {tuple(target.shape)}.')
        self.scores.append(scores.detach().float())
        self.targets.append(target > 0.5)

    def compute(self) -> torch.Tensor:
        """Percent; 0 without positives."""
        if not len(self.scores):  # a tensor after it was gathered from several processes
            return torch.tensor(0.)
        ap = voc_average_precision(dim_zero_cat(self.scores), dim_zero_cat(self.targets))
        return 100 * ap[~ap.isnan()].mean() if (~ap.isnan()).any() else torch.tensor(0.)


class PublicCodeMeanAveragePrecision(VOCMeanAveragePrecision):
    """The mAP that the paper's public code computes for COCO: to compare with its numbers, not a measure of VOC 2007.

        AP_k = 1/11 · Σ_{r ∈ {0, 0, 0.1, …, 0.9}} max precision at recall ≥ r;    mAP = Σ_k AP_k / columns

    Each of the 11 recall levels reads its precision one level low: that of recall 0 counts twice, that of recall 1
    never, and no AP is lower for it. The mean goes over one column for each id up to 91, of which COCO uses 80: the
    unused ones count as 0, which takes 80/91 of the mean over classes.

    Args:
        columns: what the sum over classes is divided by.

    Raises:
        ValueError: columns is not positive.
    """

    def __init__(self, columns: int = 91, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if columns < 1:
            raise ValueError(f'columns must be at least 1, got {columns}.')
        self.columns = columns

    def compute(self) -> torch.Tensor:
        """Percent; a class without positives counts as 0.

        Raises:
            ValueError: more classes than columns.
        """
        if not len(self.scores):
            return torch.tensor(0.)
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        if scores.shape[1] > self.columns:
            raise ValueError(f'columns must be at least the number of classes, {scores.shape[1]}, got {self.columns}.')
        ap = voc_average_precision(scores, targets, (RECALL_LEVELS[0], *RECALL_LEVELS[:-1]))
        return 100 * ap.nan_to_num(0.).sum() / self.columns


def voc_average_precision(
        scores: torch.Tensor, targets: torch.Tensor, levels: Sequence[float] = RECALL_LEVELS) -> torch.Tensor:
    """Interpolated AP of each class.

    Args:
        scores: (N, K).
        targets: (N, K) bool.
        levels: recalls to average the precision over.

    Returns:
        (K,) float64 in [0, 1]; NaN for classes without positives.
    """
    N = len(scores)
    order = scores.argsort(dim=0, descending=True)
    scores, positive = scores.gather(0, order), targets.gather(0, order).double()
    hits = positive.cumsum(dim=0)  # (N, K)
    rank = torch.arange(1, N + 1, device=scores.device, dtype=torch.float64)[:, None]
    last_of_ties = torch.ones_like(scores, dtype=torch.bool)
    last_of_ties[:-1] = scores[:-1] != scores[1:]
    total = hits[-1]
    precision = torch.where(last_of_ties, hits / rank, torch.zeros_like(hits))
    recall = hits / total
    points = [torch.where(recall >= level - 1e-9, precision, torch.zeros_like(precision)).amax(dim=0)
              for level in levels]
    return torch.where(total > 0, torch.stack(points).mean(dim=0), torch.nan)
