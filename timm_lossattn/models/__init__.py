"""What timm's registry gets: importing this package registers the models."""
from . import lossattn  # noqa: F401  (registers it; first: it lists the models that timm has without ours)
from .any_timm import loss_attention
from .backbone import StagedBackbone
from .googlenet_lossattn import GoogLeNetBackbone
from .patch_classifier import PatchClassifier
from .resnet_lossattn import ResNetBackbone
from .vgg_lossattn import VGGBackbone, VGGCifar

__all__ = [
    'GoogLeNetBackbone', 'PatchClassifier', 'ResNetBackbone', 'StagedBackbone', 'VGGBackbone', 'VGGCifar',
    'loss_attention',
]
