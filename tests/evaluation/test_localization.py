"""MaxBoxAccV2, constant boxes, cross-fitting, intervals, randomisation: known answers, naive loops, peers."""
import json
import math

import pytest
import timm
import torch
from torch import nn

from timm_lossattn import explain
from timm_lossattn.attention.routing_head import CapsuleVotes
from timm_lossattn.evaluation.constant_boxes import (
    ConstantBoxes,
    cross_fitted_accuracy,
    hits_of,
    square_hits,
    whole_hits,
)
from timm_lossattn.evaluation.intervals import Interval, mean_interval
from timm_lossattn.evaluation.localization import THRESHOLDS, MaxBoxAccV2, boxes_above
from timm_lossattn.evaluation.metrics import BoxLocalization
from timm_lossattn.evaluation.randomization import cascading_randomization, learned_modules
from timm_lossattn.models.patch_layers import CapsuleLength


def flood_boxes(scaled, threshold):
    """Boxes of connected regions by a flood fill."""
    left = {(int(y), int(x)) for y, x in (scaled >= threshold).nonzero()}
    boxes = set()
    while left:
        region, todo = set(), [left.pop()]
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        ys, xs = zip(*region)
        boxes.add((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return boxes


def test_boxes_above():
    for seed in range(10):
        scaled = torch.rand(9, 11, generator=torch.Generator().manual_seed(seed))
        found = boxes_above(scaled, 0.7)
        assert {tuple(box) for box in found.tolist()} == flood_boxes(scaled, 0.7)
    assert boxes_above(torch.zeros(3, 3), 0.5).shape == (0, 4)


def test_max_box_accuracy():
    """A square of 0.5 around a peak of 1 and a far spot of 0.3: which thresholds hit which box at which IoU."""
    heat = torch.zeros(1, 20, 20)
    heat[0, 4:14, 4:14], heat[0, 8:10, 8:10], heat[0, 17:19, 17:19] = 0.5, 1., 0.3
    hits = MaxBoxAccV2().measure(heat - 3., [torch.tensor([[4., 4., 14., 14.]])])[0]  # scaled: the offset is gone
    expected = torch.tensor([[0. < t <= 0.5] * 3 for t in THRESHOLDS])
    assert torch.equal(hits, expected)  # at 0 the whole image: IoU 100/400, less than 0.3
    shifted = MaxBoxAccV2().measure(heat, [torch.tensor([[4., 4., 14., 20.]])])[0]
    assert shifted[10].tolist() == [True, True, False]  # IoU 100/160
    nothing = MaxBoxAccV2().measure(torch.full((1, 20, 20), 2.), [torch.tensor([[0., 0., 20., 20.]])])
    assert not nothing.any()  # a flat map has no box
    metric = MaxBoxAccV2()
    for _ in range(2):
        metric.update(heat, [torch.tensor([[4., 4., 14., 14.]])])
    assert metric.compute().item() == 1.


def test_cross_fitted_accuracy():
    """The even images would choose 0, the odd ones 1: each is judged by the other's choice."""
    hits = torch.zeros(4, 2, 3, dtype=torch.bool)
    hits[0::2, 0], hits[1::2, 1] = True, True
    hits[1, 0, 0] = True  # for IoU 0.3 the first choice hits one of the odd ones
    assert cross_fitted_accuracy(hits).tolist() == pytest.approx([0., 1 / 3, 0., 0.])
    assert cross_fitted_accuracy(hits[:1]).isnan().all()
    everything = torch.ones(5, 2, 3, dtype=torch.bool)
    assert cross_fitted_accuracy(everything).tolist() == [1.] * 5


def test_constant_boxes():
    """Centred squares of 5 %, 10 %, …; a box of half the side is hit from the size on at which the IoU is enough."""
    truth = [torch.tensor([[16., 16., 48., 48.]])]
    hits = square_hits((64, 64), truth)
    assert hits.shape == (1, 20, 3)
    for step in range(1, 21):
        side = step / 20 * 64
        iou = min(side, 32) ** 2 / max(side, 32) ** 2
        assert hits[0, step - 1].tolist() == [iou >= 0.3, iou >= 0.5, iou >= 0.7]
    with torch.device('meta'):  # the default device is not asked
        assert torch.equal(square_hits((64, 64), truth), hits)
    assert whole_hits(torch.tensor([0, 0, 64, 32]), truth)[0, 0].tolist() == [False] * 3  # IoU 512 / 2560
    assert whole_hits(torch.tensor([16, 16, 48, 40]), truth)[0, 0].tolist() == [True] * 3


def test_constant_boxes_as_a_measure():
    """Four images with boxes and one without: two are hit by a box around all patches, one by the chosen square."""
    small, large = torch.tensor([[20., 20., 44., 44.]]), torch.tensor([[0., 0., 60., 60.]])
    corner = torch.tensor([[0., 0., 10., 10.]])
    metric = ConstantBoxes()
    metric.update((64, 64), torch.tensor([0, 0, 58, 58]), [large, large, torch.zeros(0, 4), small])
    metric.update((64, 64), torch.tensor([0, 0, 58, 58]), [corner])
    found = metric.compute()
    assert found['localization_ap_all_patches'].item() == pytest.approx(50.)
    # even images: large, small; odd ones: large, corner. The odd ones choose a size that hits large, for the even ones;
    # the even ones the smallest that hits one of theirs, which is small
    assert found['localization_ap_centred_square'].item() == pytest.approx(25.)
    metric = ConstantBoxes()
    metric.update((64, 64), torch.tensor([0, 0, 58, 58]), [large])
    found = metric.compute()
    assert found['localization_ap_all_patches'].item() == 100.
    assert found['localization_ap_centred_square'].isnan()


def test_nothing_measured():
    """NaN, and no error."""
    boxes, constant = MaxBoxAccV2(), ConstantBoxes()
    with pytest.warns(UserWarning, match='before the ``update``'):
        values = [boxes.compute(), *constant.compute().values()]
    assert all(value.isnan() for value in values)


def test_a_tie_is_no_hit():
    """A constant box is judged as BoxLocalization judges the model's: an IoU of exactly 0.5 is not above 0.5."""
    truth, whole = [torch.tensor([[0., 0., 64., 32.]])] * 2, torch.tensor([0., 0., 64., 64.])
    constant, model = ConstantBoxes(), BoxLocalization()
    constant.update((64, 64), whole, truth)
    model.update(torch.stack([whole] * 2), truth, torch.tensor([True, True]))
    assert constant.compute()['localization_ap_all_patches'] == model.compute()['localization_ap'] == 0
    assert hits_of(whole[None], truth[0]).tolist() == [True, True, False]  # MaxBoxAccV2: at least


def test_mean_interval():
    """As wide as theory says for normal values; NaN does not count; a constant has no width; paired is narrower."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=g)
    found = mean_interval(torch.cat([values, torch.tensor([torch.nan])]))
    half = 1.96 * float(values.std()) / 20
    assert found.n == 400
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.02)
    assert mean_interval(torch.full((10,), 0.25)).low == 0.25
    few = mean_interval(torch.full((9,), 0.25))
    assert (few.mean, few.n, few.holds_zero) == (0.25, 9, True)  # no claim
    assert math.isnan(few.low)
    other = values + 0.1 * torch.randn(400, generator=g) - 0.05
    difference = mean_interval(values - other)
    assert not difference.holds_zero
    assert difference.high - difference.low < 0.1 * (found.high - found.low) * 2
    assert mean_interval(values - values.flip(0)).holds_zero


@pytest.mark.parametrize(('given', 'plain', 'difference'), [
    ((0.25, 0.125, 0.375, 20), '0.250 [0.125, 0.375]', '**+0.250 [+0.125, +0.375]**'),
    ((-0.25, -0.375, 0., 20), '-0.250 [-0.375, 0.000]', '-0.250 [-0.375, +0.000]'),
    ((0.25, math.nan, math.nan, 9), '0.250', '+0.250'),
    ((math.nan, math.nan, math.nan, 0), '–', '–')])
def test_interval_as_text(given, plain, difference):
    """Bold only where zero lies outside; nothing is said of the spread of few values; JSON and back."""
    interval = Interval(*given)
    again = Interval.from_dict(json.loads(json.dumps(interval.to_dict(), allow_nan=False)))
    for one in (interval, again):
        assert f'{one:.3f}' == plain
        assert one.as_difference() == difference
        assert str(one) == difference.strip('*')


class InputMap(nn.Module):
    """A model, and a map of the input alone: what randomisation has to find out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_cascading_randomization():
    """From the logits downwards, with a map that does not depend on the model, and with evidence, which does."""
    torch.manual_seed(0)
    model, images = InputMap().eval(), torch.randn(2, 3, 8, 8)
    found = cascading_randomization(model, lambda m, x: x.abs().sum(1).flatten(1), images)
    assert [name for name, _ in found] == ['layers.3', 'layers.1', 'layers.0']
    assert all(rho.tolist() == pytest.approx([1., 1.]) for _, rho in found)

    nano = timm.create_model('resnet18_lossattn_conv_nano', pretrained=True).eval()
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    images = torch.randn(8, 3, 32, 32)
    target = explain(nano, images).target
    found = cascading_randomization(nano, lambda m, x: explain(m, x, target).evidence, images)
    assert len(found) == len(learned_modules(nano))
    assert abs(float(found[-1][1].mean())) < 0.4  # of 36 patches, 8 images; the measured number is in docs/
    assert all(torch.equal(tensor, state[name]) for name, tensor in nano.state_dict().items())


@pytest.mark.parametrize('name', ['resnet18_lossattn_caps_nano', 'resnet18_routing_caps', 'vgg11_bn_attn_conv'])
def test_all_heads_begin_anew(name):
    """Thresholds of capsules, votes of routing, attention: nothing stays, and the spread is that of a new model."""
    model = timm.create_model(name, width_mult=1. if 'nano' in name else 1 / 8)
    for _, module in learned_modules(model):
        new = [float(parameter.detach().norm()) for parameter in module.parameters(recurse=False)]
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 7.)
        module.reset_parameters()
        for parameter, norm in zip(module.parameters(recurse=False), new):
            assert not (parameter == 7.).any()
            if isinstance(module, (CapsuleLength, CapsuleVotes)):
                assert float(parameter.detach().norm()) == pytest.approx(norm, rel=0.05)


def test_randomization_refuses():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"part '0', a Bare, has no reset_parameters"):
        learned_modules(nn.Sequential(Bare()))
