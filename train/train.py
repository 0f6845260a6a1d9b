#!/usr/bin/env python3
"""Train an image classifier with timm's factories; patch models with loss attention get the loss of Eq. 9.

    python train/train.py --dataset hfds/uoft-cs/cifar10 --input-key img --val-split test \\
        --model resnet18_lossattn_conv_nano --epochs 10 --output output --experiment nano

Writes into <output>/<experiment>: args.yaml, summary.csv (a line per epoch), last.pth.tar and model_best.pth.tar
(timm checkpoints) and result.json (metrics, command, versions, hardware, time). ``--resume <dir>/last.pth.tar``
continues a run. Accuracy is measured after each epoch on --val-split, on the EMA weights if there are any.
"""
import contextlib
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from flags import parse_args
from timm.data import FastCollateMixup, create_dataset, create_loader, resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    CheckpointSaver,
    NativeScaler,
    dispatch_clip_grad,
    random_seed,
    setup_default_logging,
    update_summary,
)
from torch import nn
from tqdm import tqdm

import timm_lossattn
from timm_lossattn import LossAttentionLoss, LossAttentionTask, MarginLoss

_logger = logging.getLogger('train')
LOG_INTERVAL = 20  # updates between two looks at the loss


def create_model(args) -> nn.Module:
    """The model that the flags name, in train layout.

    Raises:
        ValueError: unknown model, missing checkpoint, or an argument that the model refuses.
    """
    if not timm.is_model(args.model):
        raise ValueError(f'--model: timm has no model {args.model!r}, nor has timm_lossattn.')
    for flag, path in (('--initial-checkpoint', args.initial_checkpoint), ('--resume', args.resume)):
        if path and not Path(path).is_file():
            raise ValueError(f'{flag}: no such file: {path}')
    kwargs = dict(args.model_kwargs)
    if args.xi is not None:
        kwargs['xi'] = args.xi
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
    if args.pretrained_backbone and not args.resume:
        load_backbone(model, args.pretrained_backbone)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.to(device=args.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def load_backbone(model: nn.Module, source: str) -> None:
    """Copy the backbone's weights from a pretrained model of this package, where names and shapes agree; log the rest.

    Raises:
        ValueError: no such weights, or none that fit.
    """
    if not timm.is_model(source) or not timm.models.is_model_pretrained(source):
        raise ValueError(f'--pretrained-backbone: {source!r} is no model with weights.')
    state = timm.create_model(source, pretrained=True).state_dict()
    own = {k: v for k, v in model.state_dict().items() if k.startswith('backbone.')}
    fits = {k: state[k] for k, v in own.items() if k in state and state[k].shape == v.shape}
    if not fits:
        raise ValueError(f'--pretrained-backbone: no weight of {source} fits.')
    model.load_state_dict(fits, strict=False)
    missing = sorted(set(own) - set(fits))
    _logger.info(f'Backbone: {len(fits)} of {len(own)} tensors from {source}; not loaded: {missing}')


def create_task(args, model: nn.Module, updates_per_epoch: int) -> TrainingTask:
    """Loss-attention loss for lossattn heads, margin loss for routing, the plain criterion for everything else."""
    mixup = args.mixup > 0 or args.cutmix > 0
    criterion = create_classification_loss(smoothing=args.smoothing, soft_targets=mixup)
    pool = getattr(model, 'global_pool', None)
    patch_loss = args.patch_loss if args.patch_loss is not None else pool == 'lossattn'
    device = torch.device(args.device)
    if patch_loss:
        loss = LossAttentionLoss(criterion, smoothing=0. if mixup else args.smoothing)
        return LossAttentionTask(
            model, loss, gamma_max=args.gamma_max, rampup_epochs=args.rampup_epochs,
            updates_per_epoch=updates_per_epoch, device=device)
    return ClassificationTask(model, MarginLoss() if pool == 'routing' else criterion, device=device)


def create_loaders(args, data_config: dict[str, Any], num_classes: int):
    """timm loaders for training and evaluation.

    Raises:
        ValueError: the dataset has another number of classes than the model, fewer images than a batch, or no folder.
    """
    if args.data_dir and not Path(args.data_dir).exists() and not args.dataset_download:
        raise ValueError(f'--data-dir: no such folder: {args.data_dir}')
    dataset_kwargs = dict(
        root=args.data_dir, download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
        input_img_mode='RGB' if data_config['input_size'][0] == 3 else 'L',
        **{k: v for k, v in (('input_key', args.input_key), ('target_key', args.target_key)) if v is not None})
    train_set = create_dataset(args.dataset, split=args.train_split, is_training=True, **dataset_kwargs)
    eval_set = create_dataset(args.dataset, split=args.val_split, is_training=False, **dataset_kwargs)
    classes = getattr(getattr(train_set, 'reader', None), 'class_to_idx', None)
    if classes and len(classes) != num_classes:
        raise ValueError(f'--num-classes: the dataset has {len(classes)} classes, the model {num_classes}.')
    args.label_names = sorted(classes, key=classes.get) if classes else None  # for checkpoints and result.json

    common = dict(
        input_size=data_config['input_size'], mean=data_config['mean'], std=data_config['std'],
        interpolation=data_config['interpolation'], num_workers=args.workers, pin_memory=args.pin_mem,
        device=torch.device(args.device))
    collate = None
    if args.mixup > 0 or args.cutmix > 0:
        collate = FastCollateMixup(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
    train_loader = create_loader(
        train_set, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode='const', train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        color_jitter=args.color_jitter, auto_augment=args.aa, collate_fn=collate,
        input_size_choices=args.train_img_sizes, batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None, **common)
    if not len(train_loader):
        raise ValueError(f'--batch-size: {args.batch_size} is more than the {len(train_set)} training images.')
    eval_loader = create_loader(
        eval_set, batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        crop_pct=data_config['crop_pct'], **common)
    return train_loader, eval_loader


def train_one_epoch(epoch, args, task, loader, optimizer, scheduler, autocast, scaler) -> dict[str, float]:
    """One pass over the training set. Returns the means of loss terms, γ, images/s and the loader's share of time."""
    task.train()
    updates = len(loader)
    sums: dict[str, Any] = {}  # tensors stay on the device: reading one waits for it
    images = 0
    start = end = time.perf_counter()
    waited = 0.
    bar = tqdm(loader, desc=f'epoch {epoch + 1}/{args.epochs}', leave=False, dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 60)
    for i, (x, y) in enumerate(bar):
        waited += time.perf_counter() - end
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            result = task(x, y)
        parameters = task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        if scaler is not None:
            scaler(result['loss'], optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters)
        else:
            result['loss'].backward()
            if args.clip_grad is not None:
                dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
        optimizer.zero_grad()
        step = epoch * updates + i + 1
        task.update_ema(step=step)
        if scheduler is not None:
            scheduler.step_update(num_updates=step)

        images += len(x)
        for name, value in result.items():
            if name != 'output':
                value = value.detach() if torch.is_tensor(value) else value
                sums[name] = sums.get(name, 0.) + value * len(x)
        if (i + 1) % LOG_INTERVAL == 0 or i + 1 == updates:
            means = {name: float(value) / images for name, value in sums.items()}
            if not math.isfinite(means['loss']):
                raise FloatingPointError(f'loss is {means["loss"]} by update {step}; try a lower --lr')
            bar.set_postfix({k: f'{v:.4g}' for k, v in means.items()} | {
                'images/s': f'{images / (time.perf_counter() - start):.0f}'}, refresh=False)
        end = time.perf_counter()
    seconds = time.perf_counter() - start
    return means | {'images_per_second': images / seconds, 'loader_share': waited / seconds}


@torch.inference_mode()
def evaluate(args, task: TrainingTask, loader, autocast) -> dict[str, float]:
    """Loss, top-1 and top-5 of the EMA model, or of the model if there is no EMA."""
    model = task.get_eval_model(ema=task.has_ema())
    model.eval()
    evaluator = task.create_evaluator()
    for x, y in loader:
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = model(x)
        evaluator.update(logits, y)
    return dict(evaluator.compute())


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary file, then rename."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Train; errors in what the user gave are one line on stderr and exit code 2."""
    setup_default_logging()
    try:
        run(parse_args(argv), shlex.join(['python', *(sys.argv if argv is None else argv)]))
    except (ValueError, OSError, FloatingPointError) as error:
        print('error: ' + ' '.join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def run(args, command: str) -> None:
    """Train as the flags say.

    Args:
        args: from ``parse_args``.
        command: command line, for result.json.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    random_seed(args.seed)

    model = create_model(args)
    args.num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model)
    data_config['input_size'] = (model.in_chans, *data_config['input_size'][1:])
    train_loader, eval_loader = create_loaders(args, data_config, model.num_classes)
    task = create_task(args, model, updates_per_epoch=len(train_loader))
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    device_type = torch.device(args.device).type
    autocast: Any = contextlib.nullcontext
    scaler = None
    if args.amp:
        autocast = partial(torch.autocast, device_type=device_type, dtype=getattr(torch, args.amp_dtype))
        if device_type == 'cuda' and args.amp_dtype == 'float16':
            scaler = NativeScaler(device=device_type)

    start_epoch = 0
    if args.resume:
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer, loss_scaler=scaler) or 0
        random_seed(args.seed + start_epoch)  # or the first epoch's order and augmentation would come again
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=len(train_loader))
    if scheduler is not None and start_epoch:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * len(train_loader))
        else:
            scheduler.step(start_epoch)

    experiment = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model}'
    output = Path(args.output) / experiment
    if (output / 'summary.csv').exists() and not args.resume:
        raise ValueError(f'--experiment: {output} holds a run; continue it with --resume, or choose a new name.')
    output.mkdir(parents=True, exist_ok=True)
    (output / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    saver = CheckpointSaver(
        model, optimizer, args=args, amp_scaler=scaler, checkpoint_dir=str(output), recovery_dir=str(output),
        max_history=args.checkpoint_hist, task=task)
    history: list[dict[str, Any]] = []
    result_file = output / 'result.json'
    seconds = 0.
    commands = [command]
    if args.resume:
        saver.load_state_dict_from_checkpoint(args.resume)
        if result_file.exists():
            previous = json.loads(result_file.read_text())
            history = [entry for entry in previous['epochs'] if entry['epoch'] < start_epoch]
            seconds = sum(entry['seconds'] for entry in history)
            commands = [*previous['commands'], command]

    for epoch in range(start_epoch, num_epochs):
        start = time.perf_counter()
        for shuffled in (train_loader.dataset, train_loader.batch_sampler, train_loader.sampler):
            if hasattr(shuffled, 'set_epoch'):
                shuffled.set_epoch(epoch)
        train_metrics = train_one_epoch(epoch, args, task, train_loader, optimizer, scheduler, autocast, scaler)
        lr = optimizer.param_groups[0]['lr']
        eval_metrics = evaluate(args, task, eval_loader, autocast)
        if scheduler is not None:
            scheduler.step(epoch + 1, eval_metrics['top1'])
        best_metric, best_epoch = saver.save_checkpoint(epoch, metric=eval_metrics['top1'])
        elapsed = time.perf_counter() - start
        seconds += elapsed
        update_summary(epoch, train_metrics, eval_metrics, str(output / 'summary.csv'), lr=lr, write_header=not history)
        history.append({'epoch': epoch, 'seconds': round(elapsed, 1), 'lr': lr,
                        'train': train_metrics, 'eval': eval_metrics})
        write_json(result_file, {
            'model': args.model,
            'best': {'epoch': best_epoch, 'top1': best_metric},
            'last': {'epoch': epoch, **eval_metrics},
            'seconds': round(seconds, 1),
            'seed': args.seed,
            'commands': commands,
            'args': vars(args),
            'data_config': data_config,
            'parameters': sum(p.numel() for p in model.parameters()),
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                         'timm_lossattn': timm_lossattn.__version__},
            'hardware': torch.cuda.get_device_name() if device_type == 'cuda' else
            f'{platform.machine()} CPU, {torch.get_num_threads()} threads',
            'epochs': history,
        })
        _logger.info(
            f'epoch {epoch + 1}/{num_epochs}  top1 {eval_metrics["top1"]:.2f}  loss {train_metrics["loss"]:.4f}  '
            f'lr {lr:.4g}  {train_metrics["images_per_second"]:.0f} images/s  '
            f'loader {100 * train_metrics["loader_share"]:.1f} %  {elapsed:.0f} s')
    print(f'{result_file}')


if __name__ == '__main__':
    sys.exit(main())
