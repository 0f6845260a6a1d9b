#!/usr/bin/env python3
"""Turn a finished run into weights that ``pretrained=True`` finds and that publish.py --all uploads.

    python hub/bundle.py output/train/mine ARCH.TAG [--in-package] [--dataset-id ORG/DATASET] [--note TEXT]
    python hub/bundle.py output/train/mine ARCH.TAG --model-kwargs pool=lossattn xi=1   # put in after the training
    python hub/bundle.py output/train/mine ARCH.TAG --average FILE   # the mean of its weights and these
    python hub/bundle.py --rewrite                  # config.json and card of all, after a change of their words

Takes model_best.pth.tar (EMA weights if it has them) and result.json of the run, refuses a run that
``pretrained=True`` could not restore, stores convolutions and linear layers as float16 and everything else as float32,
loads that file again into a fresh model, evaluates it in float32 on the whole validation split of the run, and writes
hub/weights/ARCH.TAG: model.safetensors, config.json, README.md, example.png (of --example, or of CIFAR-10's classes),
and result.json, which is that of the run with the accuracy after conversion, and where it was measured, under
"shipped", the card's words under "card" and, if the run started from another run's checkpoint or (--pretrained) from
weights of hub/weights, their result.json under "initial". With --in-package the weights go into timm_lossattn/weights
instead, for small models. All of it is made before any of it is put in place: if something is wrong, whatever is there
stays as it was.
"""
import argparse
import copy
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.utils import ParseKwargs
from torch import nn

from card import Words
from folder import (
    CONFIG,
    EXAMPLE,
    RESULT,
    WEIGHTS,
    draw_example,
    list_bundles,
    model_differences,
    write_card,
    write_config,
)
from timm_lossattn import load_model
from timm_lossattn.files import replace_file, sha256_of, write_json
from timm_lossattn.loading import read_checkpoint
from timm_lossattn.models.pretrained import WEIGHTS_NAME, bundled_weights, packaged_file
from timm_lossattn.text import one_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'train'))  # for lib, which evaluates
from lib.average import average_weights, measure_statistics  # noqa: E402
from lib.evaluate import evaluate_dataset  # noqa: E402
from lib.model import replace_convolutions  # noqa: E402
from lib.options import DataOptions  # noqa: E402
from lib.process import default_device  # noqa: E402
from lib.record import environment  # noqa: E402

MAX_BYTES = 70_000_000  # of a file in the repository
MAX_PACKAGE = 15_000_000  # of all weights in the package: the wheel stays under 20 MB
# flags of a run that the model is created with
MODEL_ARGS = ('num_classes', 'in_chans', 'xi', 'backbone_stride', 'patch_stride', 'patch_padding', 'width_mult')


@dataclass(frozen=True)
class Options:
    """What to bundle.

    Attributes:
        run: folder of train.py.
        name: arch.tag.
        checkpoint: in that folder.
        in_package: the weights ship in the package.
        dataset: where the run's data lie now, as timm names it.
        device: to evaluate on.
        winograd: evaluate with Winograd convolutions.
        example: image to explain in the card.
        words: for the card.
        model_kwargs: arguments of the model that ships, where it was trained with others.
        average: checkpoints whose weights are averaged with those of the run.
        command: that was typed, for result.json.
    """
    run: Path
    name: str
    checkpoint: str = 'model_best.pth.tar'
    in_package: bool = False
    dataset: str | None = None
    device: str = 'cpu'
    winograd: bool = False
    example: str | None = None
    words: Words = field(default_factory=Words)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    average: Sequence[str] = ()
    command: str = ''


