"""Heat maps in the image's own pixels, the patches that hold half of the evidence, and the class to compare with."""
import dataclasses
from functools import cache

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.interpolate import RegularGridInterpolator

from cli_run import CAT, NANO, random_model
from timm_lossattn import load_model
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.geometry import cell_edges, interpolate
from timm_lossattn.explanation.preprocessing import preprocess


def test_interpolation_against_scipy():
    """Bilinear between the middles as scipy does it; beyond the outer middles constant; outside of all patches 0."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 4))
    rows = np.array([[2., 12.], [8., 18.], [14., 24.]])  # overlapping
    columns = np.array([[0., 10.], [10., 20.], [20., 30.], [30., 40.]])
    y, x = np.linspace(0, 27, 55), np.linspace(-1, 42, 87)
    peer = RegularGridInterpolator((rows.mean(1), columns.mean(1)), values)
    within = np.stack(np.meshgrid(y.clip(7, 19), x.clip(5, 35), indexing='ij'), axis=-1)
    inside = ((y >= 2) & (y < 24))[:, None] & ((x >= 0) & (x < 40))
    np.testing.assert_allclose(interpolate(values, rows, columns, y, x), peer(within) * inside, atol=1e-12)


def test_nearest_against_a_loop():
    """Without smoothing each point has the value of the patch whose middle is nearest."""
    values = np.arange(1., 13.).reshape(3, 4)
    rows = np.array([[0., 9.], [4., 13.], [8., 17.]])
    columns = np.array([[0., 9.], [4., 13.], [8., 17.], [12., 21.]])
    y, x = np.arange(20) + 0.4, np.arange(25) + 0.4
    found = interpolate(values, rows, columns, y, x, smooth=False)
    for i, a in enumerate(y):
        for j, b in enumerate(x):
            r, c = np.abs(rows.mean(1) - a).argmin(), np.abs(columns.mean(1) - b).argmin()
            assert found[i, j] == (values[r, c] if a < 17 and b < 21 else 0)


def test_edges():
    """Patches side by side keep their borders; overlapping ones meet in the middle."""
    assert cell_edges(np.array([[0., 4.], [4., 8.]])).tolist() == [0, 4, 8]
    assert cell_edges(np.array([[0., 9.], [4., 13.]])).tolist() == [0, 6.5, 13]


def test_heat_map_lies_over_the_image():
    """Of a photograph: its own size, no NaN, a patch's value at its middle, 0 outside of the crop."""
    model = random_model(NANO)
    explanation = explain(model, preprocess(model, Image.open(CAT).resize((400, 200))))
    heat = explanation.heat_map()
    assert heat.shape == (200, 400)
    assert heat.dtype == np.float32
    assert np.isfinite(heat).all()
    assert (heat[:, :95] == 0).all()
    assert (heat[:, 305:] == 0).all()
    middle = explanation.source(0).to_image(explanation.patch_boxes).reshape(-1, 2, 2).mean(1)  # x, y
    for (x, y), value in zip(middle.tolist(), explanation.evidence[0].tolist()):
        assert heat[int(y), int(x)] == pytest.approx(value, abs=0.15 * float(explanation.evidence.abs().max()))
    alpha = explanation.heat_map(values=explanation.prediction.alpha[0], smooth=False)
    assert set(np.unique(alpha)) <= {0, *explanation.prediction.alpha[0].numpy()}
    with pytest.raises(ValueError, match=r'values must have the shape \(36,\), got \(35,\)'):
        explanation.heat_map(values=torch.zeros(35))


@cache
def explained():
    """An explanation of class 0 by itself, whose contributions the test below replaces."""
    return explain(random_model(NANO), torch.zeros(3, 3, 32, 32), target=0, against=None)


@settings(max_examples=30)
@given(st.integers(0, 10 ** 6), st.floats(0.05, 1.) | st.sampled_from([0.25, 0.5, 1.]))
def test_core_holds_its_share(seed, share):
    """Positive patches that together hold the share, and without the smallest of them no longer do; with ties too."""
    generator = torch.Generator().manual_seed(seed)
    evidence = torch.randn(3, 36, generator=generator)
    evidence[1] = torch.randint(-2, 3, (36,), generator=generator)
    evidence[2] = -evidence[2].abs()
    contributions = torch.zeros_like(explained().prediction.contributions)
    contributions[..., 0] = evidence
    explanation = dataclasses.replace(
        explained(), prediction=explained().prediction._replace(contributions=contributions))
    assert torch.equal(explanation.evidence, evidence)
    cores = explanation.core(share)
    assert not cores[2].any()
    for one, chosen in zip(evidence.double(), cores):
        positive = one.clamp(min=0)
        held = positive[chosen]
        assert (held > 0).all()
        assert held.sum() >= share * positive.sum() * (1 - 1e-6)
        if len(held):
            assert held.sum() - held.min() < share * positive.sum()
            assert chosen.all() or held.min() >= positive[~chosen].max()


def test_core_of_nothing():
    """No positive evidence, no patch, and the picture says so; a share that is none is refused."""
    explanation = explain(random_model(NANO), CAT, against=None)
    prediction = explanation.prediction._replace(contributions=-explanation.prediction.contributions.abs())
    against_all = dataclasses.replace(explanation, prediction=prediction)
    assert not against_all.core().any()
    assert 'no patch speaks for it' in [text.get_text() for text in against_all.figure().texts]
    with pytest.raises(ValueError, match=r'share must be in \(0, 1\], got 0'):
        explanation.core(0)


def test_why_not_asks_about_the_rival():
    """The class that is asked for; else the true one of a wrong prediction; else the best of the others."""
    model = random_model(NANO)
    order = explain(model, CAT).prediction.logits[0].argsort(descending=True).tolist()
    assert explain(model, CAT).why_not().against.tolist() == [order[1]]
    assert explain(model, CAT, true_class=order[0]).why_not().against.tolist() == [order[1]]
    assert explain(model, CAT, true_class=order[4]).why_not().against.tolist() == [order[4]]
    assert explain(model, CAT, target=order[3]).why_not().against.tolist() == [order[0]]
    assert explain(model, CAT, against=order[7]).why_not().against.tolist() == [order[7]]


def test_large_photographs():
    """A photograph is unlike the thumbnails of a small model, and nothing unusual for one that reads 224 pixels."""
    photo = Image.new('RGB', (1200, 900))
    assert 'has 1200×900 pixels' in explain(load_model('resnet18_lossattn_conv_nano'), [photo]).unlike_training()
    assert explain(timm.create_model('resnet18', num_classes=2).eval(), [photo]).unlike_training() == ''


@pytest.mark.parametrize('kwargs', [{'num_classes': 1}, {'num_classes': 3}])
def test_independent_classes(kwargs):
    """No true class where several may be right; a class that is asked about has its panel, the others no rivals."""
    own = timm.create_model('resnet18', **kwargs).eval()
    multi = kwargs['num_classes'] > 1
    with pytest.raises(ValueError, match='true_class must be None where classes are independent'):
        explain(own, CAT, multi_label=multi, true_class=0)
    e = explain(own, CAT, multi_label=multi, target=0, against=1 if multi else None)
    assert e.independent
    text = ' '.join(t.get_text() for t in e.figure().texts)
    assert 'rivals' not in text
    torch.testing.assert_close(e.spread_evidence().sum(1), e.evidence.sum(1))
