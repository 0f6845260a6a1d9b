"""The command line: ``timm-lossattn explain``, ``report``, ``check``, ``export``, ``list`` and ``run``."""
import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.utils import ParseKwargs

from .evaluation.check import check_model
from .evaluation.check_all import check_all, read_checks
from .explanation import class_labels, explain
from .explanation.drawing import PANELS
from .explanation.explain import HELD
from .explanation.labels import find_class, spaced
from .explanation.preprocessing import image_endings
from .export import FORMATS, OUTPUTS, check_target, export_model
from .files import fitting, unique_stems
from .flags import add_device, add_model, add_weights
from .loading import full_name, list_patch_models, load_patch_model
from .report.command import add_report_command
from .script_runner import run_script
from .text import one_line, percent, printable, shorten

__all__ = ['main']

DEFAULT_MODEL = 'resnet18_lossattn_conv_nano'


def print_error(console: Console, error: Exception) -> None:
    """One line; what stands in brackets is text, not rich's markup."""
    console.print(Text.assemble(('error', 'red'), ' ', one_line(error, 10_000)), soft_wrap=True)


def image_files(given: Sequence[str], console: Console) -> list[Path]:
    """The files, and of a folder all images in it, sorted; what else it holds is named in a line.

    Raises:
        ValueError: a folder without images.
    """
    paths: list[Path] = []
    endings = image_endings()
    for path in map(Path, given):
        if not path.is_dir():
            paths.append(path)
            continue
        content = sorted(path.iterdir())
        images = [file for file in content if file.suffix.lower() in endings and file.is_file()]
        known = set(images)
        others = [file.name + '/' * file.is_dir() for file in content if file not in known]
        if not images:
            raise ValueError(f'IMAGE: no images in the folder {path}' + (
                f'; it holds {shorten(", ".join(others), 100)}' if others else '') + (
                f'; {path}/*/* are those of its folders' if any(name.endswith('/') for name in others) else ''))
        if others:
            names = shorten(', '.join(others), 100)
            console.print(Text(f'{path}: {len(images)} images; left out: {names}'), soft_wrap=True)
        paths += images
    return paths


def class_slug(k: int, labels: Sequence[str]) -> str:
    """A class's name for a file's name: letters, digits and underscores; with its index where two would be the same."""
    slugs = [fitting(re.sub(r'\W+', '_', label).strip('_')[:40], 80) for label in labels]  # two and a stem are a name
    same = [other.casefold() for other in slugs].count(slugs[k].casefold()) > 1
    return f'{slugs[k]}_{k}' if same or not slugs[k] else slugs[k]


def run_explain(args: argparse.Namespace, console: Console) -> int:
    """One PNG and one JSON for each image; unreadable images are reported and skipped. Returns the exit code."""
    model = load_patch_model(
        args.model or (None if args.checkpoint else DEFAULT_MODEL), args.checkpoint, args.device, args.xi)
    labels = class_labels(model, model.num_classes)
    target, against = (None if value is None else find_class(flag, value, labels)
                       for flag, value in (('--target', args.target), ('--against', args.against)))
    if target is not None and target == against:
        raise ValueError(f'--against: {labels[target]} is --target as well; choose another class.')
    question = '' if target is None else f'-{class_slug(target, labels)}'
    question += '' if against is None else f'-vs-{class_slug(against, labels)}'
    if args.multi_label and args.label is not None:
        raise ValueError('--label: one class is the true one, which does not go with --multi-label.')
    own = args.label in ('folder', 'name')  # each image's own class, or one for all
    truth = None if own or args.label is None else find_class('--label', args.label, labels)
    unknown = [name for name in args.panels.split(',') if name not in PANELS]
    if unknown:
        raise ValueError(f'--panels: no panel {unknown[0]!r}; choose some of {",".join(PANELS)}.')
    paths, out = image_files(args.images, console), Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f'--out: {error}') from None
    if args.model is None and args.checkpoint is None:
        console.print(f'model: {DEFAULT_MODEL}, which knows the ten classes of CIFAR-10; for photographs --model '
                      'lossattn.NAME with any timm model', soft_wrap=True)
    failed, hinted = 0, False
    architecture = full_name(model)
    model_name = architecture if args.model in (None, 'lossattn') else args.model
    title = f'{architecture} of {model_name}' if ':' in model_name else model_name
    stems = [f'{stem}{question}' for stem in unique_stems((path.stem for path in paths), ending=f'{question}.json')]
    taken = {p.resolve() for p in paths} & {(out / f'{s}{end}').resolve() for s in stems for end in ('.png', '.json')}
    if taken:
        raise ValueError(f'--out: {out} would overwrite an input, {min(taken)}; choose another folder.')
    foreign = [name for stem in stems if (name := not_ours(out, stem))]
    if foreign:
        raise ValueError(f'--out: {out / foreign[0]} is there and no explanation; choose another folder.')
    for path, stem in zip(paths, stems):
        try:
            truth = true_class(args.label, path, labels) if own else truth
            explanation = explain(model, path, target, multi_label=args.multi_label, true_class=truth)
            if against is not None and int(explanation.target) == against:
                raise ValueError(f'--against: {path.name}: {labels[against]} is what it is classified as; choose '
                                 'another class, or give the --target that it should be.')
            if against is not None:
                explanation = explanation.versus(against)
            explanation.save(out, [stem], [f'{printable(path.name)} · {title}'], args.all_classes,
                             args.panels.split(','), args.stacked, image=printable(str(path)), model=model_name,
                             architecture=architecture, checkpoint=args.checkpoint,
                             xi=model.patch_weights.xi if model.patch_weights.informative else None,
                             version=version('timm-lossattn'))
        except ValueError as error:
            print_error(console, error)
            failed += 1
            continue
        best = int(explanation.predicted)  # of two probabilities that round to 1 the larger logit
        line = f'{printable(path.name)}: {labels[best]} {percent(float(explanation.probabilities[0, best]))}'
        if truth is not None and truth != best:
            line += f', wrong: {labels[truth]}'
        line += f'  ->  {out / stem}.png, .json'
        console.print(Text(line), soft_wrap=True)
        if question:
            console.print(Text(f'  {explanation.answer()}'), soft_wrap=True)
        hint = explanation.unlike_training()
        if hint and not hinted:
            hinted = True
            console.print(Text(f'hint: {printable(path.name)}: {hint}'), soft_wrap=True)
    return 1 if failed else 0


