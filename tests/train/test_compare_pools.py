"""compare_pools.py: its statistics against known values, and a run on two photographs."""
import json
import shutil
from pathlib import Path

import pytest

from compare_pools import main, mcnemar
from timm_lossattn.models.lite_weights import lite_file

DATA = Path(__file__).parents[1] / 'data'


def test_mcnemar():
    """Two-sided binomial tails: 5 against 0 is 2/32, equal numbers are no evidence at all."""
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.


@pytest.mark.skipif(lite_file('tf_efficientnet_lite0') is None, reason="pip install 'timm-lossattn[imagenet]'")
def test_run(tmp_path, capsys):
    """An Egyptian cat and an espresso in folders of their synsets are both right, whatever the pooling."""
    for synset, file in (('n02124075', 'photo_cat.jpg'), ('n07920052', 'photo_coffee.jpg')):
        (tmp_path / 'images' / synset).mkdir(parents=True)
        shutil.copy(DATA / file, tmp_path / 'images' / synset / file)
    flags = ['--models', 'tf_efficientnet_lite0', '--output', str(tmp_path / 'out'), '--images']
    assert main([*flags, str(tmp_path / 'images')]) == 0
    result = json.loads((tmp_path / 'out' / 'pools.json').read_text())
    found = result['models']['tf_efficientnet_lite0']
    assert found['correct']['stock'] == '11'
    assert found['rows']['0.0']['zero_patches'] == 0
    assert found['rows']['1.0']['zero_patches'] > 30
    assert '| `tf_efficientnet_lite0` | mean (stock) | 100.0 |' in (tmp_path / 'out' / 'pools.md').read_text()
    assert main([*flags, str(tmp_path)]) == 2
    assert '--images: no synset folder' in capsys.readouterr().err
