"""``lossattn`` in timm's registry: loss attention in any timm model, see ``any_timm.loss_attention``.

    timm.create_model('lossattn.resnet50.a1_in1k', pretrained=True)
    timm.create_model('lossattn', backbone='resnet50.a1_in1k', pool='lossattn', xi=0.1, pretrained=True)
    timm.create_model('lossattn', backbone='vit_small_patch16_224', global_pool='avg', fc_norm=False,
                      num_classes=10)

Every other argument is the backbone's. What follows the first dot of a name timm takes for the tag of pretrained
weights, and hands to the entry point: here it is the backbone, with its own tag. The tag may be one of ours:

    timm.create_model('lossattn.tf_efficientnet_lite0.pbc', pretrained=True)  # weights for loss attention, see TRAINED
"""
from dataclasses import dataclass, fields
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    split_model_name_tag,
)
from torch import nn

from ..attention.weights import plain_weights
from ..hub_access import create_model
from .any_timm import loss_attention
from .lite_weights import lite_overlay
from .pretrained import verified_overlay, with_published
from .probe import NoPatchSum

__all__ = ['DEFAULT_BACKBONE', 'TRAINED', 'refuse_early']

DEFAULT_BACKBONE = 'resnet18'
DEFAULT_XI = 0.1
# Weights for loss attention, by backbone and tag. Of each, what differs from the backbone's own cfg, and ξ. PBC:
# peripheral blood cells (ig: immature granulocytes), trained with averaging, loss attention put in afterwards.
TRAINED: dict[str, tuple[dict[str, Any], float]] = {
    'tf_efficientnet_lite0.pbc': ({
        'num_classes': 8, 'crop_pct': 1.0, 'license': 'apache-2.0', 'label_names': (
            'basophil', 'eosinophil', 'erythroblast', 'ig', 'lymphocyte', 'monocyte', 'neutrophil', 'platelet'),
    }, 1.),
}
SOURCES = ('hf-hub', 'local-dir')


@dataclass
class BackboneCfg(PretrainedCfg):
    """What timm knows of a backbone's weights, under the name ``lossattn.{backbone}``.

    They are those of the backbone, and timm's lists of pretrained models name them once, as such.
    """

    @property
    def has_weights(self) -> bool:
        return False


def trained_cfgs() -> dict[str, dict[str, Any]]:
    """default_cfgs of TRAINED."""
    cfgs = {}
    for name, (changes, _) in TRAINED.items():
        cfg: Any = get_pretrained_cfg(split_model_name_tag(name)[0])
        cfgs[f'lossattn.{name}'] = {
            **cfg.to_dict(), 'architecture': 'lossattn', 'tag': name, 'url': '', 'hf_hub_id': None, **changes}
    return with_published(cfgs)


def backbone_cfgs() -> dict[str, DefaultCfg]:
    """default_cfgs of all models that timm has: the tags of ``lossattn`` are their names, with their tags."""
    cfgs: dict[str, Any] = {'lossattn': get_pretrained_cfg(DEFAULT_BACKBONE)}
    for name in {*timm.list_models(), *timm.list_models(include_tags=True)}:  # timm's scripts look up both
        cfg = get_pretrained_cfg(name)
        if cfg is not None:
            cfgs[f'lossattn.{name}'] = BackboneCfg(**{f.name: getattr(cfg, f.name) for f in fields(cfg)})
    return generate_default_cfgs(cfgs | trained_cfgs())


def backbone_of(
        backbone: str | None, cfg: Any, overlay: dict[str, Any] | None) -> tuple[str, Any, dict[str, Any] | None]:
    """Backbone, its pretrained_cfg and overlay, of what timm hands to the entry point.

    Args:
        backbone: the argument, None if not given.
        cfg: None; a tag, which is the backbone's name unless that is given; or a whole cfg: of a published model, or
            what timm's scripts look up under the name of this entry point.
        overlay: entries that win over those of the cfg.

    Raises:
        ValueError: they contradict each other, or do not say which backbone.
    """
    if isinstance(cfg, PretrainedCfg):
        cfg = cfg.to_dict()
    if isinstance(cfg, str) and backbone is not None and backbone != cfg:
        raise ValueError(f'backbone: {backbone!r} contradicts the name lossattn.{cfg}; give one of the two.')
    if isinstance(cfg, str):
        backbone, cfg = cfg, None
    elif isinstance(cfg, dict) and (cfg.get('architecture') == 'lossattn' or cfg.get('source') in SOURCES):
        tag = cfg.get('tag')
        backbone = backbone or tag
        if cfg.get('source') in SOURCES:  # weights of our own
            architecture, backbone_tag = split_model_name_tag(backbone or DEFAULT_BACKBONE)
            backbone, cfg = architecture, {**cfg, 'architecture': architecture, 'tag': backbone_tag or None}
        else:
            looked_up: Any = get_pretrained_cfg(f'lossattn.{tag}' if tag else 'lossattn')
            looked_up = looked_up.to_dict()
            overlay = {**{key: value for key, value in cfg.items() if looked_up.get(key) != value}, **(overlay or {})}
            cfg = None
    elif cfg and backbone is None:  # timm leaves the tag out of lossattn.NAME where a cfg is given
        backbone = cfg.get('architecture')
        if not backbone:
            raise ValueError('pretrained_cfg does not say of which architecture it is; give backbone=NAME as well.')
    return backbone or DEFAULT_BACKBONE, cfg or None, overlay or None


