"""The command line of train.py: flags win over --config, that over --recipe, that over the defaults."""
import argparse
import importlib.util
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_lossattn.text import one_line

from .flags import add_flags, options_from
from .options import TrainOptions
from .process import default_device

__all__ = ['RECIPES', 'parse_args']

RECIPES = Path(__file__).parents[1] / 'recipes.yaml'
INFINITY = float('inf')
RANGES: dict[str, tuple[float, float]] = {
    'gamma_max': (0, INFINITY), 'rampup_epochs': (0, INFINITY), 'xi': (0, 1), 'smoothing': (0, 0.999),
    'batch_size': (1, INFINITY), 'epochs': (1, INFINITY), 'lr': (0, INFINITY), 'grad_accum_steps': (1, INFINITY),
    'checkpoint_hist': (1, INFINITY), 'checkpoint_minutes': (0, INFINITY), 'crop_padding': (0, INFINITY),
    'hflip': (0, 1), 'layer_decay': (0, 1), 'reprob': (0, 1), 'train_size_schedule_spread': (0, INFINITY),
    'train_size_random_mix': (0, 1), 'workers': (0, INFINITY), 'blank_cells': (0, 1),
}


def build_parser(defaults: bool = True) -> argparse.ArgumentParser:
    """Parser of train.py; without defaults, of what is given."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description='Train any model that timm and timm_lossattn register; patch models get the loss-attention loss.')
    add_flags(parser, TrainOptions, defaults)
    return parser


def recipe_names() -> list[str]:
    """Of recipes.yaml."""
    return list(yaml.safe_load(RECIPES.read_text('utf-8'))['recipes'])


def recipe_values(recipe: str, model: str | None) -> dict[str, Any]:
    """Values of NAME[/DATASET] for a model, from recipes.yaml.

    Raises:
        ValueError: no such recipe or dataset.
    """
    known = yaml.safe_load(RECIPES.read_text('utf-8'))
    name, _, dataset = recipe.partition('/')
    if name not in known['recipes']:
        raise ValueError(f'no recipe {name!r}; there are {", ".join(known["recipes"])}')
    if dataset and dataset not in known['datasets']:
        raise ValueError(f'no dataset {dataset!r}; there are {", ".join(known["datasets"])}')
    entry = known['recipes'][name]
    dataset = dataset or entry.get('default_dataset', '')
    values = dict(entry['flags'], **(known['datasets'][dataset] if dataset else {}))
    model = model or values.get('model', TrainOptions.model)
    for pattern, changes in entry.get('models', {}).items():
        if fnmatch(model, pattern):
            values |= changes
    return values | entry.get('datasets', {}).get(dataset, {})


def config_values(parser: argparse.ArgumentParser, config: str) -> dict[str, Any]:
    """Values of a --config file."""
    try:
        values = yaml.safe_load(Path(config).read_text('utf-8')) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f'--config {config}: {one_line(error)}')
    if not isinstance(values, dict):
        parser.error(f'--config {config}: must hold flags and values')
    values = {key.replace('-', '_'): value for key, value in values.items()}
    known = {one.name: one.metadata for one in fields(TrainOptions)}
    unknown = set(values) - set(known)
    if unknown:
        parser.error(f'--config {config}: unknown keys {sorted(unknown)}')
    for name, value in values.items():  # argparse looks at what is typed only
        choices = known[name].get('choices')
        if choices and value is not None and value not in choices:
            parser.error(f'--config {config}: {name} must be one of {", ".join(map(str, choices))}, got {value!r}')
    return values


def scale_schedule(args: argparse.Namespace, recipe: dict[str, Any], given: set[str]) -> None:
    """A run of another length goes through the recipe's schedule at another pace, unless it was given its own."""
    pace = args.epochs / recipe['epochs']
    first = 1 if args.sched == 'multistep' else 0  # timm's multistep decays one epoch before the milestone
    if 'decay_milestones' in recipe and 'decay_milestones' not in given:
        args.decay_milestones = [round((milestone - first) * pace) + first for milestone in args.decay_milestones]
    if 'warmup_epochs' in recipe and 'warmup_epochs' not in given:
        args.warmup_epochs *= pace


