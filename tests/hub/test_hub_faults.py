"""What the real client (huggingface_hub 2.4.0) does when a transfer with hub_server.py fails."""
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

from hub_calls import CONTENT, REPO, WEIGHTS, requests, upload

httpx2 = pytest.importorskip('httpx2', reason='what is measured here is huggingface_hub 2, which brings it')
ReadError, RemoteProtocolError = httpx2.ReadError, httpx2.RemoteProtocolError

RATE_LIMIT = dict(status=429, headers={'Retry-After': '1'})


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
