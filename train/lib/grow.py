"""A wide model that begins as the narrow one whose weights it is given."""
import logging

import timm
import torch
from timm.models import is_model_pretrained
from torch import nn

from timm_lossattn import hub_access

__all__ = ['grow', 'grow_from']

_logger = logging.getLogger('train')


def grow(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put a narrow model into a wide one of the same layers, so that the wide one computes what the narrow one did.

    That is so where the wider layers have further channels behind those of the narrow ones, as convolutions, batch
    norms and linear layers do; not with layer norms, groups of channels or capsules. It is not checked here.

    The first channels of each layer are the narrow model's. What the new channels read stays as it was initialised;
    the old channels and the classifier read nothing of them, their weights for the new channels are zeros. Those
    zeros have gradients, so the new channels take part from the second update on. (T. Chen et al., "Net2Net:
    Accelerating Learning via Knowledge Transfer", ICLR 2016, has the idea of keeping the function and does it by
    copying channels, which then have to be told apart by noise.)

    Args:
        model: the wide one, as initialised; changed in place.
        state: state dict of the narrow one.

    Raises:
        ValueError: other layers, or one of them wider in the narrow model; the model is as it was.
    """
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f'only one of the two has {name}')
    for name, tensor in state.items():
        if tensor.dim() != own[name].dim() or any(a > b for a, b in zip(tensor.shape, own[name].shape)):
            raise ValueError(f'{name}: {tuple(tensor.shape)} does not fit into {tuple(own[name].shape)}')
    with torch.no_grad():
        for name, tensor in state.items():
            target = own[name]
            if tensor.dim() > 1:  # rows are outputs, columns inputs
                target[:len(tensor), tensor.shape[1]:] = 0.
            target[tuple(slice(length) for length in tensor.shape)] = tensor


def grow_from(model: nn.Module, source: str) -> None:
    """``grow`` from the pretrained weights of a registered model.

    Raises:
        ValueError: no such weights, other classes or image channels, other layers, or the logits of the two differ.
    """
    if not timm.is_model(source) or not is_model_pretrained(source):
        raise ValueError(f'--grow-from: {source!r} is no model with weights.')
    narrow = hub_access.create_model(source, pretrained=True).eval()
    for name in ('num_classes', 'in_chans'):
        if getattr(model, name, None) != getattr(narrow, name, None):
            raise ValueError(f'--grow-from {source}: has {name}={getattr(narrow, name, None)}, the model '
                             f'{getattr(model, name, None)}')
    x, training = torch.randn(2, *narrow.pretrained_cfg['input_size']), model.training
    try:
        grow(model, narrow.state_dict())
        with torch.no_grad():
            same = torch.allclose(model.eval()(x), narrow(x), rtol=1e-3, atol=1e-3)
    except ValueError as error:
        raise ValueError(f'--grow-from {source}: {error}') from None
    model.train(training)
    if not same:
        raise ValueError(f'--grow-from {source}: the logits are others: something else than widths differs, or new '
                         'channels do not come behind the old ones')
    wide, old = (sum(p.numel() for p in m.parameters()) for m in (model, narrow))
    _logger.info(f'Grown from {source}: {old:,} of {wide:,} parameters, the same logits')