def half_precision(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict with float16 weights, but float32 normalisation layers, biases and thresholds."""
    state = {}
    for name, tensor in model.state_dict().items():
        half = tensor.is_floating_point() and tensor.dim() > 1 and name.endswith('.weight')
        state[name] = tensor.half().contiguous() if half else tensor.contiguous()
    return state


def model_of_run(options: Options, result: dict[str, Any]) -> Any:
    """The run's model with the weights of its checkpoint.

    Raises:
        ValueError: no such weights, or ``pretrained=True`` would not give this model back.
    """
    flags = result['args']
    architecture = result['model'].split('.')[0]
    if options.name.split('.', 1)[0] != architecture or '.' not in options.name:
        raise ValueError(f'ARCH.TAG: the run is of {architecture}, got {options.name}')
    if flags.get('multi_label'):
        raise ValueError('RUN: bundle.py measures top-1 alone; publish multi-label weights with publish.py RUN')
    state, config = read_checkpoint(options.run / options.checkpoint)
    kwargs = dict(config.get('model_args') or {})
    kwargs |= {key: flags[key] for key in MODEL_ARGS if flags.get(key) is not None}
    kwargs |= (flags.get('model_kwargs') or {}) | options.model_kwargs
    try:
        overlay = {**result['data_config'], 'label_names': flags.get('label_names')}
        model: Any = timm.create_model(result['model'], pretrained_cfg_overlay=overlay, **kwargs)
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'RUN: {options.checkpoint} does not fit {result["model"]}: {error}') from error
    try:
        differ = model_differences(options.name, model)
    except ValueError as error:
        raise ValueError(f'ARCH.TAG: {error}') from error
    if differ:
        raise ValueError(f'RUN: differs from {options.name} as it is registered in {", ".join(differ)}')
    return model


def data_of(options: Options, flags: dict[str, Any], split: str) -> DataOptions:
    """A split of the run's data."""
    return DataOptions(
        dataset=options.dataset or flags.get('dataset') or '',
        data_dir=None if options.dataset else flags.get('data_dir'), val_split=split,
        input_key=flags.get('input_key'), target_key=flags.get('target_key'), batch_size=250, workers=1)


def average(model: Any, options: Options, flags: dict[str, Any]) -> None:
    """Give the run's model the mean of its weights and the other ones, and batch norms that fit it.

    Raises:
        ValueError: other weights do not fit.
    """
    try:
        average_weights(model, [read_checkpoint(file)[0] for file in options.average])
    except RuntimeError as error:
        raise ValueError(f'--average: {error}') from error
    measured = copy.deepcopy(model).to(options.device)  # the model that is stored keeps its device and convolutions
    if options.winograd:
        replace_convolutions(measured)
    measure_statistics(measured, data_of(options, flags, flags['train_split']))
    model.load_state_dict(measured.state_dict())


def evaluate(model: Any, options: Options, flags: dict[str, Any]) -> dict[str, Any]:
    """Loss, top-1, top-5 and the number of images of the whole split of the run."""
    if options.winograd:
        replace_convolutions(model)
    measured = evaluate_dataset(model, data_of(options, flags, flags['val_split']), options.device)
    return {key: measured[key] for key in ('loss', 'top1', 'top5', 'images')}


def beginning(result: dict[str, Any]) -> dict[str, Any] | None:
    """result.json of what a run started from: another run, by its checkpoint or folder, or weights of hub/weights.

    None where there is none. A run that is bundled again, or went on since, has what it had.
    """
    args = result['args']
    source, _, where = args['model'].partition(':')
    start = args.get('initial_checkpoint') or (where if source == 'local-dir' and args.get('pretrained') else '')
    first: dict[str, Any] = result.get('starts', [{}])[0]  # went on in place since, perhaps
    resumed = first.get('resume') or args.get('resume') or ''
    if not start and resumed and Path(resumed).parent.resolve() != Path(
            args.get('output', ''), args.get('experiment', '')).resolve():
        start = resumed  # of another run
    if start or where:
        run = Path(start).parent
        return read_result(run) if start and (run / RESULT).is_file() else None
    cfg = timm.get_pretrained_cfg(result['model'])
    weights = WEIGHTS / f'{result["model"].split(".")[0]}.{cfg.tag if cfg else ""}'
    if not args.get('pretrained') or args.get('pretrained_path') or not (weights / RESULT).is_file():
        return None
    found = read_result(weights)
    return found.get('initial') if found['commands'] == result['commands'][:len(found['commands'])] else found


def read_result(folder: Path) -> dict[str, Any]:
    """result.json of a folder."""
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def place(options: Options, content: bytes) -> Path:
    """Where weights of this size go.

    Raises:
        ValueError: they are too large.
    """
    file = packaged_file(options.name) if options.in_package else WEIGHTS / options.name / WEIGHTS_NAME
    if options.in_package:
        total = len(content) + sum(f.stat().st_size for f in file.parent.glob('*.safetensors') if f != file)
        if total > MAX_PACKAGE:
            raise ValueError(f'--in-package: with these the weights in the package would have {total:,} bytes; at most '
                             f'{MAX_PACKAGE:,}')
    if len(content) > MAX_BYTES:
        raise ValueError(f'RUN: the weights have {len(content):,} bytes; the repository takes {MAX_BYTES:,}. '
                         'publish.py RUN puts them on the Hub')
    return file


def bundle(options: Options) -> dict[str, Any]:
    """Make the bundle.

    Returns:
        Its result.json.

    Raises:
        ValueError: the run is not finished, or cannot become these weights, or the example is unreadable.
    """
    try:
        result = read_result(options.run)
        model = model_of_run(options, result)
        initial = beginning(result)
        if initial is not None:
            result['initial'] = initial
    except KeyError as error:
        raise ValueError(f'RUN: {options.run / RESULT} has no {error}') from error
    except OSError as error:
        raise ValueError(f'RUN: {error}; is the run finished?') from error
    if options.average:  # what is wrong with other weights or data says so itself
        average(model, options, result['args'])
    content = save(half_precision(model), metadata={'format': 'pt'})
    file = place(options, content)
    with tempfile.TemporaryDirectory() as scratch:  # all of it is made before it replaces anything
        filled = Path(scratch)
        written = filled / WEIGHTS_NAME
        written.write_bytes(content)
        restored = model_of_file(options.name, written)
        draw_example(filled, restored, options.example, multi_label=False)  # what is wrong with it is said at once
        measured = load_model(options.name, checkpoint=written, device=options.device, pretrained_cfg_overlay={
            'label_names': model.pretrained_cfg.get('label_names')})  # or classes in another order would go unnoticed
        metrics = evaluate(measured, options, result['args'])
        result['shipped'] = {
            'file': str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else file.name, 'bytes': len(content),
            'sha256': sha256_of(written), **metrics, 'checkpoint': Path(options.checkpoint).name,
            'command': options.command, **environment(options.device)}
        result['card'] = asdict(options.words)
        write_json(filled / RESULT, result)
        describe(filled, options.name, restored)
        move(filled, options.name, file)
    return result


def move(filled: Path, name: str, file: Path) -> None:
    """Put a bundle's files in place, and remove what the one before it had besides.

    Args:
        filled: folder with all of them.
        name: arch.tag.
        file: where its weights go.
    """
    folder = WEIGHTS / name
    targets = {made.name: folder / made.name for made in filled.iterdir()} | {WEIGHTS_NAME: file}
    contents = {target: (filled / made).read_bytes() for made, target in targets.items()}
    for target, content in contents.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, content)
    for other in {packaged_file(name), folder / WEIGHTS_NAME, folder / EXAMPLE} - set(targets.values()):
        other.unlink(missing_ok=True)


