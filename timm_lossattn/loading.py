"""The one loader of "a model that somebody names": registry name, hf-hub:ORG/NAME, local-dir:FOLDER, or a checkpoint.

A checkpoint of train/train.py says itself how to build its model, as plain data under ``model_config``: architecture,
model_args, label_names and data_config (timm's, for the preprocessing). One of timm's train.py says it by its flags. Of
weights alone the name is needed; the number of classes is that of the classifier in the file.
"""
import argparse
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_pretrained

from .attention.weights import checked_xi
from .explanation import patch_model
from .explanation.preprocessing import PREPROCESSING
from .hub_access import create_model
from .models.lite_weights import lite_overlay
from .models.lossattn import refuse_early
from .models.probe import NoPatchSum
from .text import one_line

__all__ = [
    'MODEL_CONFIG', 'backbone_name', 'check_name', 'classes_in', 'full_name', 'list_patch_models', 'load_model',
    'load_patch_model', 'model_config', 'read_checkpoint',
]

MODEL_CONFIG = 'model_config'
TIMM_FLAGS = {  # of timm's train.py -> arguments of the model
    'num_classes': 'num_classes', 'in_chans': 'in_chans', 'gp': 'global_pool', 'bn_eps': 'bn_eps'}
MODULES = ('resnet_lossattn', 'vgg_lossattn', 'googlenet_lossattn')
SOURCES = ('hf-hub', 'hf_hub', 'local-dir')


def list_patch_models(filter: str = '*') -> list[str]:
    """Names of the models that this package registers, without tags."""
    return sorted(name for module in MODULES for name in timm.list_models(module=module) if fnmatch(name, filter))


def backbone_name(name: str) -> str:
    """The model whose weights a name stands for: the backbone of ``lossattn.{backbone}``, or else the name itself."""
    return name.removeprefix('lossattn.')


def check_name(name: str) -> None:
    """Whether timm can create a model of this name.

    Raises:
        ValueError: it cannot; names that are close are named.
    """
    if name.partition(':')[0] in SOURCES:
        return
    backbone = backbone_name(name)
    if backbone.startswith('lossattn.'):
        raise ValueError(f'model: {name!r} says lossattn twice.')
    if not timm.is_model(backbone):
        if '/' in name:
            raise ValueError(f'model: timm has no model {name!r}; models of the Hub are hf-hub:ORG/NAME, those of a '
                             'folder local-dir:FOLDER.')
        known = [*list_patch_models(), *timm.list_models()]
        close = get_close_matches(backbone.split('.')[0], known, n=1)
        prefix = name.removesuffix(backbone)
        hint = (f'; did you mean {prefix}{close[0]}?' if close else
                '; `timm-lossattn list` shows the models of this package.')
        raise ValueError(f'model: timm has no model {name!r}, nor has timm_lossattn{hint}')


