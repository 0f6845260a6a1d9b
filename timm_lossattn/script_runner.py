"""Run timm's own training and evaluation scripts, unmodified, with our models and our task."""
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm.scheduler
import timm.task
from timm.utils import unwrap_model

from .training import LossAttentionLoss, LossAttentionTask

__all__ = ['run_script']


def run_script(
        script: Path, arguments: Sequence[str], gamma_max: float = 0.1, rampup_epochs: float | None = None) -> None:
    """Run a timm script as ``python script arguments...`` would, in this process.

    This package's models are registered. While the script runs, ``timm.task.ClassificationTask`` gives models with a
    loss-attention head the LossAttentionTask, around the criterion that the script chose; other models get what they
    would get. γ's ramp learns epochs and updates where the script creates its schedule.

    Args:
        script: path of train.py, validate.py, benchmark.py or inference.py of a timm checkout.
        arguments: the script's own.
        gamma_max: γ_max of the patch term.
        rampup_epochs: length of its ramp; None: 80 of every 200 epochs, as in the paper.
    """
    tasks: list[LossAttentionTask] = []
    create_scheduler = timm.scheduler.create_scheduler_v2

    def substitute(task_class: Any) -> Any:
        def create(model: Any, *args: Any, **kwargs: Any) -> Any:
            plain = task_class(model, *args, **kwargs)
            weights = getattr(unwrap_model(model), 'patch_weights', None)
            if weights is None or weights.default_loss != 'loss_attention':
                return plain
            loss = LossAttentionLoss(plain.criterion, multi_label=plain.multi_label)
            tasks.append(LossAttentionTask(
                model, loss, gamma_max, 80. if rampup_epochs is None else rampup_epochs, device=plain.device,
                dtype=plain.dtype, verbose=plain.verbose, threshold=getattr(plain, 'threshold', 0.5)))
            return tasks[-1]
        return create

    def scheduler(*args: Any, **kwargs: Any) -> Any:
        result = create_scheduler(*args, **kwargs)
        for task in tasks:
            task.updates_per_epoch = kwargs.get('updates_per_epoch') or None
            if task.updates_per_epoch and task.epoch is None:
                task.set_epoch(0)
            if rampup_epochs is None:
                task.rampup_epochs = 0.4 * result[1]
        return result

    with mock.patch.multiple(
            timm.task, ClassificationTask=substitute(timm.task.ClassificationTask),
            MultiLabelClassificationTask=substitute(timm.task.MultiLabelClassificationTask)), \
            mock.patch.object(timm.scheduler, 'create_scheduler_v2', scheduler), \
            mock.patch.object(sys, 'argv', [str(script), *arguments]):
        runpy.run_path(str(script), run_name='__main__')
