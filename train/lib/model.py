"""Models: the one that train.py trains, and the trained one that the other scripts measure."""
import json
import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import is_model_pretrained, load_model_config_from_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_lossattn import freeze_backbone, hub_access
from timm_lossattn.loading import (
    check_name,
    classes_in,
    load_model,
    load_patch_model,
    read_checkpoint,
)

from .gathered import use_gathered
from .grow import grow_from
from .options import EvalOptions, TrainOptions
from .process import Process

__all__ = ['built_as', 'count_gmacs', 'create_model', 'load_trained', 'model_args', 'replace_convolutions']

_logger = logging.getLogger('train')


def load_trained(options: EvalOptions, device: torch.device | str = 'cpu', patches: bool = False) -> Any:
    """The model with the weights that the flags name, in eval mode.

    Args:
        options: which.
        device: where it goes.
        patches: a stock timm model gets patches of equal weight.

    Raises:
        ValueError: no such model or weights, or with ``patches`` one whose logits are no sum over them; Winograd
            elsewhere than on the CPU.
    """
    if options.winograd and torch.device(device).type != 'cpu':
        raise ValueError(f'--winograd: is for the CPU, not for --device {device}')
    flags = {'xi': options.xi, 'num_classes': options.num_classes, 'in_chans': options.in_chans}
    given = options.model_kwargs | {name: value for name, value in flags.items() if value is not None}
    model = (load_patch_model if patches else load_model)(
        options.model, options.checkpoint, device, **given)
    if options.winograd:
        replace_convolutions(model)
    return model


def replace_convolutions(model: nn.Module) -> None:
    """``use_winograd``, imported here because it brings torch's compiler, a second of every start."""
    from .winograd import use_winograd
    _logger.info(f'Winograd: {use_winograd(model)} convolutions')


def model_args(options: TrainOptions) -> dict[str, Any]:
    """What differs from the registered model, but for the numbers of classes and channels."""
    given = {name: getattr(options, name) for name in (
        'xi', 'backbone_stride', 'patch_stride', 'patch_padding', 'width_mult')}
    name = dict(options.model_kwargs).get('backbone', options.model)
    if options.input_size and timm.is_model(name) and not {'img_size', 'dynamic_img_size', 'strict_img_size'} & {
            *options.model_kwargs}:
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None and cfg.fixed_input_size and list(cfg.input_size) != options.input_size:
            given['img_size'] = options.input_size[1:]  # as dynamic routing, which has weights for every position
    return dict(options.model_kwargs) | {name: value for name, value in given.items() if value is not None}


def built_as(options: TrainOptions) -> tuple[str, dict[str, Any]]:
    """Architecture and ``model_args``; of a folder or a repository those of its config, and what differs from them.

    The numbers of classes and channels, which may be others now, are in neither.
    """
    source, _, where = options.model.partition(':')
    if not where:
        return options.model, model_args(options)
    if source == 'local-dir':
        config = json.loads(Path(where, 'config.json').read_text('utf-8'))
        architecture, given = config['architecture'], config.get('model_args')
    else:
        with hub_access.hub_or_cache():
            _, architecture, given = load_model_config_from_hf(where)
    kept = {key: value for key, value in (given or {}).items() if key not in ('num_classes', 'in_chans')}
    return architecture, kept | model_args(options)


