"""The options of train.py and of the scripts that evaluate: timm's names and meanings where timm has the flag."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import ParseKwargs

from .flags import flag

__all__ = [
    'AugmentOptions', 'DataOptions', 'EvalOptions', 'LossOptions', 'ModelOptions', 'OptimizerOptions', 'RunOptions',
    'TrainOptions',
]


@dataclass(frozen=True)
class DataOptions:
    """Dataset: where the images are and how they are read."""
    dataset: str = flag('', '"<type>/<name>" as in timm: hfds/uoft-cs/cifar10, hfds/FOLDER, hfids/NAME, wds/NAME, '
                            'torch/cifar10 (default: image folder)', metavar='NAME')
    data_dir: str | None = flag(None, 'dataset root', metavar='DIR')
    val_split: str = flag('validation', metavar='NAME')
    val_num_samples: int | None = flag(None, 'images in --val-split (streams only)', metavar='N')
    dataset_download: bool = flag(False, 'allow torch/ datasets to download')
    input_key: str | None = flag(None, 'image column (hfds, hfids, wds)', metavar='NAME')
    target_key: str | None = flag(None, 'label column (hfds, hfids, wds)', metavar='NAME')
    multi_label: bool = flag(False, 'an image has any number of labels: the target is a list of class indices')
    workers: int = flag(4, short='-j', metavar='N')
    pin_mem: bool = flag(False)
    cache_dataset: bool = flag(
        False, 'decode all images once into memory; crop, flip and normalise whole batches on the device')
    batch_size: int = flag(128, short='-b', metavar='N')
    num_classes: int | None = flag(None, metavar='N')
    in_chans: int | None = flag(None, metavar='N')
    input_size: list[int] | None = flag(None, 'channels, height, width', nargs=3, metavar='N')
    mean: list[float] | None = flag(None)
    std: list[float] | None = flag(None)
    interpolation: str = flag('')
    crop_pct: float | None = flag(None)
    crop_mode: str | None = flag(None, 'how evaluation crops', choices=('center', 'squash', 'border'))

    @property
    def channels(self) -> int:
        """Of the images: what the flags say, or 3."""
        return self.in_chans or (self.input_size[0] if self.input_size else 3)


@dataclass(frozen=True)
class EvalOptions(DataOptions):
    """Weights: the model whose weights are measured or explained."""
    model: str | None = flag(
        None, 'registered name, local-dir:FOLDER or hf-hub:ID (default: what the checkpoint says)', metavar='NAME')
    checkpoint: str | None = flag(None, 'weights (default: the pretrained ones)', metavar='FILE')
    xi: float | None = flag(None, 'ξ of Eq. 5b, if not as trained', metavar='X')
    model_kwargs: dict[str, Any] = flag({}, nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
    winograd: bool = flag(False, 'faster 3×3 convolutions on the CPU in float32')

    @property
    def name(self) -> str | None:
        """For titles and records."""
        return self.model or self.checkpoint


@dataclass(frozen=True)
class ModelOptions:
    """Model."""
    model: str = flag('resnet18_lossattn_conv', metavar='NAME')
    pretrained: bool = flag(False, 'start from the pretrained weights')
    pretrained_path: str | None = flag(
        None, 'with --pretrained: its weights from this file; a classifier of another size begins anew', metavar='FILE')
    pretrained_backbone: str | None = flag(
        None, "start the backbone of this package's own models from the weights of this timm model where names and "
              'shapes fit; for lossattn.NAME, whose weights are its backbone\'s, see --pretrained', metavar='MODEL')
    grow_from: str | None = flag(
        None, 'start as this narrower model with its pretrained weights: further channels begin without influence',
        metavar='MODEL')
    freeze_backbone: bool = flag(
        False, 'train what stands behind the backbone: the classifier, of models of this package also patch layers and '
               'attention; the backbone stays as it is, batch statistics too')
    initial_checkpoint: str = flag('', 'start from the weights in this file', metavar='FILE')
    resume: str = flag('', 'continue the run that wrote this checkpoint; "auto": the newest good one of --experiment',
                       metavar='FILE')
    drop: float = flag(0., 'dropout on the patch features', metavar='P')
    drop_path: float | None = flag(None, metavar='P')
    grad_checkpointing: bool = flag(False)
    channels_last: bool = flag(False)
    winograd: bool = flag(False, 'faster 3×3 convolutions on the CPU in float32; best with --channels-last')
    gathered: bool = flag(False, 'faster 9×9 patch convolutions on the CPU in bfloat16; best with --channels-last')
    torchcompile: str | None = flag(None, nargs='?', const='inductor', metavar='BACKEND')
    backbone_stride: int | None = flag(None, '1, 2, 4 or 8', choices=(1, 2, 4, 8), metavar='S')
    patch_stride: int | None = flag(None, 'of the patch convolution: 4 (default) or 2', choices=(2, 4), metavar='S')
    patch_padding: int | None = flag(
        None, "zeros around the backbone's feature map, up to 4 (default: 0)", choices=(0, 1, 2, 3, 4), metavar='N')
    width_mult: float | None = flag(None, "multiplier of all widths, of this package's own models", metavar='X')
    model_kwargs: dict[str, Any] = flag({}, nargs='*', action=ParseKwargs, metavar='KEY=VALUE')


@dataclass(frozen=True)
class LossOptions:
    """Loss."""
    gamma_max: float = flag(0.1, 'weight of the patch term (Eq. 9)', metavar='G')
    rampup_epochs: float | None = flag(
        None, "length of γ's ramp (default: 80 of every 200 epochs, as in the paper)", metavar='N')
    xi: float | None = flag(None, 'ξ of Eq. 5b (default: 0.1)', metavar='X')
    patch_loss: bool | None = flag(
        None, 'train with the patch term (default: for lossattn models only, as in the paper)')
    smoothing: float = flag(0.1, 'label smoothing', metavar='P')


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule."""
    validation_batch_size: int | None = flag(None, short='-vb', metavar='N')
    opt: str = flag('sgd', metavar='NAME')
    opt_eps: float | None = flag(None)
    opt_betas: list[float] | None = flag(None)
    opt_kwargs: dict[str, Any] = flag({}, nargs='*', action=ParseKwargs, metavar='KEY=VALUE')
    momentum: float = flag(0.9)
    weight_decay: float = flag(2e-5)
    layer_decay: float | None = flag(
        None, 'learning rate of each layer, as a share of that of the layer after it', metavar='SHARE')
    clip_grad: float | None = flag(None, metavar='NORM')
    clip_mode: str = flag('norm', choices=('norm', 'value', 'agc'))
    grad_accum_steps: int = flag(1, 'batches in an update', metavar='N')
    lr: float | None = flag(None, 'default: --lr-base × global batch size / 256 (adaptive: its root)')
    lr_base: float = flag(0.1)
    sched: str = flag('cosine', "a scheduler of timm, or 'gaussian': the paper's ramp-up over --warmup-epochs, then "
                                'steps', metavar='NAME')
    beta2_after_warmup: float | None = flag(None, 'β₂ of Adam after --warmup-epochs', metavar='B')
    sched_on_updates: bool = flag(False)
    epochs: int = flag(300, metavar='N')
    warmup_epochs: float = flag(5, metavar='N')
    warmup_lr: float = flag(1e-5)
    min_lr: float = flag(0.)
    cooldown_epochs: int = flag(0, metavar='N')
    decay_milestones: list[int] = flag([90, 180, 270])
    decay_epochs: float = flag(90)
    decay_rate: float = flag(0.1)


