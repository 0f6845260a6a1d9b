"""pytest plugin for timm's own tests/test_models.py, which select models by timm's names and module names.

With ``-p conformance_plugin`` the selections by module mean this package's modules, those by a pattern such as
``vit_*`` mean ``lossattn_vit_*`` too, and of the names ``lossattn.{any timm model}`` none is tested; the test file
itself stays as it is.
"""
import timm

import conformance_backbones  # noqa: F401  (registers them)
import timm_lossattn.cli  # noqa: F401  (registers the models)

MODULES = ['resnet_lossattn', 'vgg_lossattn', 'googlenet_lossattn', 'lossattn', 'conformance_backbones']
_list_models = timm.list_models


def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """timm.list_models with lists of modules replaced by ours, and lists of patterns extended."""
    if isinstance(module, list):
        module = MODULES
    filter, exclude_filters = (
        [*patterns, *(f'lossattn_{pattern}' for pattern in patterns)] if isinstance(patterns, list) else patterns
        for patterns in (filter, exclude_filters))
    names = _list_models(filter, module, pretrained, exclude_filters, **kwargs)
    return [name for name in names if not name.startswith('lossattn.')]


timm.list_models = list_models
