"""One epoch of training, what it says of its own time, and what it is judged by."""
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.task import ClassificationTask, MultiLabelClassificationEvaluator
from torch import nn

from lib.build import create_task
from lib.command import parse_args
from lib.engine import train_one_epoch
from lib.evaluate import evaluate
from lib.position import Recovery
from lib.process import Process
from timm_lossattn.attention.routing_head import RoutingWeights


def test_times_of_a_resumed_epoch(monkeypatch):
    """Images, seconds and rate are those of the whole epoch; drawing again what was trained on is in none of them."""
    clock = SimpleNamespace(now=100.)
    monkeypatch.setattr('lib.engine.time', SimpleNamespace(perf_counter=lambda: clock.now))

    def passes(seconds):
        clock.now += seconds

    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                passes(0.1)
                yield batch

    data = Loader([(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(20)])
    task = ClassificationTask(nn.Linear(3, 2), nn.CrossEntropyLoss(), verbose=False)
    task.register_forward_pre_hook(lambda *args: passes(0.3))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    options = parse_args(['--device', 'cpu'])
    position = {'batches': 18, 'images': 108, 'sums': {'loss': 108.}, 'random': [], 'seconds': 1.8}
    metrics = train_one_epoch(
        0, options, Process(), task, data, optimizer, None, nullcontext, None,
        Recovery(None, Process(), None, {'ranks': [position]}))
    assert metrics['seconds'] == pytest.approx(1.8 + 2 * (0.1 + 0.3))  # before the break, and two batches after it
    assert metrics['images_per_second'] == pytest.approx(120 / 2.6)
    assert metrics['loader_share'] == pytest.approx(0.1 / 0.4)


def test_every_update_is_clipped(monkeypatch):
    """--clip-grad bounds the gradients of each update of an epoch, whatever the task."""
    torch.manual_seed(0)
    task = ClassificationTask(nn.Linear(3, 2), nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    norms = []
    step = optimizer.step
    monkeypatch.setattr(optimizer, 'step', lambda: (norms.append(
        float(torch.cat([p.grad.flatten() for p in task.parameters()]).norm())), step()))
    data = [(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(4)]
    train_one_epoch(0, parse_args(['--device', 'cpu', '--clip-grad', '0.001']), Process(), task, data, optimizer, None,
                    nullcontext, None)
    assert norms == [pytest.approx(0.001, rel=0.01)] * 4


def test_means_of_half_precision_losses():
    """The plain criterion is float32 under autocast too, and a long epoch's sum loses nothing."""
    options = parse_args(['--device', 'cpu', '--model', 'resnet18_cifar', '--smoothing', '0.1', '--no-patch-loss'])
    task = create_task(options, nn.Linear(3, 2), 1, torch.device('cpu'))
    torch.manual_seed(0)
    data = [(torch.randn(64, 3), torch.randint(2, (64,))) for _ in range(600)]
    losses = []

    def keep(module, inputs, output):
        losses.append(output)
    task.criterion.register_forward_hook(keep)
    metrics = train_one_epoch(
        0, options, Process(), task, data, torch.optim.SGD(task.parameters(), lr=0.), None,
        partial(torch.autocast, device_type='cpu', dtype=torch.bfloat16), None)
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert metrics['loss'] == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-5)


@pytest.mark.parametrize('good', [True, False])
def test_weights_that_are_not_finite_are_not_saved(good):
    """The last good position stays, from where the run goes on with a lower learning rate."""
    model = nn.Linear(3, 2)
    if not good:
        model.weight.data[0, 0] = float('nan')
    saved = []
    saver = SimpleNamespace(model=model, save_position=lambda *args: saved.append(args))
    Recovery(0., Process(), saver).batch_done(0, 1, 1, 6, {'loss': torch.tensor(1.)}, 1.)
    assert len(saved) == good


@pytest.mark.parametrize(('lengths', 'expected'), [((0.9, 0.1), 100.), ((0.1, 0.9), 0.)])
def test_lengths_of_capsules_are_probabilities(lengths, expected):
    """Of routing a class is there if its length is over the threshold, not if the sigmoid of it is."""
    class Lengths(nn.Module):
        patch_weights = RoutingWeights()

        def forward(self, x):
            return torch.tensor([lengths]).expand(len(x), 2)

    loader = [(torch.zeros(4, 3, 8, 8), torch.tensor([[1., 0.]] * 4))]
    found = evaluate(Lengths(), loader, MultiLabelClassificationEvaluator(), torch.device('cpu'))
    assert found['micro_f1'] == pytest.approx(expected)
