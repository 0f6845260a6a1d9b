"""The flags of train.py: timm's names and meanings where timm's train.py has the flag."""
import argparse
import importlib.util
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import ParseKwargs

__all__ = ['add_data_flags', 'parse_args', 'positive_int']

RECIPES = Path(__file__).parent / 'recipes.yaml'


def positive_int(text: str) -> int:
    """For argparse: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
    return int(text)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that train.py and validate.py share: where the images are and how they are read."""
    group = parser.add_argument_group('dataset')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help='"<type>/<name>" as in timm: hfds/uoft-cs/cifar10, hfds/FOLDER, hfids/NAME, wds/NAME, '
                            'torch/cifar10 (default: image folder)')
    group.add_argument('--data-dir', metavar='DIR', help='dataset root')
    group.add_argument('--val-split', default='validation', metavar='NAME')
    group.add_argument('--val-num-samples', type=int, metavar='N', help='images in --val-split (streams only)')
    group.add_argument('--dataset-download', action='store_true', help='allow torch/ datasets to download')
    group.add_argument('--input-key', metavar='NAME', help='image column (hfds, hfids, wds)')
    group.add_argument('--target-key', metavar='NAME', help='label column (hfds, hfids, wds)')
    group.add_argument('--multi-label', action='store_true',
                       help='an image has any number of labels: the target is a list of class indices')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N')
    group.add_argument('--pin-mem', action='store_true')
    group.add_argument('--cache-dataset', action='store_true',
                       help='decode all images once into memory; crop, flip and normalise whole batches on the device')
    group.add_argument('--num-classes', type=int, metavar='N')
    group.add_argument('--in-chans', type=int, metavar='N')
    group.add_argument('--input-size', nargs=3, type=int, metavar='N', help='channels, height, width')
    group.add_argument('--mean', type=float, nargs='+')
    group.add_argument('--std', type=float, nargs='+')
    group.add_argument('--interpolation', default='')
    group.add_argument('--crop-pct', type=float)


