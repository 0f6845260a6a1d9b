"""Deletion, insertion, single deletion, completeness: cases with known answers, and a loop from the definition."""
from itertools import pairwise

import pytest
import torch
from scipy.stats import spearmanr

from timm_lossattn.evaluation.faithfulness import (
    Completeness,
    Deletion,
    Insertion,
    SingleDeletion,
    blank_image,
    rank_correlation,
)

BOXES = torch.tensor([[0, 0, 3, 3], [2, 0, 5, 3], [0, 2, 3, 5], [2, 2, 5, 5]])  # 2×2 patches of 3×3, 2 apart


def planted_model(x):
    """Class 1 is there as long as pixel (4, 4), which only patch 3 covers, is bright."""
    return torch.stack([torch.zeros(len(x)), 20 * x[:, 0, 4, 4] - 10], dim=1).softmax(dim=1)


def linear_model(K, size, seed=0):
    weight = torch.randn(K, size, generator=torch.Generator().manual_seed(seed))
    return lambda x: x.flatten(1) @ weight.T


def test_planted_evidence():
    """The patch with the evidence first: deletion drops at once, insertion rises at once. Last: the other way."""
    images, target = torch.ones(1, 1, 6, 6), torch.tensor([1])
    best = torch.tensor([[0., 1., 2., 3.]])
    low, high = (torch.sigmoid(torch.tensor(v)).item() for v in (-10., 10.))
    for order, deletion, insertion in (
            (best, (high + 7 * low) / 8, (low + 7 * high) / 8), (-best, (7 * high + low) / 8, (7 * low + high) / 8)):
        for measure, expected in ((Deletion(), deletion), (Insertion(), insertion)):
            found = measure.measure(planted_model, images, order, target, BOXES)
            assert found.item() == pytest.approx(expected, abs=1e-6)


def test_planted_pixel():
    """The one pixel that counts first of 36, in four steps: all but the first point are low, or high."""
    images, target = torch.ones(1, 1, 6, 6), torch.tensor([1])
    heat = torch.zeros(1, 6, 6)
    heat[0, 4, 4] = 1.
    low, high = (torch.sigmoid(torch.tensor(v)).item() for v in (-10., 10.))
    assert Deletion(steps=4).measure(planted_model, images, heat, target).item() == pytest.approx(
        (high + 7 * low) / 8, abs=1e-6)
    assert Insertion(steps=4).measure(planted_model, images, heat, target).item() == pytest.approx(
        (low + 7 * high) / 8, abs=1e-6)
    heat[0, 4, 4] = torch.nan  # where a map says nothing comes last
    assert Deletion(steps=4).measure(planted_model, images, heat, target).item() == pytest.approx(
        (7 * high + low) / 8, abs=1e-6)


@pytest.mark.parametrize('blank', ['mean', 'blur'])
def test_against_a_loop(blank):
    """Random linear model: change patches one by one, as the definition says."""
    g = torch.Generator().manual_seed(0)
    images, scores = torch.randn(3, 2, 6, 6, generator=g), torch.randn(3, 4, generator=g)
    target, logits, other = torch.tensor([0, 2, 1]), linear_model(3, 72), blank_image(images, blank)
    measures = [cls(blank, batch_size=3).measure(lambda x: logits(x).softmax(dim=1), images, scores, target, BOXES)
                for cls in (Deletion, Insertion)]
    for b in range(3):
        order = sorted(range(4), key=lambda m: -scores[b, m])
        for inserting, found in zip((False, True), measures):
            curve = []
            for step in range(5):
                x = images[b].clone()
                if inserting:
                    x[:, :5, :5] = other[b, :, :5, :5]
                for m in order[:step]:
                    x0, y0, x1, y1 = BOXES[m].tolist()
                    x[:, y0:y1, x0:x1] = (images if inserting else other)[b, :, y0:y1, x0:x1]
                curve.append(logits(x[None])[0].softmax(0)[target[b]].item())
            assert found[b].item() == pytest.approx(sum(a + c for a, c in pairwise(curve)) / 8, abs=1e-5)


