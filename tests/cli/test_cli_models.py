"""cli.py in-process: which model explains, by name, checkpoint or folder, and the list of them."""
import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from cli_run import CAPS, CAT, NANO, error_line, random_model, written
from timm_lossattn import load_model
from timm_lossattn.cli import main
from timm_lossattn.explanation.preprocessing import input_config, open_image, preprocess
from timm_lossattn.loading import MODEL_CONFIG, list_patch_models, model_config


def test_checkpoint_names_its_model(models, tmp_path):
    """A checkpoint that says what it is of needs no --model."""
    assert main(['explain', str(CAT), '--checkpoint', models[CAPS][1], '--out', str(tmp_path / 'out')]) == 0
    assert json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())['model'] == CAPS


def test_folder_of_a_run(tmp_path, capsys):
    """What train.py and publish.py leave, by local-dir:; a folder without a model is one clear line."""
    from timm.models import save_for_hf
    save_for_hf(random_model(NANO), str(tmp_path / 'hub'), safe_serialization=True)
    assert main(['explain', str(CAT), '--model', f'local-dir:{tmp_path / "hub"}', '--out', str(tmp_path / 'out')]) == 0
    assert len(written(tmp_path)) == 2
    capsys.readouterr()
    assert main(['explain', str(CAT), '--model', f'local-dir:{tmp_path}', '--out', str(tmp_path / 'out')]) == 2
    assert 'cannot load local-dir:' in error_line(capsys)


@pytest.mark.parametrize(('model', 'what'), [
    ('no_such_model', "model: timm has no model 'no_such_model'"),
    ('vgg11_bn_lossattn_caps', 'model: vgg11_bn_lossattn_caps has no weights yet'),
])
def test_bad_model(tmp_path, capsys, model, what):
    """Unknown, or without weights."""
    assert main(['explain', str(CAT), '--model', model, '--out', str(tmp_path / 'out')]) == 2
    assert what in error_line(capsys)
    assert written(tmp_path) == []


def test_name_of_a_backbone(tmp_path):
    """A published model of loss attention is called after its backbone."""
    from timm.models import save_for_hf
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone='test_resnet', num_classes=3)
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    source = f'local-dir:{tmp_path / "hub"}'
    assert main(['explain', str(CAT), '--model', source, '--out', str(tmp_path / 'out')]) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    assert (numbers['model'], numbers['architecture']) == (source, 'lossattn.test_resnet')


@pytest.mark.parametrize('flags', [{'num_classes': 5, 'model_kwargs': {}, 'mean': None, 'interpolation': ''}, None])
def test_checkpoint_of_timm(tmp_path, flags):
    """timm's train.py says arch and flags; of weights alone the classifier says how many classes there are."""
    torch.manual_seed(0)
    state = timm.create_model('test_resnet', num_classes=5).state_dict()
    content = {'epoch': 1, 'arch': 'test_resnet', 'state_dict': state, 'optimizer': {}, 'version': 2}
    torch.save(content | ({'args': Namespace(**flags)} if flags else {}), tmp_path / 'timm.pth.tar')
    torch.save(state, tmp_path / 'weights.pth')
    for name, file in ((None, 'timm.pth.tar'), ('test_resnet', 'weights.pth'), ('lossattn.test_resnet', 'weights.pth')):
        model = load_model(name, tmp_path / file)
        assert model.num_classes == 5
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert main(['explain', str(CAT), '--checkpoint', str(tmp_path / 'timm.pth.tar'), '--out', str(tmp_path)]) == 0
    assert json.loads((tmp_path / f'{CAT.stem}.json').read_text())['labels'][0] == 'class 0'


def test_classes_of_class_capsules(tmp_path):
    """Their weights, one set for each position, say as well how many classes there are."""
    torch.manual_seed(0)
    state = timm.create_model('resnet18_routing_caps', width_mult=0.125, num_classes=5).state_dict()
    torch.save(state, tmp_path / 'five.pth')
    model = load_model('resnet18_routing_caps', tmp_path / 'five.pth', width_mult=0.125)
    assert model.num_classes == 5
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_size_of_a_checkpoint_of_timm(tmp_path):
    """--img-size of timm's train.py is what images are brought to; its model is made without it."""
    for name, size, changed in (('test_resnet', 64, {}), ('test_vit', 96, {}), ('test_vit3', 96, {'img_size': 96})):
        model = timm.create_model(name, num_classes=3, **changed)
        flags = Namespace(num_classes=3, img_size=size, input_size=None, in_chans=None, model_kwargs=changed)
        torch.save({'arch': name, 'state_dict': model.state_dict(), 'args': flags}, tmp_path / 'x.pth.tar')
        assert input_config(load_model(checkpoint=tmp_path / 'x.pth.tar'))['input_size'] == (3, size, size)


