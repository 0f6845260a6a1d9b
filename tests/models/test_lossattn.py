"""loss_attention and ``lossattn`` on timm's own models: numbers, state dicts, registry, Hub folders, exports."""
import copy
import json
import pickle

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import resolve_pretrained_cfg, save_for_hf
from torch import nn

from timm_lossattn import PatchPrediction, explain, freeze_backbone, loss_attention
from timm_lossattn.cli import main
from timm_lossattn.explanation import class_labels, open_image, preprocess
from timm_lossattn.loading import load_model
from timm_lossattn.models.any_timm import LossAttentionMixin
from timm_lossattn.models.lossattn import TRAINED

# name, arguments, kind, layout, prefix tokens
MODELS = [
    ('test_resnet', {}, 'A', 'NCHW', 0),
    ('test_efficientnet', {}, 'A', 'NCHW', 0),
    ('test_vit', {'global_pool': 'avg'}, 'B', 'NLC', 1),
    ('test_vit2', {'global_pool': 'avg'}, 'B', 'NLC', 1),
    ('test_convnext', {}, 'B', 'NCHW', 0),
    ('mobilenetv3_small_050', {}, 'C', 'NCHW', 0),
    ('swin_tiny_patch4_window7_224', {'img_size': 64, 'window_size': 2, 'embed_dim': 24, 'depths': (1, 1, 1, 1)},
     'A', 'NHWC', 0),
]
IDS = [f'{name}-{kind}' for name, _, kind, _, _ in MODELS]


