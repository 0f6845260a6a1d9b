"""Datasets and loaders: timm's, the paper's augmentation, and a cache on the device for small sets."""
import os
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup, MultiLabelTarget, create_dataset, create_loader, create_transform
from torch.utils.data import IterableDataset
from torchvision import datasets as torchvision_datasets
from torchvision.transforms import v2

from cached_loader import BatchAugment, CachedLoader, cache_images


class CheckedTarget:
    """Target transform that refuses a class index outside [0, num_classes).

    Args:
        num_classes: K of the model.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, target: int) -> int:
        """The target itself.

        Raises:
            ValueError: it is no class of the model.
        """
        if not 0 <= int(target) < self.num_classes:
            raise ValueError(f'--dataset: label {target} outside [0, {self.num_classes}), the classes of the model')
        return int(target)


def one_line(error: Exception) -> str:
    """What a user's mistake says; of an error in a loader's worker, the last line of its traceback.

    Raises:
        RuntimeError: the error itself, if it is one that a user cannot have caused.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, RuntimeError):
        if 'consecutive samples' not in str(error):  # timm's words for an unreadable image
            raise error
        return ('--dataset: unreadable image (named in the warning above; set TIMM_DATASET_MAX_RETRIES to skip such '
                'images)')
    text = lines[-1].partition(': ')[2] or lines[-1] if 'DataLoader worker' in lines[0] else ' '.join(lines)
    return ' '.join(text.split())


def open_dataset(args, split: str, num_classes: int, is_training: bool = False, num_samples: int | None = None,
                 **kwargs: Any):
    """A timm dataset, or torchvision's SVHN (torch/svhn), whose targets are checked against the number of classes.

    Args:
        args: the flags.
        split: name of the split.
        num_classes: K of the model.
        is_training: timm's streams shuffle and repeat.
        num_samples: images in the split, for streams.
        kwargs: for timm's create_dataset.

    Raises:
        ValueError: no such folder, or another number of classes than the model's.
    """
    if args.data_dir and not Path(args.data_dir).exists() and not args.dataset_download:
        raise ValueError(f'--data-dir: no such folder: {args.data_dir}')
    if '/' not in args.dataset and not args.data_dir:
        raise ValueError(f'--data-dir: is needed with --dataset {args.dataset!r}; or give --dataset <type>/<name>')
    target_transform = MultiLabelTarget(num_classes) if args.multi_label else CheckedTarget(num_classes)
    if args.dataset.lower() == 'torch/svhn':
        return torchvision_datasets.SVHN(
            args.data_dir, split=split, download=args.dataset_download, target_transform=target_transform)
    keys = {name: value for name, value in (('input_key', args.input_key), ('target_key', args.target_key)) if value}
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    try:
        dataset = create_dataset(
            args.dataset, root=args.data_dir, split=split, is_training=is_training, download=args.dataset_download,
            batch_size=args.batch_size, seed=getattr(args, 'seed', 42), num_samples=num_samples,
            input_img_mode='RGB' if channels == 3 else 'L', **keys, **kwargs)
    except (RuntimeError, AssertionError, TypeError, KeyError) as error:  # no image, unknown name, unknown length, ...
        raise ValueError(
            f'--dataset {args.dataset!r}, split {split!r}: {error or type(error).__name__} (streams of unknown length '
            'need --train-num-samples and --val-num-samples)') from error
    if not isinstance(dataset, IterableDataset) and not len(dataset):
        raise ValueError(f'--dataset: no image in split {split!r}')
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if classes and len(classes) != num_classes:
        raise ValueError(f'--num-classes: the dataset has {len(classes)} classes, the model {num_classes}.')
    dataset.target_transform = target_transform
    # private, but timm reads the environment before we could set it: an unreadable image is an error, no reason to
    # train on its neighbour twice
    dataset._max_retries = int(os.environ.get('TIMM_DATASET_MAX_RETRIES', 1))
    return dataset


def label_names(dataset) -> list[str] | None:
    """Class names in the order of their indices, where the dataset knows them."""
    classes = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    return sorted(classes, key=classes.get) if classes else None


