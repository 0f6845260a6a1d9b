"""The command line: ``timm-lossattn explain``, ``check``, ``export``, ``list`` and ``run``."""
import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .evaluation.check import check_model
from .evaluation.check_all import check_all, read_checks
from .explanation import Explanation, class_labels, explain, open_image, patch_model, preprocess
from .explanation.classes import class_named
from .export import FORMATS, OUTPUTS, check_target, export_model
from .loading import backbone_name, list_patch_models, load_model
from .models.lossattn import refuse_early
from .models.probe import NoPatchSum
from .script_runner import run_script

__all__ = ['main']

DEFAULT_MODEL = 'resnet18_lossattn_conv_nano'


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


def load_patch_model(name: str | None, checkpoint: str | None, device: str) -> Any:
    """``load_model``, by default the small model that ships; a stock timm model gets patches of equal weight."""
    name = name or (None if checkpoint else DEFAULT_MODEL)
    try:
        if name and not checkpoint and timm.is_model(backbone_name(name)):
            refuse_early(backbone_name(name), {})  # before anything is downloaded
        loaded = load_model(name, checkpoint, device)
        return patch_model(loaded)
    except (NoPatchSum, TypeError) as error:
        raise ValueError(f'model: {name or checkpoint}: {error}') from error


def named(model: Any) -> str:
    """The name of a model; of loss attention in another one, with that one."""
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = cfg.get('architecture') or DEFAULT_MODEL
    return f'{name}.{cfg["tag"]}' if name == 'lossattn' and cfg.get('tag') else name


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
    if value not in labels and value.isdecimal() and int(value) < len(labels):
        return [int(value)]
    try:
        return [class_named(value, labels)]
    except ValueError as error:
        raise ValueError(f'{flag}: {error}') from None


def images_in(paths: Sequence[str]) -> list[Path]:
    """The files, and of a folder all files in it that Pillow knows by their ending, in the order of their names.

    Raises:
        ValueError: a folder has none.
    """
    endings = Image.registered_extensions()
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in endings)
            if not inside:
                raise ValueError(f'IMAGE: there are no images in the folder {path}.')
            found += inside
        else:
            found.append(path)
    return found


def question(target: str | None, against: str | None) -> str:
    """What is asked, for the name of a file: '' for the usual question."""
    plain = (re.sub(r'[^\w-]+', '_', word)[:40] for word in
             ([target] if target else []) + ([f'vs-{against}'] if against else []))
    asked = '-'.join(plain)
    return f'.{asked}' if asked else ''


def answer(explanation: Explanation) -> str:
    """The lead of what is explained over what it is compared with, and how many patches speak for it, in words."""
    evidence, labels = explanation.evidence[0], explanation.labels
    over = explanation.against
    what = {'rest': ' over its rivals', 'mean': ' over the mean of the others'}.get(str(over), '') if (
        over is None or isinstance(over, str)) else f' over {labels[int(over)]}'
    lead, speaks = float(evidence.sum()), 100 * float((evidence > 0).float().mean())
    name = 'lead' if over is not None else 'logit'
    return (f'{labels[int(explanation.target)]}: {name}{what} {lead:+.2f}; {speaks:.0f} % of the patches speak for it, '
            f'{100 * float((evidence < 0).float().mean()):.0f} % against')


def run_explain(args: argparse.Namespace, console: Console) -> int:
    """One PNG and one JSON for each image; unreadable images are reported and skipped. Returns the exit code."""
    model = load_patch_model(args.model, args.checkpoint, args.device)
    labels = class_labels(model, model.num_classes)
    target, against = (class_index(flag, value, labels)
                       for flag, value in (('--target', args.target), ('--against', args.against)))
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out: {error}') from None
    if args.model is None and args.checkpoint is None:
        console.print(f'model: {DEFAULT_MODEL}, which knows the ten classes of CIFAR-10; for photographs --model '
                      'lossattn.NAME with any timm model', soft_wrap=True)
    failed = 0
    model_name = args.model or named(model)
    paths = images_in(args.images)
    asked = question(*(labels[k[0]] if k else None for k in (target, against)))
    stems = [stem + asked for stem in unique_stems(paths)]
    taken = {p.resolve() for p in paths} & {(out / f'{s}{end}').resolve() for s in stems for end in ('.png', '.json')}
    if taken:
        raise ValueError(f'--out: {out} would overwrite an input, {min(taken)}; choose another folder.')
    for path, stem in zip(paths, stems):
        try:
            source = preprocess(model, open_image(path))
            explanation = explain(model, source, target, multi_label=args.multi_label)
            if against is not None and int(explanation.target) == against[0]:
                reason = 'is --target as well' if target else 'is what it is classified as'
                raise ValueError(f'--against: {path.name}: {labels[against[0]]} {reason}; choose another class.')
            if against is not None:
                explanation = explanation.versus(against)
        except ValueError as error:
            print_error(console, error)
            failed += 1
            continue
        explanation.save(out, [stem], [f'{path.name} · {model_name}'], args.all_classes,
                         image=str(path), model=model_name, checkpoint=args.checkpoint)
        probability, best = explanation.probabilities[0].max(dim=0)
        line = f'{path.name}: {labels[int(best)]} {100 * float(probability):.1f} %  ->  {out / stem}.png, .json'
        console.print(Text(f'{line}\n  {answer(explanation)}'), soft_wrap=True)
    return 1 if failed else 0


