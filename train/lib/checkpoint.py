"""Checkpoints that survive a crash: written whole, found again, and mended where a kill left something half done."""
import argparse
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver

from timm_lossattn.loading import MODEL_CONFIG
from timm_lossattn.text import one_line

__all__ = ['AtomicSaver', 'find_checkpoint', 'load_checkpoint', 'mend', 'save_checkpoint']

_logger = logging.getLogger('train')


@contextmanager
def written(what: str, folder: str) -> Iterator[None]:
    """OSError in place of the RuntimeError by which torch.save reports a failed write."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f'checkpoint of {what} not written to {folder}: {error}') from error


class AtomicSaver(CheckpointSaver):
    """timm's saver with files that are on the disk, whole and each on its own, before they get their name.

    timm's unlinks last.pth.tar before it renames the new one, and links the others to it: a kill between the two leaves
    no last.pth.tar, and one damaged file is three. The private methods below are where it does so, and where it chooses
    what a checkpoint holds: here plain data only, with what ``timm_lossattn.loading`` needs to build the model.

    Attributes:
        model_config: of ``timm_lossattn.loading.model_config``.
        record: the run's commands and starts, which result.json gets at the end of an epoch only.
    """
    model_config: dict[str, Any]
    record: dict[str, Any]

    def save_position(self, epoch: int, position: dict[str, Any]) -> None:
        """last.pth.tar within an epoch; it counts as that of the epoch before."""
        temporary = str(Path(self.checkpoint_dir) / 'tmp.pth.tar')
        with written(f'epoch {epoch + 1}, within', self.checkpoint_dir):
            self._save(temporary, epoch - 1, position=position | self.record)
        self._replace(temporary, str(Path(self.checkpoint_dir) / 'last.pth.tar'))

    def _save(
            self, save_path: str, epoch: int, metric: float | None = None,
            position: dict[str, Any] | None = None) -> None:
        within = position is not None
        state = {
            'epoch': epoch, 'arch': self.model_config['architecture'], MODEL_CONFIG: self.model_config,
            'args': self.args, 'optimizer': self.optimizer.state_dict(),
            'version': 2,  # as timm counts
            'metric': metric, 'saver': self.state_dict(*((None, None) if within else (epoch, metric))),
            **self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True),
        }
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if within:
            state['position'] = position
        torch.save(state, save_path)

    def _replace(self, src: str, dst: str) -> None:
        with open(src, 'rb+') as file:  # Windows syncs what can be written
            os.fsync(file.fileno())
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f'{dst}.tmp'
        shutil.copy2(src, temporary)
        self._replace(temporary, dst)


def load_checkpoint(file: Path) -> dict[str, Any]:
    """Contents of a training checkpoint, tensors on the CPU.

    Raises:
        ValueError: the file is truncated or no checkpoint of a training.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in those of timm's train.py
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
        if not {'epoch', 'state_dict', 'optimizer'} <= set(checkpoint):
            raise ValueError('it holds weights, but no state of a training')
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds on a damaged file
        raise ValueError(f'{file} is no usable checkpoint: {one_line(error, 200)}') from error
    return checkpoint


def epoch_of(file: Path) -> int:
    """N of checkpoint-N.pth.tar; the largest of all for last.pth.tar."""
    number = re.search(r'checkpoint-(\d+)', file.name)
    return int(number[1]) if number else 2 ** 62


def find_checkpoint(folder: Path) -> str:
    """The newest good checkpoint of a run, '' if there is none; damaged ones are skipped with a warning."""
    files = [*folder.glob('checkpoint-*.pth.tar'), *folder.glob('last.pth.tar')]
    for file in sorted(files, key=epoch_of, reverse=True):
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
    with written(f'epoch {epoch + 1}', saver.checkpoint_dir):
        saver.save_checkpoint(epoch, metric=metric)


def mend(saver: AtomicSaver, resumed: Path, epoch: int, metric: float | None) -> None:
    """Bring the files of a run to the state of the checkpoint that it is resumed from.

    A kill may have come between last.pth.tar and its copies, last.pth.tar may be damaged, or the user may go back to an
    older checkpoint: what is newer than that goes.

    Args:
        saver: a fresh one for the run's folder.
        resumed: checkpoint in that folder.
        epoch: its epoch.
        metric: its metric.
    """
    folder = Path(saver.checkpoint_dir)
    last, own = folder / 'last.pth.tar', folder / f'checkpoint-{epoch}.pth.tar'
    if resumed.resolve() != last.resolve():
        saver._duplicate(str(resumed), str(last))
    for file in folder.glob('checkpoint-*.pth.tar'):
        if epoch_of(file) > epoch:
            file.unlink()
    saver.load_state_dict_from_checkpoint(str(last))
    if not own.exists() and metric is not None and 'position' not in load_checkpoint(last):
        known = saver.checkpoint_files
        if len(known) < saver.max_history or saver.cmp(metric, known[-1][1]):
            saver._duplicate(str(last), str(own))
            saver.load_state_dict_from_checkpoint(str(last))
    source, best = folder / f'checkpoint-{saver.best_epoch}.pth.tar', folder / 'model_best.pth.tar'
    if source.exists() and (not best.exists() or load_checkpoint(best)['epoch'] != saver.best_epoch):
        saver._duplicate(str(source), str(best))
