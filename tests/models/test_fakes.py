"""A way to weigh patches, a head, and a backbone that this package has never heard of, each in this one file.

They go through create_model, explain, the task and export without a change anywhere else.
"""
import re
from functools import partial

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import nn

from timm_lossattn import LossAttentionTask, PatchClassifier, PatchPrediction, explain
from timm_lossattn.attention import PatchHead, PatchWeights, register_weights
from timm_lossattn.export import export_model
from timm_lossattn.models.entrypoints import create_patch_classifier, patch_model_cfg
from timm_lossattn.models.patch_layers import ConvPatchLayers


@register_weights('softmaxnorm')
class SoftmaxNormWeights(PatchWeights):
    """α = softmax of ‖p_m‖; a patch counts if it has more than its share."""
    reads_logits = True
    description = 'weighted by a softmax of sizes'

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(patch_logits, dim=-1).softmax(dim=1)

    def selected(self, alpha):
        return alpha > 1 / alpha.shape[1]


class BrightestWeights(PatchWeights):
    """What BrightestPatchHead puts on its patches."""
    default_loss = 'classification'
    description = 'of the patch with the largest features alone'

    def forward(self, h: torch.Tensor, patch_logits: torch.Tensor) -> torch.Tensor:
        first = h.sum(dim=2).argmax(dim=1, keepdim=True)
        return torch.zeros_like(h[:, :, 0]).scatter(1, first, 1.)

    def selected(self, alpha):
        return alpha > 0

    def probabilities(self, logits, multi_label=False):
        return logits.sigmoid()


class BrightestPatchHead(PatchHead):
    """The patch with the largest features decides alone."""
    default_pool = 'brightest'

    def __init__(self, in_features, num_classes, pool_type='brightest', xi=0.1, device=None, dtype=None):
        super().__init__()
        self.check_pool(pool_type, num_classes)
        self.num_features = in_features
        self.attn = BrightestWeights(xi)
        self.fc = nn.Linear(in_features, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()

    @classmethod
    def create(cls, features, grid_size, num_classes, pool_type, xi, drop_rate, device=None, dtype=None):
        return cls(features.num_features, num_classes, pool_type, xi, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(x))

    def forward_patches(self, x: torch.Tensor) -> PatchPrediction:
        h = x.flatten(2).transpose(1, 2)
        p = self.fc(h)
        alpha = self.attn(h, p)
        contributions = alpha.unsqueeze(-1) * p
        return PatchPrediction(contributions.sum(dim=1), p, alpha, contributions)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        h = x.flatten(2).transpose(1, 2)
        return (self.attn(h, h).unsqueeze(-1) * h).sum(dim=1)


class PlainBackbone(nn.Module):
    """Two convolutions, without anything of this package."""

    def __init__(self, in_chans, backbone_stride, drop_path_rate, device=None, dtype=None):
        super().__init__()
        self.first = ConvNormAct(in_chans, 6, 3, device=device, dtype=dtype)
        self.second = ConvNormAct(6, 10, 3, stride=backbone_stride, device=device, dtype=dtype)
        self.feature_info = [dict(num_chs=6, reduction=1, module='first'),
                             dict(num_chs=10, reduction=backbone_stride, module='second')]
        self.num_features = 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        return dict(stem=r'^first', blocks=r'^second')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable=True):
        assert not enable

    @torch.jit.ignore
    def forward_intermediates(self, x, indices=None, stop_early=False):
        first = self.first(x)
        second = self.second(first)
        return second, [first, second]


default_cfgs = generate_default_cfgs({
    'fake_weights.cifar10': patch_model_cfg(), 'fake_head.cifar10': patch_model_cfg(),
    'fake_backbone.cifar10': patch_model_cfg(), 'fake_stride.cifar10': patch_model_cfg()})

SMALL = dict(backbone=PlainBackbone, patch_layers=partial(ConvPatchLayers, width=8))


@register_model
def fake_weights(pretrained=False, **kwargs):
    model_args = dict(SMALL, global_pool='softmaxnorm')
    return create_patch_classifier('fake_weights', pretrained, 2, **dict(model_args, **kwargs))


