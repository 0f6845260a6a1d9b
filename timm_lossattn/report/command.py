"""``timm-lossattn report``: its flags, and the way from a data set to a table and a page."""
import argparse
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..explanation import Preprocessing, class_labels, held_of, input_config
from ..explanation.preprocessing import PREPROCESSING
from ..files import sha256_of, weights_digest
from ..flags import add_device, add_model, add_weights, positive_int
from ..loading import full_name, load_patch_model

__all__ = ['add_report_command', 'run_report']


def add_report_command(commands: Any) -> None:
    """Add ``report`` to the sub-commands of an argparse parser."""
    command = commands.add_parser(
        'report', help='a whole data set: one parquet table and one web page that needs no server',
        description='Explains every image of a data set. Run again after a crash, it goes on where it was; started by '
                    'torchrun, its processes share the work.')
    command.add_argument('dataset', metavar='DATASET', help='hfds/NAME, torch/NAME, or a folder of images')
    add_model(command, 'what --checkpoint says')
    add_weights(command)
    command.add_argument('--out', default='report', metavar='DIR', help='default: report')
    command.add_argument('--split', metavar='NAME', help='default: validation; of a folder without splits all images')
    command.add_argument('--data-dir', metavar='DIR', help='where a torch/ data set lies')
    command.add_argument('--input-key', metavar='COLUMN', help='column of the images of an hfds/ data set (image)')
    command.add_argument('--target-key', metavar='COLUMN', help='column of its labels (label)')
    command.add_argument('--no-labels', action='store_true', help='names of folders are no classes: predictions alone')
    command.add_argument('--boxes', metavar='CSV', help='ground truth: file, x0, y0, x1, y1 in pixels of the image; '
                                                        'hfds/ data sets may have a column "boxes"')
    command.add_argument('--gallery', type=positive_int, default=200, metavar='N', help='images on the page (200)')
    command.add_argument('--batch-size', type=positive_int, default=32, metavar='N', help='default: 32')
    command.add_argument('--workers', type=int, default=2, metavar='N', help='processes that read images (2)')
    add_device(command)
    command.set_defaults(run=run_report)


def run_report(args: argparse.Namespace, console: Console) -> int:
    """Explain a data set; the first process of several writes table and page. Returns 0.

    Raises:
        ValueError: a wrong data set, model, folder or device; the message says which.
        ImportError: the extra is not installed.
    """
    try:
        from .collect import Run, collect
        from .dataset import open_images
        from .page import check_page, write_page
        from .table import ReportTable
    except ImportError as error:
        if error.name is None:  # our own words
            raise
        raise ImportError(f"{error.name} is missing: pip install 'timm-lossattn[report]'") from None
    # torchrun says so; nothing else is needed of it, for processes meet in the folder
    local_rank, rank, world_size = (int(os.environ.get(name, default)) for name, default in (
        ('LOCAL_RANK', 0), ('RANK', 0), ('WORLD_SIZE', 1)))
    device = f'cuda:{local_rank}' if args.device == 'cuda' and world_size > 1 else args.device
    model = load_patch_model(args.model, args.checkpoint, device, args.xi)
    name = args.model or full_name(model)
    if model.num_classes < 2:
        raise ValueError(f'model: {name} must have two classes or more, got {model.num_classes}.')
    config = input_config(model)
    labels = class_labels(model, model.num_classes)
    images, labels, note = open_images(
        args.dataset, model, labels, Preprocessing(config), args.split, args.data_dir, args.input_key,
        args.target_key, not args.no_labels, args.boxes)
    height, width = config['input_size'][1:]
    notes = {
        'model': name, 'checkpoint': args.checkpoint, 'pool': type(model.patch_weights).__name__,
        'xi': model.patch_weights.xi if model.patch_weights.informative else None, 'held': held_of(model),
        'grid': list(model.patch_grid(height, width)), 'input_size': [width, height],
        'patch_boxes': model.patch_boxes(height, width).tolist(), 'labels': labels, 'note': note,
        'dataset': args.dataset, 'split': images.split, 'labelled': images.labelled, 'boxed': images.boxed,
        'command': f'timm-lossattn {shlex.join(sys.argv[1:])}', 'version': version('timm-lossattn'),
        'settings': {
            'dataset': args.dataset, 'data_dir': args.data_dir, 'images': len(images),
            'content': images.fingerprint(), 'split': args.split or 'validation',
            'columns': [args.input_key, args.target_key],
            'labelled': images.labelled, 'labels': labels,
            'boxes': sha256_of(args.boxes) if args.boxes else None,
            'model': name, 'weights': weights_digest(model), 'pool': repr(model.patch_weights),
            'xi': model.patch_weights.xi, 'batch_size': args.batch_size,
            'preprocessing': {  # as JSON gives it back
                key: list(value) if isinstance(value := config.get(key), tuple) else value for key in PREPROCESSING}}}
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out: {error}') from None
    page = Path(args.out) / 'index.html'
    check_page(page)
    if note and not rank:
        console.print(Text(note), soft_wrap=True)
    run = Run(Path(args.out), notes, args.batch_size, max(0, args.workers), rank, world_size)
    share = f', process 1 of {world_size}' if world_size > 1 else ''
    with Progress(TextColumn(f'explain {args.dataset}{share}'), BarColumn(), MofNCompleteColumn(),
                  TimeRemainingColumn(), console=console, transient=True,
                  disable=bool(rank) or not console.is_terminal) as progress:
        task = progress.add_task('', total=-(-len(images) // world_size))
        table = collect(model, images, run, lambda done: progress.advance(task, done))
    if table is None:
        return 0
    report = ReportTable(table)
    for index, file, reason in report.notes['unreadable'][:5]:
        console.print(Text.assemble(('left out', 'yellow'), f' {file or index}: {reason}'), soft_wrap=True)
    if not len(report):
        table.unlink()  # or the same command would find nothing else to do, even when the images are there again
        raise ValueError(f'DATASET: none of the {len(images)} images in {args.dataset} can be read.')
    write_page(page, report, images, args.gallery)
    console.print(Text(f'{len(report):,} images  ->  {table}, {page}'), soft_wrap=True)
    return 0
