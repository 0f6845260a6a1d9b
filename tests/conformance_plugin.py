"""pytest plugin for timm's own tests/test_models.py, which select models by timm's names and module names.

With ``-p conformance_plugin`` the selections by module mean this package's modules, those by a pattern such as
``vit_*`` mean ``lossattn_vit_*`` too, and no other model of timm is listed (nor one of the names
``lossattn.{any timm model}``); the test file itself stays as it is.
"""
import os

import timm

import conformance_backbones  # noqa: F401  (registers them)
import timm_lossattn.cli  # noqa: F401  (registers the models)

MODULES = ['resnet_lossattn', 'vgg_lossattn', 'googlenet_lossattn', 'lossattn', 'conformance_backbones']
_list_models = timm.list_models
OURS = {*_list_models(module=MODULES)}


def list_models(filter='', module='', pretrained=False, exclude_filters='', **kwargs):
    """timm.list_models with lists of modules replaced by ours, and lists of patterns extended."""
    if isinstance(module, list):
        module = MODULES
    filter, exclude_filters = (
        [*patterns, *(f'lossattn_{pattern}' for pattern in patterns)] if isinstance(patterns, list) else patterns
        for patterns in (filter, exclude_filters))
    names = _list_models(filter, module, pretrained, exclude_filters, **kwargs)
    return [name for name in names if name.split('.')[0] in OURS]


timm.list_models = list_models


def pytest_collection_modifyitems(items):
    """A smaller image for the forward test, if conformance.py asks for it."""
    size = os.environ.get('CONFORMANCE_FORWARD_SIZE')
    for module in {item.module for item in items} if size else ():
        module.TARGET_FWD_SIZE = int(size)
