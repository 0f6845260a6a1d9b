"""hub/space/app.py as a module, and what it answers, for the tests of the demo."""
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from timm_lossattn.models.lite_weights import lite_file

ROOT = Path(__file__).parents[1]
SPACE = ROOT / 'hub' / 'space'
EXAMPLES = SPACE / 'examples'
CAT, SHIP = EXAMPLES / 'cifar10_test_00000_cat.png', EXAMPLES / 'cifar10_test_00001_ship.png'
PHOTO = EXAMPLES / 'photo_cat.jpg'
CONV, CAPS = 'resnet18_lossattn_conv_nano.cifar10', 'resnet18_lossattn_caps_nano.cifar10'
LITE, STOCK = 'lossattn.tf_efficientnet_lite0.in1k', 'tf_efficientnet_lite0'
needs_imagenet = pytest.mark.skipif(lite_file('tf_efficientnet_lite0') is None, reason='needs the extra imagenet')


def load_app(path):
    """app.py as a module; building the page is part of it."""
    spec = importlib.util.spec_from_file_location('space_app', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(outputs):
    """The parts of an answer by name."""
    names = 'column', 'message', 'rest', 'says', 'in_row', 'stacked', 'top', 'about', 'picture', 'numbers'
    return SimpleNamespace(**dict(zip(names, outputs, strict=True)))


def error_message(app, path, name=CONV, target='', against=''):
    """The message for what is refused; there is nothing else on the page then."""
    [outputs] = app.answer(name, str(path), target, against)
    answer = shown(outputs)
    assert answer.rest['visible'] is False
    assert [answer.in_row, answer.stacked, answer.top, answer.picture, answer.numbers] == [None] * 5
    assert answer.message.startswith('<p role="alert">')
    assert str(path.parent) not in answer.message
    return answer.message
