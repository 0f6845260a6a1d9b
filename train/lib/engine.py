"""One epoch of training."""
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from tqdm import tqdm

from .options import TrainOptions
from .position import Recovery
from .process import Process

__all__ = ['train_one_epoch', 'updates_in_epoch']

LOG_INTERVAL = 20  # batches between two looks at the loss


def updates_in_epoch(options: TrainOptions, loader: Any) -> int:
    """Optimizer updates in an epoch; the last one may have fewer than ``--grad-accum-steps`` batches."""
    return -(-len(loader) // options.grad_accum_steps)


def train_one_epoch(
        epoch: int, options: TrainOptions, process: Process, task: TrainingTask, loader: Any,
        optimizer: torch.optim.Optimizer, scheduler: Any, autocast: Callable[[], Any], scaler: Any,
        recovery: Recovery | None = None) -> dict[str, float]:
    """One pass over the training set, or what ``recovery`` has left of it.

    Returns:
        Means over the images of the loss terms and of γ, images/s of all processes, the share of the time in which the
        step waited for the loader, and the seconds; with those that an interrupted run spent on it.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    task.train()
    updates, batches = updates_in_epoch(options, loader), len(loader)
    tail = batches % options.grad_accum_steps or options.grad_accum_steps  # batches in the last update
    sums: dict[str, Any] = {}  # tensors stay on the device: reading one waits for it
    images, step, earlier, waited = 0, epoch * updates, 0., 0.
    recovery = recovery or Recovery(None, process, None)
    if recovery.position is not None:
        images, step = recovery.position['images'], step + recovery.position['batches'] // options.grad_accum_steps
        earlier = recovery.position.get('seconds', 0.)
        sums = {name: value.to(process.device) if torch.is_tensor(value) else value
                for name, value in recovery.position['sums'].items()}
    end = time.perf_counter()
    start = end - earlier
    bar = tqdm(total=batches, desc=f'epoch {epoch + 1}/{options.epochs}', leave=False, dynamic_ncols=True,
               disable=process.rank > 0, mininterval=0.5 if sys.stderr.isatty() else 60)
    second_order = getattr(optimizer, 'is_second_order', False)
    optimizer.zero_grad()
    parameters = list(task.get_clip_parameters(exclude_head='agc' in options.clip_mode))  # timm's is a generator
    with bar:  # an error clears it
        for i, (x, y) in enumerate(loader):
            waited += time.perf_counter() - end
            if recovery.skip(i):
                bar.update()
                end = time.perf_counter()  # drawing again what was trained on is no training
                start, waited = end - earlier, 0.
                continue
            if options.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            update = (i + 1) % options.grad_accum_steps == 0 or i + 1 == batches
            with nullcontext() if update else task.no_sync():
                with autocast():
                    result = task(x, y)
                loss = result['loss'] / (tail if i >= batches - tail else options.grad_accum_steps)
                if scaler is not None:
                    scaler(loss, optimizer, clip_grad=options.clip_grad, clip_mode=options.clip_mode,
                           parameters=parameters, create_graph=second_order, need_update=update)
                else:
                    loss.backward(create_graph=second_order)
            if update:
                if scaler is None:
                    if options.clip_grad is not None:
                        dispatch_clip_grad(parameters, value=options.clip_grad, mode=options.clip_mode)
                    optimizer.step()
                optimizer.zero_grad()
                step += 1
                task.update_ema(step=step)
                if scheduler is not None:
                    scheduler.step_update(num_updates=step)

            images += len(x)
            for name, value in result.items():
                if name != 'output':
                    value = value.detach().float() if torch.is_tensor(value) else value  # a half would not add up
                    sums[name] = sums.get(name, 0.) + value * len(x)
            bar.update()
            if (i + 1) % LOG_INTERVAL == 0 or i + 1 == batches:
                means = {name: float(value) / images for name, value in sums.items()}
                if scaler is None and not math.isfinite(means['loss']):  # a scaler skips such steps
                    raise FloatingPointError(f'loss is {means["loss"]} by update {step}; try a lower --lr')
                rate = images * process.world_size / (time.perf_counter() - start)
                bar.set_postfix({k: f'{v:.4g}' for k, v in means.items()} | {'images/s': f'{rate:.0f}'}, refresh=False)
            end = time.perf_counter()
            recovery.batch_done(
                epoch, i + 1, step if update and i + 1 < batches else None, images, sums, end - start)
            end = time.perf_counter()
    recovery.position = None
    total = torch.tensor([float(value) for value in sums.values()] + [images], dtype=torch.float64)
    if process.distributed:  # of all processes
        total = total.to(process.device)
        dist.all_reduce(total)
    seconds = time.perf_counter() - start
    *values, images = total.tolist()
    return {name: value / images for name, value in zip(sums, values)} | {
        'images_per_second': images / seconds, 'loader_share': waited / (seconds - earlier), 'seconds': seconds}
