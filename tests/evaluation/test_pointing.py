"""Pointing game, energy pointing, grid pointing: cases with known answers, naive loops."""
import pytest
import torch

from timm_lossattn.evaluation.pointing import EnergyPointing, GridPointing, PointingGame, choose_grids, make_grids


def test_pointing_game():
    """Inside, on the exclusive border, in a second box, a tie of which half is inside, NaN elsewhere, no box."""
    heat = torch.full((6, 6, 6), torch.nan)
    heat[:, 1:5, 1:5] = 0.
    heat[0, 2, 3] = heat[1, 2, 4] = heat[2, 4, 4] = heat[3, 1, 1] = heat[3, 4, 4] = 1.
    heat[4, 3, 2] = -1.
    one, two = torch.tensor([[2, 1, 4, 3]]), torch.tensor([[0, 0, 1, 1], [4, 4, 5, 5]])
    inside = torch.tensor([[1, 1, 5, 5]])
    game = PointingGame()
    found = game.measure(heat, [one, one, two, two, inside, torch.zeros(0, 4)])
    assert found[:5].tolist() == [1., 0., 1., 0.5, 1.]
    assert found[5].isnan()
    game.update(heat, [one, one, two, two, inside, torch.zeros(0, 4)])
    assert game.compute().item() == pytest.approx(3.5 / 5)  # an image without box does not count


def test_energy_pointing():
    """3 of 4 parts of what is positive lie in the boxes; what is negative, or nothing, does not count."""
    heat = torch.zeros(3, 4, 4)
    heat[0, 0, 0], heat[0, 3, 3], heat[0, 1, 1], heat[0, 2, 2] = 2., 1., 1., -7.
    heat[0, 0, 3] = torch.nan
    heat[1] = -1.
    boxes = [torch.tensor([[0, 0, 1, 1], [3, 3, 4, 4], [0, 0, 1, 2]])] * 2 + [torch.zeros(0, 4)]
    found = EnergyPointing().measure(heat, boxes)
    assert found[:2].tolist() == [0.75, 0.]
    assert found[2].isnan()


def test_broken_boxes():
    """A pixel lies in a box if its middle does: 0.5 to 1.5 holds that of pixel 0 and not that of pixel 1."""
    heat = torch.tensor([[[1., 2.], [4., 8.]]])
    box = torch.tensor([[0.5, 0., 1.5, 1.2]])
    assert EnergyPointing().measure(heat, [box]).item() == pytest.approx(1 / 15)
    assert PointingGame().measure(heat, [box + torch.tensor([1., 1., 1., 1.])]).item() == 1.
    assert EnergyPointing().measure(heat, [torch.tensor([[0.6, 0., 1.4, 2.]])]).isnan().all()  # no middle at all


@pytest.mark.parametrize('n', [2, 3])
def test_grid_pointing(n):
    """Against a loop over cells; a flat map has 1/n²."""
    heat = torch.randn(n * n, 6, 12, generator=torch.Generator().manual_seed(0))
    cells = torch.arange(n * n)
    found = GridPointing(n).measure(heat, cells)
    for k in range(n * n):
        r, c = k // n, k % n
        cell = heat[k, r * 6 // n:(r + 1) * 6 // n, c * 12 // n:(c + 1) * 12 // n].clamp(min=0).sum()
        assert found[k].item() == pytest.approx(float(cell / heat[k].clamp(min=0).sum()))
    assert GridPointing(n).measure(torch.ones(n * n, 6, 12), cells).tolist() == pytest.approx([1 / n ** 2] * n ** 2)


def test_grid_pointing_refuses():
    with pytest.raises(ValueError, match='3 divides, got 7×6'):
        GridPointing(3).measure(torch.ones(1, 7, 6), torch.tensor([0]))


def test_choose_grids():
    """Distinct classes, each image once, only those that are right, the confident ones first, the same every time."""
    g = torch.Generator().manual_seed(0)
    label, confidence = torch.randint(6, (90,), generator=g), torch.rand(90, generator=g)
    right = torch.rand(90, generator=g) < 0.7
    grids = choose_grids(confidence, label, right, 2, 100)
    used = [i for grid in grids for i in grid]
    assert len(grids) > 5
    assert len(used) == len(set(used))
    assert all(bool(right[i]) for i in used)
    assert all(len({int(label[i]) for i in grid}) == 4 for grid in grids)
    for k in range(6):  # of a class, those that are taken are ahead of those that are not
        own = [i for i in range(90) if label[i] == k and right[i]]
        taken = [float(confidence[i]) for i in own if i in used]
        left = [float(confidence[i]) for i in own if i not in used]
        assert not taken or not left or min(taken) >= max(left)
    assert choose_grids(confidence, label, right, 2, 3) == grids[:3]
    assert choose_grids(confidence, label, right, 3, 9) == []  # nine distinct classes there are not


def test_places_in_a_grid():
    """Of classes that all grids have, each comes to stand in every place, so that none is always in the same corner."""
    label = torch.arange(4).repeat(25)
    grids = choose_grids(torch.linspace(1, 0, 100), label, torch.ones(100, dtype=torch.bool), 2, 25)
    assert len(grids) == 25
    for k in range(4):
        assert {label[grid].tolist().index(k) for grid in grids} == {0, 1, 2, 3}


def test_make_grids():
    """Row by row."""
    images = torch.arange(8.).view(8, 1, 1, 1).expand(8, 3, 2, 4)
    grids = make_grids(images, 2)
    assert grids.shape == (2, 3, 4, 8)
    assert grids[1, 0, ::2, ::4].tolist() == [[4., 5.], [6., 7.]]
    assert grids[0, 2, 1, 3] == 0.
