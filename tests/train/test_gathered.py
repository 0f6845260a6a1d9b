"""Gathered convolutions against float64, and models that use them."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_lossattn  # noqa: F401  registers the models
from lib.gathered import GatheredConv2d, gathered_conv2d, use_gathered


def example(batch, in_chs, out_chs, height, width, kernel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_chs, height, width, generator=generator)
    weight = torch.randn(out_chs, in_chs, *kernel, generator=generator) / (in_chs * kernel[0] * kernel[1]) ** 0.5
    return [t.to(dtype).requires_grad_() for t in (x, weight, torch.randn(out_chs, generator=generator))]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(('sizes', 'stride', 'padding'), [
    ((2, 16, 24, 24, 32, (9, 9)), (4, 4), (0, 0)), ((2, 5, 3, 17, 11, (9, 9)), (2, 2), (4, 4)),
    ((1, 4, 2, 9, 9, (9, 9)), (4, 4), (0, 0)), ((3, 3, 4, 8, 10, (5, 3)), (3, 2), (1, 0))])
def test_equals_the_ordinary_convolution(sizes, stride, padding, layout):
    """Output and gradients within 2e-6 of the largest value."""
    own = [t.detach().contiguous(memory_format=layout) if t.dim() == 4 else t.detach() for t in example(*sizes)]
    own = [t.requires_grad_() for t in own]
    exact = [t.detach().double().requires_grad_() for t in own]
    y, expected = gathered_conv2d(*own, stride, padding), F.conv2d(*exact, stride, padding)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected.backward(grad.double())
    for mine, reference in [(y, expected), *((a.grad, b.grad) for a, b in zip(own, exact))]:
        assert mine.shape == reference.shape
        assert (mine.double() - reference).abs().max() <= 2e-6 * reference.abs().max()
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_directional_derivatives():
    """In float64 the only error is that of the difference quotient."""
    x, weight, bias = example(2, 2, 3, 11, 9, (5, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda *args: gathered_conv2d(*args, (2, 3), (1, 0)), (x, weight, bias))


def test_without_bias_and_frozen():
    """Gradients of those that want one."""
    x, weight, _ = example(2, 3, 4, 13, 13, (9, 9))
    for wanting in (x, weight):
        gradients = []
        for convolve in (gathered_conv2d, F.conv2d):
            y = convolve(*(t if t is wanting else t.detach() for t in (x, weight)), None, (4, 4), (0, 0))
            gradients.append(torch.autograd.grad(y.square().sum(), wanting)[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_falls_back(monkeypatch):
    """Where the input has no windows to gather, or somebody reads the operations."""
    conv = GatheredConv2d(4, 4, 9, stride=4)
    calls = []
    monkeypatch.setattr('lib.gathered.gathered_conv2d', lambda *args: calls.append(1) or gathered_conv2d(*args))
    x = torch.randn(1, 4, 13, 13)
    assert conv(x).shape == (1, 4, 2, 2)
    assert calls == [1]
    assert conv(x[0]).shape == (4, 2, 2)
    assert conv(x[:0]).shape == (0, 4, 2, 2)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        conv(torch.randn(1, 4, 8, 13))
    torch.export.export(conv, (x,))
    assert copy.deepcopy(conv).to('meta')(x.to('meta')).shape == (1, 4, 2, 2)
    assert calls == [1]


def test_autocast():
    """bfloat16 as PyTorch's convolution has it: the error is of its size, and gradients are those of the parameters."""
    own, other = example(4, 32, 32, 17, 17, (9, 9)), example(4, 32, 32, 17, 17, (9, 9))
    exact = F.conv2d(*own, stride=4)
    with torch.autocast('cpu', torch.bfloat16):
        y, stock = gathered_conv2d(*own, (4, 4), (0, 0)), F.conv2d(*other, stride=4)
    assert y.dtype == stock.dtype == torch.bfloat16
    y.float().square().sum().backward()
    stock.float().square().sum().backward()
    assert (y - exact).abs().max() <= 2 * (stock - exact).abs().max()
    for a, b in zip(own, other):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 0.02 * b.grad.norm()


def test_only_what_gains_is_replaced():
    """Wide filters with a stride; parameters, hooks and keys are the same objects."""
    suitable = nn.Conv2d(16, 16, 9, stride=4)
    model = nn.Sequential(
        suitable, nn.Conv2d(16, 16, 5, stride=2, padding=2), nn.Conv2d(3, 16, 9, stride=4), nn.Conv2d(16, 16, 9),
        nn.Conv2d(16, 16, 3, stride=2), nn.Conv2d(16, 16, 9, stride=4, groups=2),
        nn.Conv2d(16, 16, 9, stride=4, padding_mode='reflect', padding=1), nn.Conv2d(16, 16, 5, stride=2, dilation=2),
        nn.Conv2d(16, 16, 9, stride=2), nn.Conv2d(16, 16, 9, stride=4, padding='valid'))
    kept, calls = dict(model.named_parameters()), []
    suitable.register_forward_hook(lambda *args: calls.append(1))
    assert use_gathered(model) == 2
    assert [type(m) is GatheredConv2d for m in model] == [True, True] + 8 * [False]
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())
    model[0](torch.randn(1, 16, 9, 9))
    assert calls == [1]
    assert use_gathered(model) == 0


@pytest.mark.parametrize('name', ['resnet18_lossattn_conv_nano', 'vgg11_bn_lossattn_caps_nano'])
def test_whole_model(name):
    """The same logits, patch logits and gradients; capsules have such a convolution as well."""
    torch.manual_seed(0)
    model = timm.create_model(name, patch_padding=1).to(memory_format=torch.channels_last).double()
    other = copy.deepcopy(model)
    assert use_gathered(other) >= 1
    assert other.patch_grid(16, 16) == model.patch_grid(16, 16)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for m in (model, other):
        m(x).square().sum().backward()
    torch.testing.assert_close(model.eval().forward_patches(x), other.eval().forward_patches(x))
    for (key, a), b in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f'{key}: {text}')