def create(name, args, num_classes=7, seed=0):
    """A model whose classifier says something."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **args).eval()
    for parameter in model.get_classifier().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def image(model, batch=2):
    size = getattr(model, 'img_size', None) or model.default_cfg['input_size'][1:]
    size = (64, 64) if 'Swin' in type(model).__name__ else size
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(1))


def error(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(('name', 'args', 'kind', 'layout', 'prefix'), MODELS, ids=IDS)
def test_model(name, args, kind, layout, prefix):
    model = create(name, args)
    keys, random = list(model.state_dict()), torch.get_rng_state()
    attributes = set(model.__dict__)
    new, mean = loss_attention(model), loss_attention(model, 'avg')
    assert torch.equal(random, torch.get_rng_state())
    assert (new.patch_kind, new.patch_layout, new.patch_prefix) == (kind, layout, prefix)
    assert isinstance(new, type(model))
    assert type(new) is type(mean)
    # the stock model is as it was, and its tensors are the new model's
    assert not isinstance(model, LossAttentionMixin)
    assert set(model.__dict__) == attributes
    assert list(new.state_dict()) == keys
    assert all(a is b for a, b in zip(new.parameters(), model.parameters()))
    assert all(a is b for a, b in zip(new.buffers(), model.buffers()))
    x = image(model)
    with torch.no_grad():
        out = new.forward_patches(x)
        assert isinstance(out, PatchPrediction)
        assert torch.equal(out.logits, new(x))
        assert error(out.contributions.sum(dim=1), out.logits) < 1e-5
        assert torch.equal(mean(x), model(x))
        assert torch.equal(mean.forward_patches(x).logits, model(x))
        assert error(mean.forward_patches(x).contributions.sum(dim=1), model(x)) < 1e-5
        assert error(new(x), model(x)) > 1e-4
    rows, cols = new.patch_grid(*x.shape[-2:])
    assert out.alpha.shape == (2, rows * cols)
    boxes = new.patch_boxes(*x.shape[-2:])
    assert int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()) == x.shape[-1] * x.shape[-2]
    # a fine-tuned checkpoint, one way and back
    other = create(name, args, seed=1)
    new.load_state_dict(other.state_dict(), strict=True)
    other.load_state_dict(new.state_dict(), strict=True)


@pytest.mark.parametrize(('name', 'args', 'kind', 'layout', 'prefix'), MODELS, ids=IDS)
def test_export(name, args, kind, layout, prefix):
    """torch.export, batch free, of everything about the patches."""
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = loss_attention(create(name, args)).eval()

        def forward(self, x):
            return tuple(self.model.forward_patches(x))
    module = Patches().eval()
    x = image(module.model)
    program = torch.export.export(module, (x,), dynamic_shapes={'x': {0: torch.export.Dim('batch', min=1, max=64)}})
    x = image(module.model, 3)
    for a, b in zip(program.module()(x), module(x)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'args'), [m[:2] for m in MODELS], ids=IDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(name, args, dtype):
    new = loss_attention(create(name, args).to(dtype))
    out = new.forward_patches(image(new).to(dtype))
    assert out.logits.dtype == out.patch_logits.dtype == dtype
    assert out.alpha.dtype == out.contributions.dtype == torch.float32
    assert error(out.contributions.sum(dim=1), out.logits.float()) < 0.03


def test_autocast_and_channels_last():
    model = create('mobilenetv3_small_050', {})
    new, x = loss_attention(model), image(model)
    expected = new.forward_patches(x).contributions.detach()
    with torch.autocast('cpu', torch.bfloat16):
        out = new.forward_patches(x)
    torch.testing.assert_close(out.alpha.sum(dim=1), torch.ones(2))
    assert error(out.contributions.sum(dim=1), out.logits.float()) < 0.03
    last = new.to(memory_format=torch.channels_last).forward_patches(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last.contributions, expected, rtol=1e-3, atol=1e-4)


def test_sizes():
    """Non-square, one channel, and of a transformer any size."""
    model = timm.create_model(
        'lossattn', backbone='test_vit', global_pool='avg', dynamic_img_size=True, in_chans=1).eval()
    out = model.forward_patches(torch.randn(1, 1, 96, 160))
    assert model.patch_grid(96, 160) == (6, 10)
    assert out.alpha.shape == (1, 60)
    resnet = timm.create_model('lossattn', backbone='test_resnet', in_chans=1).eval()
    assert resnet.patch_grid(64, 100) == (2, 4)
    assert resnet.patch_boxes(64, 100)[-1].tolist() == [75, 32, 100, 64]
    fixed = timm.create_model('lossattn', backbone='test_vit', global_pool='avg')
    with pytest.raises(ValueError, match='does not take images of 50×50'):
        fixed.patch_grid(50, 50)


def test_copies():
    model = loss_attention(create('test_convnext', {}), xi=0.7)
    x = image(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(other) is type(model)
        assert other.xi == 0.7
        assert torch.equal(other(x), model(x))
    again = loss_attention(model, 'avg')
    assert torch.equal(again.forward_patches(x).alpha, torch.full((2, 25), 1 / 25))
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_reset_classifier():
    """The new head is looked at anew; the model that lent its modules keeps its own."""
    stock = create('test_resnet', {})
    x, before = image(stock), stock(image(stock))
    new = loss_attention(stock)
    new.reset_classifier(3)
    assert new.forward_patches(x).contributions.shape == (2, 25, 3)
    assert torch.equal(stock(x), before)
    new.reset_classifier(0)
    assert torch.equal(new(x), stock.forward_head(stock.forward_features(x), pre_logits=True))
    with pytest.raises(ValueError, match='num_classes=0'):
        new.forward_patches(x)
    new.reset_classifier(2)
    assert new.forward_patches(x).logits.shape == (2, 2)
    new.reset_classifier(2, 'max')
    for use in (new, new.forward_patches):
        with pytest.raises(ValueError, match='no sum over patches'):
            use(x)
    headless = timm.create_model('lossattn', backbone='test_vit', num_classes=0).eval()
    assert headless(torch.randn(1, 3, 160, 160)).shape == (1, 64)
    headless.reset_classifier(5)
    with pytest.raises(ValueError, match='class token'):
        headless(torch.randn(1, 3, 160, 160))
    headless.reset_classifier(5, 'avg')
    assert headless.patch_kind == 'A'  # the norm before the pooling stays where it is


def test_meta_device():
    with torch.device('meta'):
        new = timm.create_model('lossattn', backbone='mobilenetv3_small_050')
    assert new.patch_kind == 'C'
    assert all(p.is_meta for p in new.parameters())


@pytest.mark.parametrize(('args', 'kind', 'message'), [
    ({'backbone': 'test_vit'}, ValueError, 'class token'),
    ({'backbone': 'test_resnet', 'global_pool': 'max'}, ValueError, 'global_pool="avg"'),
    ({'backbone': 'test_resnet', 'pool': 'attn'}, ValueError, 'parameters to learn'),
    ({'backbone': 'test_resnet', 'pool': 'nope'}, ValueError, 'one of'),
    ({'backbone': 'test_resnet', 'xi': 2}, ValueError, 'xi'),
    ({'backbone': 'nope'}, ValueError, 'nope'),
    ({'backbone': 'lossattn'}, ValueError, 'timm model'),
    ({'backbone': 'hf-hub:timm/resnet18'}, ValueError, 'loss_attention'),
    ({'backbone': 'resnet18_lossattn_conv_nano'}, ValueError, 'already'),
    ({'backbone': 'test_resnet', 'no_such_argument': 1}, TypeError, 'no_such_argument'),
])
def test_errors(args, kind, message):
    with pytest.raises(kind, match=message):
        timm.create_model('lossattn', **args)


def test_not_a_timm_model():
    with pytest.raises(TypeError, match='forward_features'):
        loss_attention(nn.Linear(2, 2))
    with pytest.raises(TypeError, match='forward_features'):
        explain(nn.Linear(2, 2).eval(), torch.randn(1, 3, 8, 8))


@pytest.fixture
def weights(tmp_path):
    """A stock model and its weights in a file."""
    torch.manual_seed(3)
    stock = timm.create_model('test_resnet').eval()
    save_file(stock.state_dict(), tmp_path / 'model.safetensors')
    return stock, str(tmp_path / 'model.safetensors')


def test_registry(weights):
    """The short form, the long one, and what timm's scripts look up are the same model with the backbone's weights."""
    stock, file = weights
    assert timm.is_model('lossattn.test_resnet.r160_in1k')
    assert timm.list_models('lossattn*') == ['lossattn']
    assert timm.get_pretrained_cfg_value('lossattn.test_resnet.r160_in1k', 'input_size') == (3, 160, 160)
    assert {name for name in timm.list_pretrained() if name.startswith('lossattn.')} <= {
        f'lossattn.{name}' for name in TRAINED}
    overlay = {'file': file, 'mean': (0.1, 0.2, 0.3)}
    looked_up = resolve_pretrained_cfg('lossattn', 'test_resnet.r160_in1k', overlay).to_dict()
    plain = resolve_pretrained_cfg('lossattn', None, overlay).to_dict()
    untagged = resolve_pretrained_cfg('lossattn', 'test_resnet', overlay).to_dict()
    assert untagged == resolve_pretrained_cfg('lossattn', 'test_resnet.r160_in1k', overlay).to_dict() | {
        'tag': untagged['tag']}
    x = torch.randn(1, 3, 64, 64)
    for args in (
            {'model_name': 'lossattn.test_resnet.r160_in1k', 'pretrained_cfg_overlay': overlay},
            {'model_name': 'lossattn', 'backbone': 'test_resnet', 'pretrained_cfg_overlay': overlay},
            {'model_name': 'lossattn', 'pretrained_cfg': looked_up},
            {'model_name': 'lossattn', 'pretrained_cfg': untagged},
            {'model_name': 'lossattn', 'pretrained_cfg': plain, 'backbone': 'test_resnet'}):
        model = timm.create_model(**args, pretrained=True, pool='avg').eval()
        assert torch.equal(model(x), stock(x))
        assert model.pretrained_cfg['mean'] == (0.1, 0.2, 0.3)
        assert model.pretrained_cfg['architecture'] == 'lossattn'
        assert model.default_cfg is model.pretrained_cfg
    features = timm.create_model('lossattn', backbone='test_resnet', features_only=True)
    assert type(features) is type(timm.create_model('test_resnet', features_only=True))


@pytest.mark.parametrize('wrapped', [False, True])
def test_hub_folder(weights, tmp_path, wrapped):
    """config.json names lossattn and its arguments, and the folder loads; timm alone does not know that name."""
    stock, file = weights
    if wrapped:
        model = loss_attention(stock, 'lossattn', 0.6)
    else:
        model = timm.create_model('lossattn.test_resnet.r160_in1k', pretrained=True, xi=0.6,
                                  pretrained_cfg_overlay={'file': file}).eval()
    save_for_hf(model, tmp_path / 'out', safe_serialization=True)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'lossattn'
    assert {'backbone': 'test_resnet.r160_in1k', 'pool': 'lossattn', 'xi': 0.6}.items() <= config['model_args'].items()
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(loaded.forward_patches(x), model.forward_patches(x)):
        assert torch.equal(a, b)
    stock.load_state_dict(loaded.state_dict(), strict=True)


def test_explain_stock_model():
    """Its own logits, and timm's names of the ImageNet classes."""
    model = timm.create_model('test_convnext').eval()
    x = image(model)
    explanation = explain(model, x)
    torch.testing.assert_close(explanation.prediction.logits, model(x).detach())
    assert explanation.grid == (5, 5)
    assert explanation.labels[:2] == ['tench', 'goldfish']
    assert len(set(explanation.labels)) == 1000
    assert class_labels(timm.create_model('test_convnext', num_classes=3), 3) == ['class 0', 'class 1', 'class 2']
    model.reset_classifier(4)  # what was found out before is not used again
    assert explain(model, x).prediction.contributions.shape == (2, 25, 4)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.png'
    Image.effect_noise((200, 170), 80).convert('RGB').save(path)
    return path


