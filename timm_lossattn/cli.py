"""The command line: ``timm-lossattn explain``, ``export``, ``list`` and ``run``."""
import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .drawing import shorten
from .explain import class_labels, explain
from .export import FORMATS, OUTPUTS, check_target, export_model
from .image_io import open_image, preprocess
from .script_runner import run_script

__all__ = ['list_patch_models', 'main']

DEFAULT_MODEL = 'resnet18_lossattn_conv_nano'


def list_patch_models(filter: str = '*') -> list[str]:
    """Names of the models that this package registers, without tags."""
    modules = ('resnet_lossattn', 'vgg_lossattn', 'googlenet_lossattn')
    return sorted(name for module in modules for name in timm.list_models(module=module) if fnmatch(name, filter))


def load_model(name: str, checkpoint: str | None, device: str, flag: str = '--model') -> Any:
    """Patch model with weights, in eval mode; ``flag`` is what the command calls the name.

    Raises:
        ValueError: no such model, no patch model, no weights, weights that do not fit, or no such device.
    """
    if name.startswith(('local-dir:', 'hf-hub:')):
        return load_published(name, checkpoint, device, flag)
    if not timm.is_model(name):
        close = get_close_matches(name, list_patch_models(), n=1)
        hint = f', did you mean {close[0]}?' if close else ';'
        raise ValueError(f'{flag}: no model {name!r}{hint} `timm-lossattn list` shows the models.')
    if name.split('.')[0] not in list_patch_models():  # before anything is downloaded
        raise ValueError(f'{flag}: {name} is no patch model; `timm-lossattn list` shows the models.')
    if checkpoint is None and not timm.models.is_model_pretrained(name):
        with_weights = [n for n in list_patch_models() if timm.models.is_model_pretrained(n)]
        others = f', or choose one of {with_weights}' if with_weights else ''
        raise ValueError(f'{flag}: {name} has no weights yet; give --checkpoint FILE{others}.')
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f'--checkpoint: no such file: {checkpoint}')
    if checkpoint is None:
        file = timm.get_pretrained_cfg_value(name, 'file')
        if file and not Path(file).is_file():
            raise ValueError(f'{flag}: the weights of {name} are missing from this installation: {file}')
        model = timm.create_model(name, pretrained=True)
    else:
        try:
            kwargs, labels = checkpoint_args(checkpoint)
            overlay: dict[str, Any] = dict(file=checkpoint, label_names=labels)
            if 'num_classes' in kwargs:
                overlay['num_classes'] = kwargs['num_classes']
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        except Exception as error:  # a broken file raises whatever its reader raises
            raise ValueError(f'--checkpoint: cannot load {checkpoint} into {name}: '
                             f'{shorten(str(error) or type(error).__name__, 300)}') from error
    return ready(model, name, device, flag)


def load_published(name: str, checkpoint: str | None, device: str, flag: str) -> Any:
    """The same for ``local-dir:FOLDER`` and ``hf-hub:ORG/NAME``, which train.py and hub/publish.py write."""
    if checkpoint is not None:
        raise ValueError(f'--checkpoint: {name} has weights of its own.')
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, AssertionError, KeyError) as error:
        raise ValueError(f'{flag}: cannot load {name}: {shorten(str(error) or type(error).__name__, 300)}') from error
    return ready(model, name, device, flag)


def ready(model: Any, name: str, device: str, flag: str) -> Any:
    """A patch model in eval mode on the device."""
    if not hasattr(model, 'forward_patches'):
        raise ValueError(f'{flag}: {name} is no patch model.')
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f'--device: cannot use {device!r}: {error}') from None


def checkpoint_args(checkpoint: str) -> tuple[dict[str, Any], list[str] | None]:
    """How train.py built the model of a training checkpoint, and its labels; nothing for bare weights."""
    if Path(checkpoint).suffix == '.safetensors':
        return {}, None
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    args = vars(content['args']) if isinstance(content, dict) and 'args' in content else {}
    kwargs = {k: args[k] for k in ('num_classes', 'in_chans', 'xi', 'backbone_stride') if args.get(k) is not None}
    return {**kwargs, **(args.get('model_kwargs') or {})}, args.get('label_names')


