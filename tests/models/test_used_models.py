"""loss_attention on models that somebody has used before: compiled, patched, frozen, run, changed by hand."""
import copy
from functools import partial
from types import MethodType

import pytest
import timm
import torch
from PIL import Image
from timm.layers import SelectAdaptivePool2d
from timm.models import save_for_hf
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import prune

from card import Words
from folder import make_folder
from timm_lossattn import explain, freeze_backbone, load_model, loss_attention
from timm_lossattn.explanation import class_labels
from timm_lossattn.export import export_model
from timm_lossattn.loading import full_name
from timm_lossattn.models.probe import equal_boxes
from timm_lossattn.report.dataset import imagenet_synsets


class OwnPruning(prune.BasePruningMethod):
    """Every second weight."""
    PRUNING_TYPE = 'unstructured'

    def compute_mask(self, t, default_mask):
        mask = default_mask.clone()
        mask.view(-1)[::2] = 0
        return mask


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_compiled():
    """``Module.compile`` keeps a call of the stock model, whose answer would be that of the new one."""
    torch.manual_seed(0)
    stock = timm.create_model('test_resnet', num_classes=5).eval()
    plain = loss_attention(stock)(X)
    stock.compile(backend='eager')
    before = stock(X)
    new = loss_attention(stock)
    assert torch.equal(new(X), plain)
    torch.testing.assert_close(new(X), new.forward_patches(X).logits)
    assert not torch.allclose(new(X), before)
    assert torch.equal(stock(X), before)


def test_wrapped():
    """What torch.compile, DataParallel and timm's EMA make of a model is explained as the model itself."""
    own = timm.create_model('test_resnet', num_classes=5).eval()
    wanted = explain(loss_attention(own), X).evidence
    for wrapped in (torch.compile(own), nn.DataParallel(own), ModelEmaV3(own)):
        assert torch.equal(explain(loss_attention(wrapped), X).evidence, wanted)
        assert explain(wrapped, X).grid == explain(own, X).grid
    photo = Image.new('RGB', (64, 64), 'orange')
    assert len(explain(torch.compile(loss_attention(own)), photo)) == 1


@pytest.mark.parametrize('name', ['forward', 'forward_head', 'forward_features'])
@pytest.mark.parametrize('known', [False, True])
def test_replaced_on_the_object(name, known):
    """Whatever it calls, and however it is bound, it may call the stock model: refused, also if the model is known."""
    model = timm.create_model('test_resnet', num_classes=5).eval()
    if known:
        loss_attention(model)
    setattr(model, name, partial(getattr(type(model), name), model))
    with pytest.raises(ValueError, match=f'`del model.{name}` first'):
        loss_attention(model)
    delattr(model, name)
    assert loss_attention(model)(X).shape == (2, 5)


def test_bound_methods():
    """Of other methods the new model gets its own, and the stock model keeps its."""
    model = timm.create_model('test_resnet', num_classes=5)
    model.itself = MethodType(lambda self: self, model)
    new = loss_attention(model)
    assert new.itself() is new
    assert model.itself() is model


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