def parse_args(argv: list[str] | None = None) -> TrainOptions:
    """The options of train.py.

    Exits with status 2 and one line for unknown flags, unknown keys in the config file, and values out of range.
    """
    parser = build_parser()
    typed = vars(build_parser(defaults=False).parse_known_args(argv)[0])
    given = (config_values(parser, typed['config']) if typed.get('config') else {}) | typed
    recipe: dict[str, Any] = {}
    if given.get('recipe'):
        try:
            recipe = recipe_values(given['recipe'], given.get('model'))
        except ValueError as error:
            parser.error(f'--recipe: {error}')
    parser.set_defaults(**recipe | given)
    args = parser.parse_args(argv)
    for name in ('opt_kwargs', 'model_kwargs'):  # key by key: what is not given stays as the recipe has it
        setattr(args, name, recipe.get(name, {}) | (getattr(args, name) or {}))
    if recipe:
        scale_schedule(args, recipe, set(given))
    whole_batches, padded = args.cache_dataset, args.crop_padding is not None
    if args.color_jitter is None:
        args.color_jitter = 0. if whole_batches or padded else 0.4
    if args.rampup_epochs is None:
        args.rampup_epochs = 0.4 * args.epochs
    check(parser, args, set(typed))
    if args.multi_label:
        args.smoothing = 0.  # of a recipe; the loss has none
    args.device = args.device or default_device()
    return options_from(TrainOptions, args)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, typed: set[str]) -> None:
    """Exit where flags do not go together, or a value is out of range.

    What does nothing is refused if it was typed: the args.yaml of a run, as --config, has a value for every flag.
    """
    if args.pretrained_backbone and (args.pretrained or args.initial_checkpoint):
        parser.error('--pretrained-backbone: goes with neither --pretrained nor --initial-checkpoint')
    if args.grow_from and (args.pretrained or args.initial_checkpoint or args.pretrained_backbone):
        parser.error('--grow-from: goes with none of --pretrained, --initial-checkpoint, --pretrained-backbone')
    if args.pretrained_path and not args.pretrained:
        parser.error('--pretrained-path: is the file of --pretrained, which is not given')
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
    if args.winograd and (args.amp or args.torchcompile or (args.device or default_device()) != 'cpu'):
        parser.error('--winograd: is for float32 on the CPU, without --amp (--no-amp, if a recipe has it) and '
                     '--torchcompile')
    if args.gathered and (args.torchcompile or (args.device or default_device()) != 'cpu'):
        parser.error('--gathered: is for the CPU, without --torchcompile')
    if args.multi_label and (args.mixup or args.cutmix or ('smoothing' in typed and args.smoothing)):
        parser.error('--multi-label: goes with none of --mixup, --cutmix, --smoothing')
    if args.layer_decay is not None and args.sched == 'none':  # which is what sets each layer's learning rate
        parser.error('--layer-decay: needs a schedule; --sched constant keeps the learning rate')
    padded = args.crop_padding is not None
    for flag, active in (('--cache-dataset', args.cache_dataset), ('--crop-padding', padded)):
        if active and (args.aa or args.train_crop_mode or args.color_jitter):
            parser.error(f'{flag}: goes with none of --aa, --train-crop-mode, --color-jitter')
    if padded and typed & {'scale', 'ratio'}:
        parser.error('--crop-padding: is in place of --scale and --ratio; `crop_padding: null` in a --config file '
                     "switches off a recipe's")
    scheduled = sorted(typed & {'train_size_schedule', 'train_size_schedule_spread', 'train_size_random_mix'})
    for name in scheduled:
        if not args.train_img_sizes:
            parser.error(f'--{name.replace("_", "-")}: needs --train-img-sizes')
        if name != 'train_size_schedule' and args.train_size_schedule != 'progressive':
            parser.error(f'--{name.replace("_", "-")}: is of --train-size-schedule progressive')
    if padded and args.train_img_sizes and not args.cache_dataset:
        parser.error('--crop-padding: goes with --train-img-sizes only if --cache-dataset is there too')
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f'--{name.replace("_", "-")} must lie in [{low}, {high}], got {value}')
