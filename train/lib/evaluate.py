"""The one loop that evaluates: accuracy or mAP, and where there are boxes, how well patches find the object.

    >>> data = DataOptions(dataset='hfds/uoft-cs/cifar10', input_key='img', val_split='test')
    >>> evaluate_dataset(model, data)          # {'loss', 'top1', 'top5', 'images', 'images_per_second'}
"""
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    MultiLabelClassificationEvaluator,
    MultiLabelClassificationTask,
    TrainingTask,
    evaluation_sample_limit,
)
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from timm_lossattn.explanation import explain, square_box
from timm_lossattn.explanation.labels import class_names

from .boxes import boxed_loader, has_boxes, open_boxed
from .data import create_eval_loader, input_config, open_dataset
from .extras import need
from .options import DataOptions
from .process import Process

__all__ = ['evaluate', 'evaluate_dataset', 'evaluate_task']

COCO_CLASSES = (80, 91)  # without and with the ids that no image has


class BoxMeasures:
    """How well a patch model finds the object on images with boxes, beside what finds it without choosing.

    Patch precision, recall and F of the selected patches, and those of all patches (names with ``_all_patches``);
    localisation beside that of constant boxes.
    """

    def __init__(self, model: Any) -> None:
        from timm_lossattn.evaluation.constant_boxes import ConstantBoxes
        from timm_lossattn.evaluation.metrics import BoxLocalization, PatchLocalization
        self.model, self.patches, self.all_patches, self.located, self.constant = (
            model, PatchLocalization(), PatchLocalization(), BoxLocalization(), ConstantBoxes())
        self.boxes = 0

    def update(self, x: torch.Tensor, y: torch.Tensor, boxes: list[torch.Tensor]) -> torch.Tensor:
        """Count a batch; its logits."""
        self.boxes += sum(len(found) for found in boxes)
        explanation = explain(self.model, x)
        logits, y = explanation.prediction.logits, y.cpu()
        for metric, selected in ((self.patches, explanation.selected),
                                 (self.all_patches, torch.ones_like(explanation.selected))):
            metric.update(selected, explanation.prediction.patch_logits, y, explanation.patch_boxes, boxes)
        predicted = logits.argmax(dim=1)
        right = predicted == y if y.dim() == 1 else y.gather(1, predicted[:, None]).squeeze(1) > 0.5
        self.located.update(explanation.boxes, boxes, right)
        around = square_box(explanation.patch_boxes, explanation.input_size)
        self.constant.update(explanation.input_size, around, boxes)
        return logits

    def compute(self) -> dict[str, float]:
        """In percent; nothing if no image had a box, as in the splits of blood cells that are without."""
        if not self.boxes:
            return {}
        unchosen = {f'{name}_all_patches': value for name, value in self.all_patches.compute().items()
                    if name != 'patches_in_object'}
        found = self.patches.compute() | unchosen | self.located.compute() | self.constant.compute()
        return {name: float(value) for name, value in found.items()}


@torch.inference_mode()
def evaluate(
        model: Any, loader: Iterable, evaluator: Any, device: torch.device, autocast: Callable[[], Any] = nullcontext,
        channels_last: bool = False, distributed: bool = False, boxes: BoxMeasures | None = None,
        precisions: Mapping[str, Any] = MappingProxyType({})) -> dict[str, float]:
    """Measures of a model over all batches.

    Args:
        model: images to logits; its mode becomes eval.
        loader: of (images, targets), with ``boxes`` of what ``collate_boxes`` gives.
        evaluator: timm's, of a task.
        device: of the model.
        autocast: context of the forward pass.
        channels_last: layout of the images.
        distributed: sum over all processes.
        boxes: what to measure besides.
        precisions: mean average precisions to measure besides, by their names: torchmetrics of logits and targets.
    """
    model.eval()
    independent = isinstance(evaluator, MultiLabelClassificationEvaluator)
    weights = getattr(model, 'patch_weights', None) if independent else None
    for x, y, *found in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast():
            logits = model(x) if boxes is None else boxes.update(x, y, found[0])
        scores = logits if weights is None else weights.independent_logits(logits)
        evaluator.update(scores.to(evaluator.device), y.to(evaluator.device))
        for metric in precisions.values():
            metric.update(logits.cpu(), y.cpu())  # explanations are on the CPU, wherever the model is
    result = dict(evaluator.compute(distributed=distributed))
    result |= {name: float(metric.compute()) for name, metric in precisions.items()}
    return result if boxes is None else result | boxes.compute()


def evaluate_task(
        task: TrainingTask, loader: Any, process: Process, autocast: Callable[[], Any],
        channels_last: bool) -> dict[str, float]:
    """Loss and accuracies (multi-label: mean average precision) of the EMA model, or without one of the model.

    A compiled model is evaluated compiled.
    """
    model: Any = task.get_eval_model(ema=task.has_ema())
    while isinstance(model, (DistributedDataParallel, ModelEmaV3)):  # DDP would wait for ranks without a batch
        model = model.module
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    return evaluate(model, loader, evaluator, process.device, autocast, channels_last, process.distributed)


def evaluate_dataset(model: Any, data: DataOptions, device: torch.device | str = 'cpu') -> dict[str, float]:
    """All measures that the model and --val-split allow, in percent, the number of images, and images/s.

    Args:
        model: on the device.
        data: dataset, split, workers and batch size; what it says of sizes wins over the model's config.
        device: of the model.

    Raises:
        ValueError: see ``open_dataset``; or it has the classes of the model in another order.
    """
    process = Process(torch.device(device))
    config = input_config(data, model)
    data = replace(data, in_chans=config['input_size'][0])
    dataset = open_dataset(data, data.val_split, model.num_classes, num_samples=data.val_num_samples)
    names, own = class_names(dataset), list((getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ())
    if names != own and sorted(names) == sorted(own):
        number = next(i for i, (name, mine) in enumerate(zip(names, own)) if name != mine)
        raise ValueError('--dataset: has the classes of the model in another order: '
                         f"class {number} is {names[number]!r}, the model's is {own[number]!r}")
    boxed = hasattr(model, 'forward_patches') and has_boxes(dataset)
    if boxed or data.multi_label:
        need('train', 'torchmetrics')
    loader: Any = (boxed_loader(open_boxed(data, model.num_classes, config, dataset), data) if boxed
                   else create_eval_loader(data, process, dataset, config))
    task = (MultiLabelClassificationTask if data.multi_label else ClassificationTask)(
        model, nn.Identity(), verbose=False, device=process.device)
    precisions: dict[str, Any] = {}
    if data.multi_label:
        from timm_lossattn.evaluation.metrics import PublicCodeMeanAveragePrecision, VOCMeanAveragePrecision
        precisions['map_voc11'] = VOCMeanAveragePrecision()
        if model.num_classes in COCO_CLASSES:  # it has COCO's number of columns
            precisions['map_public_code'] = PublicCodeMeanAveragePrecision()
    images = 0

    def counted() -> Iterable:
        nonlocal images
        for batch in tqdm(loader, desc='evaluate', leave=False, dynamic_ncols=True):
            images += len(batch[0])
            yield batch

    start = time.perf_counter()
    result = evaluate(
        model, counted(), task.create_evaluator(), process.device, boxes=BoxMeasures(model) if boxed else None,
        precisions=precisions)
    return result | {'images': images, 'images_per_second': images / (time.perf_counter() - start)}
