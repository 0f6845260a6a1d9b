"""One epoch of training: what it says of its own time."""
import time
from contextlib import nullcontext

import pytest
import torch
from timm.task import ClassificationTask
from torch import nn

from lib.command import parse_args
from lib.engine import train_one_epoch
from lib.position import Recovery
from lib.process import Process


def test_times_of_a_resumed_epoch():
    """Images, seconds and rate are those of the whole epoch; drawing again what was trained on is in none of them."""
    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.1)
                yield batch

    data = Loader([(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(20)])
    task = ClassificationTask(nn.Linear(3, 2), nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    options = parse_args(['--device', 'cpu'])
    position = {'batches': 18, 'images': 108, 'sums': {'loss': 108.}, 'random': [], 'seconds': 1.8}
    metrics = train_one_epoch(
        0, options, Process(), task, data, optimizer, None, nullcontext, None,
        Recovery(None, Process(), None, {'ranks': [position]}))
    assert 1.8 < metrics['seconds'] < 3.6  # 18 batches of 0.1 s before the break, two after it; twice the 18 were 3.8
    assert metrics['images_per_second'] == pytest.approx(120 / metrics['seconds'])
    assert 0 < metrics['loader_share'] <= 1


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
