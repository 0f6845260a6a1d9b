"""Checkpoints that survive a crash: finding the last good one, and mending what a kill left half done.

timm's CheckpointSaver writes each checkpoint to a temporary file and renames it to last.pth.tar; links to it under
checkpoint-N.pth.tar and model_best.pth.tar follow. A kill between those steps loses a link, never a checkpoint.
"""
import argparse
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver

__all__ = ['find_checkpoint', 'load_checkpoint', 'mend_links', 'save_checkpoint']

_logger = logging.getLogger('train')


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Contents of a training checkpoint, tensors on the CPU.

    Raises:
        ValueError: the file is truncated or no checkpoint of a training.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        if not {'epoch', 'state_dict', 'optimizer'} <= set(checkpoint):
            raise ValueError('it holds weights, but no state of a training')
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise ValueError(f'{file} is no usable checkpoint: {" ".join(str(error).split())[:200]}') from error
    return checkpoint


def find_checkpoint(folder: Path) -> str:
    """The newest good checkpoint of a run, '' if there is none; damaged ones are skipped with a warning."""
    def age(file: Path) -> tuple[bool, int]:
        number = re.search(r'checkpoint-(\d+)', file.name)
        return number is None, int(number[1]) if number else 0  # last.pth.tar is the newest

    for file in sorted([*folder.glob('checkpoint-*.pth.tar'), *folder.glob('last.pth.tar')], key=age, reverse=True):
        try:
            load_checkpoint(file)
        except ValueError as error:
            _logger.warning(f'--resume auto: skipped: {error}')
        else:
            return str(file)
    return ''


def save_checkpoint(saver: CheckpointSaver, epoch: int, metric: float) -> None:
    """Save; if that fails, as on a full disk, the older checkpoints stand.

    Raises:
        OSError: the checkpoint could not be written.
    """
    try:
        saver.save_checkpoint(epoch, metric=metric)
    except RuntimeError as error:  # how torch.save reports a failed write
        raise OSError(f'checkpoint of epoch {epoch + 1} not written to {saver.checkpoint_dir}: {error}') from error


def mend_links(saver: CheckpointSaver, resumed: str, epoch: int, metric: float | None) -> None:
    """After ``--resume``: bring checkpoint-N and model_best to the state that an uninterrupted run would have.

    Args:
        saver: a fresh one for the run's folder.
        resumed: checkpoint that the run goes on from.
        epoch: its epoch.
        metric: its metric.
    """
    folder = Path(saver.checkpoint_dir)
    if Path(resumed).resolve().parent != folder.resolve():
        return  # another run's checkpoint: this folder starts its own history
    saver.load_state_dict_from_checkpoint(resumed)
    last = folder / 'last.pth.tar'
    if Path(resumed).resolve() != last.resolve():  # last.pth.tar was damaged
        _copy(Path(resumed), last)
    if not (folder / f'checkpoint-{epoch}.pth.tar').exists() and metric is not None:
        known = saver.checkpoint_files
        if len(known) < saver.max_history or saver.cmp(metric, known[-1][1]):
            _copy(last, folder / f'checkpoint-{epoch}.pth.tar')
            saver.load_state_dict_from_checkpoint(resumed)
    if saver.best_epoch == epoch:
        _copy(last, folder / 'model_best.pth.tar')


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name('mend.tmp')
    shutil.copy2(source, temporary)
    os.replace(temporary, target)
