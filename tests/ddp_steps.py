#!/usr/bin/env python3
"""Train 20 steps in one process or, under torchrun, in several, on the same global batches; save the weights and the
gradients of the first step, of each model in FOLDER/NAME.pt.

    python tests/ddp_steps.py one resnet18_lossattn_conv_nano lossattn.test_resnet
    torchrun --nproc-per-node 2 tests/ddp_steps.py two resnet18_lossattn_conv_nano lossattn.test_resnet

Batch norm has fixed statistics: PyTorch computes those of the global batch on GPUs only.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / 'train'))

import timm
import torch
import torch.distributed as dist
from timm.layers import freeze_batch_norm_2d
from timm.utils import world_info_from_env

from lib.augment import BatchAugment
from lib.cached_loader import CachedLoader
from timm_lossattn import LossAttentionTask

STEPS, GLOBAL_BATCH = 20, 16


def main(folder: str, *names: str) -> None:
    _, rank, world_size = world_info_from_env()
    if world_size > 1:
        dist.init_process_group('gloo')
    for name in names:
        train(Path(folder, f'{name}.pt'), name, rank, world_size)
    if world_size > 1:
        dist.destroy_process_group()


def train(file: Path, name: str, rank: int, world_size: int) -> None:
    """A file of the weights and gradients, written by the first process."""
    torch.manual_seed(0)
    model = freeze_batch_norm_2d(timm.create_model(name, num_classes=4))
    size = (12, 12) if name == 'resnet18_lossattn_conv_nano' else (64, 64)
    images = torch.randint(256, (GLOBAL_BATCH * STEPS, 3, *size), dtype=torch.uint8)
    targets = torch.randint(4, (len(images),))
    task = LossAttentionTask(model, gamma_max=0.1, rampup_epochs=0)
    if world_size > 1:
        task.prepare_distributed()
    augment = BatchAugment(size, (0.5,) * 3, (0.25,) * 3, enabled=False)
    loader = CachedLoader(images, targets, GLOBAL_BATCH // world_size, augment, rank=rank, world_size=world_size)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.001, momentum=0.9)  # larger: rounding grows chaotically
    assert len(loader) == STEPS
    gradients = {}
    for x, y in loader:
        task.train()
        task(x, y)['loss'].backward()
        gradients = gradients or {
            f'gradient of {n}': p.grad.clone() for n, p in task.get_eval_model().named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0:
        torch.save({**task.get_eval_model().state_dict(), **gradients}, file)


if __name__ == '__main__':
    main(*sys.argv[1:])