@pytest.mark.parametrize('how', ['lossattn', 'stock', 'lossattn folder', 'stock folder'])
def test_command_line(weights, photo, tmp_path, how):
    """explain takes both, by name with a checkpoint, or as folders in the Hub's format."""
    stock, file = weights
    model = loss_attention(stock) if 'lossattn' in how else stock
    if 'folder' in how:
        save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
        options = ['--model', f'local-dir:{tmp_path / "hub"}']
    else:
        options = ['--model', f'{"lossattn." if how == "lossattn" else ""}test_resnet.r160_in1k', '--checkpoint', file]
    assert main(['explain', str(photo), *options, '--out', str(tmp_path / 'out')]) == 0
    numbers = json.loads((tmp_path / 'out' / 'photo.json').read_text())
    x = preprocess(model, open_image(photo)).x[None]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(numbers['logits']), model(x)[0], rtol=1e-4, atol=1e-5)
    assert numbers['labels'][1] == 'goldfish'
    flat = {a for row in numbers['alpha'] for a in row}
    assert (len(flat) == 1) == ('stock' in how)


@pytest.mark.parametrize(('name', 'message'), [
    ('lossattn.resnet5o', 'did you mean lossattn.resnet50'),
    ('lossattn.resnet50.nope', 'lossattn.resnet50.a1_in1k'),
    ('resnet50.nope', 'resnet50.a1_in1k'),
])
def test_names_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_command_line_refuses(photo, tmp_path, capsys):
    """A class token decides: one line that says what to do."""
    save_for_hf(timm.create_model('test_vit'), tmp_path / 'hub', safe_serialization=True)
    model = f'local-dir:{tmp_path / "hub"}'
    assert main(['explain', str(photo), '--model', model, '--out', str(tmp_path / 'out')]) == 2
    assert 'global_pool="avg"' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['test_vit', 'lossattn.test_vit'])
