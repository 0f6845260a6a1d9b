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


@pytest.mark.parametrize(('t', 'q'), [(4, 0), (2, 0), (4, 4), (2, 4), (2, 1)])
@pytest.mark.parametrize('layers', [
    lambda **kwargs: ConvPatchLayers(2, width=4, **kwargs),
    lambda **kwargs: ConvPatchLayers(6, width=4, **kwargs),
    lambda **kwargs: CapsulePatchLayers(2, PRIMARY, SECONDARY, **kwargs),
    lambda **kwargs: PrimaryCapsules(2, *PRIMARY, **kwargs),
], ids=['conv', 'conv_reduced', 'caps', 'primarycaps'])
def test_a_patch_sees_its_window_only(layers, t, q):
    """Patch (i, j) depends on the window [ti − q, ti − q + 9) × [tj − q, tj − q + 9) of the feature map and on no more.

    On all of the window, as far as it lies in the map; for stride t and padding q.
    """
    torch.manual_seed(0)
    layers = randomize(layers(patch_stride=t, patch_padding=q)).double().eval()
    for module in layers.modules():
        if isinstance(module, torch.nn.ReLU):
            module.forward = lambda x: F.leaky_relu(x, 0.5)  # let every channel pass a gradient
    in_chs = 6 if isinstance(getattr(layers, 'reduce', None), torch.nn.Module) and hasattr(layers.reduce, 'conv') else 2
    x = torch.randn(1, in_chs, 14, 18, dtype=torch.float64, requires_grad=True)
    out = layers(x)
    rows, cols = (len(range(-q, n + q - 8, t)) for n in (14, 18))  # windows that fit
    assert out.shape == (1, layers.num_features, rows, cols)
    for i, j in ((0, 0), (1, 2), (0, 1), (rows - 1, cols - 1)):
        grad = torch.autograd.grad(out[0, :, i, j].sum(), x, retain_graph=True)[0]
        expected = torch.zeros(14, 18, dtype=torch.bool)
        expected[max(t * i - q, 0):t * i - q + 9, max(t * j - q, 0):t * j - q + 9] = True
        assert torch.equal(grad[0].abs().sum(0) > 0, expected)


@pytest.mark.parametrize('name', [
    'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano', 'vgg11_bn_lossattn_conv_nano'])
@pytest.mark.parametrize(('s', 't', 'q', 'size'), [
    (1, 2, 0, (32, 32)), (2, 2, 0, (64, 50)), (4, 2, 0, (64, 64)), (8, 4, 4, (64, 64)), (8, 2, 4, (64, 64)),
    (8, 2, 1, (57, 70)), (2, 4, 3, (33, 47))])
def test_boxes_and_grid(name, s, t, q, size):
    """Against a loop over the windows of the padded feature map, whose positions are counted one by one."""
    model = timm.create_model(name, backbone_stride=s, patch_stride=t, patch_padding=q).eval()
    height, width = size

    def spans(length):
        """First and last pixel + 1 of each window along a side."""
        positions = [None] * q + [(s * i, min(s * i + s, length)) for i in range(-(-length // s))] + [None] * q
        found = []
        for start in range(0, len(positions), t):
            window = positions[start:start + 9]
            if len(window) == 9:
                inside = [pixels for pixels in window if pixels is not None]
                found.append((inside[0][0], inside[-1][1]))
        return found

    want = [[x0, y0, x1, y1] for y0, y1 in spans(height) for x0, x1 in spans(width)]
    assert model.patch_grid(height, width) == (len(spans(height)), len(spans(width)))
    assert model.patch_boxes(height, width).tolist() == want
    with torch.inference_mode():
        assert model.forward_patches(torch.zeros(1, 3, height, width)).alpha.shape == (1, len(want))


def test_patch_arguments():
    """The default is the registered model; the same weights fit every stride; what is not allowed says what is."""
    name = 'resnet18_lossattn_conv_nano'
    model = timm.create_model(name)
    assert (model.patch_stride, model.patch_padding) == (4, 0)
    other = timm.create_model(name, patch_stride=2, patch_padding=4)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert (other.patch_stride, other.patch_padding) == (2, 4)
    for bad in ({'patch_stride': 3}, {'patch_stride': 0}, {'patch_padding': 5}, {'patch_padding': -1}):
        (argument, value), = bad.items()
        with pytest.raises(ValueError, match=rf'{argument} must.*got {value}'):
            timm.create_model(name, **bad)
    with pytest.raises(ValueError, match='patch_stride: a plain classifier has no patch convolution'):
        timm.create_model('resnet18_cifar', device='meta', patch_stride=2)
    with pytest.raises(ValueError, match=r'8x8 feature map\. patch_padding=4 takes any'):
        timm.create_model(name, backbone_stride=8)(torch.zeros(1, 3, 64, 64))


def test_routing_with_another_patch_stride():
    """Its transformations belong to positions: as many as patches."""
    model = timm.create_model(
        'resnet18_routing_caps_s2', device='meta', img_size=64, backbone_stride=8, patch_stride=2, patch_padding=4)
    assert model(torch.zeros(2, 3, 64, 64, device='meta')).shape == (2, 200)


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
