"""Pretrained weights: files in the package, and which repository and commit on the Hub holds those of an ``arch.tag``.

``hub_weights.json`` is written by ``hub/publish.py --tag``. ``pretrained=True`` then downloads the file of exactly that
commit and loads it only if its SHA-256 is the one that was published. Weights that ship in the package come first.
"""
import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from timm.models import resolve_pretrained_cfg

from ..files import sha256_of

__all__ = ['HUB_WEIGHTS', 'WEIGHTS_NAME', 'bundled_weights', 'download_weights', 'verified_overlay', 'with_published']

WEIGHTS_NAME = 'model.safetensors'  # never a pickle
ATTEMPTS = 3
PACKAGE = Path(__file__).parents[1]
HUB_WEIGHTS_FILE = PACKAGE / 'hub_weights.json'
# arch.tag -> repo_id, revision (a commit hash), sha256
HUB_WEIGHTS: dict[str, dict[str, str]] = json.loads(HUB_WEIGHTS_FILE.read_text())


def bundled_weights(name: str) -> str:
    """Path of weights that ship inside the package, for ``file`` in a default_cfg."""
    return str(PACKAGE / 'weights' / f'{name}.safetensors')


def with_published(cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """default_cfgs by ``arch.tag``, those that are published with their repository and commit.

    A file in the package stands first, as timm takes it, unless this installation came without it.
    """
    result = {}
    for name, cfg in cfgs.items():
        if name in HUB_WEIGHTS:
            cfg = cfg | dict(hf_hub_id=hub_id(name), hf_hub_filename=WEIGHTS_NAME)
            if cfg.get('file') and not Path(cfg['file']).is_file():
                del cfg['file']
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
        huggingface_hub.errors.LocalEntryNotFoundError: they are not in the cache and the network is off.
    """
    entry = HUB_WEIGHTS[name]
    for attempt in range(ATTEMPTS):
        try:
            path = hf_hub_download(entry['repo_id'], WEIGHTS_NAME, revision=entry['revision'], cache_dir=cache_dir)
            break
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
    """
    if not pretrained:
        return kwargs
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=kwargs.get('pretrained_cfg'), pretrained_cfg_overlay=overlay)
    name = f'{variant}.{cfg.tag}'
    ours = name in HUB_WEIGHTS and cfg.hf_hub_id == hub_id(name)
    if not ours or cfg.file or cfg.state_dict or cfg.source in ('hf-hub', 'local-dir'):
        return kwargs
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': download_weights(name, kwargs.get('cache_dir'))}}
