"""This process among those that train together."""
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so

__all__ = ['Process', 'default_device']


CPU = torch.device('cpu')


def default_device() -> str:
    """A GPU where there is one."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


@dataclass(frozen=True)
class Process:
    """Where this process computes, and which of how many it is; the default is one process on the CPU."""
    device: torch.device = CPU
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def start(cls, device: str) -> 'Process':
        """As torchrun or SLURM says in the environment."""
        found = init_distributed_device_so(device)
        return cls(torch.device(found['device']), found['global_rank'], found['world_size'], found['local_rank'])

    @property
    def distributed(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def from_first(self, value: Any) -> Any:
        """Rank 0's value in every process: what lies on its disk decides."""
        if self.distributed:
            values = [value]
            torch.distributed.broadcast_object_list(values, src=0)
            value = values[0]
        return value
