"""What timm's registry gets: importing this package registers the models."""
from .backbone import StagedBackbone
from .googlenet_lossattn import GoogLeNetBackbone
from .patch_classifier import PatchClassifier
from .resnet_lossattn import ResNetBackbone
from .vgg_lossattn import VGGBackbone, VGGCifar

__all__ = ['GoogLeNetBackbone', 'PatchClassifier', 'ResNetBackbone', 'StagedBackbone', 'VGGBackbone', 'VGGCifar']
