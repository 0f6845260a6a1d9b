"""Cascading randomisation: does a heat map depend on what the model has learned?"""
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.copies import without_graph
from .faithfulness import rank_correlation

__all__ = ['cascading_randomization', 'learned_modules']


def learned_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own that can begin anew, the one nearest to the logits first.

    Raises:
        ValueError: parameters belong to a module without ``reset_parameters``, and would stay as they were.
    """
    found = []
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            if not hasattr(module, 'reset_parameters'):
                raise ValueError(f'model: its part {name!r}, a {type(module).__name__}, has no reset_parameters.')
            found.append((name, module))
    return found[::-1]


def cascading_randomization(
        model: Any, explain: Callable[[Any, torch.Tensor], torch.Tensor], images: torch.Tensor, seed: int = 0,
) -> list[tuple[str, torch.Tensor]]:
    """Rank correlation of maps with those of the trained model, while its layers begin anew, from the logits downwards.

    J. Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018. A map that stays the same says nothing about the
    model. Batch norms begin anew with their statistics.

    Args:
        model: it is not changed.
        explain: model and images (B, C, H, W) to scores (B, N), with a sign or not.
        images: (B, C, H, W).
        seed: of the new parameters.

    Returns:
        For each layer its name, and Spearman's ρ (B,) once it and all after it have begun anew.

    Raises:
        ValueError: see ``learned_modules``.
    """
    changed = copy.deepcopy(model, without_graph(model))
    before = explain(changed, images).detach()
    result = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, module in learned_modules(changed):
            module.reset_parameters()  # type: ignore[operator]
            result.append((name, rank_correlation(explain(changed, images).detach(), before)))
    return result
