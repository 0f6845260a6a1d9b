"""What trains a patch model: the losses of the paper, and a timm task."""
from .freeze import freeze_backbone
from .loss import LossAttentionLoss, MarginLoss, gamma_rampup
from .task import LossAttentionTask

__all__ = ['LossAttentionLoss', 'LossAttentionTask', 'MarginLoss', 'freeze_backbone', 'gamma_rampup']
