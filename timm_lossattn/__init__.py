"""Loss-attention models for timm: image logits that are a sum of patch contributions. Importing registers them."""
from .attention import PatchPrediction
from .googlenet_lossattn import GoogLeNetBackbone
from .loss import LossAttentionLoss, MarginLoss, gamma_rampup
from .patch_classifier import PatchClassifier
from .resnet_lossattn import ResNetBackbone
from .task import LossAttentionTask
from .vgg_lossattn import VGGBackbone, VGGCifar

__all__ = [
    'GoogLeNetBackbone',
    'LossAttentionLoss', 'LossAttentionTask', 'MarginLoss', 'PatchClassifier', 'PatchPrediction', 'ResNetBackbone',
    'VGGBackbone', 'VGGCifar', 'gamma_rampup',
]
__version__ = '0.1.0'
