"""What the registered models promise: parameter counts of the paper, timm's API, completeness, weights."""
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_lossattn import PatchClassifier, ResNetBackbone
from timm_lossattn.loading import list_patch_models
from timm_lossattn.models.patch_layers import PrimaryCapsules

# the paper's Table 2, in millions of parameters for 10 classes; the capsule models without the paper's unused shortcuts
PARAMETERS = {
    'vgg11_bn_cifar': 28.15, 'vgg16_bn_cifar': 33.65, 'resnet18_cifar': 11.17, 'resnet50_cifar': 58.16,
    'vgg11_bn_meanpool_conv': 30.73, 'vgg11_bn_attn_conv': 30.80, 'vgg11_bn_gatedattn_conv': 30.86,
    'vgg11_bn_lossattn_conv': 30.73, 'resnet18_meanpool_conv': 32.67, 'resnet18_attn_conv': 32.73,
    'resnet18_gatedattn_conv': 32.80, 'resnet18_lossattn_conv': 32.67, 'vgg11_bn_routing_caps': 33.41,
    'resnet18_routing_caps': 35.35, 'vgg11_bn_lossattn_caps': 30.75, 'resnet18_lossattn_caps': 32.69,
}
NANO = [name for name in list_patch_models() if '_nano' in name]
CONV_HEADS = ('lossattn', 'avg', 'attn', 'gatedattn')


def nano(pool: str = 'lossattn', **kwargs) -> PatchClassifier:
    """A small model with any convolutional head."""
    torch.manual_seed(0)
    return timm.create_model('resnet18_lossattn_conv_nano', global_pool=pool, **kwargs)


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_counts(name):
    model = timm.create_model(name, device='meta', num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)


def test_names():
    """Every name of the design is registered, and is found by timm's wildcards."""
    expected = set()
    for backbone in ('vgg11_bn', 'resnet18'):
        for head in ('lossattn_conv', 'meanpool_conv', 'attn_conv', 'gatedattn_conv', 'lossattn_caps', 'routing_caps'):
            expected |= {f'{backbone}_{head}', f'{backbone}_{head}_s2'}
        expected |= {f'{backbone}_lossattn_conv_nano', f'{backbone}_lossattn_caps_nano', f'{backbone}_cifar'}
    expected |= {
        'resnet50_lossattn_conv', 'googlenet_lossattn_conv', 'resnet18_lossattn_conv_s8', 'resnet50_lossattn_conv_s8',
        'vgg16_bn_lossattn_conv', 'resnet34_lossattn_conv', 'resnet18_lossattn_conv_nano_s2', 'vgg16_bn_cifar',
        'resnet50_cifar', 'googlenet_cifar'}
    assert set(list_patch_models()) == expected
    assert {'lossattn'} | {n for n in expected if 'lossattn' in n} == set(timm.list_models('*lossattn*'))


@pytest.mark.parametrize('name', NANO)
@pytest.mark.parametrize('train', [True, False])
def test_completeness(name, train):
    """The image logits are the sum of the contributions; forward returns the same logits, plain, in both modes."""
    torch.manual_seed(0)
    model = timm.create_model(name, drop_rate=0.3).train(train)
    x = torch.randn(3, *model.default_cfg['input_size'])
    torch.manual_seed(1)
    out = model.forward_patches(x)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), out.logits, rtol=1e-5, atol=1e-6)
    error = (out.contributions.sum(1) - out.logits).abs()
    assert (error <= 1e-5 * out.logits.abs().clamp(min=1)).all()
    assert out.alpha.dtype == torch.float32
    torch.testing.assert_close(out.alpha.sum(1), torch.ones(3))


def routing_model() -> PatchClassifier:
    """Dynamic routing with small widths."""
    torch.manual_seed(0)
    return timm.create_model(
        'resnet18_routing_caps', backbone=partial(ResNetBackbone, widths=(4, 8, 8, 16)),
        patch_layers=partial(PrimaryCapsules, capsules=4))


