"""A repository of the Hub, and calls of its client."""
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download

from hub_calls import CONFIG, CONTENT, REPO, WEIGHTS


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