def run_export(args: argparse.Namespace, console: Console) -> int:
    """One file, and what differs between it and the model. Returns 0."""
    check_target(Path(args.out), args.format, args.opset)
    model = load_patch_model(args.model, args.checkpoint, 'cpu')
    report = export_model(model, args.out, args.format, args.img_size, args.opset, args.dynamic_size)
    opset = '' if report.opset is None else f', opset {report.opset}'
    size = ', '.join(map(str, report.input_size))
    lines = [f'{report.file}: {report.format}{opset}, {report.size:,} bytes; image (B, {size})'
             + (', height and width free' if report.dynamic_size else '')]
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


def run_check(args: argparse.Namespace, console: Console) -> int:
    """Whether loss attention is exact in a timm model, or in all. Returns 0 if it is; of all, when they are done."""
    if args.all == bool(args.model):
        raise ValueError('MODEL: name a model, or give --all with a file for --out, and not both.')
    if args.all:
        return run_check_all(args, console)
    if args.out:
        raise ValueError('--out belongs to --all; the table of one model is printed.')
    kwargs = {'global_pool': args.global_pool} if args.global_pool else {}
    found = check_model(args.model, args.pretrained, **kwargs)
    table = Table(title=found.name, title_justify='left', show_header=False)
    rows = {
        'kind': {'A': 'A: the head is affine', 'B': 'B: the head normalises the pooled vector; 1/σ is held',
                 'C': 'C: the head has activations; the gates of the whole image are held',
                 'D': 'D: the logits are no sum over patches', 'error': 'unknown: an error'}[found.kind],
        'parameters': f'{found.parameters_million:.2f} million'}
    if found.kind in ('D', 'error'):
        rows['why' if found.kind == 'D' else 'error'] = found.reason
    else:
        rows |= {'features': found.layout, 'patches': found.grid,
                 'max |Σ contributions − logits|': f'{found.additive_error:.1e} of the largest logit',
                 'max |pool="avg" − stock|': f'{found.stock_error:.1e} of the largest logit',
                 'state dict': 'that of the stock model' if found.strict else 'another one',
                 'receptive field': f'{100 * (found.own_share or 0.):.0f} % of the influence on the middle patch comes '
                                    f'from its box, half from a square of {found.side_half} pixels, 90 % from '
                                    f'{found.side_90}' + ('' if args.pretrained else ' (with random weights)'),
                 'weights': 'pretrained' if args.pretrained else 'random'}
    rows['seconds'] = f'{found.seconds:.1f}'
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    return 1 if found.kind in ('D', 'error') else 0


def run_check_all(args: argparse.Namespace, console: Console) -> int:
    """A line for each model as it is done. Returns 0."""
    if not args.out or args.pretrained or args.global_pool:
        raise ValueError('--all needs --out FILE, and takes models as they stand, with random weights.')
    for found, count, total in check_all(args.out):
        console.print(Text(f'{count}/{total} {found.name}: {found.kind}{f", {found.why}" if found.why else ""}'),
                      soft_wrap=True)
    kinds = Counter(row['kind'] for row in read_checks(args.out).values())
    counts = ', '.join(f'{number} {kind}' for kind, number in sorted(kinds.items()))
    console.print(Text(f'{args.out}: {counts}'), soft_wrap=True)
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
    command.add_argument('images', nargs='+', metavar='IMAGE',
                         help='any image that Pillow opens, or a folder of them')
    command.add_argument('--model', metavar='NAME',
                         help='any timm model, lossattn.(any timm model), hf-hub:ORG/NAME or local-dir:FOLDER '
                              f'(default: what --checkpoint says, or {DEFAULT_MODEL})')
    command.add_argument('--checkpoint', metavar='FILE', help='weights to load instead of the pretrained ones')
    command.add_argument('--target', metavar='CLASS', help='class to explain, name or index (default: predicted)')
    command.add_argument('--against', metavar='CLASS', help='why not this class? (default: all, by their softmax)')
    command.add_argument('--multi-label', action='store_true',
                         help='classes are independent: sigmoids, evidence in the logit')
    command.add_argument('--all-classes', action='store_true', help='JSON with the contributions to every class')
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
    command.add_argument(
        '--dynamic-size', action='store_true', help='the file takes every height and width that the model does')
    command.set_defaults(run=run_export)

    command = commands.add_parser('check', help='whether loss attention is exact in a timm model')
    command.add_argument('model', nargs='?', metavar='MODEL', help='name of a timm model')
    command.add_argument('--all', action='store_true', help="all of timm's models under 100 million parameters, with "
                         'random weights, into --out; what is in it already is not checked again')
    command.add_argument('--out', metavar='FILE', help='for --all: a line of JSON for each model')
    command.add_argument('--pretrained', action='store_true', help='with its weights (default: random ones)')
    command.add_argument('--global-pool', metavar='NAME', help='pooling of the model, "avg" for one with a class token')
    command.set_defaults(run=run_check)

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