@pytest.mark.parametrize('pool', [*CONV_HEADS, 'routing', 'capsules'])
@pytest.mark.parametrize('autocast', [False, True])
def test_completeness_of_every_head(pool, autocast):
    """Under bf16 autocast the contributions stay float32 and sum to the logits within bf16 rounding."""
    model = routing_model() if pool == 'routing' else timm.create_model('resnet18_lossattn_caps_nano') \
        if pool == 'capsules' else nano(pool)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
        out = model.eval().forward_patches(torch.randn(2, 3, 32, 32))
    assert out.alpha.dtype == out.contributions.dtype == torch.float32
    tolerance = 2 ** -7 if autocast else 1e-5
    torch.testing.assert_close(out.contributions.sum(1), out.logits.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('pool', CONV_HEADS)
def test_classifier_of_pre_logits(pool):
    """get_classifier() applied to forward_head(pre_logits=True) gives the image logits."""
    model = nano(pool).eval()
    x = torch.randn(2, 3, 40, 33)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[2:] == model.patch_grid(40, 33)
        torch.testing.assert_close(
            model.get_classifier()(model.forward_head(features, pre_logits=True)), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [(9, 9), (9, 50), (41, 32)])
def test_any_size_from_one_patch_up(size):
    model = nano().eval()
    out = model.forward_patches(torch.randn(1, 3, *size))
    assert out.alpha.shape[1] == model.patch_grid(*size)[0] * model.patch_grid(*size)[1]
    assert out.logits.isfinite().all()


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano',
                                  'resnet18_routing_caps'])
def test_no_images(name):
    """A batch of none, as timm's models take it."""
    model = timm.create_model(name, num_classes=3, **({'width_mult': 0.125} if 'routing' in name else {})).eval()
    x = torch.zeros(0, 3, 32, 32)
    assert model(x).shape == (0, 3)
    out = model.forward_patches(x)
    assert (out.patch_logits.shape, out.alpha.shape) == ((0, 36, 3), (0, 36))


