"""Datasets and loaders: timm's, the paper's augmentation, and a cache on the device for small sets."""
import logging
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.data import (
    FastCollateMixup,
    Mixup,
    MultiLabelTarget,
    create_dataset,
    create_loader,
    create_transform,
    resolve_input_data_config,
)
from torch import nn
from torch.utils.data import IterableDataset
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import v2

from timm_lossattn.explanation.labels import class_names
from timm_lossattn.hub_access import hub_or_cache

from .augment import BatchAugment
from .cached_loader import CachedLoader, cache_images
from .extras import need
from .options import AugmentOptions, DataOptions, TrainOptions
from .process import Process

__all__ = [
    'create_eval_loader', 'create_train_loader', 'input_config', 'open_dataset', 'same_folder', 'warn_of_few_steps']

FEW_STEPS = 8
# of torch/NAME: timm takes whatever is no name of training images for the test images
TORCH_NAMES = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist', 'qmnist')
TORCH_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')
_logger = logging.getLogger('train')


class CheckedTarget:
    """Target transform that refuses a class index outside [0, num_classes), the classes of the model."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, target: int) -> int:
        """The target itself; ValueError if it is no class."""
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(f'--dataset: label {target} outside [0, {self.num_classes}), the classes of the model')
        return int(target)


def open_dataset(
        data: DataOptions, split: str, num_classes: int, is_training: bool = False, num_samples: int | None = None,
        seed: int = 42, **kwargs: Any) -> Any:
    """A timm dataset, or torchvision's SVHN (torch/svhn), whose targets are checked against the number of classes.

    Args:
        data: which, and how it is read.
        split: name of the split.
        num_classes: K of the model.
        is_training: timm's streams shuffle and repeat.
        num_samples: images in the split, for streams.
        seed: of the shuffling of streams.
        kwargs: for timm's create_dataset.

    Raises:
        ValueError: no such folder or split, another number of classes than the model's, or channels that no image has.
    """
    kind, _, name = data.dataset.lower().rpartition('/')
    if kind in ('', 'torch') and '[' in split:
        raise ValueError(f'--dataset {data.dataset!r}: has no parts of splits, got {split!r}; those of hfds/ have')
    if kind == 'torch' and name in TORCH_NAMES and split not in TORCH_SPLITS:
        raise ValueError(f'--dataset {data.dataset}: has no split {split!r}, but {", ".join(TORCH_SPLITS)}')
    from_hub = data.dataset.startswith(('hfds/', 'hfids/')) and not Path(data.dataset.partition('/')[2]).exists()
    if data.data_dir and not Path(data.data_dir).exists() and not data.dataset_download:
        raise ValueError(f'--data-dir: no such folder: {data.data_dir}')
    if '/' not in data.dataset and not data.data_dir:
        raise ValueError(f'--data-dir: is needed with --dataset {data.dataset!r}; or give --dataset <type>/<name>')
    if data.dataset.startswith(('hfds/', 'hfids/')):
        need('train', 'datasets')
    target_transform = MultiLabelTarget(num_classes) if data.multi_label else CheckedTarget(num_classes)
    if data.channels not in (1, 3):
        raise ValueError(f'--in-chans: images are read in grey, 1, or colours, 3, got {data.channels}')
    keys: dict[str, Any] = {
        key: value for key, value in (('input_key', data.input_key), ('target_key', data.target_key)) if value}
    try:
        if data.dataset.lower() == 'torch/svhn':
            return torchvision_datasets.SVHN(
                data.data_dir or '.', split=split, download=data.dataset_download, target_transform=target_transform)
        with hub_or_cache() if from_hub else nullcontext():
            dataset: Any = create_dataset(
                data.dataset, root=data.data_dir, split=split, is_training=is_training, download=data.dataset_download,
                batch_size=data.batch_size, seed=seed, num_samples=num_samples,
                input_img_mode='RGB' if data.channels == 3 else 'L', **keys, **kwargs)
    except (RuntimeError, AssertionError, TypeError, KeyError) as error:  # no image, unknown name, unknown length, ...
        raise ValueError(
            f'--dataset {data.dataset!r}, split {split!r}: {error or type(error).__name__} (streams of unknown length '
            'need --train-num-samples and --val-num-samples)') from error
    except OSError as error:  # ConnectionError of the Hub's client, a repository that is not there, a broken copy
        hint = ('; where the Hub is out of reach, --dataset hfds/FOLDER takes a copy on disk, a folder of parquet '
                "files in the Hub's layout") if from_hub else ''
        raise ValueError(f'--dataset {data.dataset!r}: {error}{hint}') from error
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ValueError(f'--dataset: no image in split {split!r}')
    classes = class_names(dataset)
    if classes and len(classes) != num_classes:
        raise ValueError(f'--num-classes: the dataset has {len(classes)} classes, the model {num_classes}.')
    dataset.target_transform = target_transform
    # private, but timm reads the environment before we could set it: an unreadable image is an error, no reason to
    # train on its neighbour twice
    dataset._max_retries = int(os.environ.get('TIMM_DATASET_MAX_RETRIES', 1))
    return dataset


def same_folder(train_set: Any, eval_set: Any, options: TrainOptions) -> bool:
    """Whether two splits of a folder are all of it, since it has no sub-folders of their names."""
    name = options.dataset.lower()
    folders = '/' not in name or name in ('torch/image_folder', 'torch/folder')  # where timm looks for sub-folders
    if options.train_split == options.val_split or not folders:
        return False
    roots = [getattr(getattr(one, 'reader', one), 'root', None) for one in (train_set, eval_set)]
    return roots[0] is not None and roots[0] == roots[1]


def input_config(data: DataOptions, model: nn.Module) -> dict[str, Any]:
    """timm's data config of the model as it was made, with what the flags change.

    For another number of channels than mean and std have, their averages, as timm's loader does.

    Raises:
        ValueError: the flags want another size than the only one that the model takes.
    """
    given, channels = asdict(data), getattr(model, 'in_chans', data.channels)
    given['in_chans'] = channels  # wins over that of --input-size, which a recipe may have
    if data.input_size:
        given['input_size'] = [channels, *data.input_size[1:]]
    for key in ('mean', 'std'):
        if given[key] and len(given[key]) not in (1, channels):
            given[key] = [sum(given[key]) / len(given[key])]
    return resolve_input_data_config(model, given)


def eval_steps(config: dict[str, Any], **changes: Any) -> v2.Compose:
    """timm's evaluation transform as far as uint8 tensors (C, H, W)."""
    return create_transform(
        config['input_size'], use_prefetcher=True, **{key: changes.get(key, config[key]) for key in (
            'interpolation', 'mean', 'crop_pct', 'crop_mode')})


