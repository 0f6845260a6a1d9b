"""Batch norm with the statistics of the global batch, also between CPU processes."""
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

__all__ = ['GlobalBatchNorm2d', 'convert_sync_batch_norm']


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """timm's conversion on GPUs; on the CPU, which torch.nn.SyncBatchNorm refuses, GlobalBatchNorm2d.

    Parameters, buffers and their names stay what they are.
    """
    if next(model.parameters()).device.type != 'cpu':
        return convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, GlobalBatchNorm2d(child))
        elif any(True for _ in child.parameters()):
            convert_sync_batch_norm(child)
    return model


class _AllReduce(torch.autograd.Function):
    """Sum over processes; the gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of all processes' images together; gradients flow through them.

    Args:
        source: the batch norm to replace; dropout and activation of timm's BatchNormAct2d come along.
    """

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__(source.num_features, source.eps, source.momentum)
        self.load_state_dict(source.state_dict())
        self.weight, self.bias = source.weight, source.bias
        self.drop = getattr(source, 'drop', nn.Identity())
        self.act = getattr(source, 'act', nn.Identity())
        self.train(source.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape."""
        if not (self.training and dist.is_initialized()):
            return self.act(self.drop(super().forward(x)))
        x32 = x.float()
        n = _AllReduce.apply(torch.tensor(float(x.numel() // x.shape[1])))
        mean = _AllReduce.apply(x32.sum(dim=(0, 2, 3))) / n
        centred = x32 - mean[:, None, None]
        var = _AllReduce.apply(centred.square().sum(dim=(0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return self.act(self.drop((centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)))
