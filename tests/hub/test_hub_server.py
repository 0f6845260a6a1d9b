"""hub_server.py against the real client, and what that client (huggingface_hub 2.4.0) does when a transfer fails."""
import io
import random
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from httpx2 import ReadError, RemoteProtocolError
from huggingface_hub import (
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from hub_server import HubServer

REPO, WEIGHTS, CONFIG = 'tester/model', 'model.safetensors', '{"architecture": "resnet18"}\n'
CONTENT = random.Random(0).randbytes(12 * 10**6)  # more than a chunk of the client, 10 MiB
RATE_LIMIT = dict(status=429, headers={'Retry-After': '1'})


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Folder with a text file and weights."""
    root = tmp_path_factory.mktemp('model')
    (root / 'config.json').write_text(CONFIG)
    (root / WEIGHTS).write_bytes(CONTENT)
    return root


@pytest.fixture
def api(hub):
    """Client with an empty repository."""
    client = HfApi(endpoint=hub.endpoint, token=hub.token)
    client.create_repo(REPO)
    return client


@pytest.fixture
def download(hub, tmp_path):
    """Download a file into a cache, which is empty at first."""
    def get(name=WEIGHTS, token=hub.token, **kwargs):
        return Path(hf_hub_download(REPO, name, endpoint=hub.endpoint, token=token, cache_dir=tmp_path / 'cache',
                                    **kwargs)).read_bytes()
    return get


def upload(api, model, **kwargs):
    return api.upload_folder(repo_id=REPO, folder_path=model, **kwargs)


def requests(hub, method, part=''):
    return [r for r in hub.log if r.method == method and part in r.path]


# Protocol


def test_create(hub):
    """Observed: without exist_ok a second create_repo raises HfHubHTTPError 409; an id without user is completed."""
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    assert api.create_repo('model').repo_id == REPO
    assert api.whoami()['name'] == 'tester'
    with pytest.raises(HfHubHTTPError, match='already created') as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.list_repo_files(REPO) == ['.gitattributes']
    assert not api.model_info(REPO).private


def test_upload_and_download(hub, api, model, download):
    """Observed: preupload, then batch, PUT and verify of the weights, then one commit with everything. The PUT carries
    no token. A second download sends a HEAD only."""
    commit = upload(api, model, commit_message='Add model')
    assert [(r.method, r.path.split(REPO)[-1]) for r in hub.log[-5:] if r.method == 'POST'] == [
        ('POST', '/preupload/main'), ('POST', '.git/info/lfs/objects/batch'),
        ('POST', '.git/info/lfs/objects/verify'), ('POST', '/commit/main')]
    [put] = requests(hub, 'PUT')
    assert 'authorization' not in put.headers
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == commit.oid == hub.repos[REPO].refs['main']
    sizes = {s.rfilename: (s.size, s.lfs is not None) for s in info.siblings}
    assert sizes.pop('.gitattributes')[1] is False
    assert sizes == {'config.json': (len(CONFIG), False), WEIGHTS: (len(CONTENT), True)}
    assert download() == CONTENT
    assert download('config.json') == CONFIG.encode()
    n = len(hub.log)
    assert download() == CONTENT
    assert [r.method for r in hub.log[n:]] == ['HEAD']


def test_snapshot(hub, api, model, tmp_path):
    """Observed: revision, tree, then HEAD and GET of each file; folders are listed and kept."""
    upload(api, model, path_in_repo='a/b')
    assert [(f.path, hasattr(f, 'blob_id')) for f in api.list_repo_tree(REPO)] == [('.gitattributes', True),
                                                                                   ('a', False)]
    folder = snapshot_download(REPO, endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path / 'cache')
    assert Path(folder, 'a', 'b', WEIGHTS).read_bytes() == CONTENT
    assert Path(folder, 'a', 'b', 'config.json').read_text() == CONFIG
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, path_in_repo='c'))


def test_unchanged_upload_makes_no_commit(hub, api, model):
    """Observed: the client compares with the oids of preupload, asks for the LFS objects all the same, sends neither
    file nor commit, and returns the commit of before."""
    first = upload(api, model)
    n = len(hub.log)
    assert upload(api, model).oid == first.oid
    assert len(hub.repos[REPO].commits) == 2  # with the initial one
    assert [(r.method, r.path.split('/')[-2]) for r in hub.log[n:]] == [
        ('POST', 'preupload'), ('POST', 'objects'), ('GET', 'revision')]


def test_known_weights_are_not_sent_again(hub, api, model, download):
    """Observed: LFS objects are known by content, so weights under another name cost no PUT."""
    upload(api, model)
    upload(api, model, path_in_repo='copy')
    assert len(requests(hub, 'PUT')) == 1
    assert download(f'copy/{WEIGHTS}') == CONTENT


def test_branch(hub, api, model, download):
    """Observed: create_branch raises HfHubHTTPError 409 for an existing branch unless exist_ok."""
    api.create_branch(REPO, branch='v1')
    with pytest.raises(HfHubHTTPError, match='already exists'):
        api.create_branch(REPO, branch='v1')
    api.create_branch(REPO, branch='v1', exist_ok=True)
    upload(api, model, revision='v1')
    assert download(revision='v1') == CONTENT
    assert api.list_repo_files(REPO) == ['.gitattributes']
    assert {r.name for r in api.list_repo_refs(REPO).branches} == {'main', 'v1'}
    with pytest.raises(RevisionNotFoundError):
        upload(api, model, revision='v2')


def test_pull_request(hub, api, model, download):
    """Observed: with create_pr a read token of another user is enough; the files are on refs/pr/1 only."""
    hub.tokens['hf_guest'] = ('guest', 'read')
    guest = HfApi(endpoint=hub.endpoint, token='hf_guest')
    assert upload(guest, model, create_pr=True).pr_revision == 'refs/pr/1'
    assert upload(guest, model, path_in_repo='a', create_pr=True).pr_num == 2
    assert api.list_repo_files(REPO) == ['.gitattributes']
    assert download(revision='refs/pr/1') == CONTENT
    refs = api.list_repo_refs(REPO, include_pull_requests=True).pull_requests
    assert [r.name for r in refs] == ['refs/pr/1', 'refs/pr/2']


def test_private(hub, model, download):
    """Observed: RepositoryNotFoundError without a token (401) and for a user without access (404)."""
    hub.tokens['hf_guest'] = ('guest', 'write')
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO, private=True)
    upload(api, model)
    assert api.model_info(REPO).private
    for token, status in ((False, 401), ('hf_guest', 404)):
        for read in (download, lambda token: api.model_info(REPO, token=token)):
            with pytest.raises(RepositoryNotFoundError) as caught:
                read(token=token)
            assert caught.value.response.status_code == status
    assert download() == CONTENT


@pytest.mark.parametrize(('token', 'status'), [('hf_wrong', 401), (False, 401), ('hf_read', 403), ('hf_guest', 403)])
def test_no_right_to_write(hub, api, model, token, status):
    """Observed: a plain HfHubHTTPError with the status, from preupload; nothing has been sent by then."""
    hub.tokens.update(hf_read=('tester', 'read'), hf_guest=('guest', 'write'))
    client = HfApi(endpoint=hub.endpoint, token=token)
    for act in (lambda: upload(client, model), lambda: client.create_repo('tester/other')):
        with pytest.raises(HfHubHTTPError) as caught:
            act()
        assert caught.type is HfHubHTTPError
        assert caught.value.response.status_code == status
    assert not requests(hub, 'PUT')
    assert len(hub.repos[REPO].commits) == len(hub.repos) == 1


def test_missing(hub, api, tmp_path):
    """Observed: one exception each for repository, revision and file; a missing file is remembered in the cache."""
    where = dict(endpoint=hub.endpoint, token=hub.token, cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('tester/other', 'config.json', **where)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, 'config.json', revision='v9', **where)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, 'config.json', **where)
    assert [path.name for path in tmp_path.glob('*/.no_exist/*/*')] == ['config.json']
    assert api.file_exists(REPO, '.gitattributes')
    assert not api.file_exists(REPO, 'config.json')


def test_delete_copy_and_stale_parent(hub, api, model, download):
    """Observed: a commit on a stale parent raises HfHubHTTPError 412; one with a bad operation changes nothing."""
    first = upload(api, model, path_in_repo='a').oid
    api.create_commit(REPO, [CommitOperationCopy(f'a/{WEIGHTS}', WEIGHTS), CommitOperationDelete('a/config.json')],
                      commit_message='move', parent_commit=first)
    assert api.list_repo_files(REPO) == ['.gitattributes', f'a/{WEIGHTS}', WEIGHTS]
    assert download() == CONTENT
    head = api.delete_folder('a', REPO).oid
    with pytest.raises(HfHubHTTPError) as caught:
        api.delete_file(WEIGHTS, REPO, parent_commit=first)
    assert caught.value.response.status_code == 412
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete(WEIGHTS), CommitOperationDelete('b')], commit_message='bad')
    assert api.model_info(REPO).sha == head
    assert api.list_repo_files(REPO) == ['.gitattributes', WEIGHTS]


def test_parts(hub, api, model, download):
    """Observed: with a chunk_size in the batch, one PUT for each part and a POST that lists their ETags."""
    hub.hub.part_size = 5 * 10**6
    upload(api, model)
    paths = [r.path for r in requests(hub, 'PUT')]  # the digest before the number may begin with any digit
    assert [sum(path.endswith(f'/{n}') for path in paths) for n in (1, 2, 3)] == [1, 1, 1]
    assert download() == CONTENT


@pytest.mark.parametrize(('header', 'status', 'start', 'stop'), [
    ('bytes=5-9', 206, 5, 10), ('bytes=11999990-', 206, 11999990, 12 * 10**6), ('bytes=-7', 206, -7, None),
    ('bytes=5-99999999', 206, 5, None), ('lines=1-2', 200, 0, None)])
def test_range(hub, api, model, header, status, start, stop):
    """First and last byte, open end, suffix, past the end, and another unit, in plain HTTP."""
    upload(api, model)
    request = urllib.request.Request(f'{hub.endpoint}/{REPO}/resolve/main/{WEIGHTS}', headers={'Range': header})
    with urllib.request.urlopen(request) as response:
        assert response.status == status
        assert response.read() == CONTENT[start:stop]
        assert response.headers['Content-Length'] == str(len(CONTENT[start:stop]))
        assert response.headers['Accept-Ranges'] == 'bytes'


@pytest.mark.parametrize('size', [12 * 10**6, 10**9])
def test_range_behind_the_end(hub, api, model, size):
    """Observed: the client raises HfHubHTTPError with the range in its message."""
    upload(api, model)
    with pytest.raises(HfHubHTTPError, match=r'bytes \*/12000000') as caught:
        http_get(f'{hub.endpoint}/{REPO}/resolve/main/{WEIGHTS}', io.BytesIO(), resume_size=size)
    assert caught.value.response.status_code == 416


def test_partial_file_is_completed(hub, api, model, tmp_path):
    """Observed: http_get with resume_size asks for the rest only. hf_hub_download never does that across calls: its
    partial file has a random name and is deleted on failure."""
    upload(api, model)
    path = tmp_path / 'partial'
    path.write_bytes(CONTENT[:700])
    with path.open('ab') as file:
        http_get(f'{hub.endpoint}/{REPO}/resolve/main/{WEIGHTS}', file, resume_size=700, expected_size=len(CONTENT))
    assert path.read_bytes() == CONTENT
    assert [r.headers['range'] for r in requests(hub, 'GET', 'resolve')] == ['bytes=700-']


def test_subprocess(hub, api, model):
    """Observed: HF_ENDPOINT, HF_TOKEN and HF_HOME are enough for a process that names none of them."""
    upload(api, model)
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download('{REPO}', '{WEIGHTS}'), end='')"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert Path(done.stdout).read_bytes() == CONTENT
    assert requests(hub, 'GET', 'resolve')[0].headers['authorization'] == f'Bearer {hub.token}'


# Faults


def test_faults_are_counted(hub, api):
    """A fault strikes the first requests that match it, as often as asked, and lists them."""
    fault = hub.fault('GET', '/api/models/.*/revision/v', 'status', times=2, status=418)
    api.model_info(REPO)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError):
            api.model_info(REPO, revision='v')
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision='v')
    assert fault.hits == [f'/api/models/{REPO}/revision/v'] * 2
    assert [r.status for r in requests(hub, 'GET')] == [200, 418, 418, 404]
    with pytest.raises(ValueError, match='no such fault'):
        hub.fault('GET', '', 'explode')
    with pytest.raises(TypeError):
        hub.fault('GET', '', 'slow', later=1)


@pytest.mark.parametrize(('method', 'kind', 'details', 'expected'), [
    ('HEAD', 'status', dict(status=401), HfHubHTTPError),
    ('HEAD', 'status', dict(status=403), LocalEntryNotFoundError),
    ('HEAD', 'status', dict(status=404), LocalEntryNotFoundError),
    ('HEAD', 'status', dict(status=409), LocalEntryNotFoundError),
    ('HEAD', 'status', dict(status=500), []),
    ('HEAD', 'status', dict(status=503, times=2), [1]),
    ('HEAD', 'status', dict(RATE_LIMIT, times=2), [2]),
    ('HEAD', 'status', dict(status=503, times=7), LocalEntryNotFoundError),
    ('HEAD', 'cut', {}, ReadError),
    ('HEAD', 'slow', dict(before=1.5), []),
    ('GET', 'status', dict(status=401), HfHubHTTPError),
    ('GET', 'status', dict(status=403), HfHubHTTPError),
    ('GET', 'status', dict(status=404), HfHubHTTPError),
    ('GET', 'status', dict(status=409), HfHubHTTPError),
    ('GET', 'status', RATE_LIMIT, [2]),
    ('GET', 'status', dict(status=500), HfHubHTTPError),
    ('GET', 'status', dict(status=503), HfHubHTTPError),
    ('GET', 'cut', dict(where='request'), ReadError),
    ('GET', 'cut', dict(after=5 * 10**6), ReadError),
    ('GET', 'truncate', dict(after=5 * 10**6), [1]),
    ('GET', 'truncate', dict(times=5), [1] * 5),
    ('GET', 'truncate', dict(times=6), RemoteProtocolError),
    ('GET', 'slow', dict(before=1.5), [1]),
    ('GET', 'slow', dict(between=0.001), []),
])
def test_download_with_fault(hub, api, model, download, waits, monkeypatch, method, kind, details, expected):
    """Observed, with the waits in seconds where the client tries again and succeeds: a HEAD is retried at once and then
    with growing waits after 429, 5xx and a timeout, not after other statuses, which in an empty cache end as
    LocalEntryNotFoundError, except 401. A GET is retried after 429, a timeout and an orderly close, up to 5 times
    without data, but neither after 5xx nor after a reset, which reaches the caller as httpx2.ReadError, from a HEAD as
    well. Retry-After: 1 waits 2 s. A failure leaves no file behind, and the next call succeeds.
    """
    upload(api, model)
    timeout = 1 if 'before' in details else 10  # a busy machine must not run into the short one
    monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', timeout)
    fault = hub.fault(method, 'resolve', kind, **details)
    if isinstance(expected, list):
        assert download(etag_timeout=timeout) == CONTENT
        assert waits == expected
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 the exact type is compared
            download(etag_timeout=timeout)
        assert caught.type is expected
        assert len(fault.hits) == fault.times
        assert download() == CONTENT
    assert len(fault.hits) == fault.times


def test_download_resumes_in_steps_of_10_mib(hub, api, model, download, waits):
    """Observed: within a call the client asks for the rest after what it has written, and it writes whole chunks of
    10 MiB, so that 11 MB received count as 10 MiB and 5 MB as nothing."""
    upload(api, model)
    hub.fault('GET', 'resolve', 'truncate', after=5 * 10**6)
    hub.fault('GET', 'resolve', 'truncate', after=11 * 10**6)
    assert download() == CONTENT
    assert [r.headers.get('range') for r in requests(hub, 'GET', 'resolve')] == [None, None, 'bytes=10485760-']
    assert waits == [1, 1]


def test_corrupt_download_is_not_noticed(hub, api, model, download):
    """Observed: the client compares the size only. The wrong file is in the cache from then on; its ETag, the sha256,
    tells."""
    upload(api, model)
    hub.fault('GET', 'resolve', 'corrupt', after=1000)
    wrong = CONTENT[:1000] + bytes([CONTENT[1000] ^ 255]) + CONTENT[1001:]
    assert download() == wrong
    assert download() == wrong
    assert download(force_download=True) == CONTENT


def test_cached_file_needs_no_hub(hub, api, model, download, waits):
    """Observed: with the file in the cache, one HEAD that fails by status is enough to return it, without waits and
    without a sign; a reset of the HEAD raises httpx2.ReadError all the same."""
    upload(api, model)
    download()
    fault = hub.fault('HEAD', 'resolve', 'status', status=503)
    assert download() == CONTENT
    assert (len(fault.hits), waits) == (1, [])
    hub.fault('HEAD', 'resolve', 'cut')
    with pytest.raises(ReadError):
        download()


PREUPLOAD, BATCH, VERIFY, COMMIT = (('POST', path) for path in ('/preupload/', '/batch', '/verify', '/commit/'))
PUT = ('PUT', '/upload/')


@pytest.mark.parametrize(('request_line', 'kind', 'details', 'expected'), [
    *[(line, 'status', dict(status=status), error) for line, error in (
        (PREUPLOAD, HfHubHTTPError), (BATCH, HfHubHTTPError), (PUT, RuntimeError), (VERIFY, RuntimeError),
        (COMMIT, HfHubHTTPError)) for status in (401, 403, 404, 409)],
    *[(line, kind, details, waits) for line in (PREUPLOAD, BATCH, PUT, VERIFY) for kind, details, waits in (
        ('status', RATE_LIMIT, [2]), ('status', dict(status=500), [1]), ('status', dict(status=503, times=2), [1, 2]),
        ('cut', dict(after=9), [1]), ('cut', dict(where='response'), [1]))],
    *[(line, 'truncate', {}, [1]) for line in (PREUPLOAD, BATCH, VERIFY)],
    (PUT, 'cut', dict(after=5 * 10**6), [1]),
    (PUT, 'status', dict(status=503, times=6), RuntimeError),
    (BATCH, 'status', dict(status=503, times=6), HfHubHTTPError),
    (PREUPLOAD, 'corrupt', {}, BadRequestError),
    (BATCH, 'corrupt', {}, BadRequestError),
    (PUT, 'corrupt', dict(after=1000), RuntimeError),
    (VERIFY, 'corrupt', {}, RuntimeError),
    (COMMIT, 'corrupt', {}, BadRequestError),
    (COMMIT, 'status', RATE_LIMIT, HfHubHTTPError),
    (COMMIT, 'status', dict(status=500), HfHubHTTPError),
    (COMMIT, 'status', dict(status=503), HfHubHTTPError),
    (COMMIT, 'cut', dict(after=9), ReadError),
])
def test_upload_with_fault(hub, api, model, download, waits, request_line, kind, details, expected):
    """Observed, with the waits in seconds where the client tries again and succeeds: preupload, batch, PUT and verify
    are retried 5 times after 429, 5xx and a connection that breaks, with waits 1, 2, 4, 8, 8, but not after other
    statuses. The commit is never retried. Errors of PUT and verify come as RuntimeError with the HTTP error as its
    cause. After an exception the repository is as before, and the same call again succeeds.
    """
    before = hub.repos[REPO].refs['main']
    fault = hub.fault(*request_line, kind, **details)
    if isinstance(expected, list):
        upload(api, model)
        assert waits == expected
    else:
        with pytest.raises(Exception) as caught:  # noqa: PT011 the exact type is compared
            upload(api, model)
        assert caught.type is expected
        if expected is RuntimeError:
            assert isinstance(caught.value.__cause__, HfHubHTTPError)
        assert waits == ([1, 2, 4, 8, 8] if fault.times == 6 else [])
        assert list(hub.repos[REPO].commits) == [before]
        assert hub.repos[REPO].refs == {'main': before}
        upload(api, model)
    assert len(fault.hits) == fault.times
    assert download() == CONTENT
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(('kind', 'expected'), [('cut', ReadError), ('truncate', RemoteProtocolError)])
def test_commit_whose_response_is_lost(hub, api, model, kind, expected):
    """Observed: the client raises although the commit is there; the same call again finds nothing to do."""
    hub.fault('POST', '/commit/', kind, where='response')
    with pytest.raises(expected):
        upload(api, model)
    head = hub.repos[REPO].refs['main']
    assert set(hub.repos[REPO].commits[head]) == {'.gitattributes', 'config.json', WEIGHTS}
    assert upload(api, model).oid == head


def test_slow_upload_has_no_timeout(hub, api, model, waits):
    """Observed: uploads wait for the response as long as it takes, whatever HF_HUB_DOWNLOAD_TIMEOUT is."""
    for method, path in (PREUPLOAD, BATCH, PUT, VERIFY, COMMIT):
        hub.fault(method, path, 'slow', before=0.2)
    start = time.monotonic()
    upload(api, model)
    assert time.monotonic() - start > 1
    assert waits == []


def test_second_server_is_another_hub(hub, api):
    """Observed: the client keeps its connections; a server that has ended takes them along."""
    with HubServer() as other:
        client = HfApi(endpoint=other.endpoint, token=other.token)
        assert not client.repo_exists(REPO)
    assert api.repo_exists(REPO)
    with pytest.raises(Exception, match='refused'):
        client.repo_exists(REPO)
