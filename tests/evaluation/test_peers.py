"""Our measures against quantus (pip install quantus), which is not among this package's own requirements."""
import pytest
import torch

from timm_lossattn.evaluation.faithfulness import Deletion
from timm_lossattn.evaluation.pointing import EnergyPointing, PointingGame

quantus = pytest.importorskip('quantus')


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.Softmax(dim=1))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def batch():
    """Images, classes, heat maps that are nowhere negative, and one box each."""
    g = torch.Generator().manual_seed(1)
    boxes = [torch.tensor([[1., 2., 6., 7.]]), torch.tensor([[0., 0., 3., 8.]]), torch.tensor([[4., 1., 8., 5.]])]
    return torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0, 2, 1]), torch.rand(3, 8, 8, generator=g), boxes


def masks(boxes):
    result = torch.zeros(len(boxes), 1, 8, 8, dtype=torch.bool)
    for mask, box in zip(result, boxes):
        x0, y0, x1, y1 = box[0].long().tolist()
        mask[:, y0:y1, x0:x1] = True
    return result


def peer(metric, batch):
    x, y, heat, boxes = batch
    return [float(v) for v in metric(
        model=Linear().eval(), x_batch=x.numpy(), y_batch=y.numpy(), a_batch=heat[:, None].numpy(),
        s_batch=masks(boxes).numpy(), device='cpu')]


def test_pointing_game(batch):
    metric = quantus.PointingGame(disable_warnings=True, display_progressbar=False)
    assert PointingGame().measure(batch[2], batch[3]).tolist() == peer(metric, batch)


def test_energy_pointing(batch):
    """Relevance mass accuracy is the same for maps without a negative part."""
    metric = quantus.RelevanceMassAccuracy(disable_warnings=True, display_progressbar=False, normalise=False, abs=False)
    assert EnergyPointing().measure(batch[2], batch[3]).tolist() == pytest.approx(peer(metric, batch), abs=1e-6)


def test_deletion(batch):
    """Pixel flipping, eight pixels at a time, into black: its curve begins after the first step, ours before it."""
    x, y, heat, _ = batch
    metric = quantus.PixelFlipping(
        features_in_step=8, perturb_baseline=0., return_auc_per_sample=False, disable_warnings=True,
        display_progressbar=False, normalise=False, abs=False)
    model = Linear().eval()
    curves = metric(model=model, x_batch=x.numpy(), y_batch=y.numpy(), a_batch=heat[:, None].numpy(), device='cpu')
    with torch.no_grad():
        first = model(x).gather(1, y[:, None])
    expected = [float(torch.trapezoid(torch.tensor([float(p), *map(float, curve)]), dx=1 / 8))
                for p, curve in zip(first, curves)]
    found = Deletion(steps=8).measure(model, x, heat, y)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