def build_parser() -> argparse.ArgumentParser:
    """Parser of train.py."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description='Train any model that timm and timm_lossattn register; patch models get the loss-attention loss.')
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with values for the flags below')

    parser.add_argument('--recipe', metavar='NAME[/DATASET]',
                        help='values from recipes.yaml: sgd, adam, fast, smoke; sgd/cifar100')
    add_data_flags(parser)
    group = parser.add_argument_group('training set')
    group.add_argument('--train-split', default='train', metavar='NAME')
    group.add_argument('--train-num-samples', type=int, metavar='N', help='images in --train-split (streams only)')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='resnet18_lossattn_conv', metavar='NAME')
    group.add_argument('--pretrained', action='store_true', help='start from the pretrained weights')
    group.add_argument('--pretrained-backbone', metavar='MODEL',
                       help='start the backbone from the weights of this timm model where names and shapes fit')
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in this file')
    group.add_argument('--resume', default='', metavar='FILE',
                       help='continue the run that wrote this checkpoint; "auto": the newest good one of --experiment')
    group.add_argument('--drop', type=float, default=0., metavar='P', help='dropout on the patch features')
    group.add_argument('--drop-path', type=float, metavar='P')
    group.add_argument('--grad-checkpointing', action='store_true')
    group.add_argument('--channels-last', action='store_true')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND')
    group.add_argument('--backbone-stride', type=int, choices=(1, 2, 4, 8), metavar='S', help='1, 2, 4 or 8')
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
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N', help='batches in an update')
    group.add_argument('--lr', type=float, help='default: --lr-base × global batch size / 256 (adaptive: its root)')
    group.add_argument('--lr-base', type=float, default=0.1)
    group.add_argument('--sched', default='cosine', metavar='NAME',
                       help="a scheduler of timm, or 'gaussian': the paper's ramp-up over --warmup-epochs, then steps")
    group.add_argument('--beta2-after-warmup', type=float, metavar='B', help='β₂ of Adam after --warmup-epochs')
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
    group.add_argument('--crop-padding', type=int, metavar='N',
                       help="the paper's augmentation: random crop after zero padding by N pixels, and --hflip")
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'))
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], help='area range of random crops')
    group.add_argument('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], help='aspect range of random crops')
    group.add_argument('--hflip', type=float, default=0.5)
    group.add_argument('--color-jitter', type=float,
                       help='default: 0.4 as in timm; 0 with --cache-dataset or --crop-padding')
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
    group.add_argument('--sync-bn', action='store_true', help='batch statistics over all processes')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''),
                       help='running statistics of the processes after an epoch: mean, those of rank 0, or their own')
    group.add_argument('--seed', type=int, default=42)
    group.add_argument('--eval-metric', metavar='NAME', help='chooses the best checkpoint (default: top1 or map)')
    group.add_argument('--checkpoint-hist', type=int, default=2, metavar='N', help='checkpoints to keep')
    for name in ('tensorboard', 'trackio', 'wandb'):
        group.add_argument(f'--log-{name}', action='store_true')
    group.add_argument('--output', default='output/train', metavar='DIR')
    group.add_argument('--experiment', default='', metavar='NAME', help='folder in --output (default: time and model)')
    return parser


def recipe_values(recipe: str, model: str | None) -> dict[str, Any]:
    """Values of NAME[/DATASET] for a model, from recipes.yaml.

    Raises:
        ValueError: no such recipe or dataset.
    """
    known = yaml.safe_load(RECIPES.read_text())
    name, _, dataset = recipe.partition('/')
    if name not in known['recipes']:
        raise ValueError(f'no recipe {name!r}; there are {", ".join(known["recipes"])}')
    if dataset and dataset not in known['datasets']:
        raise ValueError(f'no dataset {dataset!r}; there are {", ".join(known["datasets"])}')
    entry = known['recipes'][name]
    dataset = dataset or entry.get('default_dataset', '')
    values = dict(entry['flags'], **(known['datasets'][dataset] if dataset else {}))
    model = model or values.get('model')
    for pattern, changes in entry.get('models', {}).items():
        if model and fnmatch(model, pattern):
            values |= changes
    return values | entry.get('datasets', {}).get(dataset, {})


def config_values(parser: argparse.ArgumentParser, config: str) -> dict[str, Any]:
    """Values of a --config file."""
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
    return values


def scale_schedule(args: argparse.Namespace, recipe: dict[str, Any]) -> None:
    """A run of another length goes through the recipe's schedule at another pace, unless it was given its own."""
    pace = args.epochs / recipe['epochs']
    first = 1 if args.sched == 'multistep' else 0  # timm's multistep decays one epoch before the milestone
    if pace != 1 and args.decay_milestones == recipe.get('decay_milestones'):
        args.decay_milestones = [round((milestone - first) * pace) + first for milestone in args.decay_milestones]
    if pace != 1 and args.warmup_epochs == recipe.get('warmup_epochs'):
        args.warmup_epochs *= pace


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of train.py: those on the command line win over --config, that over --recipe, that over the defaults.

    Exits with status 2 and one line for unknown flags, unknown keys in the config file, and values out of range.
    """
    parser = build_parser()
    given = parser.parse_known_args(argv)[0]
    if given.config:
        parser.set_defaults(**config_values(parser, given.config))
        given = parser.parse_known_args(argv)[0]
    if given.recipe:
        explicit_model = given.model if given.model != build_parser().get_default('model') else None
        try:
            values = recipe_values(given.recipe, explicit_model)
        except ValueError as error:
            parser.error(f'--recipe: {error}')
        parser.set_defaults(**values | (config_values(parser, given.config) if given.config else {}))
    args = parser.parse_args(argv)
    if args.recipe:
        scale_schedule(args, values)
    if args.pretrained_backbone and (args.pretrained or args.initial_checkpoint):
        parser.error('--pretrained-backbone: goes with neither --pretrained nor --initial-checkpoint')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f'--batch-size must be even for --mixup and --cutmix, got {args.batch_size}')
    if args.resume == 'auto' and not args.experiment:
        parser.error('--resume auto: needs the --experiment to continue')
    if args.sched == 'plateau' and args.sched_on_updates:
        parser.error('--sched plateau: goes by epochs, not with --sched-on-updates')
    if (args.device or '').startswith('cuda') and not torch.cuda.is_available():
        parser.error(f'--device {args.device}: this PyTorch sees no CUDA device')
    for name in ('tensorboard', 'trackio', 'wandb'):
        if getattr(args, f'log_{name}') and importlib.util.find_spec(name) is None:
            parser.error(f'--log-{name}: not installed; pip install {name}')
    if args.multi_label and (args.mixup or args.cutmix):
        parser.error('--multi-label: goes with neither --mixup nor --cutmix')
    whole_batches, padded = args.cache_dataset, args.crop_padding is not None
    if args.color_jitter is None:
        args.color_jitter = 0. if whole_batches or padded else 0.4
    for flag, active in (('--cache-dataset', whole_batches), ('--crop-padding', padded)):
        if active and (args.aa or args.train_crop_mode or args.color_jitter):
            parser.error(f'{flag}: goes with none of --aa, --train-crop-mode, --color-jitter')
    if padded and args.train_img_sizes and not whole_batches:
        parser.error('--crop-padding: goes with --train-img-sizes only if --cache-dataset is there too')
    if args.rampup_epochs is None:
        args.rampup_epochs = 0.4 * args.epochs
    for name, low, high in (
            ('gamma_max', 0, float('inf')), ('rampup_epochs', 0, float('inf')), ('xi', 0, 1), ('smoothing', 0, 0.999),
            ('batch_size', 1, float('inf')), ('epochs', 1, float('inf')), ('lr', 0, float('inf')),
            ('grad_accum_steps', 1, float('inf')), ('checkpoint_hist', 1, float('inf')),
            ('crop_padding', 0, float('inf')), ('hflip', 0, 1), ('reprob', 0, 1), ('workers', 0, float('inf'))):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f'--{name.replace("_", "-")} must lie in [{low}, {high}], got {value}')
    return args
