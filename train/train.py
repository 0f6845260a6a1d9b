#!/usr/bin/env python3
"""Train an image classifier with timm's factories; patch models with loss attention get the loss of Eq. 9 or 10.

    python train/train.py --recipe fast/cifar10 --model resnet18_lossattn_conv_nano --output output --experiment nano
    torchrun --nproc-per-node 4 train/train.py ...

Writes into <output>/<experiment>: args.yaml, summary.csv (a line per epoch), curves.png, last.pth.tar,
model_best.pth.tar and the best checkpoint-N.pth.tar (timm checkpoints), result.json (metrics, commands, commit,
versions, hardware, time) and at the end hub/ (the best weights as timm stores them on the Hub).

``--resume auto`` goes on from the last good checkpoint. Everything random in an epoch follows from --seed and its
number, so that on the CPU a run that was killed and resumed ends with the weights of an uninterrupted one, to the bit.
"""
import contextlib
import json
import logging
import shutil
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_data_config
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import (
    NativeScaler,
    distribute_bn,
    init_distributed_device,
    random_seed,
    setup_default_logging,
)

from build import create_model, create_optimizer, create_scheduler, create_task
from checkpoint import AtomicSaver, find_checkpoint, load_checkpoint, mend, save_checkpoint
from data import (
    channel_statistics,
    create_eval_loader,
    create_train_loader,
    label_names,
    one_line,
    open_dataset,
)
from engine import evaluate, train_one_epoch, updates_in_epoch
from flags import parse_args
from record import Trackers, command_line, environment, save_hub_folder, write_curves, write_json, write_summary

_logger = logging.getLogger('train')


