"""Patch layers against loops over capsule units, what a patch sees, and the smallest image."""
import re

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_lossattn  # noqa: F401  registers the models
from timm_lossattn.models.patch_layers import CapsuleLength, CapsulePatchLayers, ConvPatchLayers, PrimaryCapsules

PRIMARY, SECONDARY = (3, 4), (5, 2)  # capsule channels, capsule dimension


def randomize(module):
    """Generic parameters and batch-norm statistics."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in module.named_buffers():
        if name.endswith('running_mean'):
            buffer.normal_()
        elif name.endswith('running_var'):
            buffer.uniform_(0.5, 2)
    return module


def unit(layer, x, units, stride=1):
    """Convolution, batch norm and ReLU with the output channels ``units`` of a layer only."""
    conv, bn = layer.conv, layer.bn
    x = F.conv2d(x, conv.weight[units], conv.bias[units], stride=stride)
    if bn.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = bn.running_mean[units].clone(), bn.running_var[units].clone()
    x = (x - mean[:, None, None]) / (var[:, None, None] + bn.eps).sqrt()
    return (x * bn.weight[units, None, None] + bn.bias[units, None, None]).clamp(min=0)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('size', [(9, 9), (13, 18)])
def test_capsule_layers_equal_loops_over_units(size, train):
    """Each capsule unit on its own, Eq. 11 with an offset per channel, then each unit of the second layer."""
    torch.manual_seed(0)
    layers = randomize(CapsulePatchLayers(2, PRIMARY, SECONDARY, dtype=torch.float64)).train(train)
    layers.length.offset.data = torch.tensor([0., 0.5, -0.5], dtype=torch.float64).view(3, 1, 1)
    x = torch.randn(4, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        lengths = []
        for c in range(PRIMARY[0]):
            u = unit(layers.primary.conv, x, slice(c * PRIMARY[1], (c + 1) * PRIMARY[1]), stride=4)  # (B, D, H', W')
            squares = sum(u[:, d] ** 2 for d in range(PRIMARY[1]))
            lengths.append((squares.sqrt() - layers.length.offset[c]).clamp(min=0))
        lengths = torch.stack(lengths, 1)
        expected = torch.cat([
            unit(layers.secondary, lengths, slice(c * SECONDARY[1], (c + 1) * SECONDARY[1]))
            for c in range(SECONDARY[0])], 1)
        actual = layers(x)
    assert actual.shape == (4, layers.num_features, (size[0] - 9) // 4 + 1, (size[1] - 9) // 4 + 1)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert expected.count_nonzero() > 10


def test_length_of_zero_capsules_has_finite_gradients():
    """Eq. 11 at a zero capsule: no NaN in the backward pass, whatever the offset."""
    length = CapsuleLength(2)
    length.offset.data = torch.tensor([-1., 1.]).view(2, 1, 1)
    x = torch.zeros(1, 6, 1, 2, requires_grad=True)
    out = length(x)
    assert out.flatten().tolist() == [1., 1., 0., 0.]
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert length.offset.grad.flatten().tolist() == [-2., 0.]


def test_length_in_float16_does_not_overflow():
    """Lengths are computed in float32: components of 300 have squares beyond float16."""
    out = CapsuleLength(1, dtype=torch.float16)(torch.full((1, 4, 1, 1), 300., dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.item() == 600


@pytest.mark.parametrize('layers', [
    lambda: ConvPatchLayers(2, width=4),
    lambda: ConvPatchLayers(6, width=4),
    lambda: CapsulePatchLayers(2, PRIMARY, SECONDARY),
    lambda: PrimaryCapsules(2, *PRIMARY),
], ids=['conv', 'conv_reduced', 'caps', 'primarycaps'])
def test_a_patch_sees_its_window_only(layers):
    """Patch (i, j) depends on the feature-map window [4i, 4i + 9) × [4j, 4j + 9), on all of it and on nothing else."""
    torch.manual_seed(0)
    layers = randomize(layers()).double().eval()
    for module in layers.modules():
        if isinstance(module, torch.nn.ReLU):
            module.forward = lambda x: F.leaky_relu(x, 0.5)  # let every channel pass a gradient
    in_chs = 6 if isinstance(getattr(layers, 'reduce', None), torch.nn.Module) and hasattr(layers.reduce, 'conv') else 2
    x = torch.randn(1, in_chs, 14, 18, dtype=torch.float64, requires_grad=True)
    out = layers(x)
    assert out.shape == (1, layers.num_features, 2, 3)
    for i, j in ((0, 0), (1, 2), (0, 1)):
        grad = torch.autograd.grad(out[0, :, i, j].sum(), x, retain_graph=True)[0]
        expected = torch.zeros(14, 18, dtype=torch.bool)
        expected[4 * i:4 * i + 9, 4 * j:4 * j + 9] = True
        assert torch.equal(grad[0].abs().sum(0) > 0, expected)


@pytest.mark.parametrize('stride', [1, 2, 4, 8])
@pytest.mark.parametrize('name', [
    'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano', 'vgg11_bn_lossattn_conv_nano',
    'vgg11_bn_lossattn_caps_nano',
])
def test_smallest_image(name, stride):
    """Too small: ValueError with the minimum side and the stride; an image of exactly the minimum gives one patch."""
    model = timm.create_model(name, backbone_stride=stride).eval()
    with torch.inference_mode():
        with pytest.raises(ValueError, match=rf'backbone_stride={stride}') as error:
            model(torch.zeros(1, 3, 8, 8))
        minimum = int(re.search(r'at least (\d+) pixels', str(error.value)).group(1))
        for height, width in ((minimum - 1, minimum), (minimum, minimum - 1)):
            with pytest.raises(ValueError, match=f'at least {minimum} pixels'):
                model(torch.zeros(1, 3, height, width))
        assert model.forward_features(torch.zeros(1, 3, minimum, minimum)).shape[2:] == (1, 1)
        assert model.forward_patches(torch.zeros(1, 3, minimum, minimum)).alpha.tolist() == [[1.]]


@pytest.mark.parametrize('size', [(9, 8), (8, 9), (1, 20)])
@pytest.mark.parametrize('layers', [ConvPatchLayers, CapsulePatchLayers, PrimaryCapsules])
def test_too_small_feature_map(layers, size):
    """A feature map without room for a patch: the message gives its size and the minimum for the stride."""
    with pytest.raises(ValueError, match=rf'at least 33 pixels.*{size[0]}x{size[1]} feature map'):
        layers(2, backbone_stride=4)(torch.zeros(1, 2, *size))