def fit(config: dict[str, Any]) -> v2.Compose:
    """As timm evaluates, without cutting anything off an image of the right size, which stays as it is."""
    return eval_steps(config, crop_pct=1.)


def padded_crop(options: AugmentOptions, config: dict[str, Any]) -> v2.Compose:
    """The paper's augmentation for one image: zero padding, random crop, horizontal flip; to a uint8 tensor."""
    *resize, to_tensor = fit(config).transforms
    return v2.Compose([
        *resize, v2.RandomCrop(tuple(config['input_size'][1:]), padding=options.crop_padding),
        v2.RandomHorizontalFlip(options.hflip), to_tensor,
    ])


def create_train_loader(
        options: TrainOptions, process: Process, dataset: Any, config: dict[str, Any], num_classes: int) -> Any:
    """Loader of augmented training batches: timm's, or with ``--cache-dataset`` one that works on whole batches.

    Raises:
        ValueError: fewer images than a batch, or blank cells without the augmentation that makes them.
    """
    if not isinstance(dataset, IterableDataset) and len(dataset) < options.batch_size * process.world_size:
        raise ValueError(f'--batch-size: {options.batch_size} is more than the {len(dataset)} training images'
                         + (f' / {process.world_size} processes.' if process.distributed else '.'))
    if options.blank_cells and (options.no_aug or not options.cache_dataset):
        raise ValueError('--blank-cells: needs --cache-dataset' + (', without --no-aug' if options.no_aug else ''))
    mixing: dict[str, Any] = dict(
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, label_smoothing=options.smoothing,
        num_classes=num_classes)
    schedule_epochs = options.epochs if options.train_size_schedule == 'progressive' else None
    if options.cache_dataset:
        images, targets = cache_images(dataset, fit(config), options.workers, process.device, 'train')
        augment = BatchAugment(
            config['input_size'][1:], config['mean'], config['std'], images.device, not options.no_aug,
            options.crop_padding, options.scale, options.ratio, options.hflip, options.reprob,
            options.blank_cells)
        return CachedLoader(
            images, targets, options.batch_size, augment, seed=options.seed, rank=process.rank,
            world_size=process.world_size, sizes=options.train_img_sizes, progressive_epochs=schedule_epochs,
            spread=options.train_size_schedule_spread, random_mix=options.train_size_random_mix,
            mixup=Mixup(**mixing) if options.mixed else None)
    loader: Any = create_loader(
        dataset, batch_size=options.batch_size, is_training=True, no_aug=options.no_aug, re_prob=options.reprob,
        re_mode='const', train_crop_mode=options.train_crop_mode, hflip=options.hflip,
        scale=tuple(options.scale), ratio=tuple(options.ratio),  # type: ignore[arg-type]  # two each
        color_jitter=options.color_jitter or 0., auto_augment=options.aa,
        collate_fn=FastCollateMixup(**mixing) if options.mixed else None,
        persistent_workers=False,  # or a resumed epoch would draw other augmentations
        input_size_choices=options.train_img_sizes, batch_choice_seed=options.seed,
        batch_choice_schedule=options.train_size_schedule, batch_schedule_epochs=schedule_epochs,
        batch_schedule_spread=options.train_size_schedule_spread,
        batch_schedule_random_mix=options.train_size_random_mix,
        **common(options, process, config))
    if options.crop_padding is not None and not options.no_aug:
        dataset.transform = padded_crop(options, config)
    # torch's DistributedSampler, which timm creates without a seed; with --train-img-sizes in the batches' sampler
    sampler: Any = getattr(loader.batch_sampler, 'sampler', loader.sampler)
    if hasattr(sampler, 'seed'):
        sampler.seed = options.seed
    return loader


