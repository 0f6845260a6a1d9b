"""loss_attention on models that somebody has used before: compiled, patched, frozen, run, changed by hand."""
import copy
from functools import partial
from types import MethodType

import pytest
import timm
import torch

from timm_lossattn import explain, freeze_backbone, loss_attention
from timm_lossattn.explanation import class_labels
from timm_lossattn.export import export_model
from timm_lossattn.models.any_timm import equal_boxes

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def compiled(model):
    model.compile(backend='eager')


def bound(model):
    model.forward = MethodType(type(model).forward, model)


def partially_bound(model):
    model.forward = partial(type(model).forward, model)


class Called:
    """A callable that holds the model, as hooks of other libraries do."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return type(self.model).forward(self.model, x)


def held(model):
    model.forward = Called(model)


@pytest.mark.parametrize('change', [compiled, bound, partially_bound, held])
def test_calls_are_those_of_the_new_model(change):
    """What calls the stock model is not taken over as it is: model(x) would be the stock model's answer."""
    torch.manual_seed(0)
    stock = timm.create_model('test_resnet', num_classes=5).eval()
    plain = loss_attention(stock)(X)
    change(stock)
    before = stock(X)
    new = loss_attention(stock)
    assert torch.equal(new(X), plain)
    torch.testing.assert_close(new(X), new.forward_patches(X).logits)
    assert not torch.allclose(new(X), before)
    assert torch.equal(stock(X), before)


def test_frozen_before():
    """freeze_backbone before loss_attention: each model has a mode of its own, the backbone is frozen in both."""
    stock = timm.create_model('test_resnet', num_classes=5)
    freeze_backbone(stock)
    stock.train()
    new = loss_attention(stock)
    assert new.train() is new
    assert not new.layer1.training
    new.eval()
    assert not new.training
    assert stock.training
    assert explain(new, X).prediction.logits.shape == (2, 5)
    other = copy.deepcopy(new)
    other.train()
    assert other.training
    assert not new.training


@pytest.mark.parametrize('name', ['levit_128s', 'tiny_vit_5m_224', 'efficientvit_m0'])
def test_after_a_forward_pass(name, tmp_path):
    """These keep attention biases, part of a graph, beside their buffers: a copy does without them."""
    model = timm.create_model(f'lossattn.{name}', num_classes=5).eval()
    x = torch.randn(1, 3, 224, 224)
    model(x)
    assert min(model.patch_grid(224, 224)) > 1
    model.reset_classifier(3)
    out = model.forward_patches(x)
    torch.testing.assert_close(out.contributions.sum(1), out.logits)
    loss_attention(timm.create_model(name, num_classes=2).eval())
    if name == 'levit_128s':
        export_model(model, tmp_path / 'model.pt2', 'torch.export')


def test_new_classes_have_no_names():
    """Neither those of the weights, nor those of the tag's data set."""
    cells = timm.create_model('lossattn.tf_efficientnet_lite0.pbc', pretrained=True)
    assert class_labels(cells, 8)[0] == 'basophil'
    cells.reset_classifier(8)
    assert class_labels(cells, 8)[0] == 'class 0'
    thousand = timm.create_model('lossattn.resnet18.a1_in1k')
    thousand.reset_classifier(1000)
    assert class_labels(thousand, 1000)[5] == 'class 5'


def test_setting_changed_by_hand():
    """The analysis of a model is kept as long as the model is what it was."""
    model = timm.create_model('test_vit', num_classes=5, global_pool='avg').eval()
    loss_attention(model)
    model.global_pool = 'token'
    with pytest.raises(ValueError, match='class token'):
        loss_attention(model)


def test_made_by_hand_for_another_size():
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=5, global_pool='avg').eval()
    new = loss_attention(model)
    assert new.patch_grid(64, 64) == (4, 4)
    out = new.forward_patches(X)
    torch.testing.assert_close(out.contributions.sum(1), out.logits)


@pytest.mark.parametrize('name', ['lossattn.test_resnet', 'resnet18_lossattn_conv_nano'])
def test_default_device(name):
    """Boxes and maps are of the CPU, as explanations are, whatever torch.set_default_device says."""
    model = timm.create_model(name).eval()
    explanation = explain(model, X)
    equal_boxes.cache_clear()
    with torch.device('meta'):
        assert model.patch_boxes(64, 64).device.type == 'cpu'
        assert explanation.versus(1).heat_map().shape == (64, 64)
        assert explanation.to_dict()
