"""train.py on any timm backbone: the whole network, a frozen backbone, resume, explain, layer decay, timm's tools."""
import copy
import json

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import train as train_script
from lib.command import parse_args
from lib.model import create_model
from lib.process import Process
from timm_lossattn import LossAttentionTask, freeze_backbone, load_model, loss_attention
from timm_lossattn.cli import main

BACKBONE = 'test_efficientnet'
QUICK = ('--val-split', 'val', '--num-classes', '2', '--batch-size', '8', '--epochs', '1', '--warmup-epochs', '0',
         '--workers', '0', '--lr', '0.02', '--device', 'cpu', '--color-jitter', '0', '--input-size', '3', '32', '32')


def train(*flags):
    """Exit code of train.py, in this process."""
    return train_script.main([*QUICK, *map(str, flags)])


@pytest.fixture(scope='module')
def stock(tmp_path_factory):
    """A checkpoint of a stock model of three classes, as one's own pretrained weights."""
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp('stock') / 'stock.pth'
    torch.save(timm.create_model(BACKBONE, num_classes=3).state_dict(), file)
    return file


@pytest.fixture(scope='module')
def runs(folder, stock, tmp_path_factory):
    """Folder with the runs ``whole`` and ``frozen``, an epoch each, from the stock weights."""
    out = tmp_path_factory.mktemp('any')
    common = ('--data-dir', folder, '--output', out, '--pretrained', '--pretrained-path', stock, '--model-ema')
    assert train(*common, '--experiment', 'whole', '--model', 'lossattn', '--model-kwargs', f'backbone={BACKBONE}',
                 '--layer-decay', '0.7') == 0
    assert train(*common, '--experiment', 'frozen', '--model', f'lossattn.{BACKBONE}', '--freeze-backbone',
                 '--drop', '0.2') == 0
    return out


def state(run, key='state_dict'):
    return torch.load(run / 'last.pth.tar', weights_only=True)[key]


@pytest.mark.parametrize('name', ['whole', 'frozen'])
def test_run(runs, stock, name):
    """The loss of Eq. 9; frozen tensors and running statistics are the stock ones to the bit, all others moved."""
    run, before = runs / name, torch.load(stock)
    result = json.loads((run / 'result.json').read_text())
    assert {'patch_loss', 'image_loss', 'gamma'} <= set(result['epochs'][0]['train'])
    classifier = {'classifier.weight', 'classifier.bias'}
    for key in ('state_dict', 'state_dict_ema'):
        after = state(run, key)
        assert set(after) == set(before)
        same = {name for name in before if torch.equal(after[name], before[name])}
        if name == 'frozen':
            assert same == set(before) - classifier
        else:
            assert not {name for name in same if name.endswith('running_mean')}
            assert not {name for name in same if name.endswith('conv_pw.weight')}
    model = timm.create_model(BACKBONE, num_classes=2)
    trained = model.classifier.parameters() if name == 'frozen' else model.parameters()
    assert result['args']['freeze_backbone'] == (name == 'frozen')
    assert result['trained_parameters'] == sum(p.numel() for p in trained)
    assert result['parameters'] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(('model', 'classes'), [
    (('--model', f'lossattn.{BACKBONE}'), 3), (('--model', 'lossattn', '--model-kwargs', f'backbone={BACKBONE}'), 3),
    (('--model', f'lossattn.{BACKBONE}'), 2)])
def test_classifier_of_the_file(stock, model, classes):
    """--pretrained-path: kept where it has as many classes, new where it has not."""
    options = parse_args(['--pretrained', '--pretrained-path', str(stock), '--num-classes', str(classes), *model])
    weight = create_model(options, Process()).get_classifier().weight
    before = torch.load(stock)['classifier.weight']
    assert (classes == 3) is (weight.shape == before.shape and torch.equal(weight, before))


def test_classifier_of_a_file_of_class_capsules(tmp_path):
    """--pretrained-path keeps it."""
    model = ('--model', 'resnet18_routing_caps', '--width-mult', '0.125')
    before = create_model(parse_args([*model]), Process()).state_dict()
    torch.save(before, tmp_path / 'weights.pth')
    options = parse_args([*model, '--pretrained', '--pretrained-path', str(tmp_path / 'weights.pth')])
    after = create_model(options, Process()).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize('name', ['whole', 'frozen'])
