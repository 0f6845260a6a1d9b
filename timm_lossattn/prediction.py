"""PatchPrediction, the one type that flows: image -> features -> patches -> PatchPrediction -> loss, explanation, ...

Whatever the autocast dtype, norms, attention weights and weighted sums are computed in float32 (float64 stays).
"""
from typing import NamedTuple

import torch

__all__ = ['PatchPrediction', 'upcast']


class PatchPrediction(NamedTuple):
    """What a patch model says about a batch of images and about every patch of them.

    Shapes: B images, M = H'·W' patches, K classes. Patch m = i·W' + j is row i, column j of the patch grid.

    Attributes:
        logits: (B, K) image logits z, in the dtype of the classifier.
        patch_logits: (B, M, K) each patch's own class logits p_m; for capsules the sum over capsule channels.
        alpha: (B, M) patch weights, >= 0, sum 1, float32 (float64 for float64 models).
        contributions: (B, M, K) what each patch adds to the image logits; summed over patches, the logits to rounding.
    """
    logits: torch.Tensor
    patch_logits: torch.Tensor
    alpha: torch.Tensor
    contributions: torch.Tensor


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x