@dataclass(frozen=True)
class AugmentOptions:
    """Augmentation."""
    train_split: str = flag('train', metavar='NAME')
    train_num_samples: int | None = flag(None, 'images in --train-split (streams only)', metavar='N')
    no_aug: bool = flag(False)
    crop_padding: int | None = flag(
        None, "the paper's augmentation: random crop after zero padding by N pixels, and --hflip", metavar='N')
    train_crop_mode: str | None = flag(None, choices=('rrc', 'rkrc', 'rkrr'))
    scale: list[float] = flag([0.08, 1.0], 'area range of random crops', nargs=2)
    ratio: list[float] = flag([3 / 4, 4 / 3], 'aspect range of random crops', nargs=2)
    hflip: float = flag(0.5)
    color_jitter: float | None = flag(
        None, 'default: 0.4 as in timm; 0 with --cache-dataset or --crop-padding')
    aa: str | None = flag(None, 'AutoAugment policy', metavar='NAME')
    reprob: float = flag(0., 'random erasing', metavar='P')
    blank_cells: float = flag(
        0., 'probability of each of 4 × 4 cells to be blank, with --cache-dataset; for the measure IDSDS', metavar='P')
    mixup: float = flag(0.)
    cutmix: float = flag(0.)
    train_img_sizes: list[int] | None = flag(None, 'scheduled-resolution training', metavar='N')
    train_size_schedule: str = flag('constant', choices=('constant', 'progressive'))
    train_size_schedule_spread: float = flag(0.65, 'of a progressive schedule, in steps from size to size; 0, with '
                                                   '--train-size-random-mix 0: one after the other')
    train_size_random_mix: float = flag(0.1, 'share of batches of a progressive schedule whose size is any of them')

    @property
    def mixed(self) -> bool:
        """Whether targets are probabilities."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class RunOptions:
    """Device and run."""
    device: str | None = flag(None, 'default: cuda if there is one, else cpu', metavar='DEVICE')
    amp: bool = flag(False)
    amp_dtype: str = flag('float16', choices=('float16', 'bfloat16'))
    model_ema: bool = flag(False)
    model_ema_decay: float = flag(0.9998)
    model_ema_warmup: bool = flag(False)
    sync_bn: bool = flag(False, 'batch statistics over all processes (GPUs)')
    dist_bn: str = flag('reduce', 'running statistics of the processes after an epoch: mean, those of rank 0, or their '
                                  'own', choices=('reduce', 'broadcast', ''))
    seed: int = flag(42)
    eval_metric: str | None = flag(None, 'chooses the best checkpoint (default: top1 or map)', metavar='NAME')
    checkpoint_hist: int = flag(2, 'checkpoints to keep', metavar='N')
    checkpoint_minutes: float | None = flag(
        None, 'also write last.pth.tar within an epoch, every so many minutes', metavar='N')
    log_tensorboard: bool = flag(False)
    log_trackio: bool = flag(False)
    log_wandb: bool = flag(False)
    output: str = flag('output/train', metavar='DIR')
    experiment: str = flag('', 'folder in --output (default: time and model)', metavar='NAME')

    @property
    def folder(self) -> Path:
        """Of the run, if --experiment names it."""
        return Path(self.output) / self.experiment


@dataclass(frozen=True)
class TrainOptions(RunOptions, AugmentOptions, OptimizerOptions, LossOptions, ModelOptions, DataOptions):
    """Recipe and file: where other values come from."""
    config: str | None = flag(None, 'YAML file with values for the flags below', short='-c', metavar='FILE')
    recipe: str | None = flag(
        None, 'values from recipes.yaml: sgd, adam, fast, cpu and more; fast/cifar100', metavar='NAME[/DATASET]')