def not_ours(out: Path, stem: str) -> str | None:
    """A file that an explanation of this stem would replace and that is none; None if there is no such file."""
    there = [f'{stem}{end}' for end in ('.json', '.png') if (out / f'{stem}{end}').exists()]
    try:
        if not there or {'patch_grid', 'evidence'} <= {*json.loads((out / f'{stem}.json').read_text('utf-8'))}:
            return None
    except (OSError, ValueError, TypeError):  # no numbers beside the picture, or no numbers
        pass
    return there[0]


def true_class(label: str, file: Path, labels: Sequence[str]) -> int:
    """The class that an image shows by its folder's name, or the end of its own after the last "_".

    It is a whole label in any case, "_" for a space, or of a folder an index: a folder "apple" is no custard apple, and
    an image IMG_0012 not of class 12.

    Raises:
        ValueError: the model has no such class.
    """
    name = Path(os.path.abspath(file)).parent.name if label == 'folder' else file.stem.rpartition('_')[2]
    if name in labels:
        return list(labels).index(name)
    if label == 'folder' and name.isdecimal() and int(name) < len(labels):
        return int(name)
    found = [k for k, other in enumerate(labels) if spaced(other) == spaced(name)]
    if len(found) != 1:
        raise ValueError(f'--label: no class {printable(name)!r}, as the {label} of {printable(file.name)} says; give '
                         'the class itself.')
    return found[0]


def run_export(args: argparse.Namespace, console: Console) -> int:
    """One file, and what differs between it and the model. Returns 0."""
    if args.checkpoint and Path(args.out).resolve() == Path(args.checkpoint).resolve():
        raise ValueError(f'--out: {args.out} is the --checkpoint; choose another file.')
    check_target(Path(args.out), args.format, args.opset)
    model = load_patch_model(args.model, args.checkpoint, 'cpu', args.xi)
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
    pattern = args.filter if set(args.filter) & set('*?[') else f'*{args.filter}*'
    trained = sorted(name for name in timm.list_pretrained('lossattn.*') if fnmatch(name, pattern))
    rows = [(name, [n.split('.', 1)[1] for n in timm.list_pretrained(name)]) for name in list_patch_models(pattern)]
    for name, tags in rows + [(backbone, [tag]) for backbone, _, tag in (name.rpartition('.') for name in trained)]:
        default = getattr(timm.get_pretrained_cfg(name.split('.')[0]), 'tag', '')
        tags.sort(key=default.__ne__)  # the weights that a name without tag stands for come first
        model: Any = timm.create_model(f'{name}.{tags[0]}' if tags else name, device='meta')
        height, width = model.default_cfg['input_size'][1:]
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        table.add_row(name, f'{width}×{height}', str(model.num_classes), f'{parameters:.2f}', ', '.join(tags) or '-')
    if not table.rows:
        raise ValueError(f'FILTER: no model matches {args.filter!r}.')
    if not console.is_terminal:  # a file or a pipe has no width to fit into, and lines are for grep
        table.box = None
        console.width = max(console.width, console.measure(table, options=console.options.update(width=999)).maximum)
    console.print(table)
    if console.is_terminal:
        console.print("lossattn.NAME is loss attention in any timm model; with pip install 'timm-lossattn[imagenet]' "
                      'tf_efficientnet_lite0, 1 and 2 need no network', markup=False)
    return 0