def unique_stems(paths: Sequence[Path]) -> list[str]:
    """A file stem for each path; equal stems (some file systems do not tell case) get a number."""
    seen: set[str] = set()
    stems = []
    for path in paths:
        stem, count = path.stem, 1
        while stem.casefold() in seen:
            count += 1
            stem = f'{path.stem}-{count}'
        seen.add(stem.casefold())
        stems.append(stem)
    return stems


def print_error(console: Console, error: Exception) -> None:
    """One line; what stands in brackets is text, not rich's markup."""
    message = ' '.join(str(error).split()) or type(error).__name__
    console.print(Text.assemble(('error', 'red'), ' ', message), soft_wrap=True)


def class_index(flag: str, value: str | None, labels: Sequence[str]) -> list[int] | None:
    """A class given by name or index, for a batch of one image.

    Raises:
        ValueError: no such class.
    """
    if value is None:
        return None
    if value in labels:
        return [list(labels).index(value)]
    if value.isdecimal() and int(value) < len(labels):
        return [int(value)]
    raise ValueError(f'{flag}: no class {value!r}; choose one of {labels} or an index.')


def run_explain(args: argparse.Namespace, console: Console) -> int:
    """One PNG and one JSON for each image; unreadable images are reported and skipped. Returns the exit code."""
    model = load_model(args.model, args.checkpoint, args.device)
    labels = class_labels(model, model.num_classes)
    target, against = (class_index(flag, value, labels)
                       for flag, value in (('--target', args.target), ('--against', args.against)))
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out: {error}') from None
    failed = 0
    paths = [Path(p) for p in args.images]
    stems = unique_stems(paths)
    taken = {p.resolve() for p in paths} & {(out / f'{s}{end}').resolve() for s in stems for end in ('.png', '.json')}
    if taken:
        raise ValueError(f'--out: {out} would overwrite an input, {min(taken)}; choose another folder.')
    for path, stem in zip(paths, stems):
        try:
            source = preprocess(model, open_image(path))
            explanation = explain(model, source, target, multi_label=args.multi_label)
            if against is not None and int(explanation.target) == against[0]:
                raise ValueError(f'--against: {path.name} is classified as {labels[against[0]]} itself; give --target.')
            if against is not None:
                explanation = replace(explanation, against=torch.tensor(against))
        except ValueError as error:
            print_error(console, error)
            failed += 1
            continue
        explanation.save(out, [stem], [f'{path.name} · {args.model}'],
                         image=str(path), model=args.model, checkpoint=args.checkpoint)
        probability, best = explanation.probabilities[0].max(dim=0)
        line = f'{path.name}: {labels[int(best)]} {100 * float(probability):.1f} %  ->  {out / stem}.png, .json'
        console.print(Text(line), soft_wrap=True)
    return 1 if failed else 0


def run_export(args: argparse.Namespace, console: Console) -> int:
    """One file, and what differs between it and the model. Returns 0."""
    check_target(Path(args.out), args.format, args.opset)
    model = load_model(args.model, args.checkpoint, 'cpu', flag='MODEL')
    report = export_model(model, args.out, args.format, args.img_size, args.opset)
    opset = '' if report.opset is None else f', opset {report.opset}'
    size = ', '.join(map(str, report.input_size))
    lines = [f'{report.file}: {report.format}{opset}, {report.size:,} bytes; image (B, {size})']
    for batch, differences in report.differences.items():
        numbers = ', '.join(f'{name} {differences[name]:.1e}' for name in OUTPUTS)
        lines.append(f'max |Δ| of the loaded file, batch {batch}: {numbers}')
    if not report.differences:
        lines.append('not compared with the model: onnxruntime is not installed')
    console.print(Text('\n'.join(lines)), soft_wrap=True)
    return 0