def test_pooling_of_a_checkpoint_of_timm(tmp_path):
    """--gp and --bn-eps have no parameters of their own: weights fit whatever they are."""
    model = timm.create_model('test_efficientnet', num_classes=3, global_pool='max', in_chans=1)
    flags = Namespace(num_classes=3, gp='max', bn_eps=1e-2, model_kwargs={}, in_chans=None, input_size=[1, 28, 28])
    torch.save({'arch': 'test_efficientnet', 'state_dict': model.state_dict(), 'args': flags}, tmp_path / 'x.pth.tar')
    loaded = load_model(checkpoint=tmp_path / 'x.pth.tar')
    assert (loaded.global_pool.pool_type, loaded.in_chans) == ('max', 1)
    assert {module.eps for module in loaded.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1e-2}


def test_weights_alone_of_routing(tmp_path):
    """Its classifier has a matrix for each position: no number of classes."""
    model = timm.create_model('resnet18_routing_caps', width_mult=0.125)
    save_file(model.state_dict(), tmp_path / 'x.safetensors')
    loaded = load_model('resnet18_routing_caps', tmp_path / 'x.safetensors', width_mult=0.125)
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)


def test_xi(tmp_path, capsys):
    """ξ in place of that of the weights, and in the numbers; a model without it is told so."""
    flags = ['explain', str(CAT), '--model', NANO, '--out', str(tmp_path)]
    zeros = []
    for more, xi in ((), 0.1), (('--xi', '1'), 1.):
        assert main([*flags, *more]) == 0
        numbers = json.loads((tmp_path / f'{CAT.stem}.json').read_text())
        assert numbers['xi'] == xi
        zeros.append(sum(weight == 0 for row in numbers['alpha'] for weight in row))
    assert zeros[0] < zeros[1]
    capsys.readouterr()
    assert main([*flags, '--xi', '2']) == 2
    assert error_line(capsys) == 'error xi must lie in [0, 1], got 2.0.\n'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'stock.pth')
    stock = ['explain', str(CAT), '--model', 'test_resnet', '--checkpoint', str(tmp_path / 'stock.pth'), '--out',
             str(tmp_path)]
    assert main([*stock, '--xi', '1']) == 2
    assert 'xi: test_resnet has no loss attention; lossattn.test_resnet has' in error_line(capsys)
    torch.save({'arch': 'test_resnet', 'state_dict': torch.load(tmp_path / 'stock.pth')}, tmp_path / 'timm.pth.tar')
    assert main(['explain', str(CAT), '--checkpoint', str(tmp_path / 'timm.pth.tar'), '--xi', '1']) == 2
    assert 'has no loss attention; lossattn.NAME has' in error_line(capsys)
    assert main(stock) == 0
    assert json.loads((tmp_path / f'{CAT.stem}.json').read_text())['xi'] is None


@pytest.mark.parametrize(('name', 'message'), [
    ('timm/resnet18.a1_in1k', 'models of the Hub are hf-hub:ORG/NAME'),
    ('lossattn.lossattn.resnet18', 'says lossattn twice')])
