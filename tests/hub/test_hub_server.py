"""hub_server.py against the real client (huggingface_hub 2.4.0): the protocol, without failures."""
import io
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get

from hub_calls import CONFIG, CONTENT, REPO, WEIGHTS, requests, upload
from hub_server import HubServer


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


def test_second_server_is_another_hub(hub, api):
    """Observed: the client keeps its connections; a server that has ended takes them along."""
    with HubServer() as other:
        client = HfApi(endpoint=other.endpoint, token=other.token)
        assert not client.repo_exists(REPO)
    assert api.repo_exists(REPO)
    with pytest.raises(Exception, match='refused'):
        client.repo_exists(REPO)
