"""hub/publish.py and downloads over real HTTP to a Hub on the loopback interface: round trips, faults, the registry."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi

import publish
import timm_lossattn
import upload
from timm_lossattn.models import pretrained

NANO, REPO = 'resnet18_lossattn_conv_nano', 'tester/nano'
SOURCE = f'{NANO}.cifar10'
PACKAGE = Path(timm_lossattn.__file__).parent
PREPARE = publish.prepare
LOGITS = """
import sys
import timm, timm_lossattn, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
torch.manual_seed(0)
torch.save(model(torch.randn(4, 3, 32, 32)), sys.argv[2])
"""


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """What goes up for the shipped weights."""
    folder = tmp_path_factory.mktemp('prepared') / 'nano'
    assert publish.main([SOURCE, '--repo-id', REPO, '--dry-run', '--folder', str(folder)]) == 0
    return folder


@pytest.fixture
def run(hub, waits, prepared, monkeypatch, tmp_path, capsys):
    """Publish the shipped weights; returns exit code, stdout, stderr."""
    def copy_prepared(job):
        """In place of making the same folder again; a note changes the card."""
        shutil.rmtree(job.folder, ignore_errors=True)
        shutil.copytree(prepared, job.folder)
        (job.folder / 'README.md').write_text((job.folder / 'README.md').read_text() + (job.words.note or ''))
    monkeypatch.setattr(publish, 'prepare', copy_prepared)

    def publish_shipped(*args, repo=REPO):
        code = publish.main([SOURCE, '--repo-id', repo, '--folder', str(tmp_path / 'folder'), *args])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()
    return publish_shipped


@pytest.fixture(scope='module')
def expected():
    """Logits of the weights in the package."""
    model = timm.create_model(NANO, pretrained=True).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(4, 3, 32, 32))


def logits_in_new_process(name, tmp_path, package=PACKAGE, **environment):
    """What a process that knows nothing of this one computes with a pretrained model; its error if it fails."""
    file = tmp_path / 'logits.pt'
    file.unlink(missing_ok=True)
    result = subprocess.run(
        [sys.executable, '-c', LOGITS, name, str(file)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(package.parent), **environment})
    return torch.load(file).detach() if file.exists() else result.stderr


def error_of(err):
    """The one line with the error."""
    (line,) = [line for line in err if 'error: ' in line] or [err]
    return line


def files(hub, repo=REPO, ref='main'):
    """Names on the Hub; None without a repository."""
    found = hub.repos.get(repo)
    return None if found is None else set(found.commits[found.refs[ref]])


def test_round_trip(run, hub, tmp_path, expected):
    """Published, then loaded by another process with an empty cache: the same logits. Again: nothing is sent."""
    code, out, _ = run()
    assert code == 0
    assert f'{hub.endpoint}/{REPO}/commit/' in out
    assert files(hub) >= set(publish.FILES)
    loaded = logits_in_new_process(f'hf-hub:{REPO}', tmp_path)
    assert isinstance(loaded, torch.Tensor), loaded
    assert float((loaded - expected).abs().max()) == 0
    commits, before = len(hub.repos[REPO].commits), len(hub.log)
    code, out, _ = run()
    assert code == 0
    assert 'nothing to upload' in out
    assert len(hub.repos[REPO].commits) == commits
    assert not [r for r in hub.log[before:] if r.method == 'PUT' or '/commit/' in r.path]


def test_files_of_the_weights_before(run, hub, prepared):
    """What the new weights have not goes from the repository, other files stay; a second run sends nothing."""
    assert run()[0] == 0
    HfApi(endpoint=hub.endpoint, token=hub.token).upload_file(
        path_or_fileobj=b'a licence', path_in_repo='LICENSE', repo_id=REPO)
    removed = {name: (prepared / name).read_bytes() for name in ('result.json', 'example.png')}
    try:
        for name in removed:
            (prepared / name).unlink()
        assert run()[0] == 0
        assert files(hub) == {*publish.FILES, 'LICENSE', '.gitattributes'} - {*removed}
        code, out, _ = run()
        assert (code, 'nothing to upload' in out) == (0, True)
    finally:
        for name, content in removed.items():
            (prepared / name).write_bytes(content)


def test_branch_pull_request_private(run, hub):
    """A branch is made; a pull request leaves main alone; a private repository is one."""
    assert run()[0] == 0
    main = hub.repos[REPO].refs['main']
    assert run('--revision', 'v2', '--note', 'second')[0] == 0
    assert hub.repos[REPO].refs['main'] == main
    assert hub.repos[REPO].refs['v2'] != main
    assert run('--create-pr', '--note', 'third')[0] == 0
    assert hub.repos[REPO].refs['main'] == main
    assert any(ref.startswith('refs/pr/') for ref in hub.repos[REPO].refs)
    assert run('--private', repo='tester/secret')[0] == 0
    assert hub.repos['tester/secret'].private


def test_other_architecture(run, hub, monkeypatch):
    """A repository that holds another architecture is not overwritten."""
    assert run()[0] == 0
    before = hub.repos[REPO].refs['main']
    prepare = publish.prepare

    def another(job):
        prepare(job)
        config = json.loads((job.folder / 'config.json').read_text())
        (job.folder / 'config.json').write_text(json.dumps(config | {'architecture': 'another'}))
    monkeypatch.setattr(publish, 'prepare', another)
    code, _, err = run()
    assert code == 2
    assert f'exists and holds {NANO}, not another' in error_of(err)
    assert hub.repos[REPO].refs['main'] == before


FAULTS = {
    'token': ('GET', '/api/whoami', dict(status=401), 'the token is missing or wrong'),
    'rights': ('POST', '/api/repos/create', dict(status=403), 'no right to write'),
    'gone': ('POST', '/preupload/', dict(status=404), 'answered 404'),
    'conflict': ('POST', '/commit/', dict(status=409, times=9), 'changed at the same time'),
    'too many': ('POST', '/commit/', dict(status=429, times=9, headers={'Retry-After': '1'}), 'too many requests'),
    'broken': ('POST', '/commit/', dict(status=500, times=99), 'the Hub has a problem'),
    'lfs': ('POST', '/info/lfs/objects/batch', dict(status=500, times=99), 'the Hub has a problem'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_refusals(run, hub, name):
    """One line, no half-written repository, and the same command goes on afterwards."""
    method, path, details, message = FAULTS[name]
    hub.fault(method, path, 'status', **details)
    code, _, err = run()
    assert code == 2
    assert message in error_of(err)
    assert files(hub) in (None, set()) or not files(hub) & set(publish.FILES)
    hub.faults.clear()
    assert run()[0] == 0
    assert files(hub) >= set(publish.FILES)


@pytest.mark.parametrize(('kind', 'method', 'path', 'details', 'expected'), [
    ('cut', 'PUT', '/', dict(after=200_000), 0),
    ('corrupt', 'PUT', '/', dict(after=1000), 2),
    ('status', 'PUT', '/', dict(status=503), 0),
    ('slow', 'PUT', '/', dict(before=1.), 0),
    ('cut', 'POST', '/commit/', dict(after=100), 2),
    ('cut', 'POST', '/info/lfs/objects/batch', dict(after=10), 0),
])
def test_broken_uploads(run, hub, tmp_path, kind, method, path, details, expected):
    """The client tries again, or there is one line and the next run goes on; the weights arrive whole or not at all."""
    fault = hub.fault(method, path, kind, **details)
    code, _, err = run()
    assert fault.hits
    assert code == expected
    if code:
        assert error_of(err)
        assert not (files(hub) or set()) & set(publish.FILES)
        assert run()[0] == 0
    assert files(hub) >= set(publish.FILES)
    stored = hub.repos[REPO].commits[hub.repos[REPO].refs['main']][pretrained.WEIGHTS_NAME]
    assert stored.data == (tmp_path / 'folder' / pretrained.WEIGHTS_NAME).read_bytes()


def test_no_network(run, hub, monkeypatch):
    """Nobody listens there; and the network is switched off."""
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://127.0.0.1:9')
    code, _, err = run()
    assert code == 2
    assert 'cannot be reached' in error_of(err)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    code, _, err = run()
    assert code == 2
    assert 'HF_HUB_OFFLINE' in error_of(err)


@pytest.fixture
def published(run, hub, tmp_path, monkeypatch):
    """A copy of the package whose weights are on the Hub and nowhere else."""
    package = tmp_path / 'copy' / 'timm_lossattn'
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    monkeypatch.setattr(upload, 'HUB_WEIGHTS_FILE', package / 'hub_weights.json')
    assert run('--tag', 'cifar10')[0] == 0
    return package


def test_registry(published, hub, tmp_path, expected):
    """pretrained=True downloads the commit that was published, works offline from then on, and refuses other bytes."""
    entry = json.loads((published / 'hub_weights.json').read_text())[SOURCE]
    assert entry['repo_id'] == REPO
    assert entry['revision'] == hub.repos[REPO].refs['main']
    loaded = logits_in_new_process(SOURCE, tmp_path, published)
    assert isinstance(loaded, torch.Tensor), loaded
    assert torch.equal(loaded, expected)
    assert any(f'/resolve/{entry["revision"]}/model.safetensors' in r.path for r in hub.log), hub.log[-4:]
    assert not [r for r in hub.log if r.path.endswith(('.bin', '.pth', '.pt'))]
    assert torch.equal(logits_in_new_process(SOURCE, tmp_path, published, HF_HUB_OFFLINE='1'), expected)

    (blob,) = [p for p in (tmp_path / 'hf_home' / 'hub').rglob('blobs/*') if p.stat().st_size > 1e6]
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    error = logits_in_new_process(SOURCE, tmp_path, published, HF_HUB_OFFLINE='1')
    assert isinstance(error, str)
    assert 'The file was changed or damaged; it is not loaded.' in error


def test_weights_in_the_package_come_first(published, hub, tmp_path, expected):
    """With the file in the package nothing is asked of the Hub."""
    shutil.copytree(PACKAGE / 'weights', published / 'weights', dirs_exist_ok=True)
    before = len(hub.log)
    assert torch.equal(logits_in_new_process(SOURCE, tmp_path, published), expected)
    assert len(hub.log) == before


def test_checkout_comes_second(published, hub, tmp_path, expected):
    """Without a file in the package, that of hub/weights beside it is taken, and nothing is asked of the Hub."""
    folder = published.parent / 'hub' / 'weights' / SOURCE
    folder.mkdir(parents=True)
    shutil.copy(PACKAGE / 'weights' / f'{SOURCE}.safetensors', folder / pretrained.WEIGHTS_NAME)
    before = len(hub.log)
    assert torch.equal(logits_in_new_process(SOURCE, tmp_path, published), expected)
    assert len(hub.log) == before


def test_error_names_the_hub(published, tmp_path):
    """Published, but neither on this machine nor within reach: the id and the commit are in the message."""
    entry = json.loads((published / 'hub_weights.json').read_text())[SOURCE]
    error = logits_in_new_process(SOURCE, tmp_path, published, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'nothing'))
    assert isinstance(error, str)
    last = [line for line in error.splitlines() if line.startswith('RuntimeError')]
    assert f'{REPO}@{entry["revision"]}' in last[0]


def test_all(hub, waits, run, tmp_path, monkeypatch):
    """One command: every bundle in a repository of its own, as it lies in hub/weights, and the pins of all."""
    monkeypatch.setattr(publish, 'prepare', PREPARE)
    pins = tmp_path / 'pins.json'
    pins.write_text('{}')
    monkeypatch.setattr(upload, 'HUB_WEIGHTS_FILE', pins)
    assert publish.main(['--all', '--repo-prefix', 'tester', '--folder', str(tmp_path / 'all')]) == 0
    names = publish.list_bundles()
    assert len(names) >= 3
    for name in names:
        pin = json.loads(pins.read_text())[name]
        assert pin['repo_id'] == f'tester/{name}'
        stored = hub.repos[pin['repo_id']].commits[pin['revision']]
        for file in pretrained.bundle_folder(name).iterdir():
            assert stored[file.name].data == file.read_bytes()
        assert stored[pretrained.WEIGHTS_NAME].data == Path(pretrained.bundled_weights(name)).read_bytes()


@pytest.mark.parametrize(('kind', 'details', 'error'), [
    ('truncate', dict(after=300_000), None), ('corrupt', dict(after=300_000), 'was changed or damaged'),
    ('cut', dict(after=300_000), None), ('status', dict(status=500), 'cannot download'),
    ('status', dict(status=429, headers={'Retry-After': '1'}), None),
    ('status', dict(status=404, times=9), 'cannot download'), ('status', dict(status=401, times=9), 'cannot download'),
    ('slow', dict(before=1.), None)])
def test_broken_downloads(published, hub, waits, tmp_path, monkeypatch, kind, details, error):
    """What arrives is what was published, where trying again helps, or there is an error; a second call succeeds."""
    monkeypatch.setattr(pretrained, 'HUB_WEIGHTS', json.loads((published / 'hub_weights.json').read_text()))
    fault = hub.fault('GET', '/resolve/', kind, **details)
    cache = tmp_path / 'downloads'
    if error is None:
        path = Path(pretrained.download_weights(SOURCE, cache))
        assert pretrained.sha256_of(path) == pretrained.HUB_WEIGHTS[SOURCE]['sha256']
    else:
        with pytest.raises(RuntimeError, match=error):
            pretrained.download_weights(SOURCE, cache)
    assert fault.hits
    hub.faults.clear()
    for blob in cache.rglob('blobs/*'):  # as the error says
        if pretrained.sha256_of(blob) != pretrained.HUB_WEIGHTS[SOURCE]['sha256']:
            blob.unlink()
    path = Path(pretrained.download_weights(SOURCE, cache))
    assert pretrained.sha256_of(path) == pretrained.HUB_WEIGHTS[SOURCE]['sha256']