def refuse_early(backbone: str, kwargs: dict[str, Any]) -> None:
    """Refuse a model whose logits are no sum over patches before its weights are downloaded.

    Raises:
        NoPatchSum: they are not, which a model without numbers shows. Whatever else is wrong shows when it is created.
    """
    if kwargs.get('features_only'):
        return
    given = {'device': 'meta'} if 'device' in kwargs else {}  # which would win over the context
    try:
        with torch.device('meta'):
            loss_attention(timm.create_model(backbone, **kwargs | given))
    except NoPatchSum:
        raise
    except Exception:  # a model that cannot be made without numbers
        return


def begin_small(model: Any) -> None:
    """Let the classifier, which timm left out when it loaded weights of other classes, begin as PyTorch's layers do.

    timm begins those of EfficientNets and MobileNets with weights the larger the fewer the classes, 25 times these for
    two; α follows the size of the logits.
    """
    names = model.pretrained_cfg.get('classifier') or ()  # of encoders timm names none, and left none out
    for name in [names] if isinstance(names, str) else names:
        layer: Any = model.get_submodule(name)
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()


default_cfgs = backbone_cfgs()


@register_model
def lossattn(
        pretrained: bool = False,
        backbone: str | None = None,
        pool: str = 'lossattn',
        xi: float | None = None,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Loss attention in any timm model, or with features_only=True the backbone's own feature model.

    Args:
        pretrained: load the backbone's pretrained weights, from where its own cfg or pretrained_cfg_overlay says.
        backbone: name of a timm model, with or without tag, or of TRAINED; by default a ResNet18.
        pool: 'lossattn', 'avg', or other registered patch weights without parameters.
        xi: ξ of Eq. 5b; by default 0.1, or what TRAINED says.
        kwargs: every argument of the backbone. With pretrained and another num_classes than the weights have, the
            classifier begins as PyTorch's layers do.

    Raises:
        ValueError: the backbone is no plain name, or its logits are no sum over patches.
        ConnectionError: the Hub is out of reach, and the backbone's weights are not in its cache.
        RuntimeError: weights of TRAINED that are not here and cannot be downloaded.
    """
    backbone, cfg, overlay = backbone_of(backbone, pretrained_cfg, pretrained_cfg_overlay)
    if ':' in backbone:
        raise ValueError(
            f'backbone must be the name of a timm model, got {backbone!r}. To put loss attention into a model of a '
            f'folder or a repository, call timm_lossattn.loss_attention(timm.create_model({backbone!r})).')
    if split_model_name_tag(backbone)[0] == 'lossattn' or not timm.is_model(backbone):
        raise ValueError(f'backbone must be the name of a timm model, got {backbone!r}.')
    source_args = kwargs.pop('pretrained_model_args', None)
    if source_args:
        kwargs['pretrained_model_args'] = {
            key: value for key, value in source_args.items() if key not in ('backbone', 'pool', 'xi')}
    trained = TRAINED.get(backbone) if cfg is None else None
    if trained is not None:
        cfg = trained_cfgs()[f'lossattn.{backbone}']
        if not pretrained:  # the class names are those of weights that are not loaded
            overlay = {'label_names': None, **(overlay or {})}
        overlay = verified_overlay('lossattn', pretrained, {
            'pretrained_cfg': cfg, 'pretrained_cfg_overlay': overlay, 'cache_dir': kwargs.get('cache_dir'),
        })['pretrained_cfg_overlay']
        backbone, tag = split_model_name_tag(backbone)
        cfg = {**cfg, 'architecture': backbone, 'tag': tag}
    if xi is None:
        xi = trained[1] if trained is not None else DEFAULT_XI
    plain_weights(pool, 1, xi)  # what is wrong with them is said before a download
    if pretrained:
        refuse_early(backbone, kwargs)
        if cfg is None:
            overlay = lite_overlay(backbone, overlay)
    model = create_model(
        backbone, pretrained=pretrained, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, **kwargs)
    if kwargs.get('features_only'):
        return model
    if pretrained and 0 < model.num_classes != model.pretrained_cfg['num_classes']:
        begin_small(model)
    return loss_attention(model, pool, xi)