def warn_of_few_steps(options: TrainOptions, process: Process, dataset: Any, loader: Any) -> None:
    """Say it where an epoch has a handful of steps: with a batch size for large data sets, few images teach little.

    timm's training loaders leave out what does not fill a batch.
    """
    if isinstance(dataset, IterableDataset) or len(loader) >= FEW_STEPS:
        return
    images, seen = len(dataset), len(loader) * options.batch_size * process.world_size
    left_out = f'; {images - seen} images are left out of each, others every time' if seen < images else ''
    steps = f'{len(loader)} step' + ('s' if len(loader) != 1 else '')
    smaller = max(1, images // process.world_size // FEW_STEPS)
    _logger.warning(f'--batch-size {options.batch_size}: {images} training images are {steps} an epoch'
                    f'{left_out}. --batch-size {smaller} would make {images // process.world_size // smaller}.')


def create_eval_loader(
        data: DataOptions, process: Process, dataset: Any, config: dict[str, Any],
        batch_size: int | None = None) -> Any:
    """Loader of evaluation batches in the dataset's order, with timm's evaluation transform to the last bit."""
    batch_size = batch_size or data.batch_size
    if data.cache_dataset:
        images, targets = cache_images(dataset, eval_steps(config), data.workers, process.device, 'evaluation')
        augment = BatchAugment(
            config['input_size'][1:], config['mean'], config['std'], images.device, enabled=False)
        return CachedLoader(
            images, targets, batch_size, augment, rank=process.rank, world_size=process.world_size, is_training=False)
    return create_loader(  # timm's prefetcher rounds otherwise when it normalises
        dataset, batch_size=batch_size, is_training=False, use_prefetcher=False, crop_pct=config['crop_pct'],
        **common(data, process, config))


def common(data: DataOptions, process: Process, config: dict[str, Any]) -> dict[str, Any]:
    """What timm's loaders of training and evaluation get alike."""
    return dict(
        input_size=config['input_size'], mean=config['mean'], std=config['std'], crop_mode=config['crop_mode'],
        interpolation=config['interpolation'], num_workers=data.workers, pin_memory=data.pin_mem,
        device=process.device, distributed=process.distributed)
