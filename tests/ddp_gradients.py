#!/usr/bin/env python3
"""Gradients of one loss-attention step on the same global batch, in one process or, under torchrun, in several.

    python tests/ddp_gradients.py one.pt test_resnet test_convnext
    torchrun --nproc-per-node 2 tests/ddp_gradients.py two.pt test_resnet test_convnext

Batch norm has fixed statistics: PyTorch computes those of the global batch on GPUs only.
"""
import sys

import timm
import torch
import torch.distributed as dist
from timm.layers import freeze_batch_norm_2d
from timm.utils import world_info_from_env

from timm_lossattn import LossAttentionTask

GLOBAL_BATCH = 8


def gradients(backbone: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Of every parameter, averaged over the processes, each of which has its share of the batch."""
    torch.manual_seed(rank)  # the first process's weights are those of all
    model = freeze_batch_norm_2d(timm.create_model('lossattn', backbone=backbone, num_classes=4, xi=0.9))
    with torch.no_grad():
        for buffer in model.buffers():  # of batch norms; blocks that begin at zero would have no gradients
            buffer.add_(0.1 * torch.rand_like(buffer))
    task = LossAttentionTask(model, gamma_max=0.5, rampup_epochs=0)
    if world_size > 1:
        task.prepare_distributed()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(GLOBAL_BATCH, 3, 96, 64, generator=generator)
    targets = torch.randint(4, (GLOBAL_BATCH,), generator=generator)
    task.train()
    task(images[rank::world_size], targets[rank::world_size])['loss'].backward()
    return {name: parameter.grad for name, parameter in task.get_eval_model().named_parameters()}


def main(file: str, *backbones: str) -> None:
    _, rank, world_size = world_info_from_env()
    if world_size > 1:
        dist.init_process_group('gloo')
    found = {backbone: gradients(backbone, rank, world_size) for backbone in backbones}
    if rank == 0:
        torch.save(found, file)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