def test_refused_before_a_download(photo, tmp_path, capsys, monkeypatch, name):
    """A class token is seen without the weights, which nobody asks for then."""
    def fail(*args, **kwargs):
        raise AssertionError('weights were asked for')
    monkeypatch.setattr('timm.models._builder.load_pretrained', fail)
    assert main(['explain', str(photo), '--model', name, '--out', str(tmp_path / 'out')]) == 2
    assert 'its class token decides' in capsys.readouterr().err
    assert main(['check', name, '--pretrained']) == 1
    assert 'D: the logits are no sum over patches' in capsys.readouterr().out
    with pytest.raises(ValueError, match='class token decides'):
        timm.create_model('lossattn.test_vit', pretrained=True)


def test_a_head_replaced_by_hand():
    """Layers put in place of the classifier, also deep inside, are looked at anew: exact or refused."""
    torch.manual_seed(0)
    model = loss_attention(timm.create_model('test_resnet', num_classes=4)).eval()
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert model.forward_patches(x) is not None
        assert model.patch_kind == 'A'
        width = model.get_classifier().in_features
        model.fc = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
        out = model.forward_patches(x)
        assert model.patch_kind == 'C'
        torch.testing.assert_close(out.contributions.sum(1), model(x), rtol=1e-5, atol=1e-5)
        model.fc[1] = torch.nn.Softmax(dim=1)
        with pytest.raises(ValueError, match='no sum over patches'):
            model.forward_patches(x)


def test_name_and_backbone_that_contradict():
    """Two backbones in one call are an error that names both."""
    with pytest.raises(ValueError, match="contradicts the name lossattn"):
        timm.create_model('lossattn.test_resnet', backbone='test_vit')
    assert timm.create_model('lossattn.test_resnet', backbone='test_resnet').patch_kind == 'A'


def test_another_head_on_a_frozen_backbone_in_train_mode():
    """What is looked at is the model in eval mode, however its own ``train`` was changed."""
    model = loss_attention(timm.create_model('test_resnet', num_classes=4, drop_rate=0.5)).train()
    freeze_backbone(model)
    model.reset_classifier(3)
    assert model.patch_kind == 'A'
    assert model.training
    assert model.eval().forward_patches(torch.randn(1, 3, 64, 64)).logits.shape == (1, 3)


def test_dropout_at_test_time():
    """A model in eval mode whose dropout is left on: its mask is held, the contributions sum to the logits."""
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone='regnety_002', num_classes=4, drop_rate=0.5).eval()
    assert model.patch_kind == 'A'
    torch.nn.init.normal_(model.get_classifier().weight)
    model.head.drop.train()
    x = torch.randn(2, 3, 64, 64)
    out, again = model.forward_patches(x), model.forward_patches(x)
    assert not torch.equal(out.logits, again.logits)
    torch.testing.assert_close(out.contributions.sum(1), out.logits)