def test_batch_invariance():
    """An image's prediction does not depend on the images beside it."""
    model = nano().eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = model.forward_patches(x)
        for i in range(4):
            for whole, alone in zip(together, model.forward_patches(x[i:i + 1])):
                torch.testing.assert_close(whole[i:i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stride', [3, 0, 16])
def test_bad_stride(stride):
    with pytest.raises(ValueError, match=f'backbone_stride.*{stride}'):
        nano(backbone_stride=stride)


@pytest.mark.parametrize('xi', [-0.1, 2, float('nan')])
def test_bad_xi(xi):
    with pytest.raises(ValueError, match='xi must lie in'):
        nano(xi=xi)


def test_bad_pools():
    with pytest.raises(ValueError, match=r"global_pool.*'max'"):
        nano('max')
    with pytest.raises(ValueError, match='num_classes=0'):
        nano('')
    with pytest.raises(ValueError, match='drop_path_rate'):
        timm.create_model('vgg11_bn_lossattn_conv_nano', drop_path_rate=0.1)
    with pytest.raises(ValueError, match='num_classes=0'):
        nano(num_classes=0).forward_patches(torch.randn(1, 3, 32, 32))


def test_refused_reset_changes_nothing():
    model = nano().eval()
    with pytest.raises(ValueError, match='global_pool'):
        model.reset_classifier(5, 'max')
    assert (model.num_classes, model.global_pool) == (10, 'lossattn')
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_classifier_on_a_pruned_backbone():
    """After pruning, each position of the last kept feature map is a patch."""
    model = nano(backbone_stride=4).eval()
    model.prune_intermediate_layers([1])
    model.reset_classifier(3)
    out = model.forward_patches(torch.randn(1, 3, 32, 32))
    assert out.alpha.shape[1] == 16 * 16 == model.patch_grid(32, 32)[0] * model.patch_grid(32, 32)[1]
    assert model.patch_boxes(32, 32)[1].tolist() == [2, 0, 4, 2]
    model = timm.create_model('resnet18_lossattn_conv_nano_s2').eval()
    model.prune_intermediate_layers([2, 0])  # the last stage that is kept need not be the last that is named
    model.reset_classifier(3)
    assert model.patch_boxes(32, 32)[-1].tolist() == [30, 30, 32, 32]


def test_head_goes_with_the_patch_layers():
    """Its classifier has their width, not the backbone's."""
    model = timm.create_model('resnet50_lossattn_conv', width_mult=1 / 8, num_classes=3).eval()
    model.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert model.num_classes == 0
    model.reset_classifier(3)
    out = model.forward_patches(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(out.contributions.sum(1), out.logits)
    plain = timm.create_model('resnet18_cifar', width_mult=1 / 8, num_classes=3).eval()  # without patch layers
    before = plain(torch.ones(1, 3, 32, 32))
    plain.prune_intermediate_layers(1, prune_norm=True, prune_head=False)
    assert torch.equal(plain(torch.ones(1, 3, 32, 32)), before)


@pytest.mark.parametrize('name', [
    'resnet18_lossattn_conv', 'resnet18_lossattn_caps', 'resnet18_lossattn_conv_s2', 'vgg11_bn_lossattn_conv',
    'vgg11_bn_lossattn_caps'])
def test_width_multiplier_gives_the_nano_models(name):
    """An eighth of the widths has the parameters of the registered small model, name by name and shape by shape."""
    base, _, _ = name.partition('_s2')
    small = timm.create_model(f'{base}_nano{"_s2" if "_s2" in name else ""}', device='meta', num_classes=10)
    scaled = timm.create_model(name, device='meta', num_classes=10, width_mult=1 / 8)
    assert {k: v.shape for k, v in scaled.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert (scaled.num_features, scaled.feature_info) == (small.num_features, small.feature_info)


@pytest.mark.parametrize('name', [
    'resnet18_cifar', 'resnet50_cifar', 'resnet50_lossattn_conv', 'resnet18_gatedattn_conv', 'resnet18_routing_caps',
    'googlenet_cifar', 'googlenet_lossattn_conv', 'vgg11_bn_cifar', 'vgg16_bn_cifar', 'vgg11_bn_routing_caps'])
def test_width_multiplier(name):
    """Every kind of model of the paper exists at any width; a full one is the registered one; it trains."""
    def count(**kwargs):
        return sum(p.numel() for p in timm.create_model(name, device='meta', **kwargs).parameters())

    assert count(width_mult=1) == count()
    assert count(width_mult=1 / 8) < count() / 20
    model = timm.create_model(name, width_mult=1 / 16).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for bad in (0, -1., float('nan')):
        with pytest.raises(ValueError, match='width_mult must be positive'):
            timm.create_model(name, width_mult=bad)


def test_headless_is_the_mean():
    model = nano(num_classes=0).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize('pool', CONV_HEADS)
def test_reset_classifier(pool):
    """New classes, same pooling, dtype, train mode and frozen backbone; learned attention survives."""
    model = nano(pool).double().eval()
    model.requires_grad_(False)
    attention = {k: v.clone() for k, v in model.head.attn.state_dict().items()}
    model.reset_classifier(0)
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 7)
    assert model.global_pool == pool
    assert not model.head.training
    assert model.head.fc.weight.dtype == torch.float64
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ['head.fc.weight', 'head.fc.bias']
    for key, value in attention.items():
        torch.testing.assert_close(model.head.attn.state_dict()[key], value)
    model.reset_classifier(0, '')
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dim() == 4
    model.reset_classifier(5)
    assert model.global_pool == pool


def test_routing_needs_its_input_size():
    model = timm.create_model('resnet18_routing_caps', device='meta')
    with pytest.raises(ValueError, match='patch grid'):
        model(torch.randn(1, 3, 40, 40, device='meta'))
    model = timm.create_model('resnet18_routing_caps', device='meta', img_size=40)
    assert model(torch.randn(1, 3, 40, 40, device='meta')).shape == (1, 10)


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'vgg11_bn_lossattn_caps_nano'])
def test_features_only(name):
    model = timm.create_model(name, features_only=True, backbone_stride=4, in_chans=1).eval()
    features = model(torch.randn(1, 1, 64, 64))
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()


def test_attention_hook():
    """timm's AttentionExtract sees α as the output of a named module."""
    from timm.utils import AttentionExtract
    model = nano().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        extracted = AttentionExtract(model, names=['head.attn'], mode='eval', method='hook')(x)
        torch.testing.assert_close(extracted['head.attn'], model.forward_patches(x).alpha)


@pytest.mark.parametrize('pool', ['avg', 'attn', 'gatedattn', 'lossattn'])
def test_classifier_put_in_by_hand(pool):
    """That is no linear layer: the logits are still the sum of what patches add."""
    model = timm.create_model('resnet18_lossattn_conv_nano', global_pool=pool).eval()
    model.head.fc = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_patches(x).contributions.sum(dim=1)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_plain_vgg_takes_timm_s_arguments():
    """Layers in the classifier too, pools that widen; class names are those of weights, and there are none."""
    model = timm.create_model('vgg11_bn_cifar', width_mult=0.125, act_layer=torch.nn.SiLU, global_pool='catavgmax')
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())
    features = model.forward_features(torch.randn(1, 3, 32, 32))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert not model.pretrained_cfg['label_names']


