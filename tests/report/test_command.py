"""report/command.py: flags that say where things are, and what the model is made to do."""
import datasets
import numpy as np
import pytest
from PIL import Image

from timm_lossattn.cli import main
from timm_lossattn.models.entrypoints import CIFAR10_LABELS
from timm_lossattn.report.table import ReportTable

NANO = 'resnet18_lossattn_conv_nano'


@pytest.fixture
def columns(tmp_path, monkeypatch):
    """A data set whose images and labels have other names than usual, beside a decoy with the usual ones."""
    draw = np.random.default_rng(0)
    images, decoys = ([Image.fromarray(draw.integers(0, 256, (height, 32, 3), dtype=np.uint8)) for _ in range(4)]
                      for height in (40, 50))
    kind = datasets.ClassLabel(names=list(CIFAR10_LABELS))
    rows = datasets.Dataset.from_dict(
        {'image': decoys, 'img': images, 'label': [1, 1, 1, 1], 'fine': [3, 0, 9, 3]}, features=datasets.Features(
            {'image': datasets.Image(), 'img': datasets.Image(), 'label': kind, 'fine': kind}))
    (tmp_path / 'set').mkdir()
    rows.to_parquet(str(tmp_path / 'set' / 'test-00000-of-00001.parquet'))
    monkeypatch.chdir(tmp_path)
    return f'hfds/{tmp_path / "set"}'


def test_columns_and_xi(columns, tmp_path):
    """--input-key and --target-key choose columns; of ξ = 1 more patches have no weight at all."""
    common = ['report', columns, '--data-dir', str(tmp_path), '--split', 'test', '--model', NANO, '--workers', '0']
    chosen = ['--input-key', 'img', '--target-key', 'fine']
    assert main([*common, *chosen, '--xi', '1', '--out', 'one']) == 0
    assert main([*common, *chosen, '--out', 'own']) == 0
    one, own = ReportTable('one/report.parquet'), ReportTable('own/report.parquet')
    assert (one.notes['xi'], own.notes['xi']) == (1, 0.1)
    weights = {}
    for name, table in (('one', one), ('own', own)):
        rows = table.rows(range(4))
        assert [row['label'] for row in rows] == [3, 0, 9, 3]
        assert {(row['width'], row['height']) for row in rows} == {(32, 40)}
        weights[name] = np.array([row['alpha'] for row in rows])
        assert weights[name].sum(1) == pytest.approx(1, abs=1e-2)
    assert (weights['one'] == 0).any(1).all()
    assert (weights['one'] == 0).sum() > (weights['own'] == 0).sum()
    assert main([*common, '--out', 'usual']) == 0
    usual = ReportTable('usual/report.parquet').rows(range(4))
    assert [(row['label'], row['height']) for row in usual] == [(1, 50)] * 4
