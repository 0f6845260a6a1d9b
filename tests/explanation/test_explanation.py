"""explanation.py: other comparisons of the same forward pass, and what is shown and saved."""
import io
import json
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from fake_patch_model import GRID, SIZE, planted
from timm_lossattn import loss_attention
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.evidence import leave_one_out
from timm_lossattn.models.probe import split_patches

NANO = 'resnet18_lossattn_conv_nano'
SHIP = Path(__file__).parents[1] / 'data' / 'cifar10_test_00001_ship.png'


def test_own_copy():
    """What the caller does to the images afterwards does not change the explanation."""
    x = torch.zeros(1, 3, 32, 32)
    e = explain(timm.create_model(NANO).eval(), x)
    before = e.source(0).image.tobytes()
    x.fill_(2.)
    assert e.source(0).image.tobytes() == before


def test_equal_logits():
    """The first of equal classes is the predicted one, in the JSON's first five and in the picture's next ones too."""
    model = timm.create_model(NANO).eval()
    torch.nn.init.zeros_(model.head.fc.weight)
    torch.nn.init.zeros_(model.head.fc.bias)
    e = explain(model, torch.randn(2, 3, 32, 32))
    assert e.predicted.tolist() == [0, 0]
    assert e.ranked().tolist() == [[0, 1, 2, 3, 4]] * 2
    assert [row['class'] for row in e.to_dict(1)['top5']] == [0, 1, 2, 3, 4]
    assert int(e.why_not().against[0]) == 1
    assert e.ranked(20).shape == (2, 10)
    assert e.ranked(4, 1).tolist() == [0, 1, 2, 3]


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


def test_save_under_the_names_of_the_files(tmp_path):
    """Files are called as the pictures are; what is there, the picture itself too, is not overwritten."""
    model = timm.create_model(NANO).eval()
    (tmp_path / 'other').mkdir()
    for copy in (tmp_path / 'ship.png', tmp_path / 'other' / 'Ship.png'):
        copy.write_bytes(SHIP.read_bytes())
    two = explain(model, [tmp_path / 'ship.png', str(tmp_path / 'other' / 'Ship.png')])
    assert [p.name for p in two.save(tmp_path / 'out')] == ['ship.png', 'Ship-2.png']
    assert [p.name for p in explain(model, tmp_path / 'ship.png').save(tmp_path / 'out')] == ['ship-3.png']
    assert len(list((tmp_path / 'out').iterdir())) == 6
    assert explain(model, tmp_path / 'ship.png').save(tmp_path) == [tmp_path / 'ship-2.png']
    assert (tmp_path / 'ship.png').read_bytes() == SHIP.read_bytes()
    mine = explain(model, Image.open(SHIP)).save(tmp_path / 'out', names=['ship'])  # a name that is asked for
    assert mine == [tmp_path / 'out' / 'ship.png']
    assert len(list((tmp_path / 'out').iterdir())) == 6
    longest = tmp_path / f'{"s" * 251}.png'
    longest.write_bytes(SHIP.read_bytes())
    names = [explain(model, longest).save(tmp_path / 'out')[0].name for _ in range(2)]
    assert names == [f'{"s" * 250}.png', f'{"s" * 248}-2.png']


def test_name_in_the_picture():
    """The file's name stands above the panels unless another title is given; without one there is no empty line."""
    def texts(figure):
        return [text.get_text() for text in figure.texts]

    model = timm.create_model(NANO).eval()
    named, nameless = explain(model, SHIP), explain(model, Image.open(SHIP))
    assert SHIP.name in texts(named.figure())
    assert SHIP.name not in texts(named.figure(title='another'))
    assert nameless.figure().get_figheight() == named.figure(title='').get_figheight() < named.figure().get_figheight()


def test_repr():
    """Predictions, what is explained if it is something else, and the grid; of many images the first ones."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), target=[2, 3])
    p = e.probabilities
    assert repr(e) == (f'<Explanation of 2 images, 3×4 patches: class 2 {100 * float(p[0, 2]):.0f} %; '
                       f'class 0 {100 * float(p[1, 0]):.0f} %, explained: class 3>')
    assert repr(explain(timm.create_model(NANO).eval(), torch.zeros(5, 3, 32, 32))).endswith('; …>')


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


@pytest.mark.parametrize('against', ['rest', 'mean'])
def test_independent_classes_have_no_rivals(against):
    e = explain(planted(), torch.zeros(2, 3, *SIZE), multi_label=True)
    assert e.versus(1).versus(against).against is None
    assert e.versus(against).answer().startswith('class 2, its logit: ')


def test_notes_have_names_of_their_own(tmp_path):
    """They are arguments of no function on the way, and no field of the numbers."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    e.save(tmp_path / 'out', index=3)
    assert json.loads((tmp_path / 'out' / '0.json').read_text())['index'] == 3
    with pytest.raises(ValueError, match='data: this is a field'):
        e.save(tmp_path / 'other', data='my set')
    assert list((tmp_path / 'other').iterdir()) == []


