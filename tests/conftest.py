"""What several test files need."""
import pytest
import torch
from PIL import Image


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Image folder of two classes, a bright disc of noise on the left or on the right."""
    root = tmp_path_factory.mktemp('data')
    generator = torch.Generator().manual_seed(0)
    for split, n in (('train', 16), ('val', 8)):
        for k, name in enumerate(('left', 'right')):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 80, (32, 32, 3), generator=generator)
                x[8:24, 16 * k:16 * k + 16] += 150
                Image.fromarray(x.byte().numpy()).save(root / split / name / f'{i}.png')
    return root