@register_model
def fake_head(pretrained=False, **kwargs):
    return create_patch_classifier('fake_head', pretrained, 2, head=BrightestPatchHead, **SMALL, **kwargs)


@register_model
def fake_backbone(pretrained=False, **kwargs):
    return create_patch_classifier('fake_backbone', pretrained, 2, **SMALL, **kwargs)


@register_model
def fake_stride(pretrained=False, **kwargs):
    return create_patch_classifier('fake_stride', pretrained, 2, **dict(dict(SMALL, backbone_stride=2), **kwargs))


NAMES = ['fake_weights', 'fake_head', 'fake_backbone', 'fake_stride']


@pytest.fixture(params=NAMES)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=4).eval()


def test_explain(model):
    """Grid and boxes from the feature map, evidence that sums to the lead, the selection that the weights define."""
    x = torch.randn(2, 3, 40, 32)
    explanation = explain(model, x)
    stride = 2 if model.backbone_stride == 2 else 1
    rows, cols = ((n // stride - 9) // 4 + 1 for n in (40, 32))
    assert explanation.grid == (rows, cols)
    assert explanation.patch_boxes[-1].tolist() == [
        stride * v for v in (4 * (cols - 1), 4 * (rows - 1), 4 * (cols - 1) + 9, 4 * (rows - 1) + 9)]
    logits = model(x).detach()
    torch.testing.assert_close(explanation.prediction.logits, logits)
    torch.testing.assert_close(explanation.versus(None).evidence.sum(1), logits.max(1).values)
    alpha = explanation.prediction.alpha
    if isinstance(model.head, BrightestPatchHead):
        assert explanation.selected.sum(1).tolist() == [1, 1]
        torch.testing.assert_close(explanation.probabilities, logits.sigmoid())
    elif model.global_pool == 'softmaxnorm':
        assert torch.equal(explanation.selected, alpha > 1 / alpha.shape[1])


def test_task_and_reset(model):
    """The loss reaches every parameter that it should; another classifier keeps the head's kind."""
    task = LossAttentionTask(model.train(), verbose=False)
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))['loss'].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    head = type(model.head)
    model.reset_classifier(7)
    assert type(model.head) is head
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['backbone.first.conv.weight'] < groups['backbone.second.conv.weight'] < groups['head.fc.weight']
    assert groups['backbone.second.conv.weight'] < groups['patch_layers.conv1.conv.weight'] < groups['head.fc.weight']


def test_intermediates(model):
    """The backbone's feature maps, with and without the patch layers behind them."""
    x = torch.randn(1, 3, 32, 32)
    features, maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [6, 10]
    torch.testing.assert_close(features, model.forward_features(x))


@pytest.mark.parametrize('format', ['torch.export', 'torchscript'])
def test_export(model, tmp_path, format):
    """The file computes what the model does (export_model compares them)."""
    report = export_model(model, tmp_path / f'model{".pt2" if format == "torch.export" else ".pt"}', format)
    assert max(report.differences[7].values()) <= 1e-5


def test_the_backbone_initialises_itself():
    """PatchClassifier leaves the weights of what it is given alone."""
    def backbone(*args, **kwargs):
        module = PlainBackbone(*args, **kwargs)
        nn.init.constant_(module.first.conv.weight, 0.25)
        return module

    model = PatchClassifier(backbone)
    assert (model.backbone.first.conv.weight == 0.25).all()


def test_a_model_is_no_backbone():
    """The wrong way names the right one."""
    with pytest.raises(TypeError, match=r'timm_lossattn\.loss_attention\(model\)'):
        PatchClassifier(timm.create_model('resnet18'))


def test_one_name_one_class():
    """A registered name is not taken over silently."""
    by = 'is registered already, by timm_lossattn.attention.weights.LossAttentionWeights'
    with pytest.raises(ValueError, match=f"'lossattn' {re.escape(by)}"):
        register_weights('lossattn')(BrightestWeights)
    namesake = type('LossAttentionWeights', (BrightestWeights,), {})  # of another module
    with pytest.raises(ValueError, match=re.escape(by)):
        register_weights('lossattn')(namesake)
