"""Deletion, insertion, pointing game, completeness: cases with known answers, and a loop from the definition."""
from itertools import pairwise

import pytest
import torch

from timm_lossattn.evaluation.faithfulness import completeness_error, deletion_insertion, patch_scores, pointing_game

BOXES = torch.tensor([[0, 0, 3, 3], [2, 0, 5, 3], [0, 2, 3, 5], [2, 2, 5, 5]])  # 2×2 patches of 3×3, 2 apart


def planted_model(x):
    """Class 1 is there as long as pixel (4, 4), which only patch 3 covers, is bright."""
    return torch.stack([torch.zeros(len(x)), 20 * x[:, 0, 4, 4] - 10], dim=1)


def test_planted_evidence():
    """The patch with the evidence first: deletion drops at once, insertion rises at once. Last: the other way."""
    images, target = torch.ones(1, 1, 6, 6), torch.tensor([1])
    best = torch.tensor([[0., 1., 2., 3.]])
    low, high = (torch.sigmoid(torch.tensor(v)).item() for v in (-10., 10.))
    deletion, insertion = deletion_insertion(planted_model, images, best, target, BOXES)
    assert deletion.item() == pytest.approx((high + 7 * low) / 8, abs=1e-6)
    assert insertion.item() == pytest.approx((low + 7 * high) / 8, abs=1e-6)
    deletion, insertion = deletion_insertion(planted_model, images, -best, target, BOXES)
    assert deletion.item() == pytest.approx((7 * high + low) / 8, abs=1e-6)
    assert insertion.item() == pytest.approx((7 * low + high) / 8, abs=1e-6)


def test_against_a_loop():
    """Random linear model: blank patches one by one, as the definition says."""
    g = torch.Generator().manual_seed(0)
    weight, images = torch.randn(3, 2 * 36, generator=g), torch.randn(3, 2, 6, 6, generator=g)
    scores, target = torch.randn(3, 4, generator=g), torch.tensor([0, 2, 1])

    def model(x):
        return x.flatten(1) @ weight.T

    deletion, insertion = deletion_insertion(model, images, scores, target, BOXES, batch_size=3)
    for b in range(3):
        order = sorted(range(4), key=lambda m: -scores[b, m])
        curves = []
        for inserting in (False, True):
            curve = []
            for step in range(5):
                x = images[b].clone()
                if inserting:
                    x[:, :5, :5] = 0
                for m in order[:step]:
                    x0, y0, x1, y1 = BOXES[m].tolist()
                    x[:, y0:y1, x0:x1] = images[b, :, y0:y1, x0:x1] if inserting else 0
                curve.append(model(x[None]).softmax(1)[0, target[b]].item())
            curves.append(sum(a + c for a, c in pairwise(curve)) / 8)
        assert [deletion[b].item(), insertion[b].item()] == pytest.approx(curves, abs=1e-5)


def test_deletion_insertion_refuses():
    with pytest.raises(ValueError, match=r'scores must be \(1, 4\)'):
        deletion_insertion(planted_model, torch.ones(1, 1, 6, 6), torch.ones(1, 3), torch.tensor([1]), BOXES)


def test_patch_scores():
    """Means over patches; pixels without a value do not count."""
    heat = torch.zeros(1, 6, 6)
    heat[0, 4, 4], heat[0, 0, 0] = 8., torch.nan
    assert patch_scores(heat, BOXES)[0].tolist() == pytest.approx([0., 0., 0., 8 / 9])


def test_pointing_game():
    """Inside, on the exclusive border, in a second box, a tie of which half is inside, NaN elsewhere."""
    heat = torch.full((5, 6, 6), torch.nan)
    heat[:, 1:5, 1:5] = 0.
    heat[0, 2, 3] = heat[1, 2, 4] = heat[2, 4, 4] = heat[3, 1, 1] = heat[3, 4, 4] = 1.
    heat[4, 3, 2] = -1.
    one, two = torch.tensor([[2, 1, 4, 3]]), torch.tensor([[0, 0, 1, 1], [4, 4, 5, 5]])
    inside = torch.tensor([[1, 1, 5, 5]])
    assert pointing_game(heat, [one, one, two, two, inside]).tolist() == [1., 0., 1., 0.5, 1.]


def test_completeness_error():
    parts = torch.tensor([[[1., 2.], [3., -1.]], [[0.1, 0.], [0., 0.]]])
    assert completeness_error(parts, torch.tensor([10., 0.2])).tolist() == pytest.approx([0.5, 0.1])
