#!/usr/bin/env python3
"""Evaluate a model: accuracy or mAP, and where the dataset has boxes, how well its patches find the object.

    python train/validate.py --model resnet18_lossattn_conv_nano --dataset hfds/uoft-cs/cifar10 --input-key img \\
        --val-split test
    python train/validate.py --model local-dir:output/mine/hub --dataset hfds/data/tiny_imagenet --results-file r.json

Prints a table; --results-file also writes JSON with the command. Boxes are the column "boxes" of what prepare.py wrote
(x0, y0, x1, y1 in pixels); patch models then get patch precision, recall and F, and localisation (metrics.py).
"""
import argparse
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from timm.data import resolve_data_config
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import setup_default_logging
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from boxes import BoxDataset, collate_boxes, evaluation_transform
from data import channel_statistics, create_eval_loader, label_names, one_line, open_dataset
from flags import add_data_flags
from record import command_line, environment, write_json
from timm_lossattn.cli import checkpoint_args
from timm_lossattn.explanation import class_labels, explain
from timm_lossattn.evaluation.metrics import BoxLocalization, PatchLocalization, VOCMeanAveragePrecision


def load_model(args) -> nn.Module:
    """The model with the weights that the flags name, in eval mode.

    Raises:
        ValueError: no such model or weights.
    """
    local = args.model.partition(':')[0] in ('local-dir', 'hf-hub')
    if not local and not timm.is_model(args.model):
        raise ValueError(f'--model: timm has no model {args.model!r}, nor has timm_lossattn.')
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise ValueError(f'--checkpoint: no such file: {args.checkpoint}')
    if not local and not args.checkpoint and not timm.models.is_model_pretrained(args.model):
        raise ValueError(f'--model: {args.model} has no weights; give --checkpoint.')
    given = {k: v for k, v in vars(args).items() if k in ('xi', 'num_classes', 'in_chans') and v is not None}
    try:
        kwargs = (checkpoint_args(args.checkpoint)[0] if args.checkpoint else {}) | given  # as train.py built it
        model = timm.create_model(
            args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint or '', **kwargs)
    except (RuntimeError, OSError, TypeError) as error:
        raise ValueError(f'--model {args.model}: {error}') from error
    return model.eval().to(args.device)


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that ``load_model`` reads, besides those of the dataset."""
    parser.add_argument('--model', required=True, metavar='NAME', help='registered name, local-dir:FOLDER or hf-hub:ID')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights (default: the pretrained ones)')
    parser.add_argument('--xi', type=float, metavar='X', help='ξ of Eq. 5b, if not as trained')


def has_boxes(dataset) -> bool:
    """Whether it is one that prepare.py wrote."""
    return 'boxes' in (getattr(getattr(getattr(dataset, 'reader', None), 'dataset', None), 'features', None) or {})


def open_boxed(args) -> tuple[Any, dict[str, Any], BoxDataset, list[str]]:
    """Patch model, data config, images with boxes where there are any, and label names.

    Raises:
        ValueError: the model has no patches, or what ``load_model`` and ``open_dataset`` raise.
    """
    model: Any = load_model(args)
    if not hasattr(model, 'forward_patches'):
        raise ValueError(f'--model: {args.model} is no patch model')
    data_config = resolve_data_config(vars(args), model=model)
    dataset = open_dataset(args, args.val_split, model.num_classes)
    if has_boxes(dataset):
        dataset = open_dataset(args, args.val_split, model.num_classes, additional_features=['boxes'])
    labels = label_names(dataset) or class_labels(model, model.num_classes)
    return model, data_config, BoxDataset(dataset, evaluation_transform(data_config)), labels


@torch.inference_mode()
def validate(args, model: Any, data_config: dict[str, Any]) -> dict[str, float]:
    """All measures that the model and the dataset allow, in percent, and images/s."""
    evaluator = (MultiLabelClassificationTask if args.multi_label else ClassificationTask)(
        model, nn.Identity(), verbose=False, device=torch.device(args.device)).create_evaluator()
    voc = VOCMeanAveragePrecision() if args.multi_label else None
    dataset = open_dataset(args, args.val_split, model.num_classes, num_samples=args.val_num_samples)
    boxed = hasattr(model, 'forward_patches') and has_boxes(dataset)
    patches, located = PatchLocalization(), BoxLocalization()
    if boxed:
        dataset = open_dataset(args, args.val_split, model.num_classes, additional_features=['boxes'])
        loader: Any = DataLoader(
            BoxDataset(dataset, evaluation_transform(data_config)), args.batch_size, num_workers=args.workers,
            collate_fn=collate_boxes)
    else:
        loader = create_eval_loader(args, dataset, data_config)
    start, images = time.perf_counter(), 0
    for x, y, *boxes in tqdm(loader, desc='validate', leave=False, dynamic_ncols=True):
        x, y = x.to(args.device), y.to(args.device)
        if not boxed:
            logits = model(x)
        else:
            explanation = explain(model, x)
            logits = explanation.prediction.logits
            y = y.cpu()
            patches.update(explanation.selected, explanation.prediction.patch_logits, y, explanation.patch_boxes,
                           boxes[0])
            predicted = logits.argmax(dim=1)
            right = predicted == y if y.dim() == 1 else y.gather(1, predicted[:, None]).squeeze(1) > 0.5
            located.update(explanation.boxes, boxes[0], right)
        evaluator.update(logits.to(evaluator.device), y.to(evaluator.device))
        if voc is not None:
            voc.update(logits, y)
        images += len(x)
    result = dict(evaluator.compute())
    if voc is not None:
        result['map_voc11'] = float(voc.compute())
    if boxed:
        result |= {name: float(value) for metric in (patches, located) for name, value in metric.compute().items()}
    return result | {'images': images, 'images_per_second': images / (time.perf_counter() - start)}


def main(argv: list[str] | None = None) -> int:
    """Validate; errors in what the user gave are one line on stderr and exit code 2."""
    setup_default_logging()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_data_flags(parser)
    add_weights_flags(parser)
    parser.add_argument('-b', '--batch-size', type=int, default=128, metavar='N')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--results-file', type=Path, metavar='FILE', help='write the numbers as JSON')
    parser.set_defaults(distributed=False, rank=0, world_size=1, validation_batch_size=None)
    args = parser.parse_args(argv)
    try:
        if args.batch_size < 1:
            raise ValueError(f'--batch-size must be at least 1, got {args.batch_size}')
        model = load_model(args)
        args.in_chans = getattr(model, 'in_chans', args.in_chans)
        data_config = resolve_data_config(vars(args), model=model)
        data_config['input_size'] = (args.in_chans or 3, *data_config['input_size'][1:])
        data_config['mean'], data_config['std'] = channel_statistics(data_config)
        result = validate(args, model, data_config)
    except (ValueError, OSError, RuntimeError) as error:
        print('error: ' + one_line(error), file=sys.stderr)
        return 2
    table = Table(title=args.model, title_justify='left')
    table.add_column('measure')
    table.add_column('value', justify='right')
    for name, value in result.items():
        table.add_row(name, f'{value:,}' if isinstance(value, int) else f'{value:.4f}' if name == 'loss' else
                      f'{value:.2f}')
    Console().print(table)
    if args.results_file:
        write_json(args.results_file, {
            'model': args.model, **result, 'command': command_line(argv),
            **environment(torch.device(args.device).type, 1)})
    return 0


if __name__ == '__main__':
    sys.exit(main())