def run_check(args: argparse.Namespace, console: Console) -> int:
    """Whether loss attention is exact in a timm model, or in all. Returns 0 if it is; of all, when they are done."""
    if args.all == bool(args.model):
        raise ValueError('MODEL: name a model, or give --all with a file for --out, and not both.')
    if args.all:
        return run_check_all(args, console)
    if args.out:
        raise ValueError('--out belongs to --all; the table of one model is printed.')
    taken = sorted({'name', 'pretrained', 'receptive_field'} & {*args.model_kwargs})
    if taken:
        raise ValueError(f'--model-kwargs: {taken[0]} is none of the model\'s arguments'
                         + ('; for its weights: --pretrained.' if taken == ['pretrained'] else '.'))
    found = check_model(args.model, args.pretrained, receptive_field=args.pretrained, **args.model_kwargs)
    table = Table(title=found.name, title_justify='left', show_header=False)
    rows = {
        'kind': {'A': 'A: the head is affine', 'B': 'B: the head normalises the pooled vector',
                 'C': 'C: the head has activations', 'D': 'D: the logits are no sum over patches',
                 'error': 'unknown: an error'}[found.kind]}
    if found.kind in HELD:
        rows['held for an image'] = HELD[found.kind]
    if found.parameters_million is not None:  # of a model that was not built they are not known
        rows['parameters'] = f'{found.parameters_million:.2f} million'
    if found.kind in ('D', 'error'):
        rows['why' if found.kind == 'D' else 'error'] = found.reason
    else:
        rows |= {'features': found.layout, 'patches': found.grid,
                 'max |Σ contributions − logits|': f'{found.additive_error:.1e} of the largest logit',
                 'max |pool="avg" − stock|': f'{found.stock_error:.1e} of the largest logit',
                 'state dict': 'that of the stock model' if found.strict else 'another one',
                 'receptive field': f'{100 * (found.own_share or 0.):.0f} % of the influence on the middle patch comes '
                                    f'from its box, half from a square of {found.side_half} pixels, 90 % from '
                                    f'{found.side_90}' if args.pretrained else 'of its weights: --pretrained',
                 'weights': 'pretrained' if args.pretrained else 'random'}
    rows['seconds'] = f'{found.seconds:.1f}'
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    return 1 if found.kind in ('D', 'error') else 0


def run_check_all(args: argparse.Namespace, console: Console) -> int:
    """A line for each model as it is done. Returns 0."""
    if not args.out or args.pretrained or args.model_kwargs:
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
    add_model(command, f'what --checkpoint says, or {DEFAULT_MODEL}')
    add_weights(command)
    command.add_argument('--target', metavar='CLASS', help='class to explain, name or index (default: predicted)')
    command.add_argument('--against', metavar='CLASS', help='why not this class? the third panel, and the evidence '
                         'in the JSON (default: all others by their softmax; in the panel the true class or the next)')
    command.add_argument('--label', metavar='CLASS', help='what the images really show, so that wrong predictions are '
                         'marked: a class, "folder" (the name of each image\'s folder) or "name" (the end of its own)')
    command.add_argument('--multi-label', action='store_true',
                         help='classes are independent: sigmoids, evidence in the logit')
    command.add_argument('--all-classes', action='store_true', help='JSON with the contributions to every class')
    command.add_argument('--panels', default=','.join(PANELS[:3]), metavar='NAMES',
                         help=f'of the picture, of {",".join(PANELS)} (default: the first three)')
    command.add_argument('--stacked', action='store_true', help='panels one below the other, for narrow pages')
    command.add_argument('--out', default='explanations', metavar='DIR', help='default: explanations')
    add_device(command)
    command.set_defaults(run=run_explain)

    add_report_command(commands)

    command = commands.add_parser('export', help='a model in one file for another runtime: ONNX, torch.export, ...')
    command.add_argument('model', metavar='MODEL', help='name of a model')
    command.add_argument('--format', required=True, metavar='FORMAT', help=', '.join(FORMATS))
    command.add_argument('--out', required=True, metavar='FILE', help=', '.join(e for v in FORMATS.values() for e in v))
    add_weights(command)
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
    command.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                         help='arguments of the model, global_pool=avg fc_norm=False for one with a class token')
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
    for stream in (sys.stdout, sys.stderr):  # not all encodings have ξ, and help texts and names of files do
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
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