def model_of_file(name: str, file: str | Path) -> Any:
    """What ``pretrained=True`` gives for an arch.tag whose weights lie in this file."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(file)}).eval()


def describe(folder: Path, name: str, model: Any) -> None:
    """Write config.json and README.md of a bundle, beside its result.json and example.png."""
    write_config(folder / CONFIG, model)
    write_card(folder, name, model)


def rewrite() -> None:
    """``describe`` everything in hub/weights.

    Raises:
        ValueError: weights are missing.
    """
    for name in list_bundles():
        file = bundled_weights(name)
        if file is None:
            raise ValueError(f'--rewrite: {name} has no {WEIGHTS_NAME}; make it with `bundle.py RUN {name}`')
        describe(WEIGHTS / name, name, model_of_file(name, file))


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('run', nargs='?', type=Path, metavar='RUN')
    parser.add_argument('name', nargs='?', metavar='ARCH.TAG', help='registered in the default_cfgs')
    parser.add_argument('--rewrite', action='store_true', help='config.json and card of all bundles')
    parser.add_argument('--checkpoint', default=Options.checkpoint, metavar='FILE', help='in RUN')
    parser.add_argument('--in-package', action='store_true', help='the weights ship in the package')
    parser.add_argument('--dataset', metavar='NAME', help="where the run's data lie now, as timm names it; no other "
                        'data: the card names those of the run')
    parser.add_argument('--device', default=default_device())
    parser.add_argument('--winograd', action='store_true', help='evaluate faster on the CPU, equal but for rounding')
    parser.add_argument('--example', metavar='IMAGE', help='image to explain in the card')
    parser.add_argument('--dataset-id', metavar='ID', help='id of the training set on the Hub, for the card')
    parser.add_argument('--note', metavar='TEXT', help='what the card should say about the data')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
                        help='arguments of the model that ships, where it was trained with others')
    parser.add_argument('--average', nargs='+', default=(), metavar='FILE',
                        help="what ships is the mean of the run's weights and these, with batch norms measured on "
                             '5,000 training images')
    parser.add_argument('--license', default=Words.license, metavar='ID', help=f'default: {Words.license}')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Bundle; errors are one line on stderr and exit code 2."""
    typed = sys.argv[1:] if argv is None else [*argv]
    args = build_parser().parse_args(typed)
    try:
        if args.rewrite:
            if typed != ['--rewrite']:
                raise ValueError(f'--rewrite: takes no other argument, got {shlex.join(typed)}')
            rewrite()
            return 0
        if args.name is None:
            raise ValueError('RUN, ARCH.TAG: give both, or --rewrite')
        if args.winograd and args.device != 'cpu':
            raise ValueError(f'--winograd: is for the CPU, not for --device {args.device}')
        result = bundle(Options(
            run=args.run, name=args.name, checkpoint=args.checkpoint, in_package=args.in_package, dataset=args.dataset,
            device=args.device, winograd=args.winograd, example=args.example,
            words=Words(args.dataset_id, args.note, args.license), model_kwargs=args.model_kwargs, average=args.average,
            command=shlex.join(['python', 'hub/bundle.py', *typed])))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f'error: {one_line(error, 10_000)}', file=sys.stderr)
        return 2
    shipped = result['shipped']
    print(f'{shipped["file"]}: {shipped["bytes"]:,} bytes, '
          f'top-1 {shipped["top1"]:.2f} % of {shipped["images"]:,} images')
    return 0


if __name__ == '__main__':
    sys.exit(main())