def create_model(options: TrainOptions, process: Process) -> Any:
    """The model that the flags name, in train layout and on its device.

    Raises:
        ValueError: unknown model, missing checkpoint, or an argument that the model refuses.
        ConnectionError: pretrained weights that are not here, and the Hub is out of reach.
    """
    check_name(options.model)
    for flag, path in (('--initial-checkpoint', options.initial_checkpoint), ('--resume', options.resume),
                       ('--pretrained-path', options.pretrained_path)):
        if path and not Path(path).is_file():
            raise ValueError(f'{flag}: no such file: {path}')
    if options.sync_bn and process.distributed and process.device.type == 'cpu':
        raise ValueError('--sync-bn: PyTorch has it on GPUs only; on the CPU there is --dist-bn')
    in_chans = options.in_chans or (options.input_size[0] if options.input_size else None)
    try:
        model = hub_access.create_model(
            options.model,
            pretrained=options.pretrained,
            pretrained_cfg_overlay={
                'file': options.pretrained_path,
                'num_classes': classes_in(  # timm leaves out another number
                    read_checkpoint(options.pretrained_path)[0],
                    dict(options.model_kwargs).get('backbone', options.model)),
            } if options.pretrained_path else None,
            num_classes=options.num_classes,
            in_chans=in_chans,
            drop_rate=options.drop,
            drop_path_rate=options.drop_path,
            checkpoint_path=options.initial_checkpoint,
            **model_args(options),
        )
    except (TypeError, RuntimeError) as error:  # an argument the model does not have, weights that do not fit
        raise ValueError(f'--model {options.model}: {error}') from error
    if options.pretrained_backbone and not options.resume:
        load_backbone(model, options.pretrained_backbone)
    if options.grow_from and not options.resume:
        grow_from(model, options.grow_from)
    if options.freeze_backbone:
        trained = freeze_backbone(model)
        _logger.info(f'Frozen but for {", ".join(trained)}')
    if options.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if options.winograd:
        replace_convolutions(model)
    if options.gathered:
        _logger.info(f'Gathered: {use_gathered(model)} convolutions')
    model.to(device=process.device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    return convert_sync_batchnorm(model) if options.sync_bn and process.distributed else model


def load_backbone(model: nn.Module, source: str) -> None:
    """Copy weights of a pretrained timm model into the backbone where names and shapes fit; log what did and what not.

    Names fit between the models of this package, and from timm's ResNets (with BasicBlock) and VGGs to ours.

    Raises:
        ValueError: no such weights, or none that fit.
    """
    if not timm.is_model(source) or not is_model_pretrained(source):
        raise ValueError(f'--pretrained-backbone: {source!r} is no model with weights.')
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith('backbone.')}
    if not own:
        raise ValueError(f'--pretrained-backbone: {type(model).__name__} has no separate backbone; use --pretrained.')
    state = renamed_backbone(hub_access.create_model(source, pretrained=True).state_dict(), list(own))
    fits = {name: state[name] for name, tensor in own.items() if name in state and state[name].shape == tensor.shape}
    if not any(tensor.dim() == 4 for tensor in fits.values()):
        raise ValueError(f'--pretrained-backbone: no convolution of {source} fits.')
    model.load_state_dict(fits, strict=False)
    missing = sorted(set(own) - set(fits))
    _logger.info(f'Backbone: {len(fits)} of {len(own)} tensors from {source}; not loaded: {", ".join(missing) or "–"}')


def renamed_backbone(state: dict[str, torch.Tensor], own: list[str]) -> dict[str, torch.Tensor]:
    """A state dict of this package, of timm's ResNet or of timm's VGG, under the names of our backbones."""
    if any(name.startswith('backbone.') for name in state):
        return state
    if 'features.0.weight' in state:  # the same layers in the same order under other names
        features = [tensor for name, tensor in state.items() if name.startswith('features.')]
        return dict(zip(own, features)) if len(features) == len(own) else {}  # another depth: no layer for layer
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r'^conv1\.', 'stem.conv.', name)
        name = re.sub(r'^bn1\.', 'stem.bn.', name)
        name = re.sub(r'^layer(\d)\.', lambda match: f'stages.{int(match[1]) - 1}.', name)
        name = name.replace('downsample.0.', 'downsample.conv.').replace('downsample.1.', 'downsample.bn.')
        renamed[f'backbone.{name}'] = tensor
    return renamed


def count_gmacs(model: Any, x: torch.Tensor) -> float:
    """Billions of multiply-adds in convolutions and matrix products for the first image of a batch."""
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x[:1])
    model.train(training)
    return counter.get_total_flops() / 2e9