@pytest.mark.parametrize('reparametrize', [
    partial(prune.l1_unstructured, name='weight', amount=0.3), partial(OwnPruning.apply, name='weight'),
    nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
def test_weights_that_a_hook_makes(reparametrize):
    """torch.nn.utils puts them in before a layer is called: pruned, or normalised ones, of a layer in the head too."""
    torch.manual_seed(0)
    stock = timm.create_model('test_convnext', num_classes=5).eval()
    reparametrize(stock.get_classifier())
    after = stock(X)
    model = loss_attention(stock, pool='avg')
    torch.testing.assert_close(model(X), after)
    torch.testing.assert_close(model.forward_patches(X).contributions.sum(dim=1), after)


def test_new_classes_have_no_names(tmp_path):
    """Neither those of the weights, nor those of the tag's data set, also not after they were published."""
    cells = timm.create_model('lossattn.tf_efficientnet_lite0.pbc', pretrained=True)
    assert class_labels(cells, 8)[0] == 'basophil'
    cells.reset_classifier(8)
    assert class_labels(cells, 8)[0] == 'class 0'
    thousand = timm.create_model('lossattn.resnet18.a1_in1k')
    assert full_name(thousand) == 'lossattn.resnet18.a1_in1k'
    thousand.reset_classifier(1000)
    assert class_labels(thousand, 1000)[5] == 'class 5'
    assert full_name(thousand) == 'lossattn.resnet18'
    assert imagenet_synsets(thousand) == []
    save_for_hf(thousand, tmp_path / 'saved', safe_serialization=True)
    (tmp_path / 'published').mkdir()
    for folder in ('saved', 'published'):
        if folder == 'published':
            make_folder(str(tmp_path / 'saved'), tmp_path / folder, 'me/x', Words(), None)
        assert class_labels(load_model(f'local-dir:{tmp_path / folder}'), 1000)[5] == 'class 5'


def test_setting_changed_by_hand():
    """The analysis of a model is kept as long as the model is what it was."""
    model = timm.create_model('test_vit', num_classes=5, global_pool='avg').eval()
    loss_attention(model)
    new, grid = loss_attention(model), torch.randn(1, 3, 160, 160)
    model.global_pool = new.global_pool = 'token'
    for use in (lambda: loss_attention(model), lambda: new.forward_patches(grid)):
        with pytest.raises(ValueError, match='class token'):
            use()


@pytest.mark.parametrize('use', ['forward', 'forward_patches', 'patch_grid'])
def test_refused_once_changed_by_hand(use):
    """Whichever is asked first; and taken back as soon as the model is what it was."""
    model = timm.create_model('lossattn.test_vit', num_classes=5, global_pool='avg').eval()
    x = torch.randn(2, 3, 160, 160)
    before = model(x)
    model.global_pool = 'token'
    uses = {'forward': lambda: model(x), 'forward_patches': lambda: model.forward_patches(x),
            'patch_grid': lambda: model.patch_grid(160, 160)}
    for call in (uses[use], *uses.values()):
        with pytest.raises(ValueError, match='class token'):
            call()
    assert 'class token' in model.patch_refusal
    model.global_pool = 'avg'
    assert torch.equal(model(x), before)
    assert model.patch_kind == 'B'
    assert (model.patch_grid(160, 160), model.patch_refusal) == ((10, 10), '')


@pytest.mark.parametrize('train', [False, True])
def test_head_changed_by_hand(train):
    """A forward pass looks at it as forward_patches does: statistics are those of pooled vectors, not of patches."""
    model = timm.create_model('lossattn.test_resnet', num_classes=5).train(train)
    model.fc = nn.Sequential(nn.BatchNorm1d(model.num_features), nn.Linear(model.num_features, 5)).train(train)
    other = copy.deepcopy(model)
    other._check_patches('forward_patches')
    torch.testing.assert_close(model(X), other.forward_patches(X).logits)
    assert int(model.fc[0].num_batches_tracked) == int(other.fc[0].num_batches_tracked) == train
    model.global_pool = SelectAdaptivePool2d(pool_type='max', flatten=True)
    with pytest.raises(ValueError, match='no sum over patches'):
        model(X)


def test_average_of_a_model_changed_by_hand():
    """α = 1/M: plain logits are the stock model's own, whatever decides them."""
    stock = timm.create_model('test_vit', num_classes=5, global_pool='avg').eval()
    model, x = loss_attention(stock, 'avg'), torch.randn(2, 3, 160, 160)
    model.global_pool = stock.global_pool = 'token'
    assert torch.equal(model(x), stock(x))


def test_checkpointing_is_no_change(monkeypatch):
    model = timm.create_model('lossattn.test_vit', num_classes=5, global_pool='avg').eval()
    monkeypatch.setattr('timm_lossattn.models.any_timm.analyse', None)
    model.set_grad_checkpointing()
    assert model(torch.randn(1, 3, 160, 160)).shape == (1, 5)


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])
def test_patches_need_a_classifier(name):
    """How the features lie is not known before there is one."""
    model = timm.create_model(f'lossattn.{name}', num_classes=0)
    for use in (model.patch_grid, model.patch_boxes):
        with pytest.raises(ValueError, match='patch_grid needs a classifier'):
            use(160, 160)
    model.reset_classifier(5, 'avg')
    rows, cols = model.patch_grid(160, 160)
    assert len(model.patch_boxes(160, 160)) == rows * cols


def test_tensor_beside_the_buffers():
    """A plain tensor in the head keeps its number while the head is probed."""
    class Scaled(nn.Linear):
        scale = None

        def forward(self, x):
            return super().forward(x) * self.scale

    model = timm.create_model('test_resnet', num_classes=5).eval()
    model.fc = Scaled(model.num_features, 5)
    model.fc.scale = torch.tensor(2.)
    assert loss_attention(model).patch_kind == 'A'


@pytest.mark.parametrize('model', [
    partial(timm.models.VisionTransformer, embed_dim=32, depth=1, num_heads=2, global_pool='avg'),
    partial(timm.models.MlpMixer, embed_dim=32, num_blocks=1)])
def test_made_by_hand_for_another_size(model):
    new = loss_attention(model(img_size=64, patch_size=16, num_classes=5).eval())
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


def test_default_dtype():
    """Boxes are whole pixels of the image, whatever torch.set_default_dtype says."""
    equal_boxes.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert equal_boxes(8, 8, 299, 299)[-1].tolist() == [262, 262, 299, 299]
    finally:
        torch.set_default_dtype(torch.float32)
        equal_boxes.cache_clear()


@pytest.mark.parametrize('pooled', [2, 3])
def test_tokens_that_lie_unit_by_unit(pooled):
    """Hiera's last tokens are in the order of the image only if all of its poolings took place."""
    model = loss_attention(timm.create_model('hiera_tiny_224', q_pool=pooled))
    if pooled == 3:
        assert model.patch_grid(224, 224) == (7, 7)
    else:
        with pytest.raises(ValueError, match='does not say how its 196 tokens lie'):
            model.patch_grid(224, 224)
