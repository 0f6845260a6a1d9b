"""train/compare_explanations.py, figures.py, receptive_field.py: files, numbers, known boxes and fields."""
import json

import pytest
import timm
import torch
from test_prepare import tiny_folder  # noqa: F401  (a fixture)

import compare_explanations
import figures
import prepare
import receptive_field

MODEL = 'resnet18_lossattn_conv_nano_s2'


@pytest.fixture(scope='module')
def flags(tiny_folder, tmp_path_factory):  # noqa: F811
    """Dataset with boxes and a random model of two classes."""
    root = tmp_path_factory.mktemp('compare')
    assert prepare.main(['tiny-imagenet', str(tiny_folder), str(root / 'set')]) == 0
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2)
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(model.state_dict(), root / 'model.pt')
    return ['--model', MODEL, '--num-classes', '2', '--checkpoint', str(root / 'model.pt'), '--dataset',
            f'hfds/{root / "set"}', '--data-dir', str(root), '--workers', '0']


def test_hot_box():
    """The square around the hot pixels; what says nothing or is cold stays outside."""
    heat = torch.zeros(8, 8)
    heat[2, 3], heat[4, 4], heat[7, 7] = 1., 0.2, 0.19
    heat[0, 0] = torch.nan
    assert compare_explanations.hot_box(heat).tolist() == [2, 2, 5, 5]
    for nothing in (-1., 0.):
        assert compare_explanations.hot_box(torch.full((8, 8), nothing)).tolist() == [0, 0, 0, 0]


def test_compare(flags, tmp_path, capsys):
    """Every tool has every measure; ours adds up, integrated gradients nearly, and the picture is there."""
    assert compare_explanations.main([*flags, '--images', '4', '--batch-size', '2', '--ig-steps', '64', '--rows', '2',
                                      '--output', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'compare.json').read_text())
    tools = result['tools']
    assert result['images'] == 4
    names = ['ours', 'ours, logit alone', 'Grad-CAM', 'integrated gradients (64 steps)']
    assert sorted(tools) == sorted([*names, 'ours, α > 0'])
    for name in names:
        assert 0 <= tools[name]['deletion'] <= 1
        assert 0 <= tools[name]['pointing'] <= 100
        assert tools[name]['ms'] > 0
    for name in names[:2]:
        assert tools[name]['completeness_worst'] <= 1e-5
        assert tools[name]['complete'] == 100
    assert tools['Grad-CAM']['complete'] == 0
    assert tools[names[3]]['completeness_worst'] < tools['Grad-CAM']['completeness_worst']
    assert (tmp_path / 'compare.md').read_text() in capsys.readouterr().out
    assert (tmp_path / 'compare.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('number', [4, 5, 6])
def test_figures(flags, tmp_path, number):
    """A picture for each of the paper's figures."""
    out = tmp_path / 'figure.png'
    assert figures.main([*flags, '--figure', str(number), '--images', '2', '--columns', '2', '--output',
                         str(out)]) == 0
    assert out.read_bytes().startswith(b'\x89PNG')


def test_square_shares():
    """Evidence in the box's middle and in a corner of the image; of a flat field, squares of whole pixels."""
    field = torch.zeros(32, 32)
    field[16, 16], field[0, 0] = 3., 1.
    shares = receptive_field.square_shares(field, [12, 12, 21, 21])
    assert list(shares)[:3] == [1, 3, 5]
    assert shares[1] == shares[31] == 0.75
    assert shares[33] == 1
    assert receptive_field.side_for(shares, 0.75) == 1
    assert receptive_field.side_for(shares, 0.9) == 33
    flat = receptive_field.square_shares(torch.ones(64, 64), [16, 16, 34, 34])  # centre on a corner of pixels
    assert flat[18] == pytest.approx(18 ** 2 / 64 ** 2)


def test_receptive_field(flags, tmp_path, capsys):
    """Without 3×3 convolutions that reach beyond it, a patch sees its box and nothing else; a real one sees more."""
    assert receptive_field.main([*flags, '--images', '2', '--output', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'receptive_field.json').read_text())
    assert result['patch_box'] == [24, 24, 42, 42]
    assert 0 < result['share_in_patch_box'] < 1
    assert (18 / 64) ** 2 < result['pixels_with_influence'] <= 1
    assert (tmp_path / 'receptive_field.png').read_bytes().startswith(b'\x89PNG')

    model = timm.create_model('resnet18_lossattn_conv_nano').eval()
    torch.nn.init.normal_(model.head.fc.weight)
    for stage in (model.backbone.stem, model.backbone.stages):
        for layer in stage.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                torch.nn.init.dirac_(layer.weight)
    field = receptive_field.influence(model, torch.rand(2, 3, 32, 32), 21)  # row 3, column 3
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[12:21, 12:21] = True
    assert float(field[:, inside].sum()) > 0
    assert float(field[:, ~inside].sum()) == 0


@pytest.mark.parametrize('script', [
    compare_explanations.main, receptive_field.main, lambda argv: figures.main([*argv, '--figure', '4'])])
def test_errors(script, capsys):
    assert script(['--model', 'resnet18_lossattn_conv']) == 2
    assert 'has no weights' in capsys.readouterr().err.strip().splitlines()[-1]
