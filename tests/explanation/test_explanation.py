"""explanation.py: other comparisons of the same forward pass, and what is shown and saved."""
import io
import json

import pytest
import timm
import torch
from PIL import Image

import timm_lossattn  # noqa: F401  (registers the models)
from fake_patch_model import GRID, SIZE, planted
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.evidence import leave_one_out

NANO = 'resnet18_lossattn_conv_nano'


def test_own_copy():
    """What the caller does to the images afterwards does not change the explanation."""
    x = torch.zeros(1, 3, 32, 32)
    e = explain(timm.create_model(NANO).eval(), x)
    before = e.source(0).image.tobytes()
    x.fill_(2.)
    assert e.source(0).image.tobytes() == before


def test_save(tmp_path):
    """A picture and the numbers for each image; wrong counts are refused before anything is written."""
    e = explain(timm.create_model(NANO).eval(), torch.zeros(2, 3, 32, 32))
    assert e.save(tmp_path / 'a' / 'b', notes='mine') == [tmp_path / 'a' / 'b' / f'{i}.png' for i in range(2)]
    assert sorted(p.name for p in (tmp_path / 'a' / 'b').iterdir()) == ['0.json', '0.png', '1.json', '1.png']
    assert json.loads((tmp_path / 'a' / 'b' / '1.json').read_text()) == {'notes': 'mine', **e.to_dict(1)}
    with pytest.raises(ValueError, match='names and titles must have 2 entries'):
        e.save(tmp_path / 'c', names=['one'])
    for names in (['a', 'a'], ['a', '../b'], ['a', 'b/c']):
        with pytest.raises(ValueError, match='different plain file names'):
            e.save(tmp_path / 'c', names=names)
    assert not (tmp_path / 'c').exists()


def test_show(monkeypatch):
    """One PNG for each image goes to the notebook."""
    shown = []
    monkeypatch.setattr('IPython.display.display', shown.append)
    explain(timm.create_model(NANO).eval(), torch.zeros(2, 3, 32, 32)).show()
    assert [image.data[:4] for image in shown] == [b'\x89PNG'] * 2


def test_versus():
    """Another comparison of the same forward pass equals explaining anew; the target and strangers are refused."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    anew = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    torch.testing.assert_close(e.versus([4, 1]).evidence, anew.evidence)
    torch.testing.assert_close(e.versus(None).versus('rest').evidence, e.evidence)
    assert e.versus(1).against.tolist() == [1, 1]
    for wrong, message in ((2, 'must differ from the target'), (5, r'in \[0, 4\]'), ('dog', "'dog'")):
        with pytest.raises(ValueError, match=message):
            e.versus(wrong)


@pytest.mark.parametrize('name', [NANO, 'lossattn.test_resnet', 'lossattn.test_vit'])
def test_leave_one_out(name):
    """Patch by patch, the lead of the sum without it, whose weights are made to add up to one again."""
    torch.manual_seed(0)
    args = {'global_pool': 'avg'} if 'vit' in name else {}
    model = timm.create_model(name, num_classes=4, **args).eval()
    e = explain(model, torch.randn(2, 3, *((32, 32) if name == NANO else model.default_cfg['input_size'][1:])))
    alpha, v = e.prediction.alpha.double(), e.direction.double()
    held = e.prediction.contributions.double() / alpha.unsqueeze(2)  # the logits of each patch, if the head is affine
    lost = e.leave_one_out().double()
    for b in range(2):
        lead = (alpha[b] @ held[b]) @ v[b]
        for m in range(alpha.shape[1]):
            others = torch.arange(alpha.shape[1]) != m
            weights = alpha[b, others] / alpha[b, others].sum()
            assert float(lost[b, m]) == pytest.approx(float(lead - (weights @ held[b, others]) @ v[b]), abs=1e-5)


def test_leave_one_out_of_one_patch():
    """Without the only patch that counts nothing is left."""
    lost = leave_one_out(torch.tensor([[3., 0.], [1., 2.]]), torch.tensor([[1., 0.], [0.5, 0.5]]))
    torch.testing.assert_close(lost, torch.tensor([[3., 0.], [-1., 1.]]))


def test_json_holds_what_is_compared():
    """The map of the target and of the class it is compared with; every class on request."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    shares = e.to_dict(0)['contributions']
    assert set(shares) == {'target', 'against'}
    assert (shares['target'][1][2], shares['against'][1][2]) == (3., -2.)
    assert set(e.versus('rest').to_dict(0)['contributions']) == {'target'}
    assert torch.tensor(e.to_dict(0, all_classes=True)['contributions']).shape == (*GRID, 5)


def test_notebook_shows_the_picture():
    """An Explanation at the end of a cell is the picture of its first image."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    with Image.open(io.BytesIO(e._repr_png_())) as picture:
        assert picture.format == 'PNG'
        assert min(picture.size) > 100