def run_list(args: argparse.Namespace, console: Console) -> int:
    """Table of models, their parameters and weights."""
    table = Table(title='timm-lossattn models', title_justify='left')
    table.add_column('model', no_wrap=True)
    for column in ('input', 'classes', 'params (M)'):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('weights', overflow='fold')
    for name in list_patch_models(args.filter if set(args.filter) & set('*?[') else f'*{args.filter}*'):
        model: Any = timm.create_model(name, device='meta')
        tags = [n.split('.', 1)[1] for n in timm.list_pretrained(name)]
        height, width = model.default_cfg['input_size'][1:]
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        table.add_row(name, f'{width}×{height}', str(model.num_classes), f'{parameters:.2f}', ', '.join(tags) or '-')
    if not table.rows:
        raise ValueError(f'FILTER: no model matches {args.filter!r}.')
    if not console.is_terminal:  # a file or a pipe has no width to fit into, and lines are for grep
        table.box = None
        console.width = max(console.width, console.measure(table, options=console.options.update(width=999)).maximum)
    console.print(table)
    return 0


def existing_file(path: str) -> Path:
    """For argparse: the path of a file that exists."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f'no such file: {path}')
    return Path(path)


def run_timm_script(args: argparse.Namespace, console: Console) -> int:
    """Returns 0; a script that fails ends the process itself."""
    run_script(args.script, args.arguments, args.gamma_max, args.rampup_epochs)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        prog='timm-lossattn', description='Image classifiers that say which part of the image decided.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {version("timm-lossattn")}')
    commands = parser.add_subparsers(dest='command', required=True)

    command = commands.add_parser('explain', help='which part of each image decided: a PNG and a JSON for each')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='any image that Pillow opens')
    command.add_argument('--model', default=DEFAULT_MODEL, metavar='NAME', help=f'default: {DEFAULT_MODEL}')
    command.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    command.add_argument('--target', metavar='CLASS', help='class to explain, name or index (default: predicted)')
    command.add_argument('--against', metavar='CLASS', help='why not this class? (default: the mean of all others)')
    command.add_argument('--multi-label', action='store_true',
                         help='classes are independent: sigmoids, evidence in the logit')
    command.add_argument('--out', default='explanations', metavar='DIR', help='default: explanations')
    command.add_argument('--device', default='cpu', metavar='DEVICE', help='default: cpu')
    command.set_defaults(run=run_explain)

    command = commands.add_parser('export', help='a model in one file for another runtime: ONNX, torch.export, ...')
    command.add_argument('model', metavar='MODEL', help='name of a model')
    command.add_argument('--format', required=True, metavar='FORMAT', help=', '.join(FORMATS))
    command.add_argument('--out', required=True, metavar='FILE', help=', '.join(e for v in FORMATS.values() for e in v))
    command.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    command.add_argument('--img-size', type=int, metavar='N', help="height and width (default: the weights')")
    command.add_argument('--opset', type=int, metavar='N', help="ONNX operator set (default: the exporter's)")
    command.set_defaults(run=run_export)

    command = commands.add_parser('list', help='models, parameters, weights')
    command.add_argument(
        'filter', nargs='?', default='*', metavar='FILTER', help='part of a name, or a pattern such as "*caps*s2"')
    command.set_defaults(run=run_list)

    command = commands.add_parser(
        'run', help="one of timm's own scripts, with our models and, for train.py, the loss-attention loss",
        description="Runs an unmodified script of a timm checkout. Our flags stand before it, its own after it.")
    command.add_argument('--gamma-max', type=float, default=0.1, metavar='G', help='weight of the patch term (0.1)')
    command.add_argument('--rampup-epochs', type=float, metavar='N', help='length of its ramp (0.4 × epochs)')
    command.add_argument(
        'script', type=existing_file, metavar='SCRIPT', help='path of train.py, validate.py, benchmark.py, ...')
    command.add_argument('arguments', nargs=argparse.REMAINDER, metavar='...', help="the script's own arguments")
    command.set_defaults(run=run_timm_script)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Errors in what the user gave are one line on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    if args.command == 'run':  # what goes wrong in another's script is shown as it is
        return args.run(args, Console())
    try:
        return args.run(args, Console())
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        print_error(Console(stderr=True), error)
        return 2


if __name__ == '__main__':
    sys.exit(main())