def test_resume(runs, folder, stock, name):
    """Another epoch; what was frozen still is."""
    flags = {'whole': ('--model', 'lossattn', '--model-kwargs', f'backbone={BACKBONE}', '--layer-decay', '0.7'),
             'frozen': ('--model', f'lossattn.{BACKBONE}', '--freeze-backbone')}[name]
    before = state(runs / name)
    assert train('--data-dir', folder, '--output', runs, '--experiment', name, '--resume', 'auto', '--model-ema',
                 '--epochs', '2', *flags) == 0
    result = json.loads((runs / name / 'result.json').read_text())
    assert [e['epoch'] for e in result['epochs']] == [0, 1]
    after = state(runs / name)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert (moved == {'classifier.weight', 'classifier.bias'}) == (name == 'frozen')


@pytest.mark.parametrize('name', ['whole', 'frozen'])
def test_explain_and_hub_folder(runs, folder, tmp_path, name):
    """The checkpoint says how it was built; hub/ holds the same model."""
    run, image = runs / name, next((folder / 'val' / 'left').iterdir())
    assert main(['explain', str(image), '--checkpoint', str(run / 'model_best.pth.tar'), '--out', str(tmp_path)]) == 0
    assert json.loads((tmp_path / f'{image.stem}.json').read_text())['labels'] == ['left', 'right']
    models = load_model(checkpoint=run / 'model_best.pth.tar'), load_model(f'local-dir:{run / "hub"}')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(*(model(x) for model in models))
    assert all(hasattr(model, 'forward_patches') for model in models)
    assert all(list(model.pretrained_cfg['label_names']) == ['left', 'right'] for model in models)
    config = json.loads((run / 'hub' / 'config.json').read_text())
    assert config['architecture'] == 'lossattn'


@pytest.mark.parametrize('backbone', [BACKBONE, 'test_convnext', 'test_vit'])
def test_layer_decay_groups_are_those_of_the_backbone(backbone):
    """Learning rate and weight decay of every parameter, as timm's factory gives the stock model."""
    stock = timm.create_model(backbone, num_classes=3, **{'global_pool': 'avg'} if 'vit' in backbone else {})
    task = LossAttentionTask(loss_attention(stock), verbose=False)
    settings = []
    for module in (stock, task.get_trainable_module()):
        names = {id(p): name.removeprefix('model.') for name, p in module.named_parameters()}
        optimizer = create_optimizer_v2(module, opt='adamw', lr=1., weight_decay=0.1, layer_decay=0.5)
        settings.append({names[id(p)]: (group['lr_scale'], group['weight_decay'])
                         for group in optimizer.param_groups for p in group['params']})
    assert settings[0] == settings[1]
    assert len({scale for scale, _ in settings[0].values()}) > 2


FREEZABLE = {
    BACKBONE: {}, 'test_resnet': {}, 'test_convnext': {'drop_path_rate': 0.5}, 'mobilenetv3_small_050': {},
    'test_vit': {'global_pool': 'avg', 'img_size': 64, 'drop_path_rate': 0.5}}


@pytest.mark.parametrize('backbone', FREEZABLE)
def test_frozen_in_every_mode_and_copy(backbone):
    """After train() of the model, the task and a deep copy; only the classifier learns; dropout before it is on."""
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone=backbone, num_classes=3, drop_rate=0.5, **FREEZABLE[backbone])
    head = model.get_classifier()
    names = freeze_backbone(model)
    assert len(names) == len(list(head.parameters())) == 2
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    assert model.eval().training is False
    assert torch.equal(model(x), model(x))
    for trained in (model, copy.deepcopy(model), ModelEmaV3(model).module):
        task = LossAttentionTask(trained, verbose=False)
        task.train()
        assert trained.training
        assert trained.get_classifier().training
        features = [trained.forward_features(x) for _ in range(2)]
        assert torch.equal(*features), 'drop path and batch norms of the backbone are off'
        assert not features[0].requires_grad
        assert not torch.equal(trained(x), trained(x)), 'dropout before the classifier is on'
        optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, weight_decay=0.1)
        task(x, y)['loss'].backward()
        optimizer.step()
        moved = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == set(names)
        before_reload = trained.training
        trained.eval()
        assert before_reload
        assert not any(module.training for module in trained.modules())


def test_dropout_inside_of_what_is_frozen():
    """A ViT has one behind the position embedding, beside its blocks and its classifier."""
    model = timm.create_model('lossattn', backbone='test_vit', global_pool='avg', pos_drop_rate=0.5, drop_rate=0.5)
    freeze_backbone(model)
    model.train()
    x = torch.randn(2, 3, 160, 160)
    features = model.forward_features(x)
    assert torch.equal(features, model.forward_features(x))
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


@pytest.mark.parametrize(('architecture', 'given'), [
    ('resnet18_lossattn_conv_nano', {'global_pool': 'gatedattn'}), ('resnet18_lossattn_caps_nano', {}),
    ('resnet18_routing_caps', {'width_mult': 0.125})])
