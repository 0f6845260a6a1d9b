"""What several test files need."""
from types import SimpleNamespace

import pytest
from hypothesis import settings

from hub_server import HubServer
from kill_and_resume import make_images

settings.register_profile('suite', deadline=None, derandomize=True)  # the same on every machine, however slow
settings.load_profile('suite')


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Image folder of two classes, 16 training and 8 validation images of 32×32 pixels each."""
    root = tmp_path_factory.mktemp('data')
    make_images(root, size=32, train=16, val=8)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Empty Hub of the user ``tester``, with an empty cache. Subprocesses find it in the environment; what is uploaded
    from this process needs endpoint=hub.endpoint."""
    from huggingface_hub import constants
    with HubServer() as server:
        for name, value in server.environment(tmp_path / 'hf_home').items():
            monkeypatch.setenv(name, value)
        for name, value in dict(
                HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True, HF_HUB_OFFLINE=False, ENDPOINT=server.endpoint,
                HUGGINGFACE_CO_URL_TEMPLATE=server.endpoint + '/{repo_id}/resolve/{revision}/{filename}',
                HF_HUB_CACHE=str(tmp_path / 'hf_home' / 'hub')).items():
            monkeypatch.setattr(constants, name, value)  # read from the environment at import, long ago
        yield server


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the Hub's client would have waited between its attempts, in place of the waiting."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http  # private: the client has no option for how long it waits
    seconds = []
    for module in (file_download, _http):
        monkeypatch.setattr(module, 'time', SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture(scope='session')
def app():
    """The demo's module."""
    pytest.importorskip('gradio')
    from space_app import SPACE, load_app
    return load_app(SPACE / 'app.py')
