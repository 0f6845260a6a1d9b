"""Pretrained weights of an ``arch.tag``: where they lie. The first of these that exists is taken:

1. a file in the package, ``timm_lossattn/weights/ARCH.TAG.safetensors``: small models, which a wheel carries;
2. in a checkout, ``hub/weights/ARCH.TAG/model.safetensors``, beside what is published with it;
3. on the Hub, the repository and commit that ``hub_weights.json`` names. ``hub/publish.py`` writes it; the file is
   loaded only if its SHA-256 is the one that was published.

An ``arch.tag`` in a default_cfg is declared to have weights exactly where one of these exists.
"""
import json
from pathlib import Path
from typing import Any, Optional

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from timm.models import resolve_pretrained_cfg

from ..files import sha256_of
from ..hub_access import hub_or_cache

__all__ = [
    'HUB_WEIGHTS', 'HUB_WEIGHTS_FILE', 'WEIGHTS_NAME', 'bundle_folder', 'bundled_weights', 'download_weights',
    'list_bundled', 'packaged_file', 'verified_overlay', 'with_published',
]

WEIGHTS_NAME = 'model.safetensors'  # never a pickle
ATTEMPTS = 3
PACKAGE = Path(__file__).parents[1]
HUB_WEIGHTS_FILE = PACKAGE / 'hub_weights.json'
# arch.tag -> repo_id, revision (a commit hash), sha256
HUB_WEIGHTS: dict[str, dict[str, str]] = json.loads(HUB_WEIGHTS_FILE.read_text())
RECIPES = ('cifar10', 'cifar100', 'tiny_imagenet', 'tiny_imagenet_mini')  # tags with a dataset in train/recipes.yaml


def packaged_file(name: str) -> Path:
    """Where weights lie that ship inside the package, whether they do or not."""
    return PACKAGE / 'weights' / f'{name}.safetensors'


def bundle_folder(name: str) -> Path:
    """Where a checkout keeps what is published of an ``arch.tag``, whether it does or not."""
    return PACKAGE.parent / 'hub' / 'weights' / name


def bundled_weights(name: str) -> Optional[str]:
    """File with the weights of an ``arch.tag`` on this machine, None if there is none."""
    candidates = packaged_file(name), bundle_folder(name) / WEIGHTS_NAME
    return next((str(file) for file in candidates if file.is_file()), None)


def list_bundled() -> list[str]:
    """Names, ``arch.tag``, of all weights that ``bundled_weights`` finds."""
    packaged = (file.name.removesuffix('.safetensors') for file in packaged_file('*').parent.glob('*.safetensors'))
    in_checkout = (file.parent.name for file in bundle_folder('*').parent.glob(f'*/{WEIGHTS_NAME}'))
    return sorted({*packaged, *in_checkout})


def with_published(cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """default_cfgs by ``arch.tag``, each with its file and its repository and commit on the Hub, as far as they exist.

    timm takes the file first.
    """
    result = {}
    for name, cfg in cfgs.items():
        cfg = {**cfg, 'file': bundled_weights(name)}
        if name in HUB_WEIGHTS:
            cfg.update(hf_hub_id=hub_id(name), hf_hub_filename=WEIGHTS_NAME)
        result[name] = cfg
    return result


def hub_id(name: str) -> str:
    """Repository and commit, as timm writes them."""
    return '{repo_id}@{revision}'.format(**HUB_WEIGHTS[name])


def download_weights(name: str, cache_dir: str | Path | None = None) -> str:
    """Path of the published weights in the Hub's cache; downloaded if they are not there.

    Args:
        name: ``arch.tag`` in HUB_WEIGHTS.
        cache_dir: another cache.

    Raises:
        RuntimeError: they cannot be downloaded, or the bytes are not those that were published.
    """
    entry = HUB_WEIGHTS[name]
    for attempt in range(ATTEMPTS):
        try:
            with hub_or_cache():
                path = hf_hub_download(entry['repo_id'], WEIGHTS_NAME, revision=entry['revision'], cache_dir=cache_dir)
            break
        except (ConnectionError, LocalEntryNotFoundError) as error:  # no network, or no such file
            raise RuntimeError(f'Weights of {name}: cannot download {hub_id(name)}: {error}') from error
        except HTTPError as error:  # the client tries again before the first byte; a broken transfer it can continue
            if isinstance(error, HfHubHTTPError) or attempt == ATTEMPTS - 1:
                raise RuntimeError(f'Weights of {name}: cannot download {hub_id(name)}: {error}') from error
    found = sha256_of(path)
    if found != entry['sha256']:
        raise RuntimeError(
            f'Weights of {name}: {Path(path).resolve()} has the SHA-256 {found}, published was {entry["sha256"]}. The '
            'file was changed or damaged; it is not loaded. Delete it to download it anew.')
    return path


def verified_overlay(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for timm's model builder, with the checked file in place of a download that timm would not check.

    Args:
        variant: architecture.
        pretrained: whether weights are wanted.
        kwargs: the builder's arguments; ``pretrained_cfg`` and ``pretrained_cfg_overlay`` say which weights.

    Raises:
        RuntimeError: there are no such weights, see also ``download_weights``.
    """
    if not pretrained:
        return kwargs
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get('pretrained_cfg'), pretrained_cfg_overlay=overlay)
    if not cfg.has_weights and not cfg.state_dict:
        raise RuntimeError(no_weights(variant, cfg.tag))
    name = f'{variant}.{cfg.tag}'
    ours = name in HUB_WEIGHTS and cfg.hf_hub_id == hub_id(name)
    if not ours or cfg.file or cfg.state_dict or cfg.source in ('hf-hub', 'local-dir'):
        return kwargs
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': download_weights(name, kwargs.get('cache_dir'))}}


def no_weights(variant: str, tag: Optional[str]) -> str:
    """What to do about weights that nobody has trained yet."""
    recipe = f'fast/{tag}' if tag in RECIPES else 'fast --data-dir FOLDER'
    return (f'No pretrained weights exist for {variant}{f".{tag}" if tag else ""}, and none are published. `python '
            f'train/train.py --recipe {recipe} --model {variant}` trains them (train/TRAINING.md in the repository); '
            'pretrained=False gives random ones.')
