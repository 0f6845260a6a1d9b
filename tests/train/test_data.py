"""lib/data.py: what is said about few images, and about data sets that are out of reach."""
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from lib.command import parse_args
from lib.data import create_train_loader, open_dataset, warn_of_few_steps
from lib.process import Process


@pytest.mark.parametrize(('images', 'batch', 'world', 'said'), [
    (144, 128, 1, '144 training images are 1 step an epoch; 16 images are left out of each, others every time. '
                  '--batch-size 18 would make 8.'),
    (100, 20, 2, '100 training images are 2 steps an epoch; 20 images are left out of each, others every time. '
                 '--batch-size 6 would make 8.'),
    (64, 32, 1, '64 training images are 2 steps an epoch. --batch-size 8 would make 8.'),
    (5000, 128, 1, None)])
def test_few_steps(caplog, images, batch, world, said):
    """A handful of steps is said, with what is left out and a batch size that would do."""
    options = replace(parse_args(['--data-dir', 'somewhere']), batch_size=batch)
    with caplog.at_level(logging.WARNING, logger='train'):
        warn_of_few_steps(options, SimpleNamespace(world_size=world), range(images), range(images // batch // world))
    assert [record.getMessage() for record in caplog.records] == (
        [] if said is None else [f'--batch-size {batch}: {said}'])


@pytest.mark.parametrize('sizes', [(), ('--train-img-sizes', '16', '32')])
def test_the_order_in_several_processes(folder, sizes, monkeypatch):
    """Each process sees a part of the images, in an order that follows from --seed."""
    for name, value in (('get_world_size', 2), ('get_rank', 1), ('is_available', True)):
        monkeypatch.setattr(torch.distributed, name, lambda *args, value=value: value)
    orders = []
    for seed in ('1', '1', '2'):
        options = parse_args(['--data-dir', str(folder), '--batch-size', '4', '--workers', '0', '--seed', seed, *sizes])
        dataset = open_dataset(options, 'train', 2, True)
        loader = create_train_loader(options, Process(rank=1, world_size=2), dataset, {
            'input_size': (3, 32, 32), 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'interpolation': 'bilinear',
            'crop_pct': 1., 'crop_mode': 'center'}, 2)
        sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        assert type(sampler).__name__ == 'DistributedSampler'
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]


def test_data_set_out_of_reach(monkeypatch, waits):
    """One error at once, that says what does without; the next time the Hub is asked again."""
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    options = parse_args(['--dataset', 'hfds/nobody/has_this', '--num-classes', '2'])
    with pytest.raises(ValueError, match=r"--dataset 'hfds/nobody/has_this': .*--dataset hfds/FOLDER takes a copy"):
        open_dataset(options, 'train', 2)
    assert waits == []
    assert not constants.HF_HUB_OFFLINE
