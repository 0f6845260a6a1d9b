"""train.py --grow-from: a wide model that begins as a narrow one."""
import json

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import QUICK
from torch import nn

import timm_lossattn  # noqa: F401  registers the models
import train
from lib.command import parse_args
from lib.gathered import GatheredConv2d
from lib.grow import grow
from lib.model import create_model
from lib.process import Process

NANO = 'resnet18_lossattn_conv_nano.cifar10'


@pytest.fixture(scope='module')
def narrow():
    return timm.create_model(NANO, pretrained=True).eval()


@pytest.mark.parametrize('times', [1, 2, 3])
def test_the_same_function(narrow, times):
    """Logits, contributions and α are the narrow model's; all of its parameters are in the wide one."""
    torch.manual_seed(0)
    wide = timm.create_model(NANO, width_mult=times).eval()
    x = torch.randn(4, 3, 32, 32)
    assert times == 1 or not torch.allclose(wide(x), narrow(x), atol=0.1)
    grow(wide, narrow.state_dict())
    with torch.no_grad():
        for a, b in zip(wide.forward_patches(x), narrow.forward_patches(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name, tensor in wide.state_dict().items():
        old = narrow.state_dict()[name]
        assert torch.equal(tensor[tuple(map(slice, old.shape))], old)


def test_new_channels_learn(narrow):
    """Their way into the old ones has gradients at once, they themselves from the second step on."""
    torch.manual_seed(0)
    wide = timm.create_model(NANO, width_mult=2)
    grow(wide, narrow.state_dict())
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    x, y, fc = torch.randn(8, 3, 16, 16), torch.arange(8), wide.head.fc
    old, conv = fc.in_features // 2, wide.patch_layers.conv1.conv
    assert not fc.weight[:, old:].any()
    nn.functional.cross_entropy(wide(x), y).backward()
    assert fc.weight.grad[:, old:].abs().sum() > 0
    assert not conv.weight.grad[old:, old:].any()
    optimizer.step()
    optimizer.zero_grad()
    nn.functional.cross_entropy(wide(x), y).backward()
    assert conv.weight.grad[old:, old:].abs().sum() > 0


@given(st.lists(st.integers(1, 5), min_size=3, max_size=3), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_any_widths(widths, more):
    """Convolutions, batch norms and a classifier of any widths, grown by any number of channels."""
    def network(a, b, c):
        return nn.Sequential(
            nn.Conv2d(2, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.ReLU(),
            nn.Conv2d(b, c, 2), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(c, 3)).eval()
    old, new = network(*widths), network(*(a + b for a, b in zip(widths, more)))
    with torch.no_grad():
        for tensor in (*old.parameters(), *new.parameters()):
            tensor.normal_()
    grow(new, old.state_dict())
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-4)


def test_refused_and_unchanged(narrow):
    """Other layers, or layers that are not wider."""
    for name, kwargs, message in (
            ('vgg11_bn_lossattn_conv_nano', {}, 'only one of the two has'),
            ('resnet18_lossattn_conv_nano', {'width_mult': 0.5}, 'does not fit into'),
            ('resnet18_lossattn_conv_nano', {'num_classes': 5}, 'does not fit into')):  # more would fit: see below
        model = timm.create_model(name, **kwargs)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            grow(model, narrow.state_dict())
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_as_train_builds_it(narrow):
    """With --gathered: the narrow model's logits, from a model of twice the width."""
    options = parse_args(['--model', 'resnet18_lossattn_conv_nano', '--width-mult', '2', '--grow-from', NANO,
                          '--gathered', '--channels-last', '--data-dir', '.'])
    model = create_model(options, Process.start('cpu'))
    assert type(model.patch_layers.conv1.conv) is GatheredConv2d
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), narrow(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('flags', 'source', 'message'), [
    ((), 'no_such_model', "'no_such_model' is no model with weights"),
    ((), 'resnet34_lossattn_conv', "'resnet34_lossattn_conv' is no model with weights"),
    (('--model', 'vgg11_bn_lossattn_conv_nano'), NANO, f'--grow-from {NANO}: only one of the two has backbone.'),
    (('--num-classes', '20'), NANO, f'--grow-from {NANO}: has num_classes=10, the model 20'),
    (('--in-chans', '4'), NANO, f'--grow-from {NANO}: has in_chans=3, the model 4'),
    (('--xi', '1'), NANO, 'the logits are others: something else than widths differs')])
def test_refused_by_train(folder, tmp_path, capsys, flags, source, message):
    """In one line; with another ξ, say, the same weights are another function."""
    assert train.main(['--data-dir', str(folder), '--num-classes', '10', '--output', str(tmp_path), '--experiment',
                       'run', '--model', 'resnet18_lossattn_conv_nano', '--grow-from', source, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_run_and_resume(folder, tmp_path, monkeypatch):
    """Grown at the start only, and trained with gathered convolutions; the record says where both parts ran."""
    calls = []
    monkeypatch.setattr('lib.model.grow_from', lambda model, source: calls.append(source))
    flags = ['--data-dir', str(folder), *QUICK, '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto',
             '--grow-from', NANO, '--gathered', '--channels-last']
    for epochs in ('1', '2'):
        assert train.main([*flags, '--epochs', epochs]) == 0
    assert calls == [NANO]
    result = json.loads((tmp_path / 'run' / 'result.json').read_text())
    assert [start['epoch'] for start in result['starts']] == [0, 1]
    assert {start['hardware'] for start in result['starts']} == {result['hardware']}
