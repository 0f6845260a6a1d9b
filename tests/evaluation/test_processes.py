"""Measures over two processes: gathered, they are those of one process that saw all images."""
import pytest
import torch
from torchmetrics.utilities.data import dim_zero_cat

from timm_lossattn.evaluation.constant_boxes import ConstantBoxes
from timm_lossattn.evaluation.localization import MaxBoxAccV2
from timm_lossattn.evaluation.metrics import (
    BoxLocalization,
    PatchLocalization,
    PublicCodeMeanAveragePrecision,
    VOCMeanAveragePrecision,
)
from timm_lossattn.evaluation.pointing import EnergyPointing

BOXES = [torch.tensor([[0., 0., 5., 4.]]), torch.tensor([[2., 1., 8., 8.]])]
OTHERS = [torch.tensor([[0., 4., 3., 8.]]), torch.tensor([[5., 0., 8., 3.]]), torch.tensor([[1., 1., 7., 7.]])]
HEAT, OTHER_HEAT = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)).split([2, 3])
SCORES, TARGETS = torch.tensor([[0.9, 0.2], [0.4, 0.7], [0.6, 0.1]]), torch.tensor([[1, 0], [1, 1], [0, 0]])
OTHER_SCORES, OTHER_TARGETS = torch.tensor([[0.8, 0.5], [0.3, 0.6]]), torch.tensor([[0, 1], [1, 0]])
PATCHES = torch.tensor([[4 * x, 4 * y, 4 * x + 4, 4 * y + 4] for y in range(2) for x in range(2)])
SIZE, AROUND = (8, 8), torch.tensor([0., 0., 8., 8.])


def patches(seed, boxes):
    """Arguments of PatchLocalization: random choices and logits of 2×2 patches, two classes."""
    generator = torch.Generator().manual_seed(seed)
    selected = torch.rand(len(boxes), 4, generator=generator) < 0.7
    return selected, torch.randn(len(boxes), 4, 2, generator=generator), torch.arange(len(boxes)) % 2, PATCHES, boxes


@pytest.mark.parametrize(('create', 'ours', 'theirs'), [
    (EnergyPointing, (HEAT, BOXES), (OTHER_HEAT, OTHERS)), (MaxBoxAccV2, (HEAT, BOXES), (OTHER_HEAT, OTHERS)),
    (ConstantBoxes, (SIZE, AROUND, BOXES), (SIZE, AROUND, OTHERS)),
    (VOCMeanAveragePrecision, (SCORES, TARGETS), (OTHER_SCORES, OTHER_TARGETS)),
    (PublicCodeMeanAveragePrecision, (SCORES, TARGETS), (OTHER_SCORES, OTHER_TARGETS)),
    (PatchLocalization, patches(0, BOXES), patches(1, OTHERS)),
    (BoxLocalization, (torch.cat(BOXES), BOXES, torch.tensor([True, False])),
     (torch.cat(BOXES + OTHERS[2:]), OTHERS, torch.tensor([True, True, True])))])
def test_gathered(create, ours, theirs):
    """Two processes, each with images of its own, give what one process with all of them gives."""
    other, alone, every = create(), create(), create()
    other.update(*theirs)
    alone.update(*ours)
    every.update(*ours)
    every.update(*theirs)
    states = (dim_zero_cat(getattr(other, name)) for name in other._defaults)  # the order in which they are gathered
    both = create(dist_sync_fn=lambda value, group: [value, next(states)], distributed_available_fn=lambda: True)
    both.update(*ours)
    expected, found, own = every.compute(), both.compute(), alone.compute()
    if not isinstance(expected, dict):
        expected, found, own = {'': expected}, {'': found}, {'': own}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert any(not torch.equal(own[name], value) for name, value in expected.items())
