"""How faithful a heat map is to the model: deletion and insertion by patches, pointing game, completeness.

They judge any heat map, ours or another tool's, and see the model only as a function from images to logits. Deletion
and insertion are those of V. Petsiuk et al., "RISE", with the patches of the patch grid in place of pixels; the
pointing game is that of J. Zhang et al., "Top-down Neural Attention by Excitation Backprop".
"""
from collections.abc import Callable

import torch

__all__ = ['completeness_error', 'deletion_insertion', 'patch_scores', 'pointing_game']


def patch_scores(heat: torch.Tensor, patch_boxes: torch.Tensor) -> torch.Tensor:
    """Mean of a heat map over each patch's pixels.

    Args:
        heat: (B, H, W); NaN where the map says nothing.
        patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive).

    Returns:
        (B, M).
    """
    return torch.stack([heat[:, y0:y1, x0:x1].nanmean(dim=(1, 2)) for x0, y0, x1, y1 in patch_boxes.tolist()], dim=1)


@torch.no_grad()
def deletion_insertion(
        model: Callable[[torch.Tensor], torch.Tensor],
        images: torch.Tensor,
        scores: torch.Tensor,
        target: torch.Tensor,
        patch_boxes: torch.Tensor,
        batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Areas under the deletion and the insertion curve.

    Deletion blanks patches in the order of falling score and watches the target's probability: the faster it drops,
    the better the order (a low area). Insertion starts from an image with all patches blank and brings them back in the
    same order (a high area). Blank is 0 after normalisation, the mean colour. Pixels of no patch stay as they are.

    Args:
        model: (N, C, H, W) to (N, K) logits.
        images: (B, C, H, W), normalised.
        scores: (B, M), importance of each patch for the target.
        target: (B,) classes.
        patch_boxes: (M, 4) integers x0, y0, x1, y1 (exclusive).
        batch_size: images in a forward pass.

    Returns:
        Two (B,) tensors in [0, 1]: mean probability over the M + 1 steps, by the trapezoidal rule.

    Raises:
        ValueError: scores is not (B, M), or target not (B,).
    """
    B, M = len(images), len(patch_boxes)
    if scores.shape != (B, M) or target.shape != (B,):
        raise ValueError(f'scores must be ({B}, {M}) and target ({B},), got {tuple(scores.shape)}, '
                         f'{tuple(target.shape)}.')
    H, W = images.shape[-2:]
    masks = torch.zeros(M, H, W, dtype=torch.bool)
    for m, (x0, y0, x1, y1) in enumerate(patch_boxes.tolist()):
        masks[m, y0:y1, x0:x1] = True
    areas = torch.empty(2, B)
    free = ~masks.any(dim=0)  # pixels of no patch
    for b in range(B):
        order = scores[b].argsort(descending=True, stable=True).cpu()
        gone_after = torch.full((H, W), M + 1)  # step from which a pixel counts as reached
        for step in range(M, 0, -1):
            gone_after[masks[order[step - 1]]] = step
        steps = torch.arange(M + 1)
        probabilities = []
        for insertion in (False, True):
            for part in steps.split(batch_size):  # a chunk of blanked copies at a time
                reached = gone_after <= part[:, None, None]  # (n, H, W)
                keep = (reached | free if insertion else ~reached).to(images.device)
                logits = model(images[b] * keep[:, None])
                probabilities.append(logits.float().softmax(dim=1)[:, int(target[b])].cpu())
        areas[:, b] = torch.trapezoid(torch.cat(probabilities).view(2, M + 1), dx=1 / M)
    return areas[0], areas[1]


def pointing_game(heat: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
    """Whether the hottest pixel lies in one of the image's boxes.

    Args:
        heat: (B, H, W); NaN where the map says nothing. Of several hottest pixels, the share that lies in a box counts.
        boxes: B tensors (L, 4), x0, y0, x1, y1 (exclusive); L > 0.

    Returns:
        (B,) in [0, 1].
    """
    result = []
    for one, truth in zip(heat, boxes):
        y, x = torch.nonzero(one == one.nan_to_num(-torch.inf).max(), as_tuple=True)
        x0, y0, x1, y1 = truth.to(one.device).T[..., None]
        result.append(((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).any(dim=0).float().mean())
    return torch.stack(result)


def completeness_error(attribution: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """How far the parts are from adding up to the logit that they explain: |Σ parts − logit| / max(1, |logit|).

    Args:
        attribution: (B, ...), one number for each part.
        logit: (B,) logit of the target, for integrated gradients its difference to the baseline's.

    Returns:
        (B,).
    """
    total = attribution.flatten(1).double().sum(dim=1)
    return (total - logit.double()).abs() / logit.double().abs().clamp(min=1)
