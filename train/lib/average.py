"""The mean of several networks' weights, its batch norms measured anew (SWA, P. Izmailov et al., 2018)."""
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import Subset
from tqdm import tqdm

from .boxes import boxed_loader, fixed_order, open_boxed
from .data import input_config
from .options import DataOptions

__all__ = ['average_weights', 'measure_statistics']


def average_weights(model: nn.Module, others: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Give a model the mean of its own parameters and those of others of its kind; buffers are those of the last one.

    Args:
        model: changed in place.
        others: state dicts.

    Raises:
        RuntimeError: one of them does not fit.
    """
    mean, other = AveragedModel(model), deepcopy(model)
    mean.update_parameters(model)
    for state in others:
        other.load_state_dict(state)
        mean.update_parameters(other)
    model.load_state_dict(mean.module.state_dict())


def measure_statistics(model: Any, data: DataOptions, images: int = 5000) -> None:
    """Running means and variances of all batch norms, as they are over some images of a split; nothing else changes.

    Args:
        model: changed in place.
        data: dataset, split (``val_split``: the one to train on), batch size and workers.
        images: how many, in an order that is always the same; as the model sees them in evaluation.
    """
    config = input_config(data, model)
    boxed = open_boxed(replace(data, in_chans=config['input_size'][0]), model.num_classes, config)
    loader = boxed_loader(Subset(boxed, fixed_order(boxed, images)), data)
    update_bn(tqdm(loader, desc='batch norms', leave=False, dynamic_ncols=True), model, next(model.parameters()).device)
