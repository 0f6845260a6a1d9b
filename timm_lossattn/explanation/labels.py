"""Classes and their names: of a model's weights, of a data set, and as a user gives them."""
import re
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple, Union

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..text import shorten

__all__ = ['DATA', 'Classes', 'class_labels', 'class_names', 'classes_of', 'data_of', 'find_class', 'known_classes',
           'spaced', 'training_data']


class Data(NamedTuple):
    """What weights are trained on: its name, its images in a word or two, and what they are."""
    name: str
    kind: str
    images: str


DATA = {  # by part of a tag
    'in1k': Data('ImageNet-1k', 'photographs', 'photographs'),
    'pbc': Data('PBC (blood cells)', 'blood cells', 'microscope images of single cells'),
    'cifar10': Data('CIFAR-10', 'thumbnails', 'thumbnails of 32×32 pixels'),
    'cifar100': Data('CIFAR-100', 'thumbnails', 'thumbnails of 32×32 pixels'),
    'tiny_imagenet_mini': Data('Tiny ImageNet', 'thumbnails', 'thumbnails of 64×64 pixels'),
    'tiny_imagenet': Data('Tiny ImageNet', 'thumbnails', 'thumbnails of 64×64 pixels'),
    'in12k': Data('ImageNet-12k', 'photographs', 'photographs'),
    'in21k': Data('ImageNet-21k', 'photographs', 'photographs'),
    'in22k': Data('ImageNet-22k', 'photographs', 'photographs'),
}
Classes = Union[int, str, Sequence[Union[int, str]], torch.Tensor]


def class_labels(model: Any, num_classes: int) -> list[str]:
    """Label names of the model's weights if there is one for each of the classes, or else the indices; all different.

    timm's ImageNet models carry no names; their tag says which ImageNet their classes are, unless the names are known
    to be none (()). Of weights that call several classes the same, these have their index behind the name.
    """
    cfg: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    labels = cfg.get('label_names')
    if isinstance(labels, dict):
        labels = by_index(labels, num_classes)
    imagenet = any(key.startswith('in') for key in data_of(cfg.get('tag') or ''))
    if labels is None and cfg.get('num_classes') == num_classes and imagenet:
        subset = infer_imagenet_subset(cfg)
        labels = imagenet_labels(subset) if subset else ()
    labels = [str(label) for label in labels or ()]
    if len(labels) != num_classes:
        return numbered(num_classes)
    while len({*labels}) < num_classes:
        count = Counter(labels)
        labels = [label if count[label] == 1 else f'{label} ({k})' for k, label in enumerate(labels)]
    return labels


def class_names(images: Any) -> list[str]:
    """Names of a data set's classes in the order of their numbers 0, 1, ..., of several for one class the first; or
    nothing, also if numbers are missing, for names after a gap would be those of other classes."""
    reader = getattr(images, 'reader', images)
    index = (getattr(reader, 'wnid_to_idx', None)  # torchvision's ImageNet: its class_to_idx has one 'crane' for two
             or getattr(reader, 'class_to_idx', None)
             or getattr(reader, 'class_name_to_idx', None) or {})  # of tar files
    names: dict[int, str] = {}
    for name, k in index.items():
        names.setdefault(k, name)
    return [names[k] for k in range(len(names))] if {*names} == {*range(len(names))} else []


def by_index(names: dict[Any, str], num_classes: int) -> list[str]:
    """Names from a dictionary, which timm takes too; its keys are the classes, in JSON as text."""
    return [str(names.get(k, names.get(str(k), f'class {k}'))) for k in range(num_classes)]


def numbered(num_classes: int) -> list[str]:
    """What classes are called whose names are not known."""
    return [f'class {k}' for k in range(num_classes)]


@cache
def imagenet_labels(subset: str) -> tuple[str, ...]:
    """The first word of WordNet for each class; with its synset where two classes have the same ("crane")."""
    info = ImageNetInfo(subset)
    words = [description.split(',')[0] for description in info.label_descriptions()]
    count = Counter(words)
    return tuple(word if count[word] == 1 else f'{word} ({synset})' for word, synset in zip(words, info.label_names()))