def test_frozen_model_of_the_paper(architecture, given):
    """Its backbone is frozen, to the bit; the layers behind it and the weights of patches learn with the classifier."""
    model = timm.create_model(architecture, num_classes=3, **given)
    backbone = copy.deepcopy(model.backbone.state_dict())
    names = freeze_backbone(model)
    assert names == [name for name, _ in model.named_parameters() if not name.startswith('backbone.')]
    task = LossAttentionTask(model, verbose=False)
    task.train()
    assert [module.training for module in (model, model.backbone, model.patch_layers)] == [True, False, True]
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, weight_decay=0.1)
    task(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))['loss'].backward()
    optimizer.step()
    assert all(torch.equal(value, backbone[key]) for key, value in model.backbone.state_dict().items())
    assert names == [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    with pytest.raises(ValueError, match='no classifier'):
        freeze_backbone(timm.create_model(BACKBONE, num_classes=0))


def test_frozen_within_a_wrapper():
    """What torch.compile returns: the names are those of the model, which stays frozen by itself too."""
    model = timm.create_model('test_resnet', num_classes=3)
    assert freeze_backbone(torch.compile(model, backend='eager')) == ['fc.weight', 'fc.bias']
    model.eval()
    model.train()
    assert not model.bn1.training


def test_frozen_part_that_goes():
    """reset_classifier takes the attention pooling of a ViT out; what is left of the backbone stays in eval mode."""
    model = timm.create_model('test_vit', global_pool='map', num_classes=3)
    freeze_backbone(model)
    model.reset_classifier(3, 'avg')
    model.train()
    assert model.training
    assert not model.blocks.training


@pytest.mark.parametrize('backbone', [BACKBONE, 'test_convnext', 'test_mambaout'])
@pytest.mark.parametrize('frozen', [False, True])
def test_compiled_task_in_train_mode(backbone, frozen):
    """The same loss and gradients as without torch.compile; what is Python in the head runs as Python."""
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone=backbone, num_classes=3)
    if frozen:
        freeze_backbone(model)
    tasks = [LossAttentionTask(m, verbose=False) for m in (model, copy.deepcopy(model))]
    tasks[1].compile(backend='eager')
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    gradients = []
    for task in tasks:
        task.train()
        task(x, y)['loss'].backward()
        gradients.append(task.get_eval_model().get_classifier().weight.grad)
    assert torch.allclose(*gradients, atol=1e-6)


@pytest.mark.parametrize('flags', [
    ('--model', 'lossattn.test_convnext', '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--drop', '0.2'),
    ('--model', 'lossattn.test_vit', '--model-kwargs', 'global_pool=avg', 'img_size=32', '--grad-checkpointing',
     '--drop-path', '0.1', '--torchcompile', 'eager'),
    ('--model', 'lossattn', '--model-kwargs', 'backbone=mobilenetv3_small_050', 'xi=0.5', '--freeze-backbone',
     '--clip-grad', '1', '--opt', 'adamw'),
    ('--model', 'resnet18_cifar', '--freeze-backbone'),
    ('--model', 'lossattn.vit_tiny_patch16_224', '--model-kwargs', 'global_pool=avg', '--input-size', '3', '32', '32'),
])
def test_variants(folder, tmp_path, flags):
    assert train('--data-dir', folder, '--output', tmp_path, '--experiment', 'x', *flags) == 0


@pytest.mark.parametrize(('flags', 'message'), [
    (('--model', 'lossattn', '--model-kwargs', 'backbone=no_such_model'), 'backbone must be the name of a timm model'),
    (('--model', 'lossattn.test_vit'), 'global_pool="avg"'),
    (('--model', f'lossattn.{BACKBONE}', '--pretrained-backbone', 'resnet18_lossattn_conv_nano'), 'use --pretrained'),
    (('--model', f'lossattn.{BACKBONE}', '--pretrained-path', 'x.pth'), '--pretrained-path: is the file of'),
    (('--model', f'lossattn.{BACKBONE}', '--pretrained', '--pretrained-path', 'x.pth'), 'no such file: x.pth'),
    (('--model', f'lossattn.{BACKBONE}', '--layer-decay', '2'), '--layer-decay must lie in [0, 1]'),
    (('--model', f'lossattn.{BACKBONE}', '--backbone-stride', '2'), 'backbone_stride'),
])
def test_errors(folder, tmp_path, capsys, flags, message):
    """One line, exit code 2."""
    try:
        code = train('--data-dir', folder, '--output', tmp_path, '--experiment', 'x', *flags)
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
