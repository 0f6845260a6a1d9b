"""From flags to model, task, optimizer and schedule, through timm's factories."""
import logging
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import create_classification_loss
from timm.models import is_model_pretrained
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import nn

from schedule import GaussianRampupScheduler
from sync_batch_norm import convert_sync_batch_norm
from timm_lossattn import LossAttentionLoss, LossAttentionTask, MarginLoss
from timm_lossattn.training.loss import summed_bce

_logger = logging.getLogger('train')


def create_model(args) -> nn.Module:
    """The model that the flags name, in train layout and on its device.

    Raises:
        ValueError: unknown model, missing checkpoint, or an argument that the model refuses.
    """
    if not timm.is_model(args.model):
        raise ValueError(f'--model: timm has no model {args.model!r}, nor has timm_lossattn.')
    for flag, path in (('--initial-checkpoint', args.initial_checkpoint), ('--resume', args.resume)):
        if path and not Path(path).is_file():
            raise ValueError(f'{flag}: no such file: {path}')
    kwargs = dict(args.model_kwargs)
    for name in ('xi', 'backbone_stride'):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    try:
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            in_chans=args.in_chans or (args.input_size[0] if args.input_size else None),
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            checkpoint_path=args.initial_checkpoint,
            **kwargs,
        )
    except (TypeError, RuntimeError) as error:  # an argument the model does not have, weights that do not fit
        raise ValueError(f'--model {args.model}: {error}') from error
    if args.pretrained_backbone and not args.resume:
        load_backbone(model, args.pretrained_backbone)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.to(device=args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and args.distributed:
        model = convert_sync_batch_norm(model)
    return model


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
    state = renamed_backbone(timm.create_model(source, pretrained=True).state_dict(), list(own))
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


def create_task(args, model: nn.Module, updates_per_epoch: int) -> TrainingTask:
    """Loss-attention loss for lossattn heads, margin loss for routing, the plain criterion for everything else.

    Multi-label: binary cross entropy summed over classes for every model (Eq. 10), without label smoothing.
    """
    device = torch.device(args.device)
    mixed = args.mixup > 0 or args.cutmix > 0
    pool = getattr(model, 'global_pool', None)
    patch_loss = args.patch_loss if args.patch_loss is not None else pool == 'lossattn'
    criterion: Any = summed_bce if args.multi_label else create_classification_loss(
        smoothing=args.smoothing, soft_targets=mixed)
    if patch_loss:
        loss = LossAttentionLoss(
            criterion, multi_label=args.multi_label, smoothing=0. if mixed or args.multi_label else args.smoothing)
        return LossAttentionTask(
            model, loss, gamma_max=args.gamma_max, rampup_epochs=args.rampup_epochs,
            updates_per_epoch=updates_per_epoch, device=device)
    if pool == 'routing':
        criterion = MarginLoss()
    return (MultiLabelClassificationTask if args.multi_label else ClassificationTask)(model, criterion, device=device)


def create_optimizer(args, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer over the task's trainable parameters; without ``--lr``, timm's rule for the learning rate."""
    if args.lr is None:
        ratio = args.batch_size * args.grad_accum_steps * args.world_size / 256
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        args.lr = args.lr_base * (ratio ** 0.5 if adaptive else ratio)
        _logger.info(f'Learning rate {args.lr:g}, from --lr-base {args.lr_base:g} and the global batch size')
    return create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def create_scheduler(args, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """Learning-rate schedule and number of epochs: timm's, or the paper's for Adam."""
    if args.sched == 'gaussian':
        return GaussianRampupScheduler(
            optimizer, rampup_t=args.warmup_epochs, milestones=args.decay_milestones, decay_rate=args.decay_rate,
            beta2_after_rampup=args.beta2_after_warmup, updates_per_epoch=updates_per_epoch), args.epochs
    return create_scheduler_v2(
        optimizer, **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch)