def test_leave_one_out():
    """With ξ = 0 it is what the model's own weights make of the other patches alone."""
    torch.manual_seed(0)
    model = loss_attention(timm.create_model('test_resnet', num_classes=4), xi=0.).eval()
    x = torch.randn(2, 3, 160, 160)
    e = explain(model, x)
    h = split_patches(model.forward_features(x), model.patch_layout, model.patch_prefix)
    p = model.logits_of_patches(h)
    M = h.shape[1]
    for m in range(M):
        others = torch.arange(M) != m
        alpha = model.patch_weights(h[:, others], p[:, others])
        lead = ((alpha.unsqueeze(1) @ p[:, others]).squeeze(1) * e.direction).sum(1)
        torch.testing.assert_close(e.leave_one_out()[:, m], e.evidence.sum(1) - lead, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['lossattn.test_resnet', 'lossattn.test_vit'])
def test_leave_one_out_of_held_weights(name):
    """Patch by patch, the lead of the sum without it, whose weights add up to one again; some of them are 0."""
    torch.manual_seed(0)
    args = {'global_pool': 'avg'} if 'vit' in name else {}
    model = timm.create_model(name, num_classes=4, xi=1., **args).eval()
    e = explain(model, torch.randn(2, 3, *model.default_cfg['input_size'][1:]))
    alpha = e.prediction.alpha.double()
    assert (alpha == 0).any()
    evidence, lost = e.evidence.double(), e.leave_one_out().double()
    for b in range(2):
        for m in range(alpha.shape[1]):
            others = torch.arange(alpha.shape[1]) != m
            lead = float(evidence[b, others].sum() / alpha[b, others].sum())
            assert float(lost[b, m]) == pytest.approx(float(evidence[b].sum()) - lead, abs=1e-5)


def test_leave_one_out_of_a_fine_grid():
    """Memory and time are those of M numbers, not of M × M: 127² patches of a 512×512 image."""
    M = 127 ** 2
    alpha = torch.rand(1, M).softmax(dim=1)
    evidence = torch.randn(1, M) * alpha
    e, a = evidence.double(), alpha.double()
    expected = e.sum() - (e.sum() - e) / (a.sum() - a)
    torch.testing.assert_close(leave_one_out(evidence, alpha), expected.float(), rtol=1e-4, atol=1e-9)


def test_leave_one_out_of_one_patch():
    """Without the only patch that counts nothing is left."""
    lost = leave_one_out(torch.tensor([[3., 0.], [1., 2.]]), torch.tensor([[1., 0.], [0.5, 0.5]]))
    torch.testing.assert_close(lost, torch.tensor([[3., 0.], [-1., 1.]]))


@pytest.mark.parametrize('others', [1e-6, 1e-9, 1e-20])
def test_leave_one_out_of_nearly_all_the_weight(others):
    """Against fractions, which do not round: 1 − α is no number of float32 any more."""
    q = [Fraction(5), Fraction(-2), Fraction(7, 2)]
    alpha = torch.tensor([[1., others, 3. * others]])
    evidence = alpha * torch.tensor([[float(value) for value in q]])
    a, e = ([Fraction(value) for value in t[0].tolist()] for t in (alpha, evidence))
    expected = [float(sum(e) - (sum(e) - e[m]) / (sum(a) - a[m])) for m in range(3)]
    lost = leave_one_out(evidence, alpha)
    assert lost.dtype == torch.float32
    assert lost[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_json_holds_what_is_compared():
    """The map of the target and of the class it is compared with; every class on request."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE), against=[4, 1])
    shares = e.to_dict(0)['contributions']
    assert set(shares) == {'target', 'against'}
    assert (shares['target'][1][2], shares['against'][1][2]) == (3., -2.)
    assert set(e.versus('rest').to_dict(0)['contributions']) == {'target'}
    assert torch.tensor(e.to_dict(0, all_classes=True)['contributions']).shape == (*GRID, 5)


@pytest.mark.parametrize('pool', ['lossattn', 'attn', 'avg'])
def test_logits_that_are_not_finite_are_not_drawn(tmp_path, pool):
    """Nothing is said of an image with NaN, and nothing written; another one of its batch is explained."""
    x = torch.rand(2, 3, 32, 32)
    x[1, 0, 5, 5] = float('nan')
    explanation = explain(timm.create_model('resnet18_lossattn_conv_nano', global_pool=pool).eval(), x)
    assert explanation.to_dict(0)['evidence']
    assert explanation.boxes.isfinite().all()
    for answer in (explanation.figure, explanation.to_dict, explanation.to_json, explanation.answer,
                   explanation.heat_map):
        with pytest.raises(ValueError, match='image 1: its logits or contributions are not finite'):
            answer(1)
    with pytest.raises(ValueError, match='image 1'):
        explanation.save(tmp_path, ['a', 'b'])
    assert {file.name for file in tmp_path.iterdir()} == {'a.png', 'a.json'}


def test_notebook_shows_the_picture():
    """An Explanation at the end of a cell is the picture of its first image."""
    e = explain(planted(), torch.zeros(2, 3, *SIZE))
    with Image.open(io.BytesIO(e._repr_png_())) as picture:
        assert picture.format == 'PNG'
        assert min(picture.size) > 100
