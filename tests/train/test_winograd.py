"""Convolutions by Winograd against float64, and models that use them."""
import copy
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_lossattn  # noqa: F401  registers the models
from lib import winograd
from lib.model import load_trained
from lib.options import EvalOptions
from lib.winograd import WinogradConv2d, toom_cook, use_winograd, winograd_conv2d

TOLERANCE = 2e-5  # of the largest value


@pytest.fixture
def eager():
    """The transforms without the minute of compilation."""
    torch.compiler.set_stance('force_eager')
    yield
    torch.compiler.set_stance('default')


def close(actual, expected):
    expected = expected.double()
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


def example(batch, in_chs, out_chs, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(batch, chs, height, width, generator=generator) for chs in (in_chs, out_chs))
    weight = torch.randn(out_chs, in_chs, 3, 3, generator=generator) / (3 * in_chs ** 0.5)
    return x.relu(), weight, torch.randn(out_chs, generator=generator), grad


def compare(batch, in_chs, out_chs, height, width, bias=True, layout=torch.channels_last):
    x, weight, b, grad = example(batch, in_chs, out_chs, height, width)
    own = [x.contiguous(memory_format=layout), weight, *([b] if bias else [])]
    own = [tensor.clone().requires_grad_() for tensor in own]
    exact = [tensor.detach().double().requires_grad_() for tensor in own]
    y, expected = winograd_conv2d(*own), F.conv2d(*exact, padding=1)
    y.backward(grad)
    expected.backward(grad.double())
    close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for mine, reference in zip(own, exact):
        close(mine.grad, reference.grad)


@pytest.mark.parametrize(('batch', 'in_chs', 'out_chs', 'height', 'width'), [
    (2, 16, 24, 16, 16), (1, 8, 8, 4, 4), (1, 8, 16, 12, 8), (3, 8, 5, 7, 10), (1, 3, 8, 1, 5), (2, 512, 512, 8, 8)])
@pytest.mark.usefixtures('eager')
def test_equals_the_ordinary_convolution(batch, in_chs, out_chs, height, width):
    compare(batch, in_chs, out_chs, height, width)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.usefixtures('eager')
def test_bias_and_layout(bias, layout):
    compare(2, 8, 8, 8, 8, bias, layout)


@pytest.mark.skipif('LOSSATTN_SLOW' not in os.environ, reason='LOSSATTN_SLOW is not set: a minute of compilation')
def test_compiled():
    for shape in ((2, 16, 24, 16, 16), (3, 32, 16, 8, 12), (1, 16, 16, 9, 9)):
        compare(*shape)


@pytest.mark.usefixtures('eager')
def test_gradients_are_directional_derivatives(monkeypatch):
    # with all in float64 the only error is that of the difference quotient
    monkeypatch.setattr(winograd, 'G', winograd.G.double())
    x, weight, _, grad = (t.double() for t in example(2, 3, 4, 6, 8))
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(winograd_conv2d, (x, weight))
    direction, step = torch.randn_like(weight), 1e-4
    with torch.no_grad():
        difference = (winograd_conv2d(x, weight + step * direction) - winograd_conv2d(x, weight - step * direction))
    winograd_conv2d(x, weight).backward(grad)
    torch.testing.assert_close((weight.grad * direction).sum(), (difference * grad).sum() / (2 * step))