def main(argv: list[str] | None = None) -> int:
    """Train; errors in what the user gave are one line on stderr and exit code 2."""
    setup_default_logging()
    command = command_line(argv)
    try:
        run(parse_args(argv), command)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        _logger.debug('traceback', exc_info=True)
        print('error: ' + one_line(error), file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def from_first(args, value: Any) -> Any:
    """Rank 0's value in every process: what lies on its disk decides."""
    if args.distributed:
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        value = values[0]
    return value


def run(args, command: str) -> None:
    """Train as the flags say.

    Args:
        args: from ``parse_args``.
        command: command line, for result.json.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    parsed = {name: value for name, value in vars(args).items() if name not in ('config', 'resume')}
    init_distributed_device(args)  # sets distributed, world_size, rank, local_rank, device
    if args.rank > 0:
        logging.getLogger().setLevel(logging.ERROR)
    random_seed(args.seed)
    output = Path(args.output) / (args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model}')
    if args.resume == 'auto':
        args.resume = from_first(args, find_checkpoint(output) if args.rank == 0 else '')
    in_place = bool(args.resume) and Path(args.resume).resolve().parent == output.resolve()
    if (output / 'summary.csv').exists() and not in_place:
        raise ValueError(f'--experiment: {output} holds a run; continue it with --resume, or choose a new name.')
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    model = create_model(args)
    args.num_classes = model.num_classes
    data_config = resolve_data_config(vars(args), model=model)
    data_config['input_size'] = (model.in_chans, *data_config['input_size'][1:])
    data_config['mean'], data_config['std'] = channel_statistics(data_config)
    args.in_chans = model.in_chans
    train_set = open_dataset(args, args.train_split, model.num_classes, True, args.train_num_samples)
    eval_set = open_dataset(args, args.val_split, model.num_classes, num_samples=args.val_num_samples)
    args.label_names = label_names(train_set)  # for checkpoints and result.json
    train_loader = create_train_loader(args, train_set, data_config, model.num_classes)
    eval_loader = create_eval_loader(args, eval_set, data_config)
    updates = updates_in_epoch(args, train_loader)
    task = create_task(args, model, updates)
    evaluator = task.create_evaluator()
    metric_name = args.eval_metric = args.eval_metric or evaluator.default_metric
    if metric_name not in evaluator.metric_names:
        raise ValueError(f'--eval-metric: {metric_name!r} is none of {", ".join(evaluator.metric_names)}')
    optimizer = create_optimizer(args, task)
    device_type = torch.device(args.device).type
    autocast: Any = contextlib.nullcontext
    scaler = None
    if args.amp:
        autocast = partial(torch.autocast, device_type=device_type, dtype=getattr(torch, args.amp_dtype))
        if device_type == 'cuda' and args.amp_dtype == 'float16':
            scaler = NativeScaler(device=device_type)

    start_epoch = 0
    if args.resume:
        load_checkpoint(Path(args.resume))  # says clearly what is wrong with it
        start_epoch = resume_task_checkpoint(task, args.resume, optimizer=optimizer, loss_scaler=scaler) or 0
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[args.local_rank] if device_type == 'cuda' else None)
    scheduler, num_epochs = create_scheduler(args, optimizer, updates)

    history: list[dict[str, Any]] = []
    commands = [command]
    result_file = output / 'result.json'
    if in_place and args.rank == 0 and result_file.exists():
        previous = json.loads(result_file.read_text())
        history = [entry for entry in previous['epochs'] if entry['epoch'] < start_epoch]
        commands = [*previous['commands'], command]
    history = from_first(args, history)
    if scheduler is not None:
        for entry in history:  # the whole way, because a plateau schedule depends on it
            scheduler.step(entry['epoch'] + 1, entry['eval'][metric_name])
        scheduler.step_update(start_epoch * updates)
        if start_epoch and not history:
            scheduler.step(start_epoch)

    saver = trackers = None
    if args.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        (output / 'args.yaml').write_text(yaml.safe_dump(parsed))
        saver = AtomicSaver(
            model, optimizer, args=args, amp_scaler=scaler, checkpoint_dir=str(output), recovery_dir=str(output),
            max_history=args.checkpoint_hist, decreasing=metric_name == 'loss', task=task)
        if in_place:
            mend(saver, Path(args.resume), start_epoch - 1, history[-1]['eval'][metric_name] if history else None)
        trackers = Trackers(args, output)
        if start_epoch < num_epochs:  # of an earlier end; its weights would stand beside the numbers of this one
            shutil.rmtree(output / 'hub', ignore_errors=True)

    for epoch in range(start_epoch, num_epochs):
        start = time.perf_counter()
        # all that is random in an epoch follows from this, whatever came before: a resumed epoch is the same epoch
        random_seed((1_000_003 * args.seed + epoch) * 4099 % 2 ** 31, args.rank)
        for shuffled in (train_loader, train_loader.dataset, getattr(train_loader, 'batch_sampler', None),
                         getattr(train_loader, 'sampler', None)):
            if hasattr(shuffled, 'set_epoch'):
                shuffled.set_epoch(epoch)
        train_metrics = train_one_epoch(epoch, args, task, train_loader, optimizer, scheduler, autocast, scaler)
        if args.distributed and args.dist_bn and not args.sync_bn:
            for ema in (False, True)[:1 + task.has_ema()]:
                distribute_bn(task.get_eval_model(ema=ema), args.world_size, args.dist_bn == 'reduce')
        lr = optimizer.param_groups[0]['lr']
        eval_metrics = evaluate(args, task, eval_loader, autocast)
        if scheduler is not None:
            scheduler.step(epoch + 1, eval_metrics[metric_name])
        entry = {'epoch': epoch, 'seconds': round(time.perf_counter() - start, 1), 'lr': lr,
                 'train': train_metrics, 'eval': eval_metrics}
        history.append(entry)
        if saver is None or trackers is None:
            continue
        choose = min if metric_name == 'loss' else max
        best = choose(history, key=lambda e: e['eval'][metric_name])  # the first of equals, as the saver's
        write_json(result_file, {  # before the checkpoint: a resumed run drops what is newer than its checkpoint
            'model': args.model,
            'metric': metric_name,
            'best': {'epoch': best['epoch'], **best['eval']},
            'last': {'epoch': epoch, **eval_metrics},
            'seconds': round(sum(e['seconds'] for e in history), 1),
            'seed': args.seed,
            'commands': commands,
            'args': vars(args),
            'data_config': data_config,
            'parameters': sum(p.numel() for p in model.parameters()),
            **environment(device_type, args.world_size),
            'epochs': history,
        })
        write_summary(output / 'summary.csv', history)
        save_checkpoint(saver, epoch, eval_metrics[metric_name])
        trackers.log(entry)
        _logger.info(
            f'epoch {epoch + 1}/{num_epochs}  {metric_name} {eval_metrics[metric_name]:.2f}  '
            f'loss {train_metrics["loss"]:.4f}  lr {lr:.4g}  {train_metrics["images_per_second"]:.0f} images/s  '
            f'loader {100 * train_metrics["loader_share"]:.1f} %  {entry["seconds"]:.0f} s')

    if args.rank == 0 and trackers is not None:
        trackers.close()
        if history:
            write_curves(output / 'curves.png', history, metric_name)
            save_hub_folder(output / 'hub', model, output / 'model_best.pth.tar', data_config, args.label_names)
        print(f'{result_file}')


if __name__ == '__main__':
    sys.exit(main())
