"""From options to task, optimizer, schedule and precision, through timm's factories."""
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from timm.utils import NativeScaler
from torch import nn

from timm_lossattn import LossAttentionLoss, LossAttentionTask, MarginLoss
from timm_lossattn.prediction import upcast
from timm_lossattn.training.loss import summed_bce

from .options import TrainOptions
from .schedule import GaussianRampupScheduler

__all__ = ['create_optimizer', 'create_precision', 'create_scheduler', 'create_task', 'default_loss', 'resolve_lr']

_logger = logging.getLogger('train')


def default_loss(model: nn.Module) -> str:
    """What the paper trains such a model with, see ``PatchWeights.default_loss``."""
    return getattr(getattr(model, 'patch_weights', None), 'default_loss', 'classification')


class Float32Loss(nn.Module):
    """A criterion of logits in float32 whatever autocast says: on the CPU log_softmax would stay in bfloat16.

    Args:
        criterion: (logits, target) -> scalar.
    """

    def __init__(self, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) and what the criterion takes as a target, to its scalar."""
        with torch.autocast(device_type=logits.device.type, enabled=False):
            return self.criterion(upcast(logits), target)


def create_task(options: TrainOptions, model: Any, updates_per_epoch: int, device: torch.device) -> TrainingTask:
    """Loss-attention loss, margin loss or the plain criterion, as the model's patch weights or --patch-loss say.

    Multi-label: binary cross entropy summed over classes (Eq. 10). Neither that nor the margin loss, which stays the
    image's with --patch-loss, has label smoothing.

    Raises:
        ValueError: --patch-loss for a model without patches, or --xi where nothing reads it.
    """
    kind = default_loss(model)
    if options.xi is not None and not getattr(getattr(model, 'patch_weights', None), 'informative', False):
        raise ValueError(f'--xi: {options.model} has no threshold of attention')
    criterion: Any = MarginLoss() if kind == 'margin' else summed_bce if options.multi_label else \
        create_classification_loss(smoothing=options.smoothing, soft_targets=options.mixed)
    if kind == 'loss_attention' if options.patch_loss is None else options.patch_loss:
        if not hasattr(model, 'patch_weights'):
            raise ValueError(f'--patch-loss: {options.model} has no patches; lossattn.{options.model} may have')
        smoothing = 0. if options.mixed or options.multi_label or kind == 'margin' else options.smoothing
        return LossAttentionTask(
            model, LossAttentionLoss(criterion, multi_label=options.multi_label, smoothing=smoothing),
            gamma_max=options.gamma_max, rampup_epochs=options.rampup_epochs or 0.,
            updates_per_epoch=updates_per_epoch, device=device)
    task = MultiLabelClassificationTask if options.multi_label else ClassificationTask
    return task(model, Float32Loss(criterion), device=device)


def resolve_lr(options: TrainOptions, world_size: int) -> TrainOptions:
    """Without ``--lr``, timm's rule for the learning rate."""
    if options.lr is not None:
        return options
    ratio = options.batch_size * options.grad_accum_steps * world_size / 256
    adaptive = any(name in options.opt.lower() for name in ('ada', 'lamb'))
    lr = options.lr_base * (ratio ** 0.5 if adaptive else ratio)
    _logger.info(f'Learning rate {lr:g}, from --lr-base {options.lr_base:g} and the global batch size')
    return replace(options, lr=lr)


def create_optimizer(options: TrainOptions, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer over the task's trainable parameters.

    ``filter_bias_and_bn=False`` lets all of them decay, also what the model would exempt (the thresholds of Eq. 11):
    the paper's recipe knows no exemption.
    """
    module: Any = task.get_trainable_module()
    kwargs = optimizer_kwargs(cfg=options) | options.opt_kwargs
    if not kwargs.get('filter_bias_and_bn', True) and options.layer_decay is None:
        module = [p for p in module.parameters() if p.requires_grad]  # without names nothing is exempt
    return create_optimizer_v2(module, **kwargs)


def create_scheduler(
        options: TrainOptions, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> tuple[Any, int]:
    """Learning-rate schedule and number of epochs: timm's, or the paper's for Adam."""
    if options.sched == 'gaussian':
        return GaussianRampupScheduler(
            optimizer, rampup_t=options.warmup_epochs, milestones=options.decay_milestones,
            decay_rate=options.decay_rate, beta2_after_rampup=options.beta2_after_warmup,
            updates_per_epoch=updates_per_epoch), options.epochs
    if options.sched == 'plateau':  # timm's would stay at a part of the learning rate
        options = replace(options, warmup_epochs=math.ceil(options.warmup_epochs))
    return create_scheduler_v2(
        optimizer, **scheduler_kwargs(options, decreasing_metric=options.eval_metric == 'loss'),
        updates_per_epoch=updates_per_epoch)


def fast_bfloat16() -> bool:
    """Whether oneDNN has this CPU's instructions for it; without oneDNN nobody knows, and nothing is said."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def create_precision(options: TrainOptions, device: torch.device) -> tuple[Callable[[], Any], Any]:
    """Context of forward passes, and the loss scaler of float16 on GPUs."""
    if not options.amp:
        return contextlib.nullcontext, None
    if device.type == 'cpu' and options.amp_dtype == 'bfloat16' and not fast_bfloat16():
        _logger.warning('--amp: this CPU has no instructions for bfloat16 (x86: AVX-512), which may take ten times as '
                        'long as float32 then; --no-amp trains in float32')
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, options.amp_dtype))
    scaled = device.type == 'cuda' and options.amp_dtype == 'float16'
    return autocast, NativeScaler(device=device.type) if scaled else None
