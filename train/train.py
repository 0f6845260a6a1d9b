#!/usr/bin/env python3
"""Train an image classifier with timm's factories; patch models with loss attention get the loss of Eq. 9 or 10.

    python train/train.py --recipe fast/cifar10 --model resnet18_lossattn_conv_nano --output output --experiment nano
    torchrun --nproc-per-node 4 train/train.py ...

Writes into <output>/<experiment>: args.yaml, summary.csv (a line per epoch), curves.png, last.pth.tar,
model_best.pth.tar and the best checkpoint-N.pth.tar (timm checkpoints), result.json (metrics, commands and their
first epochs, commit, versions, hardware, time) and at the end hub/ (the best weights as timm stores them on the Hub).

``--resume auto`` goes on from the last good checkpoint. Everything random in an epoch follows from --seed and its
number, so that on the CPU a run that was killed and resumed ends with the weights of an uninterrupted one, to the bit.
"""
import contextlib
import importlib.util
import json
import logging
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import distribute_bn, random_seed

from lib.build import create_optimizer, create_precision, create_scheduler, create_task, resolve_lr
from lib.checkpoint import AtomicSaver, find_checkpoint, load_checkpoint, mend, save_checkpoint
from lib.command import parse_args
from lib.data import (
    create_eval_loader,
    create_train_loader,
    input_config,
    open_dataset,
    same_folder,
    warn_of_few_steps,
)
from lib.engine import train_one_epoch, updates_in_epoch
from lib.evaluate import evaluate_task
from lib.model import built_as, create_model
from lib.options import TrainOptions
from lib.position import Recovery
from lib.process import Process
from lib.record import command_line, environment, save_hub_folder, trackers, write_summary
from lib.script import script
from timm_lossattn.explanation.labels import class_names
from timm_lossattn.files import replace_file, write_json
from timm_lossattn.loading import model_config
from timm_lossattn.text import one_line

_logger = logging.getLogger('train')

BATCHES = (  # flags that say which images a batch holds: as they were, within an epoch
    'batch_size', 'grad_accum_steps', 'seed', 'dataset', 'train_split', 'train_num_samples', 'cache_dataset')
STATE = ('params', 'lookahead_step')  # of an optimizer's groups; the rest are hyperparameters


@script
def main(argv: list[str] | None = None) -> int:
    """Train; errors in what the user gave are one line on stderr and exit code 2."""
    command = command_line(argv)
    options = parse_args(argv)
    try:
        run(options, command)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def find_run(options: TrainOptions, process: Process) -> tuple[TrainOptions, Path, bool]:
    """Options with the checkpoint to resume, folder of the run, and whether the run goes on there.

    Raises:
        ValueError: the folder holds another run, or damaged checkpoints only.
    """
    model = re.sub(r'[^\w.=-]+', '_', options.model)  # local-dir:FOLDER has what a name cannot have
    name = options.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{model}'
    options = replace(options, experiment=name)
    folder = options.folder
    auto = options.resume == 'auto'
    if auto:
        options = replace(options, resume=process.from_first(find_checkpoint(folder) if process.rank == 0 else ''))
    in_place = bool(options.resume) and Path(options.resume).resolve().parent == folder.resolve()
    saved = [*folder.glob('checkpoint-*.pth.tar'), *folder.glob('last.pth.tar')]
    if auto and saved and not options.resume:
        raise ValueError(f'--resume auto: every checkpoint in {folder} is damaged; choose a new --experiment')
    # killed before its first checkpoint, it begins anew
    killed_early = auto and not saved and not (folder / 'model_best.pth.tar').exists()
    if (folder / 'summary.csv').exists() and not in_place and not killed_early:
        raise ValueError(f'--experiment: {folder} holds a run; continue it with --resume, or choose a new name.')
    return options, folder, in_place


def prepare_task(
        options: TrainOptions, process: Process, task: TrainingTask, optimizer: torch.optim.Optimizer,
        scaler: Any) -> tuple[int, dict[str, Any] | None]:
    """State of the checkpoint to resume, EMA, compilation, distribution; the epoch and the position to begin with.

    The optimizer's hyperparameters are those of the options, not of the checkpoint.

    Raises:
        ValueError: the checkpoint is none, or from within an epoch of another number of processes or other batches.
    """
    start_epoch, position = 0, None
    if options.resume:
        checkpoint = load_checkpoint(Path(options.resume))  # it says clearly if something is wrong
        position = checkpoint.get('position')
        if position is not None and len(position['ranks']) != process.world_size:
            raise ValueError(f'--resume: {options.resume} is from within an epoch of {len(position["ranks"])} '
                             f'processes, there are {process.world_size}.')
        for name in BATCHES if position is not None else ():
            if checkpoint['args'][name] != getattr(options, name):
                raise ValueError(f'--{name.replace("_", "-")}: {options.resume} is from within an epoch with '
                                 f'{checkpoint["args"][name]}, got {getattr(options, name)}.')
        given = [{key: value for key, value in group.items() if key not in STATE} for group in optimizer.param_groups]
        trained = checkpoint['args']['opt'] if isinstance(checkpoint.get('args'), dict) else options.opt
        if trained != options.opt:
            raise ValueError(f'--opt: {options.resume} is of a run with {trained}, got {options.opt}')
        try:
            start_epoch = resume_task_checkpoint(task, options.resume, optimizer=optimizer, loss_scaler=scaler) or 0
        except RuntimeError as error:
            raise ValueError(f'--resume: {options.resume}, of {checkpoint.get("arch")}, does not fit --model '
                             f'{options.model}: {one_line(error)}') from error
        for group, own in zip(optimizer.param_groups, given):
            group |= {**own, 'initial_lr': own['lr']}
    if options.model_ema:
        task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        if options.resume:
            load_task_ema_checkpoint(task, options.resume)
    if options.torchcompile:
        task.compile(backend=options.torchcompile)
        task.compile_ema(backend=options.torchcompile)
    if process.distributed:
        task.prepare_distributed(device_ids=[process.local_rank] if process.device.type == 'cuda' else None)
    return start_epoch, position