def test_layer_decay_groups():
    """group_matcher orders stem, stages, patch layers, head."""
    from timm.models import group_parameters
    model = nano()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = [layers[f'{n}.weight'] for n in (
        'backbone.stem.conv', 'backbone.stages.0.0.conv1', 'backbone.stages.3.1.conv2', 'patch_layers.conv1.conv',
        'head.fc')]
    assert order == sorted(order)
    assert len(set(order)) == 5


def test_grad_checkpointing_gradients():
    """The same gradients; what a stage holds is computed a second time for them."""
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model = nano().train()
        model.set_grad_checkpointing(enable)
        calls = []
        for n, stage in enumerate(model.backbone.stages):
            stage[-1].register_forward_pre_hook(lambda block, args, calls=calls, n=n: calls.append(n))
        model(x).square().sum().backward()
        assert calls == ([0, 1, 2, 3, 3, 2, 1, 0] if enable else [0, 1, 2, 3])
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_torch_compile_and_export():
    """The patch outputs trace without graph breaks, and export with a dynamic batch."""
    model = nano().eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_patches(x)
        compiled = torch.compile(model.forward_patches, backend='eager', fullgraph=True)
        for a, b in zip(compiled(x), expected):
            torch.testing.assert_close(a, b)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},))
        torch.testing.assert_close(exported.module()(torch.cat([x, x]))[:3], expected.logits)


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'])
def test_hub_style_round_trip(name, tmp_path):
    """timm's local-dir source: what save_for_hf writes loads with identical logits."""
    from timm.models import save_for_hf
    model = timm.create_model(name, num_classes=4).eval()
    save_for_hf(model, tmp_path, model_config=dict(num_classes=4))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano_s2', 'resnet18_lossattn_conv_nano'])
def test_channels_last_gradients(name):
    """Those of the usual layout; a strided shortcut of few channels must not corrupt memory (oneDNN issue 6035)."""
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    x = torch.randn(8, 3, 64, 64)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=memory_format)
        model.zero_grad()
        model(x.contiguous(memory_format=memory_format)).square().sum().backward()
        gradients.append([p.grad.clone(memory_format=torch.contiguous_format) for p in model.parameters()])
    for usual, last in zip(*gradients):
        torch.testing.assert_close(last, usual, rtol=0., atol=0.05 * float(usual.abs().max()) + 1e-5)  # rounding grows


def test_parameter_table_matches_the_paper_file():
    """The numbers above are the paper's, but for the shortcuts that its capsule layers never use (paper_to_code.md)."""
    table = yaml.safe_load((Path(__file__).parents[1] / 'data' / 'paper_results.yaml').read_text())['params_million']
    assert set(table) == set(PARAMETERS)
    differ = {name for name in table if table[name] != PARAMETERS[name]}
    assert differ == {'vgg11_bn_lossattn_caps', 'resnet18_lossattn_caps'}
