"""The flags of train.py: timm's names and meanings where timm's train.py has the flag."""
import argparse
from pathlib import Path

import yaml
from timm.utils import ParseKwargs

__all__ = ['parse_args']


def build_parser() -> argparse.ArgumentParser:
    """Parser of train.py."""
    parser = argparse.ArgumentParser(
        description='Train any model that timm and timm_lossattn register; patch models get the loss-attention loss.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for the flags below')

    group = parser.add_argument_group('dataset')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help='"<type>/<name>" as in timm: hfds/uoft-cs/cifar10, hfds/FOLDER (default: image folder)')
    group.add_argument('--data-dir', metavar='DIR', help='dataset root')
    group.add_argument('--train-split', default='train', metavar='NAME')
    group.add_argument('--val-split', default='validation', metavar='NAME')
    group.add_argument('--dataset-download', action='store_true', help='allow torch/ datasets to download')
    group.add_argument('--input-key', metavar='NAME', help='image column (hfds)')
    group.add_argument('--target-key', metavar='NAME', help='label column (hfds)')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N')
    group.add_argument('--pin-mem', action='store_true')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='resnet18_lossattn_conv', metavar='NAME')
    group.add_argument('--pretrained', action='store_true', help='start from the pretrained weights')
    group.add_argument('--pretrained-backbone', metavar='MODEL',
                       help='start the backbone from the pretrained weights of another model of this package')
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in this file')
    group.add_argument('--resume', default='', metavar='FILE', help='continue the run that wrote this checkpoint')
    group.add_argument('--num-classes', type=int, metavar='N')
    group.add_argument('--in-chans', type=int, metavar='N')
    group.add_argument('--input-size', nargs=3, type=int, metavar='N', help='channels, height, width')
    group.add_argument('--mean', type=float, nargs='+')
    group.add_argument('--std', type=float, nargs='+')
    group.add_argument('--interpolation', default='')
    group.add_argument('--crop-pct', type=float)
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout on the patch features')
    group.add_argument('--drop-path', type=float, metavar='P')
    group.add_argument('--grad-checkpointing', action='store_true')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')

    group = parser.add_argument_group('loss')
    group.add_argument('--gamma-max', type=float, default=0.1, metavar='G', help='weight of the patch term (Eq. 9)')
    group.add_argument('--rampup-epochs', type=float, metavar='N',
                       help="length of γ's ramp (default: 80 of every 200 epochs, as in the paper)")
    group.add_argument('--xi', type=float, metavar='X', help='ξ of Eq. 5b (default: 0.1)')
    group.add_argument('--patch-loss', action=argparse.BooleanOptionalAction,
                       help='train with the patch term (default: for lossattn models only, as in the paper)')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='P', help='label smoothing')

    group = parser.add_argument_group('optimizer and schedule')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N')
    group.add_argument('-vb', '--validation-batch-size', type=int, metavar='N')
    group.add_argument('--opt', default='sgd', metavar='NAME')
    group.add_argument('--opt-eps', type=float)
    group.add_argument('--opt-betas', type=float, nargs='+')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE')
    group.add_argument('--momentum', type=float, default=0.9)
    group.add_argument('--weight-decay', type=float, default=2e-5)
    group.add_argument('--clip-grad', type=float, metavar='NORM')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    group.add_argument('--lr', type=float, default=0.1)
    group.add_argument('--sched', default='cosine', metavar='NAME')
    group.add_argument('--sched-on-updates', action='store_true')
    group.add_argument('--epochs', type=int, default=300, metavar='N')
    group.add_argument('--warmup-epochs', type=float, default=5, metavar='N')
    group.add_argument('--warmup-lr', type=float, default=1e-5)
    group.add_argument('--min-lr', type=float, default=0.)
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270])
    group.add_argument('--decay-epochs', type=float, default=90)
    group.add_argument('--decay-rate', type=float, default=0.1)

    group = parser.add_argument_group('augmentation')
    group.add_argument('--no-aug', action='store_true')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'))
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], help='area range of random crops')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], help='aspect range of random crops')
    group.add_argument('--hflip', type=float, default=0.5)
    group.add_argument('--color-jitter', type=float, default=0.4)
    group.add_argument('--aa', metavar='NAME', help='AutoAugment policy')
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='random erasing')
    group.add_argument('--mixup', type=float, default=0.)
    group.add_argument('--cutmix', type=float, default=0.)
    group.add_argument('--train-img-sizes', type=int, nargs='+', metavar='N', help='scheduled-resolution training')
    group.add_argument('--train-size-schedule', default='constant', choices=('constant', 'progressive'))

    group = parser.add_argument_group('device and run')
    group.add_argument('--device', metavar='DEVICE', help='default: cuda if there is one, else cpu')
    group.add_argument('--amp', action='store_true')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))
    group.add_argument('--model-ema', action='store_true')
    group.add_argument('--model-ema-decay', type=float, default=0.9998)
    group.add_argument('--model-ema-warmup', action='store_true')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--checkpoint-hist', type=int, default=2, metavar='N', help='checkpoints to keep')
    group.add_argument('--output', default='output/train', metavar='DIR')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder in --output (default: time and model)')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of train.py; a --config file gives defaults that the command line overrides.

    Exits with status 2 and one line for unknown flags, unknown keys in the config file, and values out of range.
    """
    parser = build_parser()
    config = parser.parse_known_args(argv)[0].config
    if config:
        try:
            values = yaml.safe_load(Path(config).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f'--config {config}: {" ".join(str(error).split())}')
        if not isinstance(values, dict):
            parser.error(f'--config {config}: must hold flags and values')
        values = {key.replace('-', '_'): value for key, value in values.items()}
        unknown = set(values) - {action.dest for action in parser._actions}
        if unknown:
            parser.error(f'--config {config}: unknown keys {sorted(unknown)}')
        parser.set_defaults(**values)
    args = parser.parse_args(argv)
    if args.pretrained_backbone and (args.pretrained or args.initial_checkpoint):
        parser.error('--pretrained-backbone: goes with neither --pretrained nor --initial-checkpoint')
    if args.rampup_epochs is None:
        args.rampup_epochs = 0.4 * args.epochs
    for name, low, high in (
            ('gamma_max', 0, float('inf')), ('rampup_epochs', 0, float('inf')), ('xi', 0, 1), ('smoothing', 0, 0.999),
            ('batch_size', 1, float('inf')), ('epochs', 1, float('inf')), ('lr', 0, float('inf'))):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f'--{name.replace("_", "-")} must lie in [{low}, {high}], got {value}')
    return args