def begin_epoch(epoch: int, seed: int, rank: int, loader: Any) -> None:
    """All that is random in an epoch follows from this, whatever came before: a resumed epoch is the same epoch."""
    random_seed((1_000_003 * seed + epoch) * 4099 % 2 ** 31, rank)
    shuffled: Any
    for shuffled in (loader, loader.dataset, getattr(loader, 'batch_sampler', None), getattr(loader, 'sampler', None)):
        if hasattr(shuffled, 'set_epoch'):
            shuffled.set_epoch(epoch)


def run(options: TrainOptions, command: str) -> None:
    """Train as the options say.

    Args:
        options: from ``parse_args``.
        command: command line, for result.json.
    """
    given = {name: value for name, value in asdict(options).items() if name not in ('config', 'resume')}
    process = Process.start(options.device or 'cpu')
    if process.rank > 0:
        logging.getLogger().setLevel(logging.ERROR)
    random_seed(options.seed)
    options, folder, in_place = find_run(options, process)
    if process.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    model = create_model(options, process)
    data_config = input_config(options, model)
    options = replace(options, num_classes=model.num_classes, in_chans=data_config['input_size'][0])
    train_set = open_dataset(
        options, options.train_split, model.num_classes, True, options.train_num_samples, options.seed)
    eval_set = open_dataset(
        options, options.val_split, model.num_classes, num_samples=options.val_num_samples, seed=options.seed)
    if same_folder(train_set, eval_set, options):
        raise ValueError(f'--data-dir: {options.data_dir} has no sub-folders for --train-split {options.train_split!r} '
                         f'and --val-split {options.val_split!r}: both would be the same images')
    labels, others = class_names(train_set) or None, class_names(eval_set)
    if labels and others and labels != others:
        other, label = next(pair for pair in zip(others, labels) if pair[0] != pair[1])
        raise ValueError(f'--val-split: has a class {other!r} where --train-split has {label!r}')
    if options.train_img_sizes and max(options.train_img_sizes) != data_config['input_size'][1]:
        _logger.warning(f'--train-img-sizes: at most {max(options.train_img_sizes)} pixels, where evaluation has '
                        f'{data_config["input_size"][1]}')
    train_loader = create_train_loader(options, process, train_set, data_config, model.num_classes)
    warn_of_few_steps(options, process, train_set, train_loader)
    eval_loader = create_eval_loader(options, process, eval_set, data_config, options.validation_batch_size)
    updates = updates_in_epoch(options, train_loader)
    task = create_task(options, model, updates, process.device)
    evaluator: Any = task.create_evaluator()
    metric = options.eval_metric or evaluator.default_metric
    if metric not in evaluator.metric_names:
        raise ValueError(f'--eval-metric: {metric!r} is none of {", ".join(evaluator.metric_names)}')
    options = resolve_lr(replace(options, eval_metric=metric), process.world_size)
    optimizer = create_optimizer(options, task)
    autocast, scaler = create_precision(options, process.device)
    start_epoch, position = prepare_task(options, process, task, optimizer, scaler)
    scheduler, num_epochs = create_scheduler(options, optimizer, updates)

    machine = environment(process.device, process.world_size)  # at the start: it is this commit that runs
    history: list[dict[str, Any]] = []
    result_file = folder / 'result.json'
    previous: dict[str, Any] = {}
    if in_place and process.rank == 0 and result_file.exists():
        previous = json.loads(result_file.read_text())
        if metric != previous['metric']:
            raise ValueError(f'--eval-metric: the run has chosen its best epoch by {previous["metric"]}, got {metric}')
        history = [entry for entry in previous['epochs'] if entry['epoch'] < start_epoch]
    if in_place and position is not None and 'commands' in position:
        previous = position  # starts since the last whole epoch as well
    begun: dict[str, Any] = {'epoch': start_epoch, 'commit': machine['commit'], 'hardware': machine['hardware']}
    if options.resume and not in_place:
        begun['resume'] = options.resume  # of another run
    record: dict[str, Any] = {'commands': [*previous.get('commands', []), command]}
    if not previous or 'starts' in previous:  # a run from before there were any stays without
        record['starts'] = [*previous.get('starts', []), begun]  # of each command: its first epoch and where it ran
    history = process.from_first(history)
    if start_epoch >= num_epochs:
        if not in_place:
            raise ValueError(f'--resume: {options.resume} has {start_epoch} epochs already; raise --epochs')
        _logger.warning(f'nothing left to train: {start_epoch} of {num_epochs} epochs are done')
    if scheduler is not None:
        for entry in history:  # the whole way, because a plateau schedule depends on it
            scheduler.step(entry['epoch'] + 1, entry['eval'][metric])
        scheduler.step_update(start_epoch * updates)
        for epoch in range(1, start_epoch + 1) if not history else ():  # plateau's warm-up goes step by step
            scheduler.step(epoch)
        if position is not None:
            done = position['ranks'][0]['batches'] // options.grad_accum_steps
            scheduler.step_update(start_epoch * updates + done)

    recorded = {  # plain data, for result.json and checkpoints
        **asdict(options), 'device': str(process.device), 'distributed': process.distributed,
        'world_size': process.world_size, 'rank': process.rank, 'local_rank': process.local_rank,
        'label_names': labels}
    architecture, changed = built_as(options)
    built = {**changed, 'num_classes': model.num_classes, 'in_chans': options.in_chans}
    saver = None
    with contextlib.ExitStack() as stack:
        if process.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if start_epoch < num_epochs:
                replace_file(folder / 'args.yaml', yaml.safe_dump(given).encode())
            saver = AtomicSaver(
                model, optimizer, recorded, amp_scaler=scaler, checkpoint_dir=str(folder), recovery_dir=str(folder),
                max_history=options.checkpoint_hist, decreasing=metric == 'loss', task=task)
            saver.model_config, saver.record = model_config(architecture, built, labels, data_config), record
            if in_place:
                mend(saver, Path(options.resume), start_epoch - 1, history[-1]['eval'][metric] if history else None)
            log = stack.enter_context(trackers(options, folder, recorded))
            if start_epoch < num_epochs:  # of an earlier end; its weights would stand beside the numbers of this one
                shutil.rmtree(folder / 'hub', ignore_errors=True)

        recovery = Recovery(options.checkpoint_minutes, process, saver, position)
        for epoch in range(start_epoch, num_epochs):
            begin_epoch(epoch, options.seed, process.rank, train_loader)
            train_metrics = train_one_epoch(
                epoch, options, process, task, train_loader, optimizer, scheduler, autocast, scaler, recovery)
            start = time.perf_counter() - train_metrics.pop('seconds')
            if process.distributed and options.dist_bn and not options.sync_bn:
                for ema in (False, True)[:1 + task.has_ema()]:
                    distribute_bn(task.get_eval_model(ema=ema), process.world_size, options.dist_bn == 'reduce')
            lr = max(group['lr'] for group in optimizer.param_groups)  # of the last layers, with --layer-decay
            eval_metrics = evaluate_task(task, eval_loader, process, autocast, options.channels_last)
            if scheduler is not None:
                scheduler.step(epoch + 1, eval_metrics[metric])
            entry = {'epoch': epoch, 'seconds': round(time.perf_counter() - start, 1), 'lr': lr,
                     'train': train_metrics, 'eval': eval_metrics}
            history.append(entry)
            if saver is None:
                continue
            choose = min if metric == 'loss' else max
            best = choose(history, key=lambda e: e['eval'][metric])  # the first of equals, as the saver's
            write_json(result_file, {  # before the checkpoint: a resumed run drops what is newer than its checkpoint
                'model': architecture,
                'metric': metric,
                'best': {'epoch': best['epoch'], **best['eval']},
                'last': {'epoch': epoch, **eval_metrics},
                'seconds': round(sum(e['seconds'] for e in history), 1),
                'seed': options.seed,
                **record,
                'args': recorded,
                'data_config': data_config,
                'parameters': sum(p.numel() for p in model.parameters()),
                'trained_parameters': sum(p.numel() for p in model.parameters() if p.requires_grad),
                **machine,
                'epochs': history,
            })
            write_summary(folder / 'summary.csv', history)
            save_checkpoint(saver, epoch, eval_metrics[metric])
            log(entry)
            _logger.info(
                f'epoch {epoch + 1}/{num_epochs}  {metric} {eval_metrics[metric]:.2f}  '
                f'loss {train_metrics["loss"]:.4f}  lr {lr:.4g}  {train_metrics["images_per_second"]:.0f} images/s  '
                f'loader {100 * train_metrics["loader_share"]:.1f} %  {entry["seconds"]:.0f} s')

    if process.rank == 0:
        if history:
            if importlib.util.find_spec('matplotlib'):
                from lib.plots import draw_runs
                draw_runs(folder / 'curves.png', {folder.name: {'epochs': history, 'metric': metric}})
            save_hub_folder(folder / 'hub', folder / 'model_best.pth.tar')
        print(f'{result_file}')


if __name__ == '__main__':
    sys.exit(main())
