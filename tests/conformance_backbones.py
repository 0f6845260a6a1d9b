"""Entry points for timm's own tests alone: ``lossattn_{backbone}`` for backbones of different families."""
import sys

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model

from timm_lossattn.models.lossattn import lossattn

AVERAGE = {'global_pool': 'avg'}
BACKBONES = {  # the arguments that the backbone needs to be a sum over patches
    'convnext_atto': {}, 'edgenext_xx_small': {}, 'levit_128s': {}, 'mixer_s32_224': {}, 'mobilenetv3_small_050': {},
    'poolformer_s12': {}, 'regnetx_002': {}, 'repvgg_a0': {}, 'swin_tiny_patch4_window7_224': {}, 'test_byobnet': {},
    'test_nfnet': {}, 'test_resnet': {}, 'test_vit': AVERAGE, 'tf_efficientnet_lite0': {},
    'vit_tiny_patch16_224': AVERAGE,
}
default_cfgs = generate_default_cfgs({f'lossattn_{name}': get_pretrained_cfg(name) for name in BACKBONES})


def register(backbone, arguments):
    """One entry point, as a module's function would be."""
    def entry(pretrained=False, **kwargs):
        return lossattn(pretrained, backbone=backbone, **{**arguments, **kwargs})
    entry.__name__ = f'lossattn_{backbone}'
    setattr(sys.modules[__name__], entry.__name__, register_model(entry))


for name, arguments in BACKBONES.items():
    register(name, arguments)