def test_matrices_are_those_of_the_paper():
    a, g, b = (torch.tensor(matrix) for matrix in toom_cook((0., 1., -1., 2., -2.)))
    paper = torch.tensor([
        [4., 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1]])
    assert torch.equal(b.abs(), paper.abs())  # the sign of a row may move from Bᵀ to G
    torch.testing.assert_close(a, torch.tensor([
        [1., 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]))
    d, h = torch.randn(6), torch.randn(3)
    torch.testing.assert_close(a @ ((g @ h) * (b @ d)), F.conv1d(d[None, None], h[None, None])[0, 0])


def test_only_what_gains_is_changed():
    """Parameters, hooks and keys are the same objects."""
    calls = []
    suitable = nn.Conv2d(128, 128, 3, padding=1)
    suitable.register_forward_hook(lambda *args: calls.append(1))
    model = nn.Sequential(
        suitable, nn.Conv2d(128, 128, 3, padding='same', bias=False), nn.Conv2d(3, 128, 3, padding=1),
        nn.Conv2d(128, 128, 3, stride=2, padding=1), nn.Conv2d(128, 128, 3), nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3, padding=1, groups=2), nn.Conv2d(128, 128, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2), nn.Sequential(suitable))
    state = model.state_dict()
    parameters = list(model.parameters())
    assert use_winograd(model.eval()) == 2
    assert [type(m) is WinogradConv2d for m in model[:-1]] == [True, True] + 7 * [False]
    assert model[-1][0] is model[0]
    assert not model[0].training
    model[0](torch.rand(1, 128, 4, 4))
    assert calls == [1]
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == {k: v.data_ptr() for k, v in state.items()}
    assert use_winograd(model) == 0


@pytest.mark.usefixtures('eager')
def test_falls_back(monkeypatch):
    conv = WinogradConv2d(8, 8, 3, padding=1)
    calls = []
    monkeypatch.setattr(winograd, 'winograd_conv2d', lambda *args: calls.append(1) or winograd_conv2d(*args))
    monkeypatch.setattr(winograd, 'MIN_TILES', 4)
    x = torch.randn(1, 8, 8, 8)
    conv(x)
    assert calls == [1]
    conv(torch.randn(1, 8, 4, 8))         # too few tiles
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    conv(torch.randn(1, 8, 5, 5))         # two thirds of 8×8 would be padding
    conv(torch.randn(0, 8, 8, 8))
    conv(torch.randn(8, 8, 8))            # one image without a batch
    torch.export.export(conv, (x,))
    copy.deepcopy(conv).double()(x.double())
    assert conv.to('meta')(x.to('meta')).shape == x.shape
    assert calls == [1]


@pytest.mark.usefixtures('eager')
def test_whole_model(monkeypatch):
    monkeypatch.setattr(winograd, 'MIN_CHANNELS', 8)
    monkeypatch.setattr(winograd, 'MIN_TILES', 1)
    calls = []
    monkeypatch.setattr(winograd, 'winograd_conv2d', lambda *args: calls.append(1) or winograd_conv2d(*args))
    torch.manual_seed(0)
    model = timm.create_model('resnet18_lossattn_conv_nano', pretrained=True).to(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    assert use_winograd(other) == 16
    again = copy.deepcopy(other)
    assert sum(isinstance(m, WinogradConv2d) for m in again.modules()) == 16
    assert list(other.state_dict()) == list(model.state_dict())
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([3, 8])
    with torch.no_grad():
        expected = model.double().eval()(x.double())
        for used in (other, again):
            close(used.eval()(x), expected)
        assert len(calls) == 32
        torch.testing.assert_close(other.forward_patches(x).contributions.sum(1), other(x))
    F.cross_entropy(model.train()(x.double()), y).backward()
    F.cross_entropy(other.train()(x), y).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert (q.grad - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name  # batch norm after ReLU: many near zero


@pytest.mark.usefixtures('eager')
def test_trained_model(monkeypatch):
    """--winograd of the scripts that measure: the same contributions and boxes; elsewhere than on the CPU an error."""
    monkeypatch.setattr(winograd, 'MIN_CHANNELS', 8)
    monkeypatch.setattr(winograd, 'MIN_TILES', 1)
    name = 'resnet18_lossattn_conv_nano'
    plain, used = (load_trained(EvalOptions(model=name, winograd=on), patches=True) for on in (False, True))
    assert [sum(isinstance(m, WinogradConv2d) for m in model.modules()) for model in (plain, used)] == [0, 16]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, out = (model.forward_patches(x) for model in (plain, used))
    close(out.contributions, expected.contributions.double())
    assert torch.equal(used.patch_boxes(32, 32), plain.patch_boxes(32, 32))
    with pytest.raises(ValueError, match='--winograd: is for the CPU, not for --device cuda'):
        load_trained(EvalOptions(model=name, winograd=True), 'cuda')