def model_config(
        architecture: str, model_args: Mapping[str, Any], label_names: list[str] | None = None,
        data_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a checkpoint needs to be read, as plain data."""
    return {
        'architecture': architecture, 'model_args': dict(model_args), 'label_names': label_names,
        'data_config': {key: value for key, value in (data_config or {}).items() if key in PREPROCESSING},
    }


def read_checkpoint(file: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights of a checkpoint (EMA weights if there are any) and its ``model_config``, {} if it does not say its model.

    Raises:
        ValueError: no such file, or no checkpoint.
    """
    if not Path(file).is_file():
        raise ValueError(f'checkpoint: no such file: {file}')
    config: dict[str, Any] = {}
    if Path(file).suffix != '.safetensors' and not is_pickle(Path(file)):
        raise ValueError(f'checkpoint: {file} is no file of PyTorch (.pth, .pt, .tar, .bin) or safetensors.')
    try:
        # timm's train.py stores its flags as a Namespace, which timm_config reads
        with torch.serialization.safe_globals([argparse.Namespace]):
            if Path(file).suffix != '.safetensors':
                content = torch.load(file, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(file))
                if isinstance(content, dict):
                    own: Any = content.get(MODEL_CONFIG)  # other projects call something else so
                    ours = isinstance(own, dict) and isinstance(own.get('architecture'), str)
                    config = own if ours else timm_config(content)
            return timm.models.load_state_dict(str(file)), config
    except Exception as error:  # a broken file raises whatever its reader raises
        raise ValueError(f'checkpoint: cannot read {file}: {one_line(error)}') from error


def timm_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """``model_config`` of a checkpoint of timm's own train.py: its architecture and flags; {} of any other."""
    if not isinstance(content.get('arch'), str) or not timm.is_model(content['arch']):
        return {}
    flags = vars(content['args']) if isinstance(content.get('args'), argparse.Namespace) else {}
    model_kwargs = flags.get('model_kwargs') or {}
    given = {argument: flags[flag] for flag, argument in TIMM_FLAGS.items() if flags.get(flag)}
    if flags.get('input_size'):  # wins in the script, where --in-chans is not given
        given.setdefault('in_chans', flags['input_size'][0])
    data_config = {key: flags[key] for key in PREPROCESSING if flags.get(key)}
    if flags.get('img_size') and 'input_size' not in data_config:
        data_config['input_size'] = (flags.get('in_chans') or 3, flags['img_size'], flags['img_size'])
    cfg = default_cfg(model_kwargs.get('backbone', content['arch']))
    if cfg is not None and cfg.fixed_input_size:  # the script makes its model without its size of images
        given['img_size'] = tuple(cfg.input_size[-2:])
    return model_config(content['arch'], given | model_kwargs, None, data_config)


def default_cfg(name: str) -> Any:
    """What timm knows of a model, of lossattn.NAME of its backbone, without its tag; None if it knows nothing."""
    return timm.get_pretrained_cfg(backbone_name(name).split('.')[0])


def classes_in(state: Mapping[str, torch.Tensor], name: str) -> int:
    """Number of classes of a model's state dict, of lossattn.NAME of that of its backbone; -1 without a classifier."""
    cfg = default_cfg(name)
    classifier = (cfg.classifier if cfg is not None else None) or ()
    weights = [state.get(f'{layer}.weight') for layer in ([classifier] if isinstance(classifier, str) else classifier)]
    weight = next((weight for weight in weights if weight is not None and weight.dim() in (2, 4)), None)
    if weight is None:
        return -1
    linear = weight.dim() == 2 or weight.shape[2:] == (1, 1)  # else of capsules for routing, (positions, K, O, D)
    return weight.shape[0 if linear else 1]


def is_pickle(file: Path) -> bool:
    """Whether a file may be one of torch.save, of any version, or of NumPy, whose files are archives too."""
    with file.open('rb') as content:
        return content.read(1) == b'\x80' or zipfile.is_zipfile(file)


def full_name(model: Any) -> str:
    """Architecture of a model; of loss attention in a timm model with the backbone, ``lossattn.{backbone}``.

    The backbone has its tag where the classes are those of the tag's weights: fine-tuned ones are others.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = str(cfg.get('architecture') or type(model).__name__)
    args = getattr(model, '_model_args', {})
    if name != 'lossattn' or 'backbone' not in args:
        return name
    backbone = args['backbone']
    try:
        tagged: Any = timm.get_pretrained_cfg(f'lossattn.{backbone}')
        names = [None if names is None else tuple(names) for names in (tagged.label_names, cfg.get('label_names'))]
        same = tagged.num_classes == model.num_classes and names[0] == names[1]
    except RuntimeError:  # a tag that timm does not know
        same = False
    name = f'lossattn.{backbone if same else backbone.partition(".")[0]}'
    return name + ('' if args['pool'] == 'lossattn' else f' with pool={args["pool"]}')


def load_model(
        name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = 'cpu',
        **kwargs: Any) -> Any:
    """A model with weights, in eval mode.

    Pretrained weights come from where timm says. Of tf_efficientnet_lite0, 1 and 2, with or without ``lossattn.``
    before it, they come from the packages of the extra ``imagenet`` if those are installed: no network is needed. Where
    the Hub is out of reach, its cache is looked through.

    Args:
        name: a model of timm or of this package, with or without tag, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``; None
            if the checkpoint says it.
        checkpoint: file with weights to load instead of the pretrained ones, .safetensors or of a training.
        device: where the model goes.
        kwargs: arguments of the model, which win over those of the checkpoint.

    Raises:
        ValueError: no such model, file, weights or device, or weights that do not fit; the message says which.
    """
    if 'pretrained' in kwargs:
        raise ValueError('pretrained: load_model gives models with weights; timm.create_model makes one without.')
    state, config = (None, {}) if checkpoint is None else read_checkpoint(checkpoint)
    if name is None and not config:
        raise ValueError('model: no name is given, and ' + (
            'no checkpoint.' if checkpoint is None else f'{checkpoint} does not say of which of timm\'s models it is.'))
    name = name or config['architecture']
    check_name(name)
    published = name.partition(':')[0] in SOURCES
    if published and checkpoint is not None:
        raise ValueError(f'checkpoint: {name} has weights of its own.')
    if state is None and not published:
        check_has_weights(name)
    model_args = {**config.get('model_args', {}), **kwargs}
    if state is not None:
        if (num_classes := classes_in(state, model_args.get('backbone', name))) > 0:
            model_args.setdefault('num_classes', num_classes)
        overlay = {'label_names': config.get('label_names'), **config.get('data_config', {})}
        if 'num_classes' in model_args:
            overlay['num_classes'] = model_args['num_classes']
        model_args['pretrained_cfg_overlay'] = {**overlay, **(model_args.get('pretrained_cfg_overlay') or {})}
    try:
        if state is None and not name.startswith('lossattn'):  # which looks for them itself
            model_args['pretrained_cfg_overlay'] = lite_overlay(name, model_args.get('pretrained_cfg_overlay'))
        model: Any = create_model(name, pretrained=state is None, **model_args)
        if state is not None:
            model.load_state_dict(state)
    except NoPatchSum as error:
        raise ValueError(f'model: {name}: {error}') from error
    except Exception as error:  # broken folders, weights that do not fit, no network: many kinds
        what = f'cannot load {checkpoint} into {name}' if state is not None else f'cannot load {name}'
        raise ValueError(f'{"checkpoint" if state is not None else "model"}: {what}: {one_line(error, 400)}') from error
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f'device: cannot use {str(device)!r}: {one_line(error)}') from None


def load_patch_model(
        name: str | None = None, checkpoint: str | Path | None = None, device: str | torch.device = 'cpu',
        xi: float | None = None, **kwargs: Any) -> Any:
    """``load_model``; a stock timm model gets patches of equal weight, see ``patch_model``.

    Args:
        name, checkpoint, device, kwargs: see ``load_model``.
        xi: ξ in place of that of the weights; refused where patches are not weighed by what they say.

    Raises:
        ValueError: what ``load_model`` raises, or the logits are no sum over patches, which is said before weights are
            downloaded.
    """
    try:
        if name and checkpoint is None and timm.is_model(name) and not name.startswith('lossattn'):
            refuse_early(name, kwargs)  # lossattn does so itself
    except NoPatchSum as error:
        raise ValueError(f'model: {name}: {error}') from error
    if xi is not None:
        checked_xi(xi)
        if name and timm.is_model(name) and name.split('.')[0] not in ('lossattn', *list_patch_models()):
            raise ValueError(f'xi: {name} has no loss attention; lossattn.{name} has.')
        kwargs['xi'] = xi
    try:
        model = load_model(name, checkpoint, device, **kwargs)
    except ValueError as error:
        if xi is not None and "argument 'xi'" in str(error):  # of a checkpoint or a folder that says its model itself
            raise ValueError(f'xi: {checkpoint or name} has no loss attention; lossattn.NAME has.') from error
        raise
    try:
        model = patch_model(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f'model: {name or checkpoint}: {error}') from error
    if xi is not None and not model.patch_weights.informative:
        raise ValueError(f'xi: the patches of {name or checkpoint} are {model.patch_weights.description}.')
    return model


def check_has_weights(name: str) -> None:
    """ValueError unless a registered name has pretrained weights, and a file of this package is where it should be."""
    prefix = ''
    if not is_model_pretrained(name):  # only weights that were trained with loss attention are known under such a name
        prefix, name = name.removesuffix(backbone_name(name)), backbone_name(name)
    if not is_model_pretrained(name):
        if not prefix and is_model_pretrained(f'lossattn.{name}'):
            raise ValueError(f'model: {name} has no weights; did you mean lossattn.{name}?')
        architecture = name.split('.')[0]
        others = [prefix + n for n in timm.list_pretrained(f'{architecture}.*')] or [
            n for n in list_patch_models() if is_model_pretrained(n)]
        raise ValueError(f'model: {prefix}{name} has no weights yet; give a checkpoint, or choose one of {others}.')
    file = timm.get_pretrained_cfg_value(name, 'file')
    if file and not Path(file).is_file():
        raise ValueError(f'model: the weights of {name} are missing from this installation: {file}')