def test_pixels_against_a_loop():
    """Deletion pixel by pixel, asked after each quarter."""
    g = torch.Generator().manual_seed(1)
    images, heat = torch.randn(2, 1, 4, 4, generator=g), torch.randn(2, 4, 4, generator=g)
    model, target = linear_model(2, 16), torch.tensor([0, 1])
    found = Deletion(steps=4).measure(lambda x: model(x).softmax(dim=1), images, heat, target)
    for b in range(2):
        order = heat[b].flatten().argsort(descending=True)
        curve = []
        for gone in (0, 4, 8, 12, 16):
            x = images[b].flatten().clone()
            x[order[:gone]] = 0.
            curve.append(model(x.view(1, 1, 4, 4)).softmax(1)[0, target[b]].item())
        assert found[b].item() == pytest.approx(sum(a + c for a, c in pairwise(curve)) / 8, abs=1e-5)


@pytest.mark.parametrize(('units', 'steps'), [(36, 8), (4, 3), (49, 10), (7, 7)])
def test_reached_in_whole_numbers(units, steps):
    """After step s as many units are gone as units·s/steps rounded, a half upwards: no float32 rounding decides."""
    images, order = torch.ones(1, 1, 1, units), torch.arange(units, 0, -1).float()[None, None]
    gone: list[int] = []

    def model(x):
        gone.extend((x == 0).flatten(1).sum(1).tolist())
        return torch.zeros(len(x), 2)

    Deletion(steps=steps).measure(model, images, order, torch.tensor([0]))
    assert gone == [(2 * units * s + steps) // (2 * steps) for s in range(steps + 1)]


def test_removal_refuses():
    for order, boxes in ((torch.ones(1, 3), BOXES), (torch.ones(1, 6, 5), None)):
        with pytest.raises(ValueError, match='order must be'):
            Deletion().measure(planted_model, torch.ones(1, 1, 6, 6), order, torch.tensor([1]), boxes)


def test_blank_image():
    """The blur keeps the mean of the whole and has no edge left; the other is the mean colour."""
    images = torch.zeros(1, 1, 40, 40)
    images[..., 20:] = 1.
    blurred = blank_image(images, 'blur')
    assert float(blurred.mean()) == pytest.approx(0.5, abs=1e-3)
    assert float((blurred[..., 1:] - blurred[..., :-1]).abs().max()) < 0.15
    assert not blank_image(images, 'mean').any()


def test_single_deletion():
    """Of a linear model, input × gradient says exactly what a blanked cell takes away; its negative the contrary."""
    model, images = linear_model(3, 2 * 64), torch.randn(2, 2, 8, 8)
    v = torch.tensor([[1., -1., 0.], [0., -.5, 1.]])
    x = images.clone().requires_grad_()
    gradient, = torch.autograd.grad((model(x) * v).sum(), x)
    heat = (images * gradient).sum(1)
    measure = SingleDeletion()
    drops = measure.drops(model, images, v)
    torch.testing.assert_close(drops[0, 5], heat[0, 2:4, 2:4].sum(), rtol=1e-4, atol=1e-5)
    assert measure.measure(heat, drops).tolist() == pytest.approx([1., 1.])
    assert measure.measure(-heat, drops).tolist() == pytest.approx([-1., -1.])
    assert measure.measure(torch.ones(2, 8, 8), drops).tolist() == [0., 0.]
    assert measure.cells((9, 7)).sum(0).unique().tolist() == [1]  # every pixel in one cell, whatever the size


def test_rank_correlation():
    """Against scipy, with ties."""
    a = torch.randint(5, (4, 20), generator=torch.Generator().manual_seed(0)).float()
    b = torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    assert rank_correlation(a, b).tolist() == pytest.approx([spearmanr(x, y).statistic for x, y in zip(a, b)], abs=1e-5)


def test_completeness():
    """|Σ parts − what they explain|, relative to it where that is larger than 1; a mean over images of all batches."""
    measure = Completeness()
    parts = torch.tensor([[[1., 2.], [3., -1.]], [[0.1, 0.], [0., 0.]]])
    assert measure.measure(parts, torch.tensor([10., 0.2])).tolist() == pytest.approx([0.5, 0.1])
    measure.update(parts, torch.tensor([10., 0.2]))
    measure.update(parts[:1], torch.tensor([5.]))
    assert measure.compute().item() == pytest.approx(0.2)
