"""Loss-attention models for timm: image logits that are a sum of patch contributions. Importing registers them."""
from .explanation import Explanation, explain
from .loading import list_patch_models, load_model
from .models import GoogLeNetBackbone, PatchClassifier, ResNetBackbone, VGGBackbone, VGGCifar, loss_attention
from .prediction import PatchPrediction
from .training import LossAttentionLoss, LossAttentionTask, MarginLoss, freeze_backbone, gamma_rampup

__all__ = [
    'Explanation', 'GoogLeNetBackbone', 'LossAttentionLoss', 'LossAttentionTask', 'MarginLoss', 'PatchClassifier',
    'PatchPrediction', 'ResNetBackbone', 'VGGBackbone', 'VGGCifar', 'explain', 'freeze_backbone', 'gamma_rampup',
    'list_patch_models', 'load_model', 'loss_attention',
]
__version__ = '0.1.0'
