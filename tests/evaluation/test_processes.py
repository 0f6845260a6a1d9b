"""Measures that keep a value an image, after they were gathered from two processes."""
import pytest
import torch

from timm_lossattn.evaluation.constant_boxes import ConstantBoxes
from timm_lossattn.evaluation.localization import MaxBoxAccV2
from timm_lossattn.evaluation.metrics import PublicCodeMeanAveragePrecision, VOCMeanAveragePrecision
from timm_lossattn.evaluation.pointing import EnergyPointing

BOXES = [torch.tensor([[0., 0., 5., 4.]]), torch.tensor([[2., 1., 8., 8.]])]
HEAT = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
SCORES, TARGETS = torch.tensor([[0.9, 0.2], [0.4, 0.7], [0.6, 0.1]]), torch.tensor([[1, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize(('create', 'batch'), [
    (EnergyPointing, (HEAT, BOXES)), (MaxBoxAccV2, (HEAT, BOXES)),
    (ConstantBoxes, ((8, 8), torch.tensor([0., 0., 8., 8.]), BOXES)),
    (VOCMeanAveragePrecision, (SCORES, TARGETS)), (PublicCodeMeanAveragePrecision, (SCORES, TARGETS))])
def test_gathered(create, batch):
    """Two processes with one batch each give what one process with both gives."""
    alone = create()
    alone.update(*batch)
    alone.update(*batch)
    both = create(dist_sync_fn=lambda value, group: [value, value], distributed_available_fn=lambda: True)
    both.update(*batch)
    expected, found = alone.compute(), both.compute()
    for name in expected if isinstance(expected, dict) else ['']:
        pair = (found[name], expected[name]) if name else (found, expected)
        assert torch.equal(*pair)