def data_of(name: str) -> list[str]:
    """Keys of DATA in a model's name or tag, in their order: what it was trained on, and then on what."""
    return re.findall(rf'(?:^|[._])({"|".join(DATA)})(?=_|$)', name)


def training_data(model: Any, labels: Sequence[str]) -> str:
    """Name of the data that a model's weights were trained on, as their tag says it; '' where it is not known.

    A tag is believed only where the classes are those of its weights: fine-tuned ones keep the tag of their start.
    """
    cfg: dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    tag = cfg.get('tag') or ''
    found = data_of(tag)
    if not found:
        return ''
    data = DATA[found[-1]].name  # what it was fine-tuned on
    if not cfg.get('label_names'):
        return data if list(labels) != numbered(len(labels)) else ''
    try:
        own = timm.get_pretrained_cfg_value(f'{cfg.get("architecture")}.{tag}', 'label_names')
    except RuntimeError:  # no registered weights
        return ''
    return data if list(own or ()) == list(labels) else ''


def known_classes(labels: Sequence[str], data: str = '') -> str:
    """What a model can answer at all, in a few words: "knows 10 classes of CIFAR-10: airplane … truck"."""
    count = f'knows {len(labels):,} class' + ('es' if len(labels) > 1 else '') + (f' of {data}' if data else '')
    if list(labels) == numbered(len(labels)):
        return f'{count}, without names'
    ends = [shorten(label, 20) for label in (labels[0], labels[-1])]
    return f'{count}: {(" … " if len(labels) > 2 else ", ").join(ends[:len(labels)])}'


def spaced(name: str) -> str:
    """A class's name as folders, files and users may write it too: in any case, with "_" for spaces."""
    return name.replace('_', ' ').casefold()


def find_class(name: str, value: str, labels: Sequence[str]) -> int:
    """Index of a class given as text: its name, its index, its name in another case, or whole words of one name only.

    "_" and a space are the same.

    Raises:
        ValueError: no such class, or words of several; the message begins with ``name`` and lists what is close.
    """
    if value in labels:
        return list(labels).index(value)
    if value.isdecimal() and int(value) < len(labels):
        return int(value)
    folded, wanted = [spaced(label) for label in labels], spaced(value).strip()
    found = [k for k, label in enumerate(folded) if label == wanted] or [
        k for k, label in enumerate(folded) if wanted and re.search(rf'(?<!\w){re.escape(wanted)}(?!\w)', label)]
    if len(found) == 1:
        return found[0]
    if found:
        some = [labels[k] for k in found[:10]]
        raise ValueError(f'{name}: {value!r} may be {len(found)} classes; choose one of {some}'
                         f'{" and more" if len(found) > 10 else ""}, or an index.')
    if len(labels) <= 20:
        close = list(labels)
    else:
        near = get_close_matches(wanted, folded, 5, 0.5)
        close = [label for label, lower in zip(labels, folded) if lower in near]
    choose = f'choose one of {close}' if close else f'choose one of {len(labels)} names'
    raise ValueError(f'{name}: no class {value!r}; {choose} or an index up to {len(labels) - 1}.')


def classes_of(name: str, value: Classes, batch: int, labels: Sequence[str]) -> torch.Tensor:
    """Classes as the user gave them, one for all B images or one for each, as (B,) int64.

    Raises:
        ValueError: not B names or indices of classes; the message calls them ``name``.
    """
    if isinstance(value, str):
        value = find_class(name, value, labels)
    elif isinstance(value, (list, tuple)):
        value = [find_class(name, one, labels) if isinstance(one, str) else one for one in value]
    accepted = f'{name} must hold {batch} classes in [0, {len(labels) - 1}]'
    try:
        result = torch.as_tensor(value, device='cpu')
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f'{accepted}, got {value!r}.') from None
    result = result.expand(batch) if result.dim() == 0 else result.reshape(-1)  # one for all, of NumPy or torch as well
    if (result.shape != (batch,) or result.is_floating_point() or result.dtype == torch.bool
            or int(result.min()) < 0 or int(result.max()) >= len(labels)):
        raise ValueError(f'{accepted}, got {result.tolist()}.')
    return result.long()