def test_names_that_are_nearly_right(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_old_checkpoint(models, tmp_path):
    """A file of torch.save from before there were archives, which timm reads as well; own class names win."""
    model = timm.create_model(NANO, pretrained=True)
    torch.save(model.state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    names = [f'name {k}' for k in range(10)]
    loaded = load_model(NANO, tmp_path / 'old.pth', pretrained_cfg_overlay={'label_names': names})
    assert torch.equal(loaded.head.fc.weight, model.head.fc.weight)
    assert list(loaded.pretrained_cfg['label_names']) == names


@pytest.mark.parametrize(
    'kind', ['missing', 'directory', 'empty.pth', 'text.png', 'text.safetensors', 'other model.safetensors'])
def test_bad_checkpoint(models, tmp_path, capsys, kind):
    """One line that names the file, for all that is no checkpoint of the model."""
    path = tmp_path / kind
    if kind == 'directory':
        path.mkdir()
    elif kind == 'empty.pth':
        path.touch()
    elif kind.startswith('text'):
        path.write_text('not a checkpoint')
    elif kind.startswith('other'):
        path.write_bytes(Path(models[CAPS][1]).read_bytes())
    assert main(['explain', str(CAT), '--model', NANO, '--checkpoint', str(path), '--out', str(tmp_path / 'out')]) == 2
    message = error_line(capsys)
    assert message.startswith('error checkpoint: ')
    assert str(path) in message
    assert len(message) < 1000
    assert written(tmp_path) == []


def test_bad_device(run, tmp_path, capsys):
    """The message names the option."""
    assert run(CAT, '--device', 'abacus') == 2
    assert "device: cannot use 'abacus'" in error_line(capsys)
    assert written(tmp_path) == []


def test_list_with_filter(capsys):
    """Names, input sizes, classes and parameters, untruncated."""
    assert main(['list', '*resnet18*nano*']) == 0
    out = capsys.readouterr().out
    assert '…' not in out
    rows = {cells[0]: cells[1:4] for cells in map(str.split, out.splitlines()) if len(cells) >= 5 and '_' in cells[0]}
    assert sorted(rows) == list_patch_models('*resnet18*nano*')
    for name in (NANO, CAPS):
        parameters = sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6
        assert rows[name][:3] == ['32×32', '10', f'{parameters:.2f}']
    assert rows['resnet18_lossattn_conv_nano_s2'][:2] == ['64×64', '10']  # of the first weights
    assert re.search(r'nano_s2 .* tiny_imagenet_mini, tiny_imagenet\b', out)


def test_list_without_filter(capsys):
    """Every registered model, once, with the whole name; into a pipe without a frame, for grep."""
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert '│' not in out
    names = [line.split()[0] for line in out.splitlines() if '×' in line]
    assert [name for name in names if not name.startswith('lossattn.')] == list_patch_models()
    assert 'lossattn.tf_efficientnet_lite0' in names  # which was trained with it
    assert {'resnet18_lossattn_conv', 'vgg11_bn_lossattn_caps', 'googlenet_lossattn_conv', NANO} <= set(names)


def test_list_nothing(capsys):
    """A filter that nothing matches is an error."""
    assert main(['list', 'zebra*']) == 2
    assert "no model matches 'zebra*'" in error_line(capsys)


def test_hints(run, capsys):
    """A near miss gets a suggestion; a plain word filters by part of the name."""
    assert main(['explain', str(CAT), '--model', 'resnet18_lossattn_con']) == 2
    assert 'did you mean resnet18_lossattn_conv?' in error_line(capsys)
    assert main(['list', 'nano']) == 0
    assert 'vgg11_bn_lossattn_caps_nano' in capsys.readouterr().out


def test_bare_weights_have_no_labels(models, tmp_path):
    """A safetensors file says nothing about classes: they are numbered, whatever the model's own weights mean."""
    file = tmp_path / 'weights.safetensors'
    save_file(models[NANO][0].state_dict(), file)
    assert main(['explain', str(CAT), '--model', NANO, '--checkpoint', str(file), '--out', str(tmp_path / 'out')]) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    assert numbers['labels'] == [f'class {k}' for k in range(10)]


def test_checkpoint_arguments(tmp_path):
    """ξ, stride and the number of classes of a training checkpoint are those of the explained model."""
    model = timm.create_model(NANO, num_classes=3, xi=1., backbone_stride=2).eval()
    config = model_config(NANO, {'num_classes': 3, 'xi': 1., 'backbone_stride': 2}, ['a', 'b', 'c'])
    torch.save({'state_dict': model.state_dict(), MODEL_CONFIG: config}, tmp_path / 'last.pth.tar')
    flags = ['explain', str(CAT), '--checkpoint', str(tmp_path / 'last.pth.tar')]
    assert main([*flags, '--out', str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / f'{CAT.stem}.json').read_text())
    with torch.no_grad():
        expected = model(preprocess(model, open_image(CAT)).x[None])[0]
    assert numbers['patch_grid'] == [2, 2]
    assert numbers['labels'] == ['a', 'b', 'c']
    assert numbers['logits'] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize('own', [{'dim': 96}, 'vit', ['a', 'b']])
def test_checkpoints_of_other_projects(tmp_path, own):
    """What they call model_config says nothing of the model; timm's own words beside it do."""
    file = tmp_path / 'other.pth'
    torch.save({MODEL_CONFIG: own, 'state_dict': {}}, file)
    with pytest.raises(ValueError, match="does not say of which of timm's models it is"):
        load_model(checkpoint=file)
    state = timm.create_model('test_resnet', num_classes=3).state_dict()
    torch.save({MODEL_CONFIG: own, 'state_dict': state, 'arch': 'test_resnet'}, file)
    assert load_model(checkpoint=file).num_classes == 3
