"""pytest plugin for timm's own tests/test_models.py, whose intermediates tests select models by timm's module names.

With ``-p conformance_plugin`` they select this package's modules instead; the test file itself stays as it is.
"""
import timm

import timm_lossattn.cli  # noqa: F401  (registers the models)

MODULES = ['resnet_lossattn', 'vgg_lossattn', 'googlenet_lossattn']
_list_models = timm.list_models


def list_models(*args, **kwargs):
    """timm.list_models with a list of modules replaced by ours."""
    if isinstance(kwargs.get('module'), list):
        kwargs['module'] = MODULES
    return _list_models(*args, **kwargs)


timm.list_models = list_models