def fit(data_config: dict[str, Any]) -> v2.Compose:
    """Resize the shorter side and crop the middle, as timm evaluates; leaves images of the right size as they are."""
    size = tuple(data_config['input_size'][1:])
    mode = v2.InterpolationMode(data_config['interpolation'])
    return v2.Compose([v2.Resize(size[0] if size[0] == size[1] else size, mode), v2.CenterCrop(size)])


def padded_crop(args, data_config: dict[str, Any]) -> v2.Compose:
    """The paper's augmentation for one image: zero padding, random crop, horizontal flip; to a uint8 tensor."""
    size = tuple(data_config['input_size'][1:])
    return v2.Compose([
        fit(data_config), v2.RandomCrop(size, padding=args.crop_padding), v2.RandomHorizontalFlip(args.hflip),
        v2.PILToTensor(),
    ])


def create_train_loader(args, dataset, data_config: dict[str, Any], num_classes: int):
    """Loader of augmented training batches: timm's, or with ``--cache-dataset`` one that works on whole batches.

    Raises:
        ValueError: fewer images than a batch.
    """
    if not isinstance(dataset, IterableDataset) and len(dataset) < args.batch_size * args.world_size:
        raise ValueError(f'--batch-size: {args.batch_size} is more than the {len(dataset)} training images'
                         + (f' / {args.world_size} processes.' if args.world_size > 1 else '.'))
    size = data_config['input_size'][1:]
    mixing = dict(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
    mixed = args.mixup > 0 or args.cutmix > 0
    if args.cache_dataset:
        images, targets = cache_images(dataset, v2.Compose([fit(data_config), v2.PILToTensor()]), args, 'train')
        augment = BatchAugment(
            size, data_config['mean'], data_config['std'], crop_padding=args.crop_padding, scale=args.scale,
            ratio=args.ratio, hflip=args.hflip, reprob=args.reprob, device=images.device, enabled=not args.no_aug)
        return CachedLoader(
            images, targets, args.batch_size, augment, seed=args.seed, rank=args.rank, world_size=args.world_size,
            sizes=args.train_img_sizes, progressive_epochs=args.epochs
            if args.train_size_schedule == 'progressive' else None, mixup=Mixup(**mixing) if mixed else None)
    loader = create_loader(
        dataset, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug, re_prob=args.reprob,
        re_mode='const', train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        color_jitter=args.color_jitter, auto_augment=args.aa,
        collate_fn=FastCollateMixup(**mixing) if mixed else None,
        distributed=args.distributed, persistent_workers=False,  # or a resumed epoch would draw other augmentations
        input_size_choices=args.train_img_sizes, batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        **_common(args, data_config))
    if args.crop_padding is not None and not args.no_aug:
        dataset.transform = padded_crop(args, data_config)
    if hasattr(loader.sampler, 'seed'):  # torch's DistributedSampler, which timm creates without one
        loader.sampler.seed = args.seed
    return loader


def create_eval_loader(args, dataset, data_config: dict[str, Any]):
    """Loader of evaluation batches in the dataset's order."""
    batch_size = args.validation_batch_size or args.batch_size
    if args.cache_dataset:
        transform = create_transform(
            data_config['input_size'], use_prefetcher=True, interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'])
        images, targets = cache_images(dataset, transform, args, 'evaluation')
        augment = BatchAugment(
            data_config['input_size'][1:], data_config['mean'], data_config['std'], device=images.device, enabled=False)
        return CachedLoader(
            images, targets, batch_size, augment, rank=args.rank, world_size=args.world_size, is_training=False)
    return create_loader(
        dataset, batch_size=batch_size, is_training=False, crop_pct=data_config['crop_pct'],
        distributed=args.distributed, **_common(args, data_config))


def channel_statistics(data_config: dict[str, Any]) -> list[tuple[float, ...]]:
    """Mean and std of each channel; for another number of channels their averages, as timm's loader does."""
    channels = data_config['input_size'][0]
    return [tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
            for values in (data_config['mean'], data_config['std'])]


def _common(args, data_config: dict[str, Any]) -> dict[str, Any]:
    return dict(
        input_size=data_config['input_size'], mean=data_config['mean'], std=data_config['std'],
        interpolation=data_config['interpolation'], num_workers=args.workers, pin_memory=args.pin_mem,
        device=torch.device(args.device))
