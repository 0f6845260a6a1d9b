"""What several test files need."""
import pytest

from kill_and_resume import make_images


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Image folder of two classes, 16 training and 8 validation images of 32×32 pixels each."""
    root = tmp_path_factory.mktemp('data')
    make_images(root, size=32, train=16, val=8)
    return root
